"""From token outputs to text events: where a choice ends, what counts, and that every stream is closed."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from deployments.api.choices import ChoiceText, TextEvent, merge, stream_choice
from deployments.errors import EngineDeadError, TransferError
from deployments.messages import FinishReason, GenerateRequest, SamplingParams
from tests.api.fakes import END_ID, PLAIN_END_ID, FakeBackend, Hang, Step, build_codec, playing

CODEC = build_codec()


async def events_of(backend: FakeBackend, stops: Sequence[str] = ()) -> list[TextEvent]:
    request = GenerateRequest("r", (1,), SamplingParams(max_tokens=9))
    return [
        event async for event in stream_choice(backend.generate, request, ChoiceText(0, CODEC.detokenizer(), stops))
    ]


def summary(events: list[TextEvent]) -> tuple[str, int, FinishReason | None]:
    return "".join(e.text for e in events), sum(e.num_tokens for e in events), events[-1].finish_reason


@pytest.mark.parametrize(
    ("steps", "stops", "expected"),
    [
        (["ab", "c", FinishReason.LENGTH], (), ("abc", 3, "length")),
        (["ab", [END_ID], FinishReason.STOP], (), ("ab", 3, "stop")),
        (["ab", [PLAIN_END_ID], FinishReason.STOP], (), ("ab", 3, "stop")),
        (["ab", [PLAIN_END_ID], FinishReason.LENGTH], (), ("ab!", 3, "length")),
        (["ab", [ord("c"), PLAIN_END_ID], FinishReason.STOP], ("x",), ("abc", 4, "stop")),
        (["a", "é".encode()[:1], FinishReason.LENGTH], (), ("a\ufffd", 2, "length")),
        (["one E", "N", "D two", FinishReason.LENGTH], ("END",), ("one ", 7, "stop")),
        (["one E", "N", FinishReason.LENGTH], ("END",), ("one EN", 6, "length")),
        (["one E", [END_ID], FinishReason.STOP], ("END",), ("one E", 6, "stop")),
        (["abcdef", FinishReason.LENGTH], ("cd",), ("ab", 4, "stop")),
        (["a", "é".encode()[:1], FinishReason.LENGTH], ("\ufffd",), ("a", 2, "stop")),
    ],
)
async def test_a_choice_ends_where_it_should(steps: list[Step], stops: Sequence[str], expected: tuple[str, int, str]):
    assert summary(await events_of(playing(*steps), stops)) == expected


async def test_a_stop_string_ends_the_request_at_the_backend_before_the_last_event_goes_out():
    backend = playing("a", "STOP", Hang())
    request = GenerateRequest("r", (1,), SamplingParams(max_tokens=9))
    stream = stream_choice(backend.generate, request, ChoiceText(0, CODEC.detokenizer(), ("STOP",)))
    async with aclosing(stream):
        await anext(stream)
        assert backend.running == {"r"}
        last = await anext(stream)
        assert (last.finish_reason, last.text) == (FinishReason.STOP, "")
        assert not backend.running


async def test_a_stream_that_ends_without_a_reason_is_an_error():
    with pytest.raises(EngineDeadError, match="without a finish reason"):
        await events_of(playing("a"))


async def test_a_lost_token_is_a_broken_invariant():
    text = ChoiceText(0, CODEC.detokenizer(), ())
    outputs = [output async for output in playing("a", "b").generate(GenerateRequest("r", (), SamplingParams(1)))]
    text.push(outputs[0])
    with pytest.raises(AssertionError):
        text.push(outputs[0])


class Numbers:
    """Streams that count up, and know which of them are open."""

    def __init__(self) -> None:
        self.open: set[int] = set()

    async def stream(self, start: int, stop: int, error: Exception | None = None) -> AsyncGenerator[int, None]:
        self.open.add(start)
        try:
            for number in range(start, stop):
                await asyncio.sleep(0)
                yield number
            if error is not None:
                raise error
        finally:
            await asyncio.sleep(0)
            self.open.discard(start)

    async def endless(self, start: int) -> AsyncGenerator[int, None]:
        self.open.add(start)
        try:
            yield start
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.open.discard(start)


@pytest.mark.parametrize("num_streams", [1, 3])
async def test_merging_keeps_the_items_and_the_order_of_each_stream(num_streams: int):
    numbers = Numbers()
    merged = [n async for n in merge([numbers.stream(100 * i, 100 * i + 5) for i in range(num_streams)])]
    for i in range(num_streams):
        assert [n for n in merged if n // 100 == i] == list(range(100 * i, 100 * i + 5))
    assert not numbers.open


async def test_merged_streams_run_at_once():
    numbers = Numbers()
    async with aclosing(merge([numbers.endless(0), numbers.endless(1), numbers.endless(2)])) as merged:
        assert {await anext(merged) for _ in range(3)} == {0, 1, 2}
        assert numbers.open == {0, 1, 2}
    assert not numbers.open


async def test_an_error_in_one_stream_closes_all():
    numbers = Numbers()
    merged = merge([numbers.endless(0), numbers.stream(10, 12, TransferError("lost")), numbers.endless(20)])
    with pytest.raises(TransferError, match="lost"):
        async with aclosing(merged):
            async for _ in merged:
                pass
    assert not numbers.open


@pytest.mark.parametrize("num_streams", [1, 3])
async def test_cancelling_the_consumer_closes_all(num_streams: int):
    numbers = Numbers()
    seen = asyncio.Queue[int]()

    async def consume() -> None:
        async with aclosing(merge([numbers.endless(i) for i in range(num_streams)])) as merged:
            async for number in merged:
                seen.put_nowait(number)

    task = asyncio.create_task(consume())
    for _ in range(num_streams):
        await seen.get()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not numbers.open
