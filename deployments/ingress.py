"""The front door: a replica that serves OpenAI's API over HTTP. Runs on CPU nodes.

Puts together what it needs; what HTTP looks like is `api/`'s business, and the way to the pools `pool_backend.py`'s.
"""

import asyncio
import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from prometheus_client.core import Metric
from ray import serve
from starlette.applications import Starlette

from deployments.apart import call_apart
from deployments.api.accounts import Sharers
from deployments.api.control_tokens import ControlPolicy
from deployments.api.examiners import Apart
from deployments.api.grammar_check import TIMEOUT_S as GRAMMAR_TIMEOUT_S
from deployments.api.http import build_app
from deployments.api.keys import KeyRing
from deployments.api.pages import own_version
from deployments.api.reasoning.support import ReasoningParserName
from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer
from deployments.api.tools.families import ToolParserName
from deployments.engine.model.resolve import resolve_model
from deployments.engine.model.tokenizer_files import check_tokenizer
from deployments.engine_info import EngineInfo
from deployments.errors import UnsupportedModelError
from deployments.load.admission import Admission, Bounds
from deployments.load.held import HoldBounds
from deployments.messages import ModelInfo
from deployments.planner.wire import numbers_of_ingress
from deployments.pool_backend import PoolBackend
from deployments.routing.crossover import Crossover
from deployments.routing.pools import PoolRouters
from deployments.routing.settings import RoutingSettings
from deployments.serve_state import ask_each, http_host, is_loopback, num_replicas, own_handle
from deployments.service_look import ServiceLook
from deployments.telemetry.client_stats import ClientCounts
from deployments.telemetry.followers import Follower, ObservedCalls
from deployments.telemetry.history import ClientHistory
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.live import ServiceState
from deployments.telemetry.live_view import LiveView
from deployments.telemetry.metrics import families_of_ingress
from deployments.telemetry.peers import TIMEOUT_S as PEERS_TIMEOUT_S
from deployments.telemetry.ray_metrics import tell_ray
from deployments.telemetry.request_log import log_call
from deployments.telemetry.settings import MetricsPlan, TraceSettings
from deployments.tokens.receiver import TokenReceiver

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

# Between two looks at how many ingress replicas count for the limits of a key.
_SHARERS_PERIOD_S = 10.0
_UPGRADE_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """What an ingress replica is told.

    Attributes:
        model: as the engines were given it.
        served_model_name: the model's name in the API.
        model_root: its name where it comes from.
        max_request_bytes: larger bodies are refused.
        max_unread_tokens: a client that leaves more tokens unread is dropped.
        resume_timeout_s: how long a request whose decode replica was lost may wait for another.
        bounds: of admission.
        crossover: which prompts the prefill pool computes; None: there is none.
        routing: see there.
        api_keys: where the keys are that let in, as `check_source` takes it; None: everybody may come in.
        max_replicas: of this deployment.
        cors_origins: whose pages may use the API from a browser.
        control_tokens: what becomes of those that users write in messages.
        tool_parser: how the model writes calls of tools.
        reasoning_parser: how it marks its thoughts.
        logs_requests: a line for each call.
        traces: of calls.
        metrics: of this replica.
        tells_planner: Ray Serve carries to its controller, for the planner, how many calls were refused, and are held.
        hold: bounds of those that wait for a decode replica; None: there always is one.
    """

    model: str
    served_model_name: str
    model_root: str
    max_request_bytes: int
    max_unread_tokens: int
    resume_timeout_s: float
    bounds: Bounds
    crossover: Crossover | None
    routing: RoutingSettings
    api_keys: str | None
    max_replicas: int
    cors_origins: tuple[str, ...]
    control_tokens: ControlPolicy
    tool_parser: ToolParserName
    reasoning_parser: ReasoningParserName
    logs_requests: bool = False
    traces: TraceSettings = field(default_factory=TraceSettings)
    metrics: MetricsPlan = field(default_factory=MetricsPlan)
    tells_planner: bool = False
    hold: HoldBounds | None = None


@serve.ingress()
class Ingress:
    """One ingress replica.

    Args:
        decode: handle of the decode deployment.
        prefill: handle of the prefill deployment; None: colocated.
        settings: what it is told.
    """

    async def __init__(  # type: ignore[misc]
        self,
        decode: "DeploymentHandle[Any]",
        prefill: "DeploymentHandle[Any] | None",
        settings: IngressSettings,
    ) -> None:
        self._settings = settings
        self._keys = await self._open_keys()
        engine = await find_engine(decode, settings.model)
        self._codec = await asyncio.to_thread(
            load_codec,
            engine.path,
            settings.model,
            settings.control_tokens,
            settings.tool_parser,
            settings.reasoning_parser,
        )
        self._info = describe_served(engine, self._codec, settings.served_model_name, settings.model_root)
        tokens = await TokenReceiver.start(ray.util.get_node_ip_address(), settings.max_unread_tokens)
        routers = PoolRouters(settings.routing, settings.crossover, engine.positions)
        admission = Admission(settings.bounds, is_remote=routers.is_remote)
        clients, replica = ClientCounts(), serve.get_replica_context().replica_id.unique_id
        count = partial(IngressStats.of, replica, clients.stats, admission, routers)
        self._view = LiveView(count, self._look(is_colocated=prefill is None), partial(self._ask_all, "client_history"))
        self._observer = ObservedCalls(clients, build_followers(settings, replica))
        self._backend = PoolBackend(
            decode,
            prefill,
            tokens,
            admission,
            routers,
            settings.resume_timeout_s,
            clients,
            replica,
            partial(self._ask_all, "ingress_stats") if settings.max_replicas > 1 else None,
            settings.metrics.vllm_model,
            self._view,
            may_lack_prefill=settings.crossover is not None and settings.crossover.may_lack_pool,
            hold=settings.hold,
        )
        if settings.metrics.to_ray:
            self._telling_ray = asyncio.create_task(tell_ray(self._families))
        self._watch = asyncio.create_task(self._backend.watch.run())
        self._health_watch = asyncio.create_task(self._backend.pool_health.watch())
        # What is loaded by now stays. To look through it for garbage takes 0.3 s (450,000 objects, 2 busy cores of a
        # Zen 4 machine, 2026-11-27), in which no token goes out and nobody is refused.
        gc.collect()
        gc.freeze()

    async def _open_keys(self) -> KeyRing | None:
        source = self._settings.api_keys
        if source is None:
            warn_if_open(await asyncio.to_thread(http_host))
            return None
        # Strict until it is known how many run.
        sharers = Sharers(self._settings.max_replicas)
        keys = await asyncio.to_thread(KeyRing, source, sharers)
        self._keys_watch = asyncio.create_task(keys.watch())
        self._sharers_watch = asyncio.create_task(_watch_sharers(sharers))
        return keys

    async def _ask_all(self, method: str) -> list[Any]:
        """What each ingress replica answers, or why it does not."""
        return await ask_each(own_handle(), method, PEERS_TIMEOUT_S)

    def _look(self, *, is_colocated: bool) -> ServiceLook:
        settings, mode = self._settings, "colocated" if is_colocated else "disaggregated"
        fixed = ServiceState(
            settings.served_model_name,
            mode,
            own_version(),
            is_planned=settings.tells_planner,
            may_sleep=settings.hold is not None,
        )
        return ServiceLook(fixed, serve.get_replica_context().app_name)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve carries to its controller for the planner; nothing if there is none."""
        if not self._settings.tells_planner:
            return {}
        return numbers_of_ingress(self._backend.num_refused, self._backend.held)

    async def _families(self) -> Iterable[Metric]:
        return families_of_ingress(self._backend.own_stats(), self._settings.metrics.vllm_model)

    async def ingress_stats(self) -> IngressStats:
        """What this replica tells of itself; any of them asks all, so that each tells of all."""
        return self._backend.own_stats()

    async def client_history(self) -> ClientHistory:
        """What its clients saw lately, for the replica that somebody looks at."""
        return self._view.own_part()

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(
            self._backend,
            self._codec,
            self._info,
            observer=self._observer,
            max_body_bytes=self._settings.max_request_bytes,
            server_sends_ids=True,
            keys=self._keys,
            cors_origins=self._settings.cors_origins,
            examiner=Apart(self._codec.backend.to_str(), self._info.vocab_size, GRAMMAR_TIMEOUT_S),
        )


async def find_engine(decode: "DeploymentHandle[Any]", model: str) -> EngineInfo:
    """What a decode engine of this model says of itself; waits until there is one.

    While an application gets another model, replicas of the old one are there as well, and for a while alone. An
    ingress that went by those would speak the old one's tokens to the new one.
    """
    others = set[str]()
    while True:
        engine: EngineInfo = await decode.engine_info.remote()
        if engine.model in ("", model):
            return engine
        if engine.model not in others:
            others.add(engine.model)
            logger.info("waiting for a decode replica of %s: one that was asked has %s", model, engine.model)
        await asyncio.sleep(_UPGRADE_POLL_S)


def build_followers(settings: IngressSettings, replica: str) -> list[Follower]:
    """Whoever is told of calls that are over."""
    followers: list[Follower] = [log_call] if settings.logs_requests else []
    if settings.traces.endpoint is not None:
        from deployments.telemetry.traces import CallTracer  # the package that exports may be missing

        followers.append(CallTracer(settings.traces, settings.served_model_name, replica))
    return followers


def warn_if_open(host: str | None) -> None:
    """Without keys: say so where the address on which the API listens is for others than this machine."""
    if not is_loopback(host):
        logger.warning(
            "NO API KEYS: the API listens on %s, and whoever reaches it may use it and watch it. Set "
            "ingress.api_keys, or let only a proxy that authenticates reach it (docs/security.md).",
            host,
        )


async def _watch_sharers(sharers: Sharers) -> None:
    """Keep up with how many replicas share the limits of keys; while Serve does not say, the last number holds."""
    while True:
        try:
            sharers.count = await asyncio.to_thread(num_replicas)
        except Exception as error:
            logger.warning("Serve does not say how many ingress replicas run: %r", error)
        await asyncio.sleep(_SHARERS_PERIOD_S)


def describe_served(engine: EngineInfo, codec: TextCodec, name: str, root: str = "") -> ModelInfo:
    """What the API must know of the model: what its engines say of it, and its tokenizer.

    Raises:
        UnsupportedModelError: see `TextCodec.check_vocabulary`.
    """
    codec.check_vocabulary(engine.vocab_size)
    own_ends = {token_id for token_id in codec.end_token_ids if token_id < engine.vocab_size}
    return ModelInfo(
        name=name,
        path=engine.path,
        max_model_len=engine.longest,
        vocab_size=engine.vocab_size,
        eos_token_ids=tuple(sorted({*engine.eos_token_ids, *own_ends})),
        root=root,
    )


def load_codec(
    path: str,
    model: str,
    control_tokens: ControlPolicy = "allow",
    tool_parser: ToolParserName = "auto",
    reasoning_parser: ReasoningParserName = "auto",
) -> TextCodec:
    """Load the tokenizer of the engines' model; in other processes, which load what this one shall not."""
    if Path(path).is_absolute() and not Path(path).exists():
        # The engine's node converted the model into its own cache; this node has to do the same.
        path = call_apart(resolve_model, model)
    # If transformers finds torch it imports it, and no tokenizer needs it: 5.8 s and 310 MB, without 2.7 s and 95 MB
    # (SmolLM2's tokenizer, 2 cores of a shared Xeon, 2026-11-28).
    quietly = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
    try:
        tokenizer = call_apart(read_tokenizer, path, without=["torch"], environment=quietly)
    except UnsupportedModelError:
        check_tokenizer(path)  # whose reasons are plainer
        raise
    return TextCodec(tokenizer, control_tokens, tool_parser, reasoning_parser)
