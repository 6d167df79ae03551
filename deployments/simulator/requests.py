"""The requests of a trace, and what became of each.

Reads the form of `load_tests/trace.py`, and the Mooncake paper's.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Prompt tokens for which a trace has one id.
BLOCK_SIZE = 512


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
        is_refused: admission did not let it in.
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


def load_trace(path: Path) -> list[Request]:
    """The requests of a file, in order."""
    rows = _mooncake(path) if path.suffix == ".jsonl" else _ours(path)
    return sorted(rows, key=lambda request: request.at_s)


def _mooncake(path: Path) -> Iterator[Request]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield _request(row["timestamp"] / 1000, row["input_length"], row["output_length"], row["hash_ids"])


def _ours(path: Path) -> Iterator[Request]:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            ids = [int(prefix_id) for prefix_id in row["prefix_ids"].split()]
            yield _request(float(row["arrival_s"]), int(row["prompt_tokens"]), int(row["output_tokens"]), ids)


def _request(at_s: float, prompt_tokens: int, output_tokens: int, ids: list[int]) -> Request:
    chain = tuple(block.to_bytes(16, "big") for block in ids[: prompt_tokens // BLOCK_SIZE])
    return Request(at_s, prompt_tokens, max(1, output_tokens), chain)
