"""One local Ray with the real graph on the default model, twice: disaggregated and colocated."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from app.config import AppConfig
from app.graph import graph
from deployments.metrics import ReplicaStats

MODEL_NAME = "smollm2"
MODES = ("disaggregated", "colocated")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/e2e/" in item.path.as_posix():
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(900))


@dataclass(frozen=True)
class Service:
    """A running application.

    Attributes:
        mode: disaggregated or colocated.
        url: without the API's `/v1`.
    """

    mode: str
    url: str

    def pool(self, name: str) -> DeploymentHandle[Any]:
        return serve.get_deployment_handle(name, self.mode)

    def stats(self, pool: str) -> list[ReplicaStats]:
        return self.pool(pool).broadcast("stats").results(timeout_s=30)

    @property
    def pools(self) -> tuple[str, ...]:
        return ("Prefill", "Decode") if self.mode == "disaggregated" else ("Decode",)


@pytest.fixture(scope="module")  # not longer: other tests start a Ray of their own in this process
def services() -> Iterator[dict[str, Service]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        for mode in MODES:
            # 64 and not the default: most prompts here are short, and shall take the long way.
            remote: dict[str, Any] = {"min_remote_prefill_tokens": 64} if mode == "disaggregated" else {}
            args = AppConfig(mode=mode, served_model_name=MODEL_NAME, **remote)
            serve.run(graph(args), name=mode, route_prefix=f"/{mode}")
        yield {mode: Service(mode, f"http://127.0.0.1:{port}/{mode}") for mode in MODES}
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(params=MODES)
def service(request: pytest.FixtureRequest, services: dict[str, Service]) -> Service:
    return services[request.param]


@pytest.fixture
def disaggregated(services: dict[str, Service]) -> Service:
    return services["disaggregated"]


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=300) as client:
        yield client
