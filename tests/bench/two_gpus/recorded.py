"""`app:graph`, but for engines that record their steps: `tests.bench.two_gpus.recorded:graph`."""

from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from ray.serve import Application

from app.config import AppConfig, Pool
from deployments.front import SpawnedEngine
from tests.bench.two_gpus.timeline import build_recorded

APP = "tests.bench.two_gpus.recorded:graph"
# Absolute: engines have other working folders.
FOLDER = Path(__file__).parents[3] / ".run/two-gpus/timeline"


def graph(args: AppConfig) -> Application:
    """Build the application; its engines write to `FOLDER`."""
    module = import_module("app.graph")  # `app.graph` is the function
    build = module._engine

    def engine(args: AppConfig, pool: Pool) -> SpawnedEngine:
        spawned: SpawnedEngine = build(args, pool)
        return replace(spawned, build=partial(build_recorded, FOLDER, pool))

    with patch.object(module, "_engine", engine):
        application: Application = module.graph(args)
    return application
