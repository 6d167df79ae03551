"""What a receipt says of real engines: its times fit into those that the ingress sees, and name who served."""

import asyncio
import time
from contextlib import aclosing

import pytest

from deployments import decode, receipt_log
from deployments.engine.engine import Engine
from deployments.messages import ANYWHERE, TokenOutput
from deployments.receipts import DecodeReceipt, Receipt
from deployments.routing.pools import RoutedRequest
from tests.deployments.conftest import StartPools
from tests.deployments.pools import NUM_TOKENS, PROMPT, Pools
from tests.engine.driving import greedy
from tests.waiting import PATIENCE_S, until

# Durations are differences of floats.
TINY_S = 1e-6


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receipt is waited for longer than a busy machine takes."""
    monkeypatch.setattr(decode, "_PREFILL_END_S", PATIENCE_S)
    monkeypatch.setattr(receipt_log, "PATIENCE_S", PATIENCE_S)


def has_begun(engine: Engine) -> bool:
    return engine.stats().generated_tokens >= 3


async def serve(pools: Pools, request_id: str, *, dies: bool = False) -> tuple[list[TokenOutput], Receipt]:
    """All outputs, and the receipt as it is when the last of them comes."""
    told: list[Receipt] = []
    outputs = []
    request = greedy(request_id, PROMPT, NUM_TOKENS)
    pools.decode.engine.stop_at(has_begun if dies else None)
    async with aclosing(pools.backend.generate(request, lambda: None, told.append)) as stream:
        async for output in stream:
            outputs.append(output)
            if dies and len(outputs) == 1:
                await pools.decode.engine.until(has_begun)
                pools.decode.engine.die()
    return outputs, told[-1]


@pytest.mark.parametrize("is_remote", [True, False])
async def test_a_receipt_names_who_served_and_its_times_fit(start: StartPools, is_remote: bool) -> None:
    pools = await start(min_tokens=16 if is_remote else 10_000)
    begun_s = time.monotonic()
    outputs, (attempt,) = await serve(pools, "r1")
    elapsed_s = time.monotonic() - begun_s
    told = attempt.decode
    assert told is not None and told.times is not None and attempt.first_token_s is not None
    assert (attempt.replica, told.replica, attempt.num_tokens, attempt.error) == ("d0", "d0", NUM_TOKENS, "")
    assert attempt.num_tokens == sum(len(output.token_ids) for output in outputs)
    times = told.times
    assert times.next_token_s is not None and times.next_token_s > 0
    assert min(times.queued_s, times.awaited_s, times.computing_s) >= 0
    if not is_remote:
        assert not told.prefills and times.awaited_s == 0 and times.computing_s > 0
        assert times.queued_s + times.computing_s <= attempt.first_token_s + TINY_S
        return
    (prefill,) = told.prefills
    assert prefill.replica == "p0" and prefill.times is not None and prefill.handoff is not None
    handoff = prefill.handoff
    # All of it may be there when its last step is told of.
    assert handoff.num_bytes > 0 and min(handoff.hidden_s, handoff.exposed_s) >= 0
    assert handoff.hidden_s + handoff.exposed_s > 0
    # Beside each other: the prompt may be begun before its blocks are reserved, and its first token does not wait for
    # the last of its KV.
    assert 0 < prefill.times.queued_s + prefill.times.computing_s <= attempt.first_token_s + TINY_S
    assert 0 < times.queued_s + times.awaited_s + times.computing_s <= elapsed_s + TINY_S
    assert times.computing_s < times.awaited_s, "its first token came with the prompt"
    assert times.num_found_tokens == prefill.times.num_found_tokens == 0
    _, (again,) = await serve(pools, "r2")
    assert again.decode is not None and again.decode.times is not None and not again.decode.prefills
    assert again.decode.times.num_found_tokens > 100


async def test_a_resumed_request_lists_its_attempts(start: StartPools) -> None:
    pools = await start(num_decode=2)
    outputs, (lost, served) = await serve(pools, "r1", dies=True)
    assert lost.error and lost.decode is None and lost.num_tokens > 0 and lost.first_token_s is not None
    assert served.decode is not None and served.replica == "d1" and not served.error
    assert lost.num_tokens + served.num_tokens == NUM_TOKENS == sum(len(output.token_ids) for output in outputs)


async def test_a_receipt_that_holds_nothing_back_is_whole_a_moment_later(start: StartPools) -> None:
    pools = await start(min_tokens=16)
    told: list[Receipt] = []
    request = greedy("r1", PROMPT, NUM_TOKENS)
    async with aclosing(pools.backend.generate(request, lambda: None, told.append, holds_last=False)) as stream:
        outputs = [output async for output in stream]
    assert sum(len(output.token_ids) for output in outputs) == NUM_TOKENS
    await until(lambda: told[-1][-1].decode is not None)
    (attempt,) = told[-1]
    assert attempt.decode is not None and attempt.decode.times is not None and len(attempt.decode.prefills) == 1
    assert (attempt.num_tokens, attempt.error) == (NUM_TOKENS, "")
    await until(
        lambda: all(task is asyncio.current_task() or "serve" not in repr(task) for task in asyncio.all_tasks())
    )


async def test_a_receipt_counts_the_tokens_of_an_answer_that_its_reader_ends(start: StartPools) -> None:
    pools = await start(min_tokens=16)
    told: list[Receipt] = []
    request, num_read = greedy("r1", PROMPT, NUM_TOKENS), 0
    async with aclosing(pools.backend.generate(request, lambda: None, told.append)) as stream:
        async for output in stream:
            num_read += len(output.token_ids)
            if num_read >= 2:
                break
    (attempt,) = told[-1]
    assert num_read <= attempt.num_tokens <= NUM_TOKENS


async def test_a_receipt_of_which_nothing_was_sent_is_cut_without_one() -> None:
    told: list[Receipt] = []
    receipt_log.ReceiptLog(told.append).cut(0)
    assert not told


async def test_a_receipt_counts_the_tokens_that_came_after_the_replica_was_done() -> None:
    told: list[Receipt] = []
    log = receipt_log.ReceiptLog(told.append)
    log.sent(RoutedRequest(ANYWHERE, (), time.monotonic), 0)
    serving = asyncio.create_task(asyncio.sleep(PATIENCE_S))
    log.ended(NUM_TOKENS - 1, DecodeReceipt("d0", None, ()))
    log.end_when_settled(serving, NUM_TOKENS)
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert [(attempt.replica, attempt.num_tokens) for attempt in told[-1]] == [("d0", NUM_TOKENS)]
    num_told = len(told)
    log.end_when_settled(serving, NUM_TOKENS)
    assert len(told) == num_told, "nothing new is not told"


async def test_a_receipt_waits_for_the_replica_that_went_on_behind_one_whose_last_tokens_were_lost() -> None:
    told: list[Receipt] = []
    log = receipt_log.ReceiptLog(told.append)
    routed = RoutedRequest(ANYWHERE, (), time.monotonic)
    log.sent(routed, 0)
    log.ended(3, DecodeReceipt("d0", None, ()))
    log.ended(3, error="TransferError: the last token did not arrive")
    log.sent(routed, 3)
    settled = asyncio.create_task(log.settle(NUM_TOKENS))
    await asyncio.sleep(0)
    assert not settled.done()
    log.ended(NUM_TOKENS, DecodeReceipt("d1", None, ()))
    await settled
    assert [attempt.decode and attempt.decode.replica for attempt in told[-1]] == [None, "d1"]
