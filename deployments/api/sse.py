"""Server-sent events and JSON as bytes. Knows neither HTTP nor OpenAI's shapes; `exchange.py` sends what it makes."""

from collections.abc import Mapping

import orjson

DONE = b"data: [DONE]\n\n"


def to_json(value: object) -> bytes:
    """Encode what JSON can hold; raises `TypeError` for anything else."""
    return orjson.dumps(value)


def frame(value: object) -> bytes:
    """One event. JSON escapes line breaks, so a single `data:` line always holds it."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def named_frame(value: Mapping[str, object]) -> bytes:
    """One event under the name that is its `type`."""
    return b"event: " + str(value["type"]).encode() + b"\n" + frame(value)
