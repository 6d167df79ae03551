"""The requests of a trace, and what became of each.

Reads the form of `load_tests/trace.py`, and the Mooncake paper's.
"""

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Prompt tokens for which a trace has one id.
BLOCK_SIZE = 512

_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_ids")
_THEIRS = ("timestamp", "input_length", "output_length", "hash_ids")  # the first in ms
# Bounds of a row: what is beyond is no trace of requests, and would be played for ever.
MAX_ARRIVAL_S, MAX_TOKENS, _MAX_ID = 10_000_000, 1_000_000, 2**128 - 1


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
        is_refused: admission did not let it in, or no KV pool holds it; or it was held for a replica, and too many
            were, or none came in time.
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
        TraceError: it has none, or one that cannot be understood; or those of our own form are not in order.
    """
    try:
        requests = list(_mooncake(path) if path.suffix == ".jsonl" else _ours(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None
    if not requests:
        raise TraceError(f"{path}: the trace has no request; at least one row is needed")
    return sorted(requests, key=lambda request: request.at_s)  # theirs need not be in order


def _mooncake(path: Path) -> Iterator[Request]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{where}: cannot be read as JSON: {error}") from None
            if not isinstance(row, dict) or (missing := [name for name in _THEIRS if name not in row]):
                lacks = "no object" if not isinstance(row, dict) else f"no {', '.join(missing)}"
                raise TraceError(f"{where}: {lacks}; needed are {', '.join(_THEIRS)}")
            time, prompt, output, ids = (row[name] for name in _THEIRS)
            if not isinstance(ids, list):
                raise TraceError(f"{where}: {_THEIRS[3]}: {ids!r:.80} is not a list")
            at_s = _time(where, _THEIRS[0], time, 1000 * MAX_ARRIVAL_S) / 1000
            yield _request(where, _THEIRS, at_s, (prompt, output), ids)


def _ours(path: Path) -> Iterator[Request]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows, above_s = csv.DictReader(file), 0.0
        try:
            if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
                raise TraceError(f"{path}:1: no column {', '.join(missing)}; needed are {', '.join(_COLUMNS)}")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    raise TraceError(
                        f"{where}: not as many cells as the header, which has {len(rows.fieldnames or ())}"
                    )
                time, prompt, output, ids = (row[name] for name in _COLUMNS)
                at_s = _time(where, _COLUMNS[0], time, MAX_ARRIVAL_S)
                if at_s < above_s:
                    raise TraceError(f"{where}: arrival_s: {at_s!r} is before {above_s!r} of the row above; sort rows")
                above_s = at_s
                yield _request(where, _COLUMNS, at_s, (prompt, output), ids.split())
        except csv.Error as error:
            raise TraceError(f"{path}:{rows.reader.line_num}: {error}") from None


def _request(
    where: str, names: Sequence[str], at_s: float, lengths: Sequence[object], ids: Sequence[object]
) -> Request:
    """Of a row; `names` are those of arrival, prompt, output and prefix ids."""
    prompt, output = (_whole(where, names[1 + i], value, 1, MAX_TOKENS) for i, value in enumerate(lengths))
    numbers = [_whole(where, names[3], value, 0, _MAX_ID) for value in ids]
    most = -(-prompt // BLOCK_SIZE)
    if len(numbers) > most:
        raise TraceError(
            f"{where}: {names[3]}: {len(numbers)} blocks; {prompt} prompt tokens are {most} of {BLOCK_SIZE} at most"
        )
    return Request(at_s, prompt, output, tuple(one.to_bytes(16, "big") for one in numbers[: prompt // BLOCK_SIZE]))


def _whole(where: str, name: str, value: object, least: int, most: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        bounds = f"{least:,} to {most:,}" if most < _MAX_ID else f"{least:,} to 2**128 - 1"
        raise TraceError(f"{where}: {name}: {_shown(value)} is not a whole number of {bounds}")
    return number


def _time(where: str, name: str, value: object, most: float) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not 0 <= number <= most:
        raise TraceError(
            f"{where}: {name}: {_shown(value)} is not a number of 0 to {most:,.0f} since the trace's start"
        )
    return number


def _shown(value: object) -> str:
    return f"{value!s:.60}" if isinstance(value, int) and not isinstance(value, bool) else f"{value!r:.60}"
