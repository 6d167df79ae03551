"""What the API asks of the pools behind it, done by deployments of Ray Serve. Lives in the ingress.

Knows the pools by their handles: one call per request, which lasts as long as the request does. Its tokens come from
the engines directly, to the `TokenReceiver` of this replica.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from deployments.decode_client import DecodeClient
from deployments.errors import EngineDeadError, StartingError
from deployments.load.admission import Admission, Ticket
from deployments.load.held import Held, HeldRequests, HoldBounds
from deployments.load.pool_health import PoolHealth
from deployments.load.pool_watch import PoolWatch
from deployments.load.reading import DECODE, PREFILL, Reading, by_role
from deployments.messages import GenerateRequest
from deployments.ray_errors import as_ours, is_nobody_there
from deployments.receipt_log import ReceiptLog, ReceiptStream
from deployments.receipts import Receipt
from deployments.replica_stats import Positions, ReplicaStats
from deployments.routing.pools import PoolRouters
from deployments.serve_state import ask_each
from deployments.telemetry.client_stats import ClientCounts
from deployments.telemetry.ingress_stats import IngressStats
from deployments.telemetry.live_view import LiveView
from deployments.telemetry.metrics import render
from deployments.telemetry.peers import Ask, Peers
from deployments.telemetry.single_flight import SingleFlight
from deployments.tokens.receiver import TokenReceiver, TokenStream

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_STATS_TIMEOUT_S = 10.0
# A call that is in doubt waits no longer for a fresh reading; an engine answers between two of its steps.
_REFRESH_TIMEOUT_S = 0.5
# One replica that does not answer hides no other that does: less than `MAX_AGE_S` of `pool_health.py`.
_READY_TIMEOUT_S = 4.0


class PoolBackend:
    """What the API needs, done by the pools.

    Args:
        decode: handle of the decode deployment.
        prefill: handle of the prefill deployment; None: colocated.
        tokens: where the engines send the tokens of this replica's requests.
        admission: lets calls in.
        routers: choose the replicas.
        resume_timeout_s: see `DecodeClient`.
        clients: what the clients of this replica see.
        replica: name of this one.
        ask_peers: all ingress replicas for their numbers; None: there is this one alone.
        vllm_model: see `render`.
        view: shows the service to those who look; None: with nothing but numbers.
        may_lack_prefill: there may be no prefill replica.
        hold: there may be no decode replica, and this bounds who waits for one; None: there always is one.
    """

    def __init__(
        self,
        decode: "DeploymentHandle[Any]",
        prefill: "DeploymentHandle[Any] | None",
        tokens: TokenReceiver,
        admission: Admission,
        routers: PoolRouters,
        resume_timeout_s: float,
        clients: ClientCounts,
        replica: str = "",
        ask_peers: Ask | None = None,
        vllm_model: str | None = None,
        view: LiveView | None = None,
        *,
        may_lack_prefill: bool = False,
        hold: HoldBounds | None = None,
    ) -> None:
        self._pools = {DECODE: decode} if prefill is None else {PREFILL: prefill, DECODE: decode}
        self._may_lack = frozenset([PREFILL] * may_lack_prefill + [DECODE] * (hold is not None))
        self._held = None if hold is None else HeldRequests(hold, self._look_closely)
        asked = {name: handle for name, handle in self._pools.items() if name not in self._may_lack}
        asks: dict[str, Callable[[], Awaitable[object]]]
        asks = {name: partial(_be_ready, handle) for name, handle in asked.items()}
        if self._held is not None:
            asks[DECODE] = partial(_be_ready_or_start, decode, self._held)
        self.pool_health = PoolHealth(asks)
        self._tokens = tokens
        self._admission = admission
        self._routers = routers
        self.watch = PoolWatch(self.read_pools, self.take)
        self.clients = clients
        self._replica, self._vllm_model = replica, vllm_model
        self.peers = Peers(ask_peers or self._ask_self, self.own_stats)
        self._view = view or LiveView(self.own_stats)
        self._metrics = SingleFlight[bytes]()
        self._decode = DecodeClient(decode, tokens, resume_timeout_s, self.clients.request_resumed, routers, self._held)

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
        *,
        holds_last: bool = True,
    ) -> "TokenStream | ReceiptStream":
        """Tokens of a request; closing the stream ends the request on every pool."""
        log = None if on_receipt is None else ReceiptLog(on_receipt)

        def overflow() -> None:
            serving.cancel()
            on_overflow()

        def close(stream: TokenStream) -> None:
            if log is not None and stream.has_finished:
                log.end_when_settled(serving, len(stream.token_ids))
                return
            if log is not None:
                log.cut(len(stream.token_ids))
            serving.cancel()

        stream = self._tokens.open(request.request_id, overflow, close)
        asked = request if log is None else replace(request, wants_receipt=True)
        # Not in the context of the HTTP request, by which Serve knows whose call this is: when that is cancelled, Serve
        # ends the call before we do (`_on_request_cancelled`), and a client that left looks like a lost replica.
        serving = asyncio.create_task(self._decode.serve(asked, stream, log), context=Context())
        return ReceiptStream(stream, log) if log is not None and holds_last else stream

    async def health(self) -> tuple[bool, str]:
        """Whether every pool can serve, and if not, which one cannot; see `PoolHealth`."""
        return self.pool_health.state()

    @property
    def num_refused(self) -> int:
        """Calls that were not let in."""
        return self._admission.refusals.total()

    @property
    def held(self) -> Held:
        """Requests that wait for a decode replica."""
        return Held() if self._held is None else self._held.now()

    def own_stats(self) -> IngressStats:
        """What this ingress replica tells of itself."""
        return IngressStats.of(self._replica, self.clients.stats, self._admission, self._routers, self.held)

    async def _ask_self(self) -> list[IngressStats]:
        return [self.own_stats()]

    async def live(self) -> Mapping[str, object]:
        return await self._view.document(self.pool_health.state())

    async def metrics(self) -> bytes:
        return await self._metrics(self._read_metrics)

    async def _read_metrics(self) -> bytes:
        (pools, _), ingresses = await asyncio.gather(self._ask_pools(dict.fromkeys(self._pools)), self.peers.read())
        # Apart: it takes 36 ms for eight engines of each pool and two ingress replicas, with vLLM's names (2026-11-29).
        return await asyncio.to_thread(render, pools, ingresses, self._vllm_model)

    async def read_pools(self) -> dict[str, list[ReplicaStats]]:
        """The numbers of every replica, by the pool whose work it does, and what its cache has to tell the routers.

        Raises:
            Exception: a pool did not answer, so that nobody can decide by it. Those that did are shown.
        """
        asked_s = time.monotonic()
        pools, failures = await self._ask_pools({name: self._routers.positions(name) for name in self._pools})
        if failures:
            self._view.take(Reading.of(pools, asked_s))
            raise failures[0]
        return pools

    def take(self, reading: Reading) -> None:
        """Whoever decides by it is told of a reading."""
        self._admission.update(reading)
        self._routers.update(reading)
        self._view.take(reading)
        if self._held is not None:
            self._held.update(reading)

    def _look_closely(self) -> None:
        """Somebody waits for a replica: read the pools more often until nobody does."""
        self._looking = asyncio.create_task(self._look_until_nobody_waits())

    async def _look_until_nobody_waits(self) -> None:
        while self.held.count:
            await self.watch.refresh(_REFRESH_TIMEOUT_S)

    async def _ask_pools(
        self, read: Mapping[str, Positions | None]
    ) -> tuple[dict[str, list[ReplicaStats]], list[BaseException]]:
        """The pools that answer, by what their replicas do, and why others do not."""
        # A failure waits for the other pool's answer, so that whoever asks again has asked once at a time.
        asked = [self._stats(handle, read[name]) for name, handle in self._pools.items()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        pools: dict[str, list[ReplicaStats]] = {}
        failures: list[BaseException] = []
        for name, answer in zip(self._pools, answers, strict=True):
            if not isinstance(answer, BaseException):
                pools[name] = answer
            elif isinstance(answer, Exception) and name in self._may_lack and is_nobody_there(answer):
                pools[name] = []
            else:
                failures.append(answer)
        return by_role(pools), failures

    async def _stats(self, handle: "DeploymentHandle[Any]", read: Positions | None) -> list[ReplicaStats]:
        """Of the replicas that answer; of one that has just died Serve may not know yet."""
        response = handle.broadcast("stats", read)
        answers = await response.results_async(timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
        told = [answer for answer in answers if isinstance(answer, ReplicaStats)]
        if not told:
            raise next(iter(answers), EngineDeadError("every replica of the pool has just died"))
        return told


def _sizes(requests: Sequence[GenerateRequest]) -> list[int]:
    """Tokens of each prompt that are to be computed; one that is sampled again finds what its first sample left."""
    prompts = [request.prompt_token_ids for request in requests]
    return [1 if n and prompt is prompts[n - 1] else len(prompt) for n, prompt in enumerate(prompts)]


async def _be_ready(handle: "DeploymentHandle[Any]") -> None:
    try:
        await handle.ready.remote()
    except Exception as error:
        raise as_ours(error) from error


async def _be_ready_or_start(handle: "DeploymentHandle[Any]", held: HeldRequests) -> None:
    """One replica is ready; or there is none, and nobody has waited for one in vain.

    Each replica is asked, for a question to any of them would have Serve start one where there is none.
    """
    try:
        answers = await ask_each(handle, "ready", _READY_TIMEOUT_S)
    except Exception as error:
        if not is_nobody_there(error):
            raise as_ours(error) from error
        if held.is_overdue:
            raise StartingError("no replica runs, and none has started in time", 0.0) from None
        return
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    if len(failures) == len(answers):
        raise as_ours(failures[0]) if isinstance(failures[0], Exception) else failures[0]
