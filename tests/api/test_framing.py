"""What a stream's frames hold does not depend on how they were written."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api import sse
from deployments.api.answers import Answer, ChatAnswer, CompletionAnswer, Tally
from deployments.api.call import Call
from deployments.api.choices import TextEvent
from deployments.api.framing import Framer
from deployments.api.scores import ScoredToken
from deployments.messages import FinishReason
from tests.api.reading import chat, completion

USAGE = {"include_usage": True}
COMMON: tuple[dict[str, Any], ...] = (
    {},
    {"n": 2},
    {"stream_options": USAGE},
    {"stream_options": USAGE | {"continuous_usage_stats": True}},
    {"return_token_ids": True},
    {"service_tier": "default"},
)
CALLS = (
    *(completion(stream=True, **fields) for fields in (*COMMON, {"logprobs": 0}, {"prompt": ["abc", "de"]})),
    *(chat(stream=True, **fields) for fields in (*COMMON, {"logprobs": True})),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(['","text":"', "}\n\n", '"\\'])


def build(call: Call) -> tuple[Tally, Answer]:
    tally = Tally(call)
    return tally, (ChatAnswer if call.call_id.startswith("chat") else CompletionAnswer)(call, tally)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Call, list[TextEvent]]:
    call = draw(st.sampled_from(CALLS))
    events, running = [], list(range(len(call.requests)))
    while running:
        choice = draw(st.sampled_from(running))
        token_ids = tuple(draw(st.lists(st.integers(3, 90), min_size=1, max_size=3)))
        scores = tuple(ScoredToken(i, b"x", -0.5, 1, ()) for i in token_ids) if call.num_logprobs is not None else ()
        reason = draw(st.sampled_from([*FinishReason, None, None, None, None, None, None]))
        events.append(TextEvent(choice, draw(TEXTS), token_ids, reason, 0, scores=scores))
        if reason is not None:
            running.remove(choice)
    return call, events


@given(streams())
def test_frames_are_those_of_the_chunks_one_by_one(stream: tuple[Call, list[TextEvent]]) -> None:
    call, events = stream
    (tally, answer), (framed_tally, framed) = build(call), build(call)
    framer = Framer(framed, sse.frame)
    for event in events:
        tally.add(event)
        framed_tally.add(event)
        assert framer.push(event) == b"".join(sse.frame(chunk) for chunk in answer.chunks(event))
    assert framer.ending() == b"".join(sse.frame(chunk) for chunk in answer.ending()) + sse.DONE


@pytest.mark.parametrize("call", [completion(stream=True), chat(stream=True)])
def test_chunks_of_an_ordinary_call_are_made_for_its_first_two_pieces_alone(call: Call) -> None:
    made: list[Mapping[str, object]] = []

    def frame(chunk: Mapping[str, object]) -> bytes:
        made.append(chunk)
        return sse.frame(chunk)

    framer = Framer(build(call)[1], frame)
    numbers = []
    for text in "abcdefgh":
        assert framer.push(TextEvent(0, text, (1,), None, 0)).count(f'"{text}"'.encode()) == 1
        numbers.append(len(made))
    assert numbers[0] < numbers[1] == numbers[-1]
