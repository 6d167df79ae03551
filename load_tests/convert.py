"""Public traces in the form that scenarios replay: `python -m load_tests.convert INPUT OUTPUT.csv`.

Knows the forms of Mooncake, BurstGPT and Azure, and how to cut and describe a trace. `trace.py` has our own form.

Sources: https://github.com/kvcache-ai/Mooncake (whose `hash_ids` are our `prefix_ids`), https://github.com/HPMLL/BurstGPT,
https://github.com/Azure/AzurePublicDataset (LLM inference, 2023 and 2024).
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from load_tests.trace import (
    COLUMNS,
    PREFIX_BLOCK_TOKENS,
    TraceError,
    TraceRow,
    checked_row,
    csv_rows,
    finite_time,
    num_blocks,
    open_text,
    read_trace,
    write_trace,
)

_MOONCAKE = ("timestamp", "input_length", "output_length", "hash_ids")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_UNDERSTOOD = f"""understood are CSVs with the columns
  ours      {",".join(COLUMNS)}
  burstgpt  {",".join(_BURSTGPT)} (others are ignored)
  azure     {",".join(_AZURE)} (and no others)
and JSON lines with the fields
  mooncake  {",".join(_MOONCAKE)} (and no others)"""
# Near the traces, so that seconds since then keep their microseconds in a float.
_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Converted:
    """A trace as it was recorded, from arrival 0; `num_skipped` of its rows had no prompt or no answer."""

    rows: list[TraceRow]
    num_skipped: int


def recognise(path: Path) -> str:
    """Say which form a trace has, from its first line: `ours`, `mooncake`, `burstgpt` or `azure`.

    Raises:
        TraceError: it cannot be read, or has none of these.
    """
    with open_text(path) as file:
        line = next((line.strip() for line in file if line.strip()), "")
    with contextlib.suppress(ValueError):
        fields = json.loads(line)
        if isinstance(fields, dict) and set(fields) == set(_MOONCAKE):
            return "mooncake"
    columns = set(line.replace('"', "").split(","))
    if columns == set(_AZURE):
        return "azure"
    for form, needed in (("ours", COLUMNS), ("burstgpt", _BURSTGPT)):
        if columns.issuperset(needed):
            return form
    raise TraceError(f"{path}: begins with {line[:100]!r}, which is no known form of trace; {_UNDERSTOOD}")


def convert_mooncake(path: Path) -> Converted:
    """Read Mooncake's JSON lines: milliseconds, and a hash id for each block of 512 tokens."""

    def parse(where: str, line: str) -> TraceRow:
        try:
            time_ms, prompt, output, ids = (json.loads(line)[name] for name in _MOONCAKE)
        except (ValueError, TypeError, LookupError):
            raise TraceError(f"{where}: {line[:100]!r} is not JSON with the fields {', '.join(_MOONCAKE)}") from None
        if not isinstance(ids, list):
            raise TraceError(f"{where}: hash_ids: {ids!r} is not a list of whole numbers")
        return checked_row(where, _MOONCAKE, finite_time(where, "timestamp", time_ms) / 1e3, (prompt, output), ids)

    with open_text(path) as file:
        return _in_order(path, (parse(f"{path}:{n}", line.strip()) for n, line in enumerate(file, 1) if line.strip()))


def convert_burstgpt(path: Path) -> Converted:
    """Read a BurstGPT CSV; answers of no tokens are its failures."""
    return _in_order(path, (row for _, row in csv_rows(path, _BURSTGPT, finite_time)))


def convert_azure(path: Path) -> Converted:
    """Read an Azure LLM inference CSV; its instants are cut to microseconds, UTC where they name no offset."""
    return _in_order(path, (row for _, row in csv_rows(path, _AZURE, _instant)))


_READERS = {
    "ours": lambda path: Converted(read_trace(path), num_skipped=0),
    "mooncake": convert_mooncake,
    "burstgpt": convert_burstgpt,
    "azure": convert_azure,
}


def _instant(where: str, name: str, value: str) -> float:
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        allowed = "an instant such as 2023-11-16 18:17:03.9799600 or 2024-05-10 00:00:00.01+00:00"
        raise TraceError(f"{where}: {name}: {value!r} is not {allowed}") from None
    return ((instant if instant.tzinfo else instant.replace(tzinfo=UTC)) - _EPOCH).total_seconds()


def _in_order(path: Path, requests: Iterable[TraceRow]) -> Converted:
    recorded = sorted(requests, key=lambda row: row.arrival_s)
    rows = [row for row in recorded if row.prompt_tokens and row.output_tokens]
    if not rows:
        raise TraceError(f"{path}: none of its {len(recorded)} rows has both a prompt and an answer; one is needed")
    return Converted(_from_zero(rows), len(recorded) - len(rows))


def _from_zero(rows: Sequence[TraceRow], speed: float = 1.0) -> list[TraceRow]:
    start_s = rows[0].arrival_s if rows else 0.0
    return [replace(row, arrival_s=round((row.arrival_s - start_s) / speed, 6)) for row in rows]


def window(rows: Sequence[TraceRow], start_s: float, duration_s: float, speed: float = 1.0) -> list[TraceRow]:
    """Keep what arrives in [start_s, start_s + duration_s), from arrival 0 on, `speed` times as fast."""
    return _from_zero([row for row in rows if start_s <= row.arrival_s < start_s + duration_s], speed)


def clip(row: TraceRow, max_prompt_tokens: int | None, max_output_tokens: int | None) -> TraceRow:
    """Bound the lengths of a request; a shorter prompt has fewer prefix blocks."""
    prompt_tokens = min(row.prompt_tokens, max_prompt_tokens or row.prompt_tokens)
    output_tokens = min(row.output_tokens, max_output_tokens or row.output_tokens)
    return TraceRow(row.arrival_s, prompt_tokens, output_tokens, row.prefix_ids[: num_blocks(prompt_tokens)])


def share_seen_before(rows: Sequence[TraceRow]) -> float:
    """Compute the share of the prompt tokens that lie in prefix blocks which an earlier request began with, too."""
    tree: dict[tuple[int, int], int] = {}
    num_seen_tokens = 0
    for row in rows:
        node = num_seen_blocks = 0
        for prefix_id in row.prefix_ids:
            # Below a new node all nodes are new: only the common beginning of two chains is counted.
            num_seen_blocks += (node, prefix_id) in tree
            node = tree.setdefault((node, prefix_id), len(tree) + 1)
        num_seen_tokens += min(num_seen_blocks * PREFIX_BLOCK_TOKENS, row.prompt_tokens)
    return num_seen_tokens / sum(row.prompt_tokens for row in rows)


def summarize(rows: Sequence[TraceRow]) -> list[str]:
    """Describe a trace in a few lines."""

    def percentiles(name: str, tokens: list[int]) -> str:
        p50, p99 = (sorted(tokens)[-(-len(tokens) * percent // 100) - 1] for percent in (50, 99))
        return f"{name} tokens: p50 {p50}, p99 {p99}"

    seconds = rows[-1].arrival_s - rows[0].arrival_s
    rate = f"{len(rows) / seconds:.3f} requests/s" if seconds else "all at once"
    return [
        f"{len(rows)} rows in {seconds:.3f} s: {rate}",
        percentiles("prompt", [row.prompt_tokens for row in rows]),
        percentiles("output", [row.output_tokens for row in rows]),
        f"{share_seen_before(rows):.1%} of the prompt tokens are in prefix blocks seen before",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Convert, cut and describe a trace; 0 when it was written, 1 when it could not be."""
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        converted = _READERS[recognise(options.input)](options.input)
        cut = window(converted.rows, options.start_s, options.duration_s, options.speed)
        if not cut:
            end_s = converted.rows[-1].arrival_s
            raise TraceError(f"{options.input}: no row in that window; arrivals are from 0 to {end_s:g} s")
        rows = [clip(row, options.max_prompt_tokens, options.max_output_tokens) for row in cut]
        write_trace(options.output, rows)
    except (TraceError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    num_clipped = sum(after != before for after, before in zip(rows, cut, strict=True))
    print("\n".join(summarize(rows)))
    print(f"{converted.num_skipped} rows of the input skipped (no prompt or no answer), {num_clipped} clipped")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m load_tests.convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Convert a trace to the form that scenarios replay, cut a window of it, and describe it.",
        epilog=f"The form of INPUT is told from its first line; {_UNDERSTOOD}",
    )
    parser.add_argument("input", type=Path, metavar="INPUT", help="the trace to read")
    parser.add_argument("output", type=Path, metavar="OUTPUT.csv", help="where to write it in our form")
    for option, kind, default, meaning in (
        ("--start-s", float, 0.0, "skip the first seconds of INPUT (default: none)"),
        ("--duration-s", float, math.inf, "keep so many seconds of INPUT (default: all)"),
        ("--max-prompt-tokens", int, None, "cut longer prompts, and their prefix blocks"),
        ("--max-output-tokens", int, None, "cut longer answers"),
        ("--speed", float, 1.0, "divide arrivals by this, after the window is cut (default: 1)"),
    ):
        parser.add_argument(option, type=kind, default=default, metavar="N" if kind is int else "X", help=meaning)
    return parser


def _check(options: argparse.Namespace) -> None:
    for option, lower, upper in (
        ("start_s", 0.0, 1e12),
        ("duration_s", 1e-6, math.inf),
        ("max_prompt_tokens", 1, math.inf),
        ("max_output_tokens", 1, math.inf),
        ("speed", 1e-6, 1e6),
    ):
        value = vars(options)[option]
        if value is not None and not lower <= value <= upper:
            raise TraceError(f"--{option.replace('_', '-')}: {value} is not from {lower:g} to {upper:g}")


if __name__ == "__main__":
    sys.exit(main())
