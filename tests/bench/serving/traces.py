"""The engine's own account of when it drew each token, as `paced.py` writes it when a request ends."""

import asyncio
import json
import time
from collections.abc import Collection
from pathlib import Path

# An engine hears of a client that left within milliseconds, or after seconds where a machine is busy.
TIMEOUT_S = 60.0
_PERIOD_S = 0.05


def read_trace(path: Path) -> dict[str, list[float]]:
    """Times at which the engine drew each token, by request id, of the requests that have ended."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    # The last line may be written just now.
    return {row["id"]: row["times_s"] for row in map(json.loads, (line for line in lines if line.endswith("\n")))}


async def wait_for_traces(
    path: Path, request_ids: Collection[str], timeout_s: float = TIMEOUT_S
) -> dict[str, list[float]]:
    """Read the trace once all of these requests have ended at the engine, which is some time after their clients left.

    Raises:
        TimeoutError: names those that have not.
    """
    deadline_s = time.monotonic() + timeout_s
    while missing := set(request_ids) - (trace := read_trace(path)).keys():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{len(missing)} requests have not ended at the engine after {timeout_s:g} s: {missing}")
        await asyncio.sleep(_PERIOD_S)
    return trace
