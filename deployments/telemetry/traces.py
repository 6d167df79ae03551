"""Traces of calls for OpenTelemetry, made of receipts once a call is over. Nothing that was said is in them.

Names are those of OpenTelemetry's conventions for generative AI, where they have one, else `kvrelay.…`. Loaded only
where traces are wanted.
"""

import logging
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.api.observer import EndedCall, Outcome
from deployments.telemetry.settings import TraceSettings
from deployments.telemetry.waterfall import Part, Value, lay_out

logger = logging.getLogger(__name__)

# A span goes out so soon, and is dropped if the collector does not take it in that time.
_DELAY_MS = 1000
_TIMEOUT_S = 5.0
_CONTEXT = TraceContextTextMapPropagator()
_SCOPE = InstrumentationScope("kvrelay")
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status()


class CallTracer:
    """Follows calls, and exports a trace of each that is sampled.

    Its spans are over when they are made, so none comes of a `Tracer`, which would take four times as long.

    Args:
        settings: see there.
        model: its name in the API.
        replica: name of this ingress replica.
    """

    def __init__(self, settings: TraceSettings, model: str, replica: str) -> None:
        assert settings.endpoint is not None, "nobody wants traces"
        self._model = model
        self._sampler = ParentBased(TraceIdRatioBased(settings.sample_ratio))
        self._ids = RandomIdGenerator()
        self._resource = Resource.create({"service.name": settings.service_name, "service.instance.id": replica})
        exporter = LogsOnce(OTLPSpanExporter(endpoint=settings.endpoint, timeout=_TIMEOUT_S), settings.endpoint)
        self._processor = BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS)

    def __call__(self, call: EndedCall) -> None:
        """Trace a call, if it is sampled."""
        caller = _CONTEXT.extract(call.trace_headers, Context())
        parent = get_current_span(caller).get_span_context()
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        sampling = self._sampler.should_sample(caller, trace_id, call.path)
        if sampling.decision is not Decision.RECORD_AND_SAMPLE:
            return
        context = self._context(trace_id, sampling.trace_state)
        self._add_parts([] if call.receipt is None else lay_out(call.receipt, call.seconds), context, call.began_s)
        operation = "text_completion" if call.path.endswith("/v1/completions") else "chat"
        is_failed = call.outcome in (Outcome.FAILED, Outcome.STALLED)
        span = ReadableSpan(
            f"{operation} {self._model}",
            context,
            parent if parent.is_valid else None,
            self._resource,
            _attributes(call, operation, self._model),
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR) if is_failed else _UNSET,
            start_time=_nanoseconds(call.began_s),
            end_time=_nanoseconds(call.began_s + call.seconds),
            instrumentation_scope=_SCOPE,
        )
        self._processor.on_end(span)

    def _add_parts(self, parts: Sequence[Part], parent: SpanContext, began_s: float) -> None:
        for part in parts:
            context = self._context(parent.trace_id, parent.trace_state)
            self._add_parts(part.parts, context, began_s)
            span = ReadableSpan(
                part.name,
                context,
                parent,
                self._resource,
                {f"kvrelay.{name}": value for name, value in part.values.items()},
                status=Status(StatusCode.ERROR, part.error) if part.error else _UNSET,
                start_time=_nanoseconds(began_s + part.begin_s),
                end_time=_nanoseconds(began_s + part.end_s),
                instrumentation_scope=_SCOPE,
            )
            self._processor.on_end(span)

    def _context(self, trace_id: int, state: TraceState | None) -> SpanContext:
        return SpanContext(trace_id, self._ids.generate_span_id(), False, _SAMPLED, state)

    def close(self) -> None:
        """Export what there is."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]  # of OpenTelemetry


def _attributes(call: EndedCall, operation: str, model: str) -> dict[str, Value | Sequence[str]]:
    attributes: dict[str, Value | Sequence[str] | None] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "kvrelay",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": call.call_id,
        "gen_ai.response.finish_reasons": call.finish_reasons or None,
        "gen_ai.response.time_to_first_chunk": call.ttft_s,
        "gen_ai.usage.input_tokens": call.num_prompt_tokens,
        "gen_ai.usage.output_tokens": call.num_generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": call.num_cached_tokens,
        "http.request.method": "POST",
        "http.response.status_code": None if call.status is None else int(call.status),
        "url.path": call.path,
        "kvrelay.outcome": call.outcome.value,
        "kvrelay.request_id": call.request_id,
        "error.type": None if call.outcome is Outcome.OK else call.outcome.value,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


class LogsOnce(SpanExporter):
    """Says once that a collector takes nothing, and once that it does again; the exporter's own lines come at each try.

    It runs in a thread of OpenTelemetry's, which drops what has waited for too long.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._is_failing = False
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result, reason = self._exporter.export(spans), "it does not answer, or refuses them"
        except Exception as error:
            result, reason = SpanExportResult.FAILURE, repr(error)
        is_failing = result is not SpanExportResult.SUCCESS
        if is_failing and not self._is_failing:
            logger.warning("%s takes no traces; they are dropped until it does: %s", self._endpoint, reason)
        elif self._is_failing and not is_failing:
            logger.warning("%s takes traces again", self._endpoint)
        self._is_failing = is_failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
