"""Whoever compares a stream with its trace waits until the engine has written it."""

import asyncio
import json
from pathlib import Path

import pytest

from tests.bench.serving.traces import read_trace, wait_for_traces


def line(request_id: str, *times_s: float) -> str:
    return json.dumps({"id": request_id, "times_s": times_s}) + "\n"


async def test_a_request_that_ends_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line("a", 1.0, 2.0))
    waiting = asyncio.create_task(wait_for_traces(path, ["a", "b"]))
    await asyncio.sleep(0)
    assert not waiting.done()
    with path.open("a") as file:
        file.write(line("b", 1.5))
    assert await waiting == {"a": [1.0, 2.0], "b": [1.5]}


async def test_a_request_that_never_ends_is_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line("a", 1.0))
    with pytest.raises(TimeoutError, match=r"1 requests .*'b'"):
        await wait_for_traces(path, ["a", "b"], timeout_s=0.0)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line("a", 1.0) + line("b", 1.5)[:-5])
    assert read_trace(path) == {"a": [1.0]}


def test_before_any_request_has_ended_there_is_no_trace(tmp_path: Path) -> None:
    assert read_trace(tmp_path / "trace.jsonl") == {}
