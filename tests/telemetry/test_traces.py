"""A call becomes a trace, if it is sampled: its spans lie within each other, and hold nothing that was said."""

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from deployments.api.observer import EndedCall, Outcome
from deployments.telemetry import settings, traces
from deployments.telemetry.settings import TraceSettings
from deployments.telemetry.traces import CallTracer, LogsOnce
from tests.telemetry.calls import CALL
from tests.telemetry.collector import Collector, collecting

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(autouse=True)
def loud() -> Iterator[None]:
    """A tracer quiets the exporter's own logger, for good."""
    exporters = logging.getLogger("opentelemetry")
    yield
    exporters.setLevel(logging.NOTSET)


def trace(collector: Collector, *calls: EndedCall, sample_ratio: float = 1.0) -> None:
    collector.spans.clear()
    wanted = TraceSettings(endpoint=collector.url, sample_ratio=sample_ratio, service_name="mine")
    tracer = CallTracer(wanted, "m", "i0")
    for call in calls:
        tracer(call)
    tracer.close()


def test_a_call_becomes_spans_that_lie_within_each_other(collector: Collector) -> None:
    trace(collector, CALL)
    by_id = {span.span_id: span for span in collector.spans}
    (root,) = [span for span in collector.spans if not span.parent_id]
    assert (root.name, root.begin_ns, root.seconds, root.service) == ("chat m", 10**18, 1.5, "mine")
    assert root.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "kvrelay",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.response.time_to_first_chunk": 0.5,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "kvrelay.outcome": "ok",
        "kvrelay.request_id": "mine",
    }
    names = sorted(span.name for span in collector.spans if span is not root)
    prefill = ["prefill", "prefill.compute", "prefill.queue"]
    assert names == ["attempt", "attempt", "decode", "decode.queue", "handoff", "ingress", *prefill]
    for span in collector.spans:
        if span is not root:
            parent = by_id[span.parent_id]
            assert parent.begin_ns <= span.begin_ns <= span.end_ns <= parent.end_ns
            assert span.trace_id == root.trace_id
    (lost,) = [span for span in collector.spans if span.is_error]
    assert (lost.name, lost.attributes["kvrelay.replica"]) == ("attempt", "d1")


@pytest.mark.parametrize(
    ("flags", "sample_ratio", "is_traced"), [("01", 0.0, True), ("00", 1.0, False), ("", 0.0, False), ("", 1.0, True)]
)
def test_the_caller_decides_whether_its_call_is_traced_and_else_the_ratio(
    collector: Collector, flags: str, sample_ratio: float, is_traced: bool
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-{flags}", "tracestate": "vendor=1"} if flags else {}
    trace(collector, replace(CALL, trace_headers=headers), sample_ratio=sample_ratio)
    assert bool(collector.spans) == is_traced
    if flags and is_traced:
        (root,) = [span for span in collector.spans if span.name == "chat m"]
        assert (root.trace_id, root.parent_id) == (TRACE, SPAN)


HOSTILE = "", "00", f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01," * 2, "\x00\xff" * 4000


@pytest.mark.parametrize("header", HOSTILE)
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(collector: Collector, header: str) -> None:
    trace(collector, replace(CALL, trace_headers={"traceparent": header, "tracestate": header}))
    (root,) = [span for span in collector.spans if not span.parent_id]
    assert root.trace_id != TRACE


def test_a_call_that_failed_or_never_came_to_the_pools_is_one_span(collector: Collector) -> None:
    failed = replace(CALL, outcome=Outcome.FAILED, status=None, ttft_s=None, receipt=None, path="/app/v1/completions")
    trace(collector, failed, replace(failed, outcome=Outcome.INVALID))
    assert [(span.name, span.is_error) for span in collector.spans] == [
        ("text_completion m", True),
        ("text_completion m", False),  # the caller was at fault
    ]
    assert [span.attributes["error.type"] for span in collector.spans] == ["failed", "invalid"]


def test_who_calls_and_what_was_said_is_in_no_span(collector: Collector) -> None:
    call = replace(CALL, user="alice", labels={"metadata": {"secret": "alice"}}, key="alice")
    trace(collector, call)
    assert collector.spans and "alice" not in str(collector.spans)


def test_a_collector_that_is_down_is_said_once_and_no_call_waits_for_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "_TIMEOUT_S", 0.2)
    with socket.socket() as closed, caplog.at_level(logging.INFO):
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1/traces"
        tracer = CallTracer(TraceSettings(endpoint=url), "m", "i0")
        begun_s = time.thread_time()
        for _ in range(300):  # which are more spans than are kept
            tracer(CALL)
        assert (time.thread_time() - begun_s) / 300 < 0.01
        tracer.close()
    (line,) = caplog.records
    assert url in line.getMessage() and "takes no traces" in line.getMessage()


class Moody(SpanExporter):
    """Takes spans, refuses them or breaks, one after the other."""

    def __init__(self, *moods: SpanExportResult | Exception) -> None:
        self._moods = list(moods)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        mood = self._moods.pop(0)
        if isinstance(mood, Exception):
            raise mood
        return mood


def test_each_turn_of_a_collector_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    takes, refuses = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
    moods = takes, refuses, OSError("gone"), refuses, takes, takes, refuses
    exporter = LogsOnce(Moody(*moods), "http://c/v1/traces")
    with caplog.at_level(logging.INFO):
        told = [exporter.export([]) is takes for _ in moods]
    assert told == [mood is takes for mood in moods]
    assert ["again" in record.getMessage() for record in caplog.records] == [False, True, False]


def test_where_the_exporter_is_missing_the_setting_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "_EXPORTER", "opentelemetry.exporter.nobodys.http")
    with pytest.raises(ValueError, match="pip install opentelemetry-exporter-otlp-proto-http"):
        TraceSettings(endpoint="http://collector:4318/v1/traces")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:4318", "whole address"),
        ("grpc://collector:4317/v1/traces", "whole address"),
        ("http://collector:4318", "whole address"),
        ("http://collector:99999/v1/traces", "whole address"),
        ("http://collector/v1/tra ces", "whole address"),
        ("http://a:secret@collector/v1/traces", "no password"),
    ],
)
def test_an_endpoint_that_is_none_is_refused(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TraceSettings(endpoint=url)
