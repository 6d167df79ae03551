"""Framing: one event is one line, whatever the text."""

import orjson
import pytest

from deployments.api.sse import DONE, frame, to_json


@pytest.mark.parametrize("text", ["plain", "two\nlines\r\n", "data: [DONE]\n\n", "\u2028 é 👋 \x00"])
def test_an_event_is_one_line_and_comes_back_whole(text: str):
    event = frame({"text": text})
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    line = event.removesuffix(b"\n\n")
    assert b"\n" not in line and b"\r" not in line
    assert orjson.loads(line.removeprefix(b"data: ")) == {"text": text}


def test_the_end_is_openais():
    assert DONE == b"data: [DONE]\n\n"


def test_what_json_cannot_hold_is_an_error():
    with pytest.raises(TypeError):
        to_json(object())
