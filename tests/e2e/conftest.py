"""One local Ray with the real graph on the default model, twice: disaggregated and colocated.

And, for what needs two replicas of each pool, with a model that takes no time.
"""

import copy
import json
import random
import re
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
from app.ports import free_ports
from deployments.engine.model.files import BUNDLED_MODEL
from deployments.engine.model.resolve import resolve_model
from deployments.errors import EngineDeadError
from deployments.planner.settings import PlannerSettings
from deployments.ray_errors import as_ours
from deployments.replica_stats import ReplicaStats
from tests.api.fakes import build_tokenizer
from tests.bench.chaos import scaling
from tests.engine.families import build_model
from tests.ray_start import set_as_make_serve, start_ray
from tests.telemetry.collector import Collector, collecting
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.e2e.greedy import Reference

MODEL_NAME = "smollm2"
MODES = ("disaggregated", "colocated")
# By default Serve's controller looks at its replicas ten times a second, for 6 % of a core, and its proxy has 15 s to
# start, which is little on a busy machine.
SERVE_SETTINGS = ("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S")
MAX_TOKENS = 16
# And not what is free just now of a machine that others use, too.
NUM_BLOCKS = 1024
# What replicas that are removed have for their requests: hand-offs may all end, and nothing here takes as long.
PREFILL_SHUTDOWN_S, DECODE_SHUTDOWN_S = 300.0, 1.0
# For what an engine or a replica has to say, on a machine that others keep busy.
ANSWER_TIMEOUT_S = 120.0
# Engines of tests share cores with each other and with the tests: none is taken for hung, or its hand-off given up.
ENGINE_PATIENCE = {"max_silence_s": 300.0, "lease_s": 120.0}
PLAIN_LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 256, 300, 511, 2049)
CHATS = (
    "What is the capital of France?",
    "Write a haiku about the sea. 🌊",
    "List three prime numbers above ten and say why they are prime, in one sentence each. " * 6,
    "Erkläre in einem Satz, was ein Schlüssel-Wert-Cache ist, 请用中文回答。",
)


# Modules, and tests, that are not in the order of their names. The first modules have a Ray of their own, beside which
# that of the others shall not idle. Two replicas of each pool do not idle beside the others either; who uses them comes
# last, and at the very end who leaves one replica of each pool. Others fill what a sleeper waits.
FIRST = ("test_make_serve", "test_serve_run", "test_a_service_that_nobody_calls_sleeps_and_says_what_it_serves")
LAST = ("test_live_page", "test_flip", "test_routing", "test_drain", "test_a_service_that_was_woken_sleeps_again")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if "/tests/e2e/" in item.path.as_posix()]
    for item in ours:
        item.add_marker(pytest.mark.e2e)
        item.add_marker(pytest.mark.timeout(900))
    ordered = iter(sorted(ours, key=_place))
    places = {id(item) for item in ours}
    items[:] = [next(ordered) if id(item) in places else item for item in items]


def _place(item: pytest.Item) -> int:
    names = item.path.stem, item.name
    last = [place for place, name in enumerate(LAST) if name in names]
    return 0 if set(names) & set(FIRST) else 2 + last[0] if last else 1


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
        """What every engine of a pool says now.

        Asked again while one is behind a long step, for which its front answers with what it said last, and while one
        is gone of which this process has not heard yet.
        """

        def ask() -> list[ReplicaStats] | None:
            try:
                rows: list[ReplicaStats] = self.pool(pool).broadcast("stats").results(timeout_s=30)
            except TimeoutError:
                return None
            except Exception as error:
                if isinstance(as_ours(error), EngineDeadError):
                    return None
                raise
            return None if any(row.age_s for row in rows) else rows

        return wait_until(ask, ANSWER_TIMEOUT_S)

    def metrics(self) -> str:
        """All of them, from the one ingress replica that there is; without those of a replica that is gone."""
        return httpx.get(f"{self.url}/metrics", timeout=ANSWER_TIMEOUT_S).raise_for_status().text

    def metric(self, name: str) -> float:
        """The value of a metric of the one ingress replica that there is."""
        (value,) = re.findall(rf'^{name}{{ingress="[^",]*"}} (\S+)$', self.metrics(), re.MULTILINE)
        return float(value)

    @property
    def pools(self) -> tuple[str, ...]:
        return ("Prefill", "Decode") if self.mode == "disaggregated" else ("Decode",)


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Of traces."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="package")  # not longer: other tests start a Ray of their own in this process
def services(collector: Collector) -> Iterator[dict[str, Service]]:
    with pytest.MonkeyPatch.context() as patch:
        set_as_make_serve(patch, SERVE_SETTINGS)
        start_ray(num_cpus=8)
    try:
        (port,) = free_ports(1)  # not before: Ray takes many while it starts
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        targets = []
        for mode in MODES:
            # 64 and not the default: most prompts here are short, and shall take the long way.
            remote: dict[str, Any] = {"min_remote_prefill_tokens": 64} if mode == "disaggregated" else {}
            # Three engines and the tests share two cores: nothing shall be refused for being slow.
            patience: dict[str, Any] = {
                "ingress.max_ttft_s": 600,
                "engine": ENGINE_PATIENCE | {"num_blocks": NUM_BLOCKS},
                # Of those calls alone whose callers ask for it.
                "ingress.traces": {"endpoint": collector.url, "sample_ratio": 0.0},
                "metrics.vllm_names": True,
            }
            args = AppConfig(mode=mode, served_model_name=MODEL_NAME, **patience, **remote)
            targets.append(serve.RunTarget(graph(args), name=mode, route_prefix=f"/{mode}"))
        serve.run_many(targets)  # side by side: much of a start is waiting
        yield {mode: Service(mode, f"http://127.0.0.1:{port}/{mode}") for mode in MODES}
    finally:
        serve.shutdown()  # of all other applications, too
        ray.shutdown()


@dataclass(frozen=True)
class Scaled:
    """An application whose pools have as many replicas as a file says.

    Attributes:
        service: the application.
        path: of the file.
    """

    service: Service
    path: Path

    def scale(self, num_replicas: int) -> None:
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps({"Prefill": num_replicas, "Decode": num_replicas}))
        draft.replace(self.path)  # at once: the pools read it when they like

    def num_replicas(self, pool: str) -> int:
        """Those that start or stop included."""
        status = serve.status().applications[self.service.name or ""]
        return sum(status.deployments[pool].replica_states.values())

    def wait_for_two(self) -> None:
        """Until both pools have two replicas that answer, this process and the ingress.

        Serve counts one that has just died as running, and tells others later than us of one that has just come.
        """

        def have_two() -> bool:
            status = serve.status().applications[self.service.name or ""]
            return (
                all(status.deployments[pool].replica_states == {"RUNNING": 2} for pool in self.service.pools)
                and all(len(self.service.stats(pool)) == 2 for pool in self.service.pools)
                and len(re.findall(r"^kvrelay_kv_blocks{", self.service.metrics(), re.MULTILINE)) == 4
            )

        wait_until(have_two, 300)


def save_small_model(folder: Path) -> str:
    """One with random weights, of which `tests.engine.families.reference("llama", ...)` knows the answers."""
    copy.deepcopy(build_model("llama")).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return resolve_model(str(folder))


@pytest.fixture(scope="package")
def scaled(services: dict[str, Service], tmp_path_factory: pytest.TempPathFactory) -> Scaled:
    """Two replicas of each pool, with a small random model."""
    name, folder = "scaled", tmp_path_factory.mktemp("scaled")
    url = services["colocated"].url.removesuffix("colocated") + name
    scaled = Scaled(Service("disaggregated", url, name), folder / "replicas.json")
    scaled.scale(2)
    model = save_small_model(folder / "model")
    size = {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 2}
    args = AppConfig.model_validate(
        {
            "model": model,
            "served_model_name": MODEL_NAME,
            "min_remote_prefill_tokens": 64,
            "parity_check": False,
            "engine": ENGINE_PATIENCE | {"num_blocks": 2000, "block_size": 16},
            "ingress": {"max_ttft_s": 600, "resume_timeout_s": 600},
            "prefill": size | {"graceful_shutdown_timeout_s": PREFILL_SHUTDOWN_S},
            "decode": size | {"graceful_shutdown_timeout_s": DECODE_SHUTDOWN_S},
        }
    )
    # Without the planner: the tests themselves tell decode replicas to compute prompts.
    args = args.model_copy(update={"planner": PlannerSettings(flip=True)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(scaling.VARIABLE, str(scaled.path))
        serve.run(scaling.graph(args), name=name, route_prefix=f"/{name}")
    return scaled


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
