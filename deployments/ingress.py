"""The front door: OpenAI's API over HTTP, and the way from there to the decode pool. Runs on CPU nodes.

Knows the pools by their handles: one call per request, which lasts as long as the request does. Its tokens come from
the engines directly, to the `TokenReceiver` of this replica. What HTTP looks like is `api/`'s business.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from starlette.applications import Starlette

from deployments.apart import call_apart
from deployments.api.accounts import Sharers
from deployments.api.control_tokens import ControlPolicy
from deployments.api.examiners import Apart
from deployments.api.grammar_check import TIMEOUT_S as GRAMMAR_TIMEOUT_S
from deployments.api.http import build_app
from deployments.api.keys import KeyRing
from deployments.api.reasoning.support import ReasoningParserName
from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer
from deployments.api.tools.families import ToolParserName
from deployments.decode_client import DecodeClient
from deployments.engine.model.resolve import resolve_model
from deployments.engine.model.tokenizer_files import check_tokenizer
from deployments.engine_info import EngineInfo
from deployments.errors import UnsupportedModelError
from deployments.load.admission import Admission, Bounds, Ticket
from deployments.load.pool_health import PoolHealth
from deployments.load.pool_watch import PoolWatch
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.messages import GenerateRequest, ModelInfo
from deployments.planner.wire import REFUSED
from deployments.ray_errors import as_ours
from deployments.receipt_log import ReceiptLog, ReceiptStream
from deployments.receipts import Receipt
from deployments.replica_stats import Positions, ReplicaStats
from deployments.routing.crossover import Crossover
from deployments.routing.pools import PoolRouters
from deployments.routing.settings import RoutingSettings
from deployments.serve_state import http_host, is_loopback, num_replicas
from deployments.telemetry.client_metrics import AdmissionMetrics, ClientMetrics, RoutingMetrics
from deployments.telemetry.pool_metrics import render
from deployments.tokens.receiver import TokenReceiver, TokenStream

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

_STATS_TIMEOUT_S = 10.0
# A call that is in doubt waits no longer for a fresh reading; an engine answers between two of its steps.
_REFRESH_TIMEOUT_S = 0.5
# Between two looks at how many ingress replicas count for the limits of a key.
_SHARERS_PERIOD_S = 10.0


class PoolBackend:
    """What the API needs, done by the pools.

    Args:
        decode: handle of the decode deployment.
        prefill: handle of the prefill deployment; None: colocated.
        tokens: where the engines send the tokens of this replica's requests.
        admission: lets calls in.
        routers: choose the replicas.
        resume_timeout_s: see `DecodeClient`.
    """

    def __init__(
        self,
        decode: "DeploymentHandle[Any]",
        prefill: "DeploymentHandle[Any] | None",
        tokens: TokenReceiver,
        admission: Admission,
        routers: PoolRouters,
        resume_timeout_s: float,
    ) -> None:
        self._pools = {DECODE: decode} if prefill is None else {PREFILL: prefill, DECODE: decode}
        self.pool_health = PoolHealth({name: partial(_be_ready, handle) for name, handle in self._pools.items()})
        self._tokens = tokens
        self._admission = admission
        self._routers = routers
        self.watch = PoolWatch(self.read_pools, self.take)
        self.clients = ClientMetrics()
        self._decode = DecodeClient(decode, tokens, resume_timeout_s, self.clients.request_resumed, routers)
        self.clients.registry.register(AdmissionMetrics(admission))
        self.clients.registry.register(RoutingMetrics(routers))

    async def admit(self, requests: Sequence[GenerateRequest], key: bytes) -> Ticket:
        """Let a call in; see `Admission.admit`. Before others' requests have it refused, the pools are read anew."""
        sizes, priority = _sizes(requests), requests[0].priority
        if self._admission.is_in_doubt(sizes, priority, key):
            await self.watch.refresh(_REFRESH_TIMEOUT_S)
        return self._admission.admit(sizes, priority, key)

    def generate(
        self,
        request: GenerateRequest,
        on_overflow: Callable[[], None],
        on_receipt: Callable[[Receipt], None] | None = None,
    ) -> "TokenStream | ReceiptStream":
        """Tokens of a request; closing the stream ends the request on every pool."""

        def overflow() -> None:
            serving.cancel()
            on_overflow()

        stream = self._tokens.open(request.request_id, overflow, lambda _: serving.cancel())
        if on_receipt is None:
            serving = asyncio.create_task(self._decode.serve(request, stream))
            return stream
        log = ReceiptLog(on_receipt)
        serving = asyncio.create_task(self._decode.serve(replace(request, wants_receipt=True), stream, log))
        return ReceiptStream(stream, log)

    async def health(self) -> tuple[bool, str]:
        """Whether every pool can serve, and if not, which one cannot; see `PoolHealth`."""
        return self.pool_health.state()

    @property
    def num_refused(self) -> int:
        """Calls that were not let in."""
        return self._admission.refusals.total()

    async def metrics(self) -> bytes:
        return render(await self._read_pools(dict.fromkeys(self._pools)), self.clients)

    async def read_pools(self) -> dict[str, list[ReplicaStats]]:
        """The numbers of every replica, by the name of its pool, and what its cache has to tell the routers."""
        return await self._read_pools({name: self._routers.positions(name) for name in self._pools})

    def take(self, reading: Reading) -> None:
        """Whoever decides by it is told of a reading."""
        self._admission.update(reading)
        self._routers.update(reading)

    async def _read_pools(self, read: Mapping[str, Positions | None]) -> dict[str, list[ReplicaStats]]:
        # A failure waits for the other pool's answer, so that whoever asks again has asked once at a time.
        asked = [self._stats(handle, read[name]) for name, handle in self._pools.items()]
        readings = await asyncio.gather(*asked, return_exceptions=True)
        pools: dict[str, list[ReplicaStats]] = {}
        for name, reading in zip(self._pools, readings, strict=True):
            if isinstance(reading, BaseException):
                raise reading
            pools[name] = reading
        return pools

    async def _stats(self, handle: "DeploymentHandle[Any]", read: Positions | None) -> list[ReplicaStats]:
        stats: list[ReplicaStats] = await handle.broadcast("stats", read).results_async(timeout_s=_STATS_TIMEOUT_S)
        return stats


def _sizes(requests: Sequence[GenerateRequest]) -> list[int]:
    """Tokens of each prompt that are to be computed; one that is sampled again finds what its first sample left."""
    prompts = [request.prompt_token_ids for request in requests]
    return [1 if n and prompt is prompts[n - 1] else len(prompt) for n, prompt in enumerate(prompts)]


async def _be_ready(handle: "DeploymentHandle[Any]") -> None:
    try:
        await handle.ready.remote()
    except Exception as error:
        raise as_ours(error) from error


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
        tells_planner: Ray Serve carries to its controller, for the planner, how many calls were refused.
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
    tells_planner: bool = False


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
        engine: EngineInfo = await decode.engine_info.remote()
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
        self._backend = PoolBackend(decode, prefill, tokens, admission, routers, settings.resume_timeout_s)
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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve carries to its controller for the planner; nothing if there is none."""
        return {REFUSED: float(self._backend.num_refused)} if self._settings.tells_planner else {}

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(
            self._backend,
            self._codec,
            self._info,
            observer=self._backend.clients,
            max_body_bytes=self._settings.max_request_bytes,
            server_sends_ids=True,
            keys=self._keys,
            cors_origins=self._settings.cors_origins,
            examiner=Apart(self._codec.backend.to_str(), self._info.vocab_size, GRAMMAR_TIMEOUT_S),
        )


def warn_if_open(host: str | None) -> None:
    """Without keys: say so where the address on which the API listens is for others than this machine."""
    if not is_loopback(host):
        logger.warning(
            "NO API KEYS: the API listens on %s, and whoever reaches it may use it and read /metrics. Set "
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
        max_model_len=min(engine.max_model_len, engine.num_blocks * engine.block_size),
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
