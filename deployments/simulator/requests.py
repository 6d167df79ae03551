"""The requests of a trace, and what became of each.

Reads the form of `load_tests/trace.py`, and the Mooncake paper's.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Prompt tokens for which a trace has one id.
BLOCK_SIZE = 512

_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_ids")
_MOONCAKE = "timestamp (ms), input_length, output_length, hash_ids"


@dataclass(slots=True)
class Request:
    """One request, and what became of it.

    Attributes:
        at_s: when it comes.
        prompt_tokens: of its prompt.
        output_tokens: that it generates.
        chain: names of the prompt's full blocks, as far as the trace tells them.
        ttft_s: to its first token; None: it had none.
        end_s: when its last token came; None: it has none.
        is_refused: admission did not let it in; or it was held for a replica, and too many were, or none came in time.
        gaps_over: of its tokens, that came later than the bound after the one before.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    chain: tuple[bytes, ...] = ()
    ttft_s: float | None = None
    end_s: float | None = None
    is_refused: bool = False
    gaps_over: float = 0.0


class TraceError(ValueError):
    """A trace cannot be read; the message has the file, the line and what is wrong with it."""


def load_trace(path: Path) -> list[Request]:
    """The requests of a file, in order.

    Raises:
        TraceError: it has none, or one that cannot be understood.
    """
    rows = _mooncake(path) if path.suffix == ".jsonl" else _ours(path)
    try:
        requests = sorted(rows, key=lambda request: request.at_s)
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if not requests:
        raise TraceError(f"{path}: the trace has no request; at least one row is needed")
    return requests


def _mooncake(path: Path) -> Iterator[Request]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield _request(row["timestamp"] / 1000, row["input_length"], row["output_length"], row["hash_ids"])
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(f"{path}:{number}: {error!r}; needed are {_MOONCAKE}") from None


def _ours(path: Path) -> Iterator[Request]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
            raise TraceError(f"{path}:1: no column {', '.join(missing)}; needed are {', '.join(_COLUMNS)}")
        for row in rows:
            try:
                ids = [int(prefix_id) for prefix_id in row["prefix_ids"].split()]
                yield _request(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]), ids)
            except (ValueError, TypeError, AttributeError) as error:
                raise TraceError(f"{path}:{rows.line_num}: {error}; needed are {', '.join(_COLUMNS)}") from None


def _request(at_s: float, prompt_tokens: int, output_tokens: int, ids: list[int]) -> Request:
    if not 0 <= at_s < math.inf or prompt_tokens < 1:
        raise ValueError(f"{prompt_tokens} prompt tokens at {at_s} s; at least 1, and a time of at least 0, are needed")
    chain = tuple(block.to_bytes(16, "big") for block in ids[: prompt_tokens // BLOCK_SIZE])
    return Request(at_s, prompt_tokens, max(1, output_tokens), chain)
