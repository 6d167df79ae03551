"""One local Ray with the real graph on the default model, twice: disaggregated and colocated."""

import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import ray
import torch
from ray import serve
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from app.config import AppConfig
from app.graph import graph
from deployments.engine.model.files import BUNDLED_MODEL
from deployments.engine.model.resolve import resolve_model
from deployments.replica_stats import ReplicaStats

if TYPE_CHECKING:
    from tests.e2e.greedy import Reference

MODEL_NAME = "smollm2"
MODES = ("disaggregated", "colocated")
MAX_TOKENS = 16
PLAIN_LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 256, 300, 511, 2049)
CHATS = (
    "What is the capital of France?",
    "Write a haiku about the sea. 🌊",
    "List three prime numbers above ten and say why they are prime, in one sentence each. " * 6,
    "Erkläre in einem Satz, was ein Schlüssel-Wert-Cache ist, 请用中文回答。",
)


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
        name: of the application; None: its mode.
    """

    mode: str
    url: str
    name: str | None = None

    def pool(self, name: str) -> DeploymentHandle[Any]:
        return serve.get_deployment_handle(name, self.name or self.mode)

    def stats(self, pool: str) -> list[ReplicaStats]:
        return self.pool(pool).broadcast("stats").results(timeout_s=30)

    @property
    def pools(self) -> tuple[str, ...]:
        return ("Prefill", "Decode") if self.mode == "disaggregated" else ("Decode",)


@pytest.fixture(scope="package")  # not longer: other tests start a Ray of their own in this process
def services() -> Iterator[dict[str, Service]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        targets = []
        for mode in MODES:
            # 64 and not the default: most prompts here are short, and shall take the long way.
            remote: dict[str, Any] = {"min_remote_prefill_tokens": 64} if mode == "disaggregated" else {}
            # Three engines and the tests share two cores: nothing shall be refused for being slow.
            patience: dict[str, Any] = {"ingress.max_ttft_s": 600}
            args = AppConfig(mode=mode, served_model_name=MODEL_NAME, **patience, **remote)
            targets.append(serve.RunTarget(graph(args), name=mode, route_prefix=f"/{mode}"))
        serve.run_many(targets)  # side by side: much of a start is waiting
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


@pytest.fixture(scope="session")
def prompts() -> dict[str, list[int]]:
    """24 prompts by name; the plain ones are windows of real text, the chats go through the template."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BUNDLED_MODEL))
    words = Path(__file__).read_text() + " ".join(CHATS) + Path(str(torch.__file__)).read_text()
    text = tokenizer(words)["input_ids"]
    rng = random.Random(7)
    plain = {f"plain-{n}": text[(at := rng.randrange(len(text) - n)) : at + n] for n in PLAIN_LENGTHS}
    chats = {
        f"chat-{i}": tokenizer.apply_chat_template(
            [{"role": "user", "content": chat}], add_generation_prompt=True, return_dict=False
        )
        for i, chat in enumerate(CHATS)
    }
    return plain | chats


@pytest.fixture(scope="session")
def reference(prompts: dict[str, list[int]]) -> "Reference":
    from tests.e2e.greedy import Reference  # it knows the names above

    return Reference(prompts)
