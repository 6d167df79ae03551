"""Drives engine actors without fronts and ingress: hands requests from one to another, and reads the clock."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ray

from deployments.engine_info import EngineInfo
from deployments.messages import GenerateRequest, HandoffOpened, Placed, SamplingParams, TokenOutput
from deployments.receipts import ChunkArrived
from deployments.tokens.receiver import TokenReceiver, TokenStream

T = TypeVar("T")
Event = TypeVar("Event", Placed, HandoffOpened)

_TIMEOUT_S = 300


def random_prompt(num_tokens: int, seed: int, vocab_size: int) -> tuple[int, ...]:
    """Token ids that no tokenizer gives a meaning of its own."""
    rng = random.Random(seed)
    return tuple(rng.randrange(3, vocab_size) for _ in range(num_tokens))


@dataclass(slots=True)
class Arrivals:
    """What one engine sent of one request.

    Attributes:
        token_ids: in order.
        times_s: `time.perf_counter()` of each.
    """

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)

    @property
    def token_s(self) -> float:
        """Of a token behind the first one, on average; there are two at least."""
        return (self.times_s[-1] - self.times_s[0]) / (len(self.times_s) - 1)


class Inbox:
    """Plays the ingress for one engine: takes its tokens, in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._receiver = self._run(TokenReceiver.start("127.0.0.1", max_unread_tokens=1000))
        self.address = self._receiver.address
        self._takes: dict[str, list[Future[Arrivals]]] = {}

    @contextmanager
    def listening(self, name: str) -> Iterator[TokenStream]:
        """Listen for a request, from before the engine hears of it; what is still awaited at the end is given up."""
        stream = self._run(self._open(name))
        try:
            yield stream
        finally:
            for take in self._takes.pop(stream.name, []):
                take.cancel()
            self._run(stream.aclose())

    @contextmanager
    def listening_to(self, names: Iterable[str]) -> Iterator[list[TokenStream]]:
        """Likewise, for several requests."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.listening(name)) for name in names]

    def take(self, stream: TokenStream, count: int) -> "Future[Arrivals]":
        """So many tokens, noted as they come."""
        found = asyncio.run_coroutine_threadsafe(self._take(stream, count), self._loop)
        self._takes.setdefault(stream.name, []).append(found)
        return found

    async def _take(self, stream: TokenStream, count: int) -> Arrivals:
        found = Arrivals()
        while len(found.token_ids) < count:
            output: TokenOutput = await anext(stream)
            found.token_ids += output.token_ids
            found.times_s += [time.perf_counter()] * len(output.token_ids)
        return found

    async def _open(self, name: str) -> TokenStream:
        return self._receiver.open(name, lambda: None, lambda _: None)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_TIMEOUT_S)


@dataclass(frozen=True, slots=True)
class HandOver:
    """One request that one engine prefilled and the other one decoded.

    Attributes:
        token_ids: as the decode engine told them, the first one from the prefill engine included.
        num_bytes: of KV.
        chunks_s: from the acceptance of the prompt to the last block in the other engine's pool.
        behind_s: from the first token, when the last chunk was computed, to the last block in the other engine's pool.
        ttft_s: from the request to the first token, which the prefill engine sends.
        token_s: of a token behind the first one, as the decode engine told them, on average.
    """

    token_ids: list[int]
    num_bytes: int
    chunks_s: float
    behind_s: float
    ttft_s: float
    token_s: float


class DrivenEngine:
    """An `EngineActor` of which nobody else reads the events.

    Args:
        actor: its handle.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.info: EngineInfo = ray.get(actor.info.remote())
        self.inbox = Inbox()
        self._events = actor.events.options(num_returns="streaming").remote()

    def generate(self, prompt: tuple[int, ...], name: str, max_tokens: int) -> list[int]:
        """What it makes of a prompt by itself, greedily."""
        return self.answer(prompt, name, max_tokens).token_ids

    def answer(self, prompt: tuple[int, ...], name: str, max_tokens: int) -> Arrivals:
        """Likewise, and when."""
        with self.inbox.listening(name) as stream:
            ray.get(self.actor.add.remote(_greedy(prompt, name, max_tokens), None, self.inbox.address))
            return self.inbox.take(stream, max_tokens).result(_TIMEOUT_S)

    def await_events(self, kind: type[Event], name: str) -> list[Event]:
        """The next ones of a kind, of one request; others are dropped."""
        while True:
            events = [event for event in ray.get(next(self._events)) if isinstance(event, kind)]
            if found := [event for event in events if event.request_id == name]:
                return found


def hand_over(
    source: DrivenEngine,
    target: DrivenEngine,
    prompt: tuple[int, ...],
    name: str,
    max_tokens: int = 2,
    on_opened: Callable[[], None] = lambda: None,
) -> HandOver:
    """Have one engine prefill a prompt and the other one decode.

    Args:
        source: the prefill engine.
        target: the decode engine.
        prompt: token ids.
        name: of the request, unique.
        max_tokens: at least 2: a request must outlive its first token to be handed over.
        on_opened: called when the hand-off is on its way, computed already or not.

    Raises:
        RayError, TransferError: an engine died, or something did not arrive.
    """
    request = _greedy(prompt, name, max_tokens)
    with source.inbox.listening(name) as sent, target.inbox.listening(name) as told:
        # The target tells the first token too, when the last block is in its pool.
        first, arrived = source.inbox.take(sent, 1), target.inbox.take(told, max_tokens)
        begun = time.perf_counter()
        # At once, as the fronts do with a prompt of which the target has nothing; KV goes on only to reserved blocks.
        added = target.actor.add.remote(request, 1, target.inbox.address)
        ray.get([added, source.actor.prefill.remote(request, 0, source.inbox.address)])
        assert target.await_events(Placed, name)[0].remote
        source.await_events(HandoffOpened, name)
        opened = time.perf_counter()
        ack = target.actor.receive_kv.remote(name, source.actor.take_handoff.remote(name))
        on_opened()
        chunks: list[ChunkArrived] = ray.get(ack)
        computed_s, told_here = first.result(_TIMEOUT_S).times_s[0], arrived.result(_TIMEOUT_S)
        in_place_s = told_here.times_s[0]
    return HandOver(
        told_here.token_ids,
        sum(chunk.num_bytes for chunk in chunks),
        in_place_s - opened,
        in_place_s - computed_s,
        computed_s - begun,
        told_here.token_s,
    )


def _greedy(prompt: tuple[int, ...], name: str, max_tokens: int) -> GenerateRequest:
    return GenerateRequest(name, prompt, SamplingParams(max_tokens=max_tokens, temperature=0))
