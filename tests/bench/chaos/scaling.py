"""The graph as `app.graph` builds it, with pools whose sizes a file tells: so a bench scales them when it wants to.

Runs in the server; `cluster.py` writes the file. It goes Serve's own way of scaling, which restarts nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

from ray.serve import Application
from ray.serve.config import AutoscalingContext

from app.config import AppConfig
from app.deployment_config import PoolConfig

# Names the file; it holds the number of replicas of each pool by the name of its deployment, and must exist.
VARIABLE = "KVRELAY_BENCH_REPLICAS"


class WantedReplicas:
    """An autoscaling policy of Ray Serve. It is pickled by value, so it knows nothing else of this project.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        wanted: dict[str, int] = json.loads(self._path.read_text())
        return wanted[context.deployment_name], {}


def graph(args: AppConfig) -> Application:
    """Build the application; `python -m app.local up --app` takes it."""
    from app.graph import graph as build

    pools = {"prefill": _scaled(args.prefill), "decode": _scaled(args.decode)}
    return build(args.model_copy(update=pools))


def _scaled(pool: PoolConfig) -> PoolConfig:
    policy = {"policy_function": f"{__name__}.WantedReplicas", "policy_kwargs": {"path": os.environ[VARIABLE]}}
    at_once = {"upscale_delay_s": 0.0, "downscale_delay_s": 0.0}
    return pool.model_copy(update={"autoscaling_config": {**pool.autoscaling_config, **at_once, "policy": policy}})
