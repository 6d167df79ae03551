"""From AIPerf's records to samples, whether it kept up, and one real run of it against a server of a few lines."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from load_tests import generator
from load_tests.generator import MAX_CPU_SHARE, MAX_LAG_P99_S, GeneratorError, Target, find_aiperf, judge, match, send
from load_tests.samples import Sample
from load_tests.schedule import Planned
from tests.load_tests.runs import build_sample

START_S = 1_700_000_000.0


def planned(session: str, turn: int = 0, at_s: float | None = 1.0, output_tokens: int = 3) -> Planned:
    return Planned("chat", session, turn, at_s if turn == 0 else None, 0.0, (1, 2, 3, 4), output_tokens)


def record(session: str, issued_s: float, turn: int = 0, late_s: float = 0.0, **changes) -> dict[str, Any]:
    """A line of AIPerf's export: three tokens, 100 ms to the first, 50 ms between."""
    sent_s = START_S + issued_s + late_s
    metadata = {
        "conversation_id": session,
        "turn_index": turn,
        "credit_issued_ns": round((START_S + issued_s) * 1e9),
        "request_start_ns": round(sent_s * 1e9),
        "request_end_ns": round((sent_s + 0.2) * 1e9),
        "was_cancelled": changes.pop("was_cancelled", False),
    }
    metrics = {
        "time_to_first_token": {"value": 100.0, "unit": "ms"},
        "inter_chunk_latency": {"value": [50.0, 50.0], "unit": "ms"},
        "usage_completion_tokens": {"value": 3, "unit": "tokens"},
    }
    return {"metadata": metadata, "metrics": changes.pop("metrics", metrics), **changes}


def test_a_record_becomes_a_sample_in_seconds_since_the_start():
    (sample,), start_s = match([planned("a", at_s=1.0)], [record("a", 1.0, late_s=0.002)], 10)
    assert start_s == pytest.approx(START_S)
    assert (sample.planned_s, sample.error, sample.prompt_tokens, sample.output_tokens) == (1.0, None, 4, 3)
    assert sample.sent_s == pytest.approx(1.002, abs=1e-6)
    assert sample.ttft_s == pytest.approx(0.1)
    assert sample.gaps_s == pytest.approx((0.05, 0.05))
    assert sample.end_s == pytest.approx(1.202, abs=1e-6)


def test_the_run_begins_where_the_most_punctual_request_says():
    schedule = [planned("a", at_s=1.0), planned("b", at_s=2.0)]
    samples, start_s = match(schedule, [record("a", 1.4), record("b", 2.0)], 10)
    assert start_s == pytest.approx(START_S)
    assert [sample.sent_s for sample in samples] == pytest.approx([1.4, 2.0], abs=1e-6)


def test_turns_after_the_first_are_matched_and_those_that_never_came_are_no_failure():
    schedule = [planned("a"), planned("a", 1), planned("a", 2)]
    samples, _ = match(schedule, [record("a", 1.0), record("a", 1.3, turn=1)], 10)
    assert [(sample.turn, sample.planned_s) for sample in samples] == [(0, 1.0), (1, None)]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"error": {"code": 429, "type": "ServerError", "message": "busy"}}, "HTTP 429"),
        ({"error": {"code": None, "type": "ClientConnectorError", "message": "refused"}}, "ClientConnectorError"),
        ({"was_cancelled": True}, "unfinished"),
        ({"metrics": {}}, "wrong number of tokens"),
    ],
)
def test_failures_are_kept_by_kind(changes, kind):
    (sample,), _ = match([planned("a")], [record("a", 1.0, **changes)], 10)
    assert sample.error == kind


def test_a_request_that_was_never_sent_is_a_failure_unless_it_was_due_after_the_end():
    schedule = [planned("a"), planned("b", at_s=2.0), planned("c", at_s=11.0)]
    samples, _ = match(schedule, [record("a", 1.0)], 10)
    assert [(sample.session, sample.error, sample.sent_s) for sample in samples[1:]] == [("b", "not sent", None)]


def test_a_generator_in_time_is_valid():
    health = judge([build_sample(sent_s=20.0)], {"worker": 0.1})
    assert health.problems == ()
    assert health.lag_s["max"] == 0.0


def late(lag_s: float) -> Sample:
    sample = build_sample(sent_s=20.0)
    values = {name: getattr(sample, name) for name in sample.__dataclass_fields__}
    return Sample(**values | {"sent_s": 20.0 + lag_s})


@pytest.mark.parametrize(
    ("samples", "cpu", "complaint"),
    [
        ([late(MAX_LAG_P99_S * 2)], {}, "sent late: p99 200 ms"),
        ([build_sample()], {"worker": MAX_CPU_SHARE + 0.1}, "its process worker used 90% of a core"),
        ([build_sample(error="not sent")], {}, "1 requests were never sent"),
    ],
)
def test_a_generator_that_lagged_makes_the_run_invalid(samples, cpu, complaint):
    (problem,) = judge(samples, cpu).problems
    assert complaint in problem


async def complete(request: Request) -> Response:
    body = await request.json()
    if body["prompt"][0] == 13:
        return JSONResponse({"error": {"message": "no"}}, status_code=503)

    async def stream():
        for index in range(body["max_tokens"]):
            await asyncio.sleep(0.02)
            yield event([{"index": 0, "text": f"t{index}", "finish_reason": None}])
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        yield event([], usage | {"total_tokens": sum(usage.values())})
        yield "data: [DONE]\n\n"

    def event(choices, usage=None):
        values = {"id": "c", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices}
        return f"data: {json.dumps(values | {'usage': usage})}\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


async def metrics(_: Request) -> Response:
    return Response("# TYPE fake_blocks gauge\nfake_blocks 7\n", media_type="text/plain; version=0.0.4")


@pytest.fixture
def server() -> Iterator[str]:
    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/metrics", metrics)]
    config = uvicorn.Config(Starlette(routes=routes), host="127.0.0.1", port=0, log_level="error")
    uvicorn_server = uvicorn.Server(config)
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    while not uvicorn_server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{uvicorn_server.servers[0].sockets[0].getsockname()[1]}"
    uvicorn_server.should_exit = True
    thread.join()


@pytest.fixture
def aiperf(monkeypatch) -> None:
    beside = Path(__file__).parents[2] / ".venv-load" / "bin"
    monkeypatch.setenv("PATH", f"{beside}{os.pathsep}{os.environ['PATH']}")
    if shutil.which("aiperf") is None:
        pytest.skip("aiperf is not installed; `make test` installs it into .venv-load")


@pytest.mark.e2e
@pytest.mark.usefixtures("aiperf")
def test_aiperf_sends_a_schedule_and_brings_back_every_request(server, tmp_path, monkeypatch):
    first_in_line = set()
    monkeypatch.setattr(generator, "put_first", lambda process: first_in_line.add(generator.name_of(process)))
    refused = Planned("chat", "refused", 0, 0.5, 0.0, (13, 14), 3)
    other = Planned("long", "long", 0, 1.0, 0.0, tuple(range(100, 200)), 10)
    schedule = [planned("a", at_s=0.2), planned("a", 1), planned("a", 2), refused, other]
    observed = send(schedule, Target(server, "fake"), 30.0, 30.0, tmp_path / "run")
    assert [(sample.session, sample.turn, sample.error) for sample in observed.samples] == [
        ("a", 0, None),
        ("a", 1, None),
        ("a", 2, None),
        ("refused", 0, "HTTP 503"),
        ("long", 0, None),
    ]
    long = observed.samples[-1]
    assert (long.request_class, long.output_tokens, len(long.gaps_s)) == ("long", 10, 9)
    assert long.sent_s is not None and long.sent_s > 0.9
    # Not each: where the machine is busy, two tokens are read at once, and the gap before them is longer.
    assert median(long.gaps_s) > 0.01
    first, second = observed.samples[:2]
    assert first.end_s is not None and second.sent_s is not None and second.sent_s >= first.end_s
    assert observed.server["fake_blocks avg"] == 7
    assert first_in_line == generator.SENDERS


def test_without_aiperf_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(GeneratorError, match=r"pip install -r load_tests/requirements\.txt"):
        find_aiperf()
