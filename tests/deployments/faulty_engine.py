"""A real engine on a tiny model, in this process, that dies, hangs, or loses what comes when a test says so."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.handoff.outbox import TakenHandoff
from deployments.engine.handoff.outgoing import End, Part, Told, Word
from deployments.engine_builder import BuiltEngine
from deployments.engine_info import EngineInfo
from deployments.kv_tier.keys import TierKeys
from deployments.kv_transfer.layout import KVLayout
from deployments.local_engine import LocalEngine
from deployments.messages import ChunkReady, FrontEvent, GenerateRequest, ReplyAddress
from tests.engine.driving import build_engine
from tests.engine.grammars import load_with_tokenizer
from tests.engine.insides import guard_steps, runner_of
from tests.kv_tier.local_tier import LocalStore, LocalTier

OBJECT_BLOCKS = 3
# An engine that takes no steps looks so often whether it is asked for anything else.
_PAUSE_S = 0.002


class HeldClock:
    """Seconds that stand still until they are let go, and again when they are held: no lease runs out meanwhile.

    However busy the machine is, a test with a short lease gets to where it wants to be. Any thread may ask.
    """

    def __init__(self) -> None:
        self._held_s: float | None = time.monotonic()
        self._behind_s = 0.0

    def __call__(self) -> float:
        held_s = self._held_s
        return time.monotonic() - self._behind_s if held_s is None else held_s

    def go_on(self) -> None:
        if self._held_s is not None:
            self._behind_s = time.monotonic() - self._held_s
            self._held_s = None

    def hold(self) -> None:
        self._held_s = self()


class GatedHandoff(TakenHandoff):
    """One that its engine tells of as it can: not while it hangs or holds a part up, and never once it is dead."""

    def __init__(self, engine: "FaultyEngine", handoff: TakenHandoff) -> None:
        self._engine = engine
        self._taken = handoff

    def watch(self, told: Told) -> None:
        self._engine.tell_of(self._taken, told)

    def release(self, index: int) -> None:
        self._taken.release(index)

    def let_go(self) -> None:
        self._taken.let_go()


class FaultyEngine(LocalEngine):
    """See the module.

    Attributes:
        death: what whoever asks it is told; None: it lives.
        goes_on: cleared while it hangs.
        holds: whether a part that comes, or that it is about to tell of, is held up, until `lets_go` is set.
        has_held: set once one was.
        fail_receives: so many of the next parts do not arrive, and those behind them neither.
        changes: what becomes of a chunk on its way.
        added: requests that it was asked to decode.
        renews: False: it says that it renews leases, and does not.
        step_s: what each step takes at least, as one of a larger model does.

    Args:
        tier: that it gives KV to and takes it from; None: none.
        overrides: of the engine's settings.
    """

    def __init__(self, tier: LocalTier | None = None, **overrides: Any) -> None:
        self._engine = build_engine(load_with_tokenizer("llama"), **overrides)
        limits = self._engine.limits
        sizes = limits.block_size, 1024, float(overrides.get("lease_s", 15.0)), os.getpid(), limits.num_blocks
        info = EngineInfo("tiny", limits.max_model_len, 512, (), *sizes)
        super().__init__(BuiltEngine(self._engine, info, None, "cpu"))
        if tier is not None:
            self._join(tier)
        self.death: Exception | None = None
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.holds: Callable[[ChunkReady], bool] = lambda chunk: False
        self.has_held = asyncio.Event()
        self.lets_go = asyncio.Event()
        self.fail_receives = 0
        self.changes: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.added: list[GenerateRequest] = []
        self.renews = True
        self.step_s = 0.0
        self._stops_at: Callable[[Engine], bool] | None = None
        self._listeners: list[Told] = []
        self._tellers: list[asyncio.Task[None]] = []
        guard_steps(self._engine, self._may_step)

    def _join(self, tier: LocalTier) -> None:
        """Take part in a tier of objects of `OBJECT_BLOCKS`."""
        shape = self._engine.kv_shape
        layout = KVLayout("tiny", shape.form.name, self._engine.limits.block_size, shape.groups)
        keys = TierKeys(layout, OBJECT_BLOCKS * layout.bytes_per_block)
        self._host.use_tier(LocalStore(tier, self._host.give), keys, copy_share=1.0)

    def take_role(self, is_flipped: bool) -> None:
        """As the planner tells it."""
        self._host.take_role(is_flipped)

    def hang(self) -> None:
        """As if the process had been stopped: it answers nothing and tells nothing, until `goes_on` is set."""
        self.goes_on.clear()

    def die(self) -> None:
        """As if the process had been killed: it draws no further token."""
        self.death = ConnectionError("the engine's process is gone")
        self._tell([])
        for told in self._listeners:
            told(End.GONE)

    def break_model(self, error: Exception) -> None:
        """From now on no step runs."""

        def fail(*_: object) -> None:
            raise error

        runner_of(self._engine).launch = fail

    def stop_at(self, condition: Callable[[Engine], bool] | None) -> None:
        """Take no step any more once this is true, and do all else; None: go on.

        An engine that goes on while a test looks may be past it, however soon the test does what it wants to do then.
        """
        self._stops_at = condition

    async def until(self, condition: Callable[[Engine], bool]) -> None:
        """Return when the engine is where the test wants it, before its next step; the test's own timeout bounds it."""
        before = self._stops_at
        self.stop_at(lambda engine: condition(engine) or (before is not None and before(engine)))
        try:
            while not await self.run(condition):  # noqa: ASYNC110  an engine tells nobody how far it is
                await asyncio.sleep(0.001)
        finally:
            self.stop_at(before)

    def add(self, request: GenerateRequest, remote_threshold: int | None, reply_to: ReplyAddress) -> Awaitable[None]:
        self.added.append(request)
        return super().add(request, remote_threshold, reply_to)

    def take_handoff(self, request_id: str) -> Awaitable[TakenHandoff]:
        return self._ask(lambda: GatedHandoff(self, self._host.take_handoff(request_id)))

    def tell_of(self, handoff: TakenHandoff, told: Told) -> None:
        """See `GatedHandoff`; called in the event loop."""
        words = asyncio.Queue[Word]()
        self._listeners.append(told)

        async def pass_on() -> None:
            word: Word | None = None
            while not isinstance(word, End):
                word = await words.get()
                if isinstance(word, Part):
                    await self._hold(word.chunk)
                await self.goes_on.wait()
                if self.death is not None:
                    return  # which has been told
                told(word)

        handoff.watch(lambda word: self._event_loop.call_soon_threadsafe(words.put_nowait, word))
        self._tellers.append(self._event_loop.create_task(pass_on()))

    def renew(self, request_id: str) -> Awaitable[bool]:
        return super().renew(request_id) if self.renews else self._ask(lambda: True)

    async def events(self) -> AsyncIterator[list[FrontEvent]]:
        async for batch in super().events():
            await self.goes_on.wait()
            if not batch:
                assert self.death is not None
                raise self.death
            yield batch

    async def _parts(self, request_id: str, handoff: TakenHandoff) -> AsyncIterator[Part]:
        async for part in super()._parts(request_id, handoff):
            await self._hold(part.chunk)
            self._fail_if_told()
            await self._reach()
            yield replace(part, tensor=self.changes(part.tensor))

    def _fail_if_told(self) -> None:
        if self.fail_receives:
            self.fail_receives -= 1
            raise ConnectionError("the transfer broke")

    async def _hold(self, chunk: ChunkReady) -> None:
        if not self.lets_go.is_set() and self.holds(chunk):
            self.has_held.set()
            await self.lets_go.wait()

    def _may_step(self, engine: Engine) -> bool:
        """Asked in the engine's thread, before each step."""
        is_over = self.death is not None or self._is_there(engine)
        if pause_s := _PAUSE_S if is_over else self.step_s:
            time.sleep(pause_s)
        return not is_over

    def _is_there(self, engine: Engine) -> bool:
        """Whether it is to stop here."""
        stops_at = self._stops_at
        try:
            return stops_at is not None and stops_at(engine)
        except Exception:  # `until` asks the same, and fails
            return True

    async def _reach(self) -> None:
        await self.goes_on.wait()
        if self.death is not None:
            raise self.death
