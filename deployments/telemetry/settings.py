"""What a user can set about metrics and traces. The application has it as `metrics.*` and `ingress.traces.*`."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def check_endpoint(url: str) -> str:
    """Refuse what is no whole address of a collector, and say where its exporter is missing."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and len(parts.path) > 1
        is_whole = is_whole and parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError("must be the whole address where a collector takes OTLP, http://HOST:4318/v1/traces")
    if parts.username is not None:
        raise ValueError("must hold no password; the variable OTEL_EXPORTER_OTLP_HEADERS may, on the ingress's node")
    if not _is_installed(_EXPORTER):
        raise ValueError("needs OpenTelemetry's exporter: pip install opentelemetry-exporter-otlp-proto-http")
    return url


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it
        return False


class MetricsSettings(BaseModel):
    """Who is told metrics, and by which names, beside `/metrics` by ours.

    Attributes:
        to_ray: tell metrics to Ray's own agents, so that the cluster's Prometheus needs no other target.
        vllm_names: tell metrics by vLLM's names, too, for boards and autoscalers that read these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    to_ray: bool = True
    vllm_names: bool = False


@dataclass(frozen=True, slots=True)
class MetricsPlan:
    """The same for a replica.

    Attributes:
        to_ray: see `MetricsSettings`.
        vllm_model: the model's name, where vLLM's names are wanted; else None.
    """

    to_ray: bool = False
    vllm_model: str | None = None


class TraceSettings(BaseModel):
    """Traces of calls, for a collector of OpenTelemetry.

    Attributes:
        endpoint: where a collector takes OTLP over HTTP, as `http://HOST:4318/v1/traces`; without it nothing is traced.
        sample_ratio: share of the calls that are traced; one whose `traceparent` says whether it is follows that.
        service_name: what the collector knows this service by.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    endpoint: Annotated[str, AfterValidator(check_endpoint)] | None = None
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    service_name: str = Field(default="kvrelay", min_length=1, max_length=255)
