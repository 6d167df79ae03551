"""From token outputs to text events: where a choice ends, what counts, and that every stream is closed."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from deployments.api.choices import ChoiceText, TextEvent, TextRules, merge, stream_choice
from deployments.errors import EngineDeadError, TransferError
from deployments.messages import FinishReason, GenerateRequest, SamplingParams
from tests.api.fakes import END_ID, PLAIN_END_ID, FakeBackend, Hang, Step, build_codec, playing

CODEC = build_codec()
REQUEST = GenerateRequest("r", (1,), SamplingParams(max_tokens=9))


def text_of(rules: TextRules, prompt: Sequence[int] = (1,)) -> ChoiceText:
    return ChoiceText(0, CODEC, prompt, rules)


async def events_of(backend: FakeBackend, rules: TextRules, prompt: Sequence[int] = (1,)) -> list[TextEvent]:
    return [event async for event in stream_choice(backend.generate, REQUEST, text_of(rules, prompt))]


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
    rules = TextRules(continues_prompt=True, stops=tuple(stops))
    assert summary(await events_of(playing(*steps), rules)) == expected


@pytest.mark.parametrize(
    ("min_tokens", "steps", "expected"),
    [
        (3, ["ab", "cxd", "x", FinishReason.LENGTH], ("abc", 4, "stop")),
        (4, ["ab", "cxd", "x", FinishReason.LENGTH], ("abcxd", 6, "stop")),
        (4, ["abcxdx", FinishReason.LENGTH], ("abcxd", 6, "stop")),
        (9, ["ab", "x", FinishReason.LENGTH], ("abx", 3, "length")),
    ],
)
async def test_a_stop_string_within_the_first_min_tokens_ends_nothing(
    min_tokens: int, steps: list[Step], expected: tuple[str, int, str]
):
    rules = TextRules(continues_prompt=True, stops=("x",), min_tokens=min_tokens)
    assert summary(await events_of(playing(*steps), rules)) == expected


END = "<end>"


@pytest.mark.parametrize(
    ("steps", "stops", "expected"),
    [
        (["ab", [END_ID], "c", FinishReason.LENGTH], (END,), ("ab", 3, "stop")),
        (["ab", [ord("c"), END_ID, ord("d")], FinishReason.LENGTH], (END,), ("abc", 4, "stop")),
        (["ab", [END_ID], "c", FinishReason.LENGTH], (f"b{END}",), ("a", 3, "stop")),
        (["ab", [END_ID], "cd", FinishReason.LENGTH], (f"b{END}c",), ("a", 4, "stop")),
        (["ab", [END_ID], "d", FinishReason.LENGTH], (f"b{END}c",), ("abd", 4, "length")),
        (["ab", [END_ID], FinishReason.STOP], (f"b{END}",), ("a", 3, "stop")),
        (["ab", [END_ID], "cd", FinishReason.LENGTH], ("bc",), ("a", 4, "stop")),
        (["a", [END_ID], "bcd", FinishReason.LENGTH], ("bc", f"{END}d"), ("a", 4, "stop")),
        (["a", END, "b", FinishReason.LENGTH], (END,), ("a", 6, "stop")),
        (["ab", [END_ID], "c", FinishReason.LENGTH], ("end",), ("abc", 4, "length")),
        (["a", "é".encode()[:1], [END_ID], "b", FinishReason.LENGTH], (END,), ("a\ufffd", 3, "stop")),
        (["a", "é".encode()[:1], [END_ID], "b", FinishReason.LENGTH], (f"a{END}",), ("a\ufffdb", 4, "length")),
    ],
)
async def test_a_stop_string_finds_special_tokens_that_are_not_shown(
    steps: list[Step], stops: tuple[str, ...], expected: tuple[str, int, str]
):
    assert summary(await events_of(playing(*steps), TextRules(continues_prompt=True, stops=stops))) == expected


@pytest.mark.parametrize(
    ("steps", "stops", "expected"),
    [
        (["abcdef", FinishReason.LENGTH], ("cd",), "abcd"),
        (["ab", [PLAIN_END_ID], FinishReason.STOP], (), "ab!"),
        (["ab", [PLAIN_END_ID], FinishReason.STOP], ("x",), "ab!"),
        (["ab", [END_ID], FinishReason.STOP], (), "ab"),
        (["ab", [END_ID], "c", FinishReason.LENGTH], (f"b{END}",), "ab"),
    ],
)
async def test_what_ended_a_choice_is_part_of_its_text_where_that_is_asked_for(
    steps: list[Step], stops: tuple[str, ...], expected: str
):
    rules = TextRules(continues_prompt=True, stops=stops, include_stop=True)
    assert summary(await events_of(playing(*steps), rules))[0] == expected


@pytest.mark.parametrize(
    ("steps", "stops", "expected"),
    [
        (["ab", [END_ID], "c", FinishReason.LENGTH], (), ("ab<end>c", 4, "length")),
        (["ab", [END_ID], FinishReason.STOP], (), ("ab", 3, "stop")),
        (["ab", [END_ID], "c", FinishReason.LENGTH], (END,), ("ab", 3, "stop")),
        (["ab", [END_ID], "c", FinishReason.LENGTH], ("<e",), ("ab", 3, "stop")),
        (["ab", [END_ID], "c", FinishReason.LENGTH], ("nd",), ("ab<e", 3, "stop")),
        (["ab", [END_ID], "c", FinishReason.LENGTH], (">c",), ("ab<end", 4, "stop")),
        (["ab", [END_ID], FinishReason.STOP], ("nd",), ("ab", 3, "stop")),
    ],
)
async def test_special_tokens_are_text_where_they_are_shown(
    steps: list[Step], stops: tuple[str, ...], expected: tuple[str, int, str]
):
    rules = TextRules(continues_prompt=True, stops=stops, skip_special_tokens=False)
    assert summary(await events_of(playing(*steps), rules)) == expected


@pytest.mark.parametrize(("continues_prompt", "expected"), [(True, "éa"), (False, "\ufffda")])
async def test_only_a_continuation_is_read_behind_its_prompt(continues_prompt: bool, expected: str):
    first, last = "é".encode()
    backend = playing([last], "a", FinishReason.LENGTH)
    events = await events_of(backend, TextRules(continues_prompt=continues_prompt), prompt=(ord("x"), first))
    assert summary(events)[0] == expected


async def test_a_stop_string_ends_the_request_at_the_backend_before_the_last_event_goes_out():
    backend = playing("a", "STOP", Hang())
    stream = stream_choice(backend.generate, REQUEST, text_of(TextRules(continues_prompt=True, stops=("STOP",))))
    async with aclosing(stream):
        await anext(stream)
        assert backend.running == {"r"}
        last = await anext(stream)
        assert (last.finish_reason, last.text) == (FinishReason.STOP, "")
        assert not backend.running


async def test_a_stream_that_ends_without_a_reason_is_an_error():
    with pytest.raises(EngineDeadError, match="without a finish reason"):
        await events_of(playing("a"), TextRules(continues_prompt=True))


async def test_a_lost_token_is_a_broken_invariant():
    text = text_of(TextRules(continues_prompt=True))
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
