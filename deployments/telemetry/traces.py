"""Traces of calls for OpenTelemetry, made of receipts once a call is over. Nothing that was said is in them.

Names are those of OpenTelemetry's conventions for generative AI, where they have one, else `kvrelay.…`. Loaded only
where traces are wanted.
"""

import logging
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.api.observer import EndedCall, Outcome
from deployments.telemetry.settings import TraceSettings
from deployments.telemetry.waterfall import Part, Value, lay_out

logger = logging.getLogger(__name__)

# A span goes out so soon, and is dropped if the collector does not take it in that time.
_DELAY_MS = 1000
_TIMEOUT_S = 5.0
_CONTEXT = TraceContextTextMapPropagator()


class CallTracer:
    """Follows calls, and exports a trace of each that is sampled.

    Args:
        settings: see there.
        model: its name in the API.
        replica: name of this ingress replica.
    """

    def __init__(self, settings: TraceSettings, model: str, replica: str) -> None:
        assert settings.endpoint is not None, "nobody wants traces"
        self._model = model
        resource = Resource.create({"service.name": settings.service_name, "service.instance.id": replica})
        # Not OpenTelemetry's global one: Ray Serve would trace its own calls, too.
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)), resource=resource, shutdown_on_exit=False
        )
        exporter = LogsOnce(OTLPSpanExporter(endpoint=settings.endpoint, timeout=_TIMEOUT_S), settings.endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS))
        self._tracer = self._provider.get_tracer("kvrelay")

    def __call__(self, call: EndedCall) -> None:
        """Trace a call, if it is sampled."""
        operation = "text_completion" if call.path.endswith("/v1/completions") else "chat"
        root = self._tracer.start_span(
            f"{operation} {self._model}",
            _CONTEXT.extract(call.trace_headers, Context()),
            SpanKind.SERVER,
            start_time=_nanoseconds(call.began_s),
        )
        if root.is_recording():
            root.set_attributes(_attributes(call, operation, self._model))
            if call.outcome is not Outcome.OK:
                root.set_attribute("error.type", call.outcome.value)
            if call.outcome in (Outcome.FAILED, Outcome.STALLED):
                root.set_status(Status(StatusCode.ERROR))
            if call.receipt is not None:
                self._add(root, lay_out(call.receipt, call.seconds), call.began_s)
        root.end(_nanoseconds(call.began_s + call.seconds))

    def _add(self, parent: Span, parts: Sequence[Part], began_s: float) -> None:
        context = set_span_in_context(parent, Context())
        for part in parts:
            values = {f"kvrelay.{name}": value for name, value in part.values.items()}
            start_time = _nanoseconds(began_s + part.begin_s)
            span = self._tracer.start_span(part.name, context, attributes=values, start_time=start_time)
            if part.error:
                span.set_status(Status(StatusCode.ERROR, part.error))
            self._add(span, part.parts, began_s)
            span.end(_nanoseconds(began_s + part.end_s))

    def close(self) -> None:
        """Export what there is."""
        self._provider.shutdown()


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
