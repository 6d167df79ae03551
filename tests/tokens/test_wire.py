"""Frames come back as they were, however the bytes are cut; anything else is refused."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.messages import FinishReason, TokenOutput
from deployments.tokens.wire import MAX_FRAME_BYTES, FrameReader, WireError, encode

outputs = st.builds(
    TokenOutput,
    request_id=st.text(max_size=50),
    index=st.integers(0, 2**40),
    token_ids=st.lists(st.integers(0, 2**31), min_size=1, max_size=5).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    num_cached_tokens=st.integers(0, 2**31),
)
steps = st.lists(st.lists(outputs, max_size=5), max_size=5)


@given(steps=steps, cuts=st.lists(st.integers(0, 2000)))
def test_frames_survive_any_cut(steps: list[list[TokenOutput]], cuts: list[int]) -> None:
    data = b"".join(encode(step) for step in steps)
    places = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
    reader = FrameReader()
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    assert [frame for piece in pieces for frame in reader.feed(piece)] == steps


def test_a_frame_that_announces_too_much_is_refused() -> None:
    with pytest.raises(WireError, match=str(MAX_FRAME_BYTES)):
        list(FrameReader().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big")))


@pytest.mark.parametrize(
    "body", [b"\xc1", msgspec.msgpack.encode(["r", 0, [1]]), msgspec.msgpack.encode([["r", "0", [1]]])]
)
def test_a_frame_of_something_else_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="no list of token outputs"):
        list(FrameReader().feed(len(body).to_bytes(4, "big") + body))
