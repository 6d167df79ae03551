"""Traces to replay: their form, its reader and its writer. `convert.py` makes them of public ones.

A trace is a CSV of arrivals and lengths, without text: `arrival_s,prompt_tokens,output_tokens,prefix_ids`, in order of
arrival; further columns are ignored. `prefix_ids` are separated by spaces, and may be none: each stands for one block
of `PREFIX_BLOCK_TOKENS` leading tokens of the prompt, the last one perhaps for a part of it; prompts share what the
chains of their ids share. Knows nothing of scenarios; `schedule.py` makes requests of the rows.
"""

import contextlib
import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PREFIX_BLOCK_TOKENS = 512
COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_ids")


class TraceError(ValueError):
    """A trace cannot be used; the message names the file, the line, the value and what is allowed."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace; `arrival_s` counts from the trace's start."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...]


def read_trace(path: Path) -> list[TraceRow]:
    """Read a trace in our form.

    Raises:
        TraceError: it cannot be read, has no rows, or a row is not as the module says.
    """
    rows: list[TraceRow] = []
    for where, row in csv_rows(path, COLUMNS, finite_time, least=1):
        if rows and row.arrival_s < rows[-1].arrival_s:
            above_s = rows[-1].arrival_s
            raise TraceError(f"{where}: arrival_s: {row.arrival_s!r} is before {above_s!r} of the row above; sort rows")
        rows.append(row)
    if not rows:
        raise TraceError(f"{path}: the trace is empty; at least one row is needed below the header")
    return rows


def write_trace(path: Path, rows: Iterable[TraceRow]) -> None:
    """Write a trace in our form; `read_trace` gives the same rows back."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow((row.arrival_s, row.prompt_tokens, row.output_tokens, " ".join(map(str, row.prefix_ids))))


def num_blocks(num_tokens: int) -> int:
    """Count the blocks that so many leading tokens touch."""
    return -(-num_tokens // PREFIX_BLOCK_TOKENS)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a trace; what cannot be read becomes a `TraceError`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None


def csv_rows(
    path: Path, names: Sequence[str], arrival: Callable[[str, str, str], float], least: int = 0
) -> Iterator[tuple[str, TraceRow]]:
    """Yield where each row is, and the row; `names` as in `checked_row`."""
    with open_text(path) as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or ()
        if missing := [name for name in names if name not in header]:
            raise TraceError(f"{path}:1: no column {', '.join(missing)}; needed are {','.join(names)}")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if None in cells or None in cells.values():
                raise TraceError(f"{where}: not as many cells as the header, which has {len(header)}")
            time, prompt, output, *ids = (cells[name] for name in names)
            at_s = arrival(where, names[0], time)
            yield where, checked_row(where, names, at_s, (prompt, output), " ".join(ids).split(), least)


def checked_row(
    where: str, names: Sequence[str], at_s: float, lengths: Sequence[object], ids: Sequence[object], least: int = 0
) -> TraceRow:
    """Check a row: `names` are those of arrival, prompt, output and, where there are any, prefix ids."""
    prompt_tokens, output_tokens = (_whole(where, names[1 + i], value, least) for i, value in enumerate(lengths))
    prefix_ids = tuple(_whole(where, names[3], value) for value in ids)
    if len(prefix_ids) > num_blocks(prompt_tokens):
        allowed = f"{prompt_tokens} prompt tokens are {num_blocks(prompt_tokens)} of {PREFIX_BLOCK_TOKENS} at most"
        raise TraceError(f"{where}: {names[3]}: {len(prefix_ids)} blocks; {allowed}")
    return TraceRow(at_s, prompt_tokens, output_tokens, prefix_ids)


def _whole(where: str, name: str, value: object, least: int | None = None) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise TraceError(f"{where}: {name}: {value!r} is not a whole number{bound}")
    return number


def finite_time(where: str, name: str, value: object) -> float:
    """Check a time that is a number; `where` and `name` are for the error."""
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise TraceError(f"{where}: {name}: {value!r} is not a finite number of at least 0")
    return number
