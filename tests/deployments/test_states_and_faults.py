"""Every state that a request can be in, and everything that can go wrong in it; docs/handoff.md has the table.

Two prefill and two decode replicas. The request is brought to a state, and held there; then one thing goes wrong, and
what was held arrives after all, late. In the end the client has the tokens of an undisturbed run, unless it is the one
that left, and no engine that lives holds anything.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import pytest_asyncio

from deployments.errors import EngineDeadError
from deployments.messages import TokenOutput
from tests.deployments.conftest import StartPools
from tests.deployments.faulty_engine import HeldClock
from tests.deployments.pools import MANY_TOKENS, NUM_TOKENS, PROMPT, Pools, is_decoding, tokens_of
from tests.engine.driving import greedy
from tests.engine.families import random_prompt, reference
from tests.waiting import PATIENCE_S

LEASE_S = 0.4
# The occupant's 900 tokens take half a minute: it has its seat for as long as the request is brought to its state.
OCCUPANT_STEP_S = 0.03


class Case:
    """A request in a state.

    Attributes:
        pools: two replicas each; the first ones have the request.
        clock: of all leases; it stands still until the request is in its state.
        reading: what the client gets.
        occupant: another request, which has the only seat; None: there is none.
        expected: what the client gets of an undisturbed run.
    """

    def __init__(self, pools: Pools, clock: HeldClock) -> None:
        self.pools = pools
        self.clock = clock
        self.reading: asyncio.Task[list[TokenOutput]]
        self.occupant: asyncio.Task[list[TokenOutput]] | None = None
        self.expected: tuple[int, ...]

    def ask(self, num_tokens: int = NUM_TOKENS) -> None:
        self.expected = reference("llama", PROMPT, num_tokens)
        self.reading = asyncio.create_task(self.pools.collect(greedy("r", PROMPT, num_tokens)))

    async def occupy(self, prompt: tuple[int, ...]) -> None:
        """Let another request have the first decode engine's only seat."""
        self.pools.decode.engine.step_s = OCCUPANT_STEP_S
        self.occupant = asyncio.create_task(self.pools.collect(greedy("occupant", prompt, 900)))
        await self.pools.decode.engine.until(is_decoding)

    async def let_go(self) -> None:
        """Let what was held arrive, and the occupant leave."""
        self.pools.decode.engine.lets_go.set()
        self.pools.decode.engine.step_s = 0.0
        self.pools.decode.engine.stop_at(None)
        if self.occupant is not None:
            self.occupant.cancel()
            with suppress(asyncio.CancelledError):
                await self.occupant


async def queued(case: Case) -> None:
    """The decode engine has no seat for it."""
    await case.occupy(PROMPT[:9])
    case.ask()
    await case.pools.decode.engine.until(lambda engine: engine.stats().num_waiting == 1)


async def begun(case: Case) -> None:
    """The decode engine has no seat for it, and the prompt, whose beginning is new there, is computed all the same."""
    await case.occupy(random_prompt(9, seed=8))
    case.ask()
    await case.pools.prefill.engine.until(lambda engine: engine.stats().prompt_tokens >= len(PROMPT))


async def reserved(case: Case) -> None:
    """Blocks are set aside, and none has come."""
    case.pools.decode.engine.holds = lambda chunk: True
    case.ask()
    await case.pools.decode.engine.has_held.wait()


async def filling(case: Case) -> None:
    """Some blocks have come."""
    case.pools.decode.engine.holds = lambda chunk: chunk.index > 0
    case.ask()
    await case.pools.decode.engine.has_held.wait()


async def filling_by_layers(case: Case) -> None:
    """The first layers of blocks have come, and no block as a whole."""
    case.pools.decode.engine.holds = lambda chunk: chunk.is_last and chunk.layers is not None and chunk.layers[0] > 0
    case.ask()
    await case.pools.decode.engine.has_held.wait()


async def ready(case: Case) -> None:
    """Everything is computed and copied out; the last chunk is on its way."""
    case.pools.decode.engine.holds = lambda chunk: chunk.is_last
    case.ask()
    await case.pools.decode.engine.has_held.wait()


async def decoding(case: Case) -> None:
    """The decode engine has claimed it and generates, until what is to go wrong does."""
    case.pools.decode.engine.stop_at(is_decoding)
    case.ask(MANY_TOKENS)
    await case.pools.decode.engine.until(is_decoding)


async def client_leaves(case: Case) -> None:
    case.reading.cancel()


async def ingress_dies(case: Case) -> None:
    await case.pools.tokens.stop()
    case.reading.cancel()


async def transfer_breaks(case: Case) -> None:
    case.pools.decode.engine.fail_receives = 1


async def prefill_engine_dies(case: Case) -> None:
    case.pools.prefill.engine.die()


async def prefill_engine_hangs(case: Case) -> None:
    case.pools.prefill.engine.hang()
    with pytest.raises(EngineDeadError, match="has not answered"):
        await case.pools.prefill.deployment.check_health()


async def prefill_front_hangs(case: Case) -> None:
    """It renews nothing, so that the leases run out on either side."""
    for engine in case.pools.engines:
        await engine.until(lambda engine: engine.next_expiry_s is None)


async def decode_engine_dies(case: Case) -> None:
    case.pools.decode.engine.die()


async def decode_engine_hangs(case: Case) -> None:
    case.pools.decode.engine.hang()
    with pytest.raises(EngineDeadError, match="has not answered"):
        await case.pools.decode.deployment.check_health()


STATES = [queued, begun, reserved, filling, filling_by_layers, ready, decoding]
FAULTS = [
    client_leaves,
    ingress_dies,
    transfer_breaks,
    prefill_engine_dies,
    prefill_engine_hangs,
    prefill_front_hangs,
    decode_engine_dies,
    decode_engine_hangs,
]
Step = Callable[[Case], Awaitable[None]]


@pytest_asyncio.fixture
async def case(start: StartPools, state: Step) -> Case:
    settings, clock = {"lease_s": LEASE_S, "max_silence_s": LEASE_S}, HeldClock()
    if state is filling_by_layers:
        # With room for all chunks: one that has to wait for others' memory goes whole.
        settings |= {"handoff_layer_parts": 2, "max_num_batched_tokens": 64}
    return Case(await start(num_prefill=2, num_decode=2, max_num_seqs=1, clock=clock, **settings), clock)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
async def test_every_fault_in_every_state(case: Case, state: Step, fault: Step) -> None:
    for engine in case.pools.engines:
        engine.renews = fault is not prefill_front_hangs
    await state(case)
    case.clock.go_on()
    await fault(case)
    await case.let_go()
    if case.reading.cancelling():
        with pytest.raises(asyncio.CancelledError):
            await case.reading
        async with asyncio.timeout(PATIENCE_S):
            await case.pools.wait_idle()
    else:
        assert tokens_of(await case.reading) == case.expected
    for engine in case.pools.engines:
        engine.goes_on.set()
    async with asyncio.timeout(PATIENCE_S):
        await case.pools.wait_idle()
