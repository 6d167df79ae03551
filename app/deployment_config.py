"""What a user can set of each deployment, and what Ray Serve is told of it. `app/config.py` puts them together."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ray._private.label_utils import validate_label_selector
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig

from deployments.api.body import MAX_BODY_BYTES
from deployments.api.control_tokens import ControlPolicy
from deployments.api.cors import check_origin
from deployments.api.keys import check_source
from deployments.api.reasoning.support import ReasoningParserName
from deployments.api.tools.families import ToolParserName
from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.telemetry.settings import TraceSettings

# Serve starts a new replica when a check fails three times, or at once when the replica is gone: one whose engine does
# not answer the check leaves by itself.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 20.0
# Of an integer in what Serve sends its controller.
_MAX_COUNT = 2**31 - 1
# More than any machine has; Ray's own bound overflows.
_MAX_CPUS = 4096
# The asynchronous front of an engine: it passes messages on and never computes.
FRONT_NUM_CPUS = 0.1


def _check_amount(value: float) -> float:
    """Ray counts resources in ten-thousandths."""
    if 0 < value < 1e-4:
        raise ValueError("must be 0 or at least 0.0001")
    return value


Amount = Annotated[float, Field(ge=0), AfterValidator(_check_amount)]


class SpeculationSettings(SpeculationConfig):
    """Settings of guesses as arguments: whether they fit is judged once those of all places are put together."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        return self


class EngineSettings(EngineConfig):
    """The engine's settings as arguments: `model` has its own argument, and only what is given overrides."""

    model: str = Field(default="", exclude=True)
    speculation: SpeculationSettings = Field(default_factory=SpeculationSettings)

    @model_validator(mode="before")
    @classmethod
    def _model_is_shared(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "model" in values:
            raise ValueError("both pools run one model; set the argument `model`")
        return values


class ReplicaConfig(BaseModel):
    """How many replicas a deployment has and where they run.

    Attributes:
        min_replicas: replicas kept at all times; 0, where the planner starts them: of prefill and decode.
        initial_replicas: replicas at the start; else `min_replicas`, but of decode at least 1.
        max_replicas: replicas at most.
        autoscaling_config: other fields of Ray Serve's AutoscalingConfig, such as `upscale_delay_s`.
        max_ongoing_requests: requests that one replica takes at once, running and waiting.
        max_queued_requests: requests that wait for a replica that takes them, at each caller; with more they are
            refused with 429. Bounds for bursts, since admission has refused before: see `ingress.max_ttft_s`.
        graceful_shutdown_timeout_s: seconds that a replica being removed may take to finish its requests.
        node_labels: Ray labels that a node must have, `KEY=VALUE` each; pins the deployment to a type of node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_replicas: int = Field(default=1, ge=1, le=_MAX_COUNT)
    initial_replicas: int | None = Field(default=None, ge=1, le=_MAX_COUNT)
    max_replicas: int = Field(default=1, ge=1, le=_MAX_COUNT)
    autoscaling_config: dict[str, Any] = Field(default_factory=dict)
    max_ongoing_requests: int = Field(default=1024, ge=1, le=_MAX_COUNT)
    max_queued_requests: int = Field(default=1024, ge=1, le=_MAX_COUNT)
    graceful_shutdown_timeout_s: float = Field(default=60.0, gt=0)
    node_labels: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ray_accepts(self) -> Self:
        for name in self.autoscaling_config:
            if name not in AutoscalingConfig.model_fields:
                raise ValueError(f"autoscaling_config.{name}: Ray Serve's AutoscalingConfig has no such field")
            if name in ReplicaConfig.model_fields:
                raise ValueError(f"autoscaling_config.{name}: set `{name}` beside `autoscaling_config`, not in it")
        try:
            self._ray_autoscaling_config()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            where = f"autoscaling_config.{where}={first['input']}: " if where else ""
            raise ValueError(where + first["msg"].removeprefix("Value error, ")) from error
        if refusal := validate_label_selector(self.node_labels):
            raise ValueError(f"node_labels: {refusal}")
        return self

    def _ray_autoscaling_config(self) -> AutoscalingConfig:
        return AutoscalingConfig(
            min_replicas=self.min_replicas,
            initial_replicas=self.initial_replicas,
            max_replicas=self.max_replicas,
            **self.autoscaling_config,
        )

    def common_options(self) -> dict[str, Any]:
        """Return the options that all deployments have, as `Deployment.options` takes them."""
        return {
            # Only what was set, so that Ray's deprecated fields do not warn by being repeated.
            "autoscaling_config": self._ray_autoscaling_config().model_dump(exclude_unset=True),
            "max_ongoing_requests": self.max_ongoing_requests,
            "max_queued_requests": self.max_queued_requests,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1},
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "health_check_period_s": HEALTH_CHECK_PERIOD_S,
            "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        }


def _split_at_commas(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class IngressConfig(ReplicaConfig):
    """The deployment that speaks HTTP; it needs no GPU.

    Attributes:
        num_cpus: CPUs that Ray reserves for each replica.
        max_request_bytes: largest body of a request; a larger one is refused.
        max_unread_tokens: tokens kept for a client that does not read; with more its request is ended.
        resume_timeout_s: seconds without a new token after which a request whose decode replica was lost fails.
        max_start_s: where `decode.min_replicas=0`, a request that has waited so many seconds for a decode replica to
            start is refused with 503.
        max_ttft_s: a request is refused with 429 if its first token is estimated to take more seconds than its priority
            may use of this: 100% high, 80% normal, 50% low.
        max_queued_tokens: the same for prompt tokens that wait, per engine that computes prompts.
        api_keys: file with the keys that callers must have, absolute and on the ingress's node, or `env:NAME` for a
            variable there that holds the same; without it everybody may call. See docs/security.md.
        cors_origins: origins, with commas between them, whose pages may use the API from a browser; `*`: all.
        control_tokens: of the model, in messages of chats: `allow` them, `refuse` the call, or read them as `text`.
        tool_parser: how the model writes calls of tools: `hermes` (Qwen's too), `llama3`, `mistral` or
            `harmony` (gpt-oss); `auto`: as its chat template shows.
        reasoning_parser: how it marks its thoughts: `think`, as Qwen 3 and DeepSeek do, `harmony`, as gpt-oss does, or
            `none`, which leaves them in the answer; `auto`: as its chat template shows.
        request_log: a line for each call, as `text` or `json`, with what it cost and where it was served; `off`: none.
        traces: of calls, for a collector of OpenTelemetry; see docs/telemetry.md.
    """

    num_cpus: Amount = Field(default=0.1, le=_MAX_CPUS)
    max_request_bytes: int = Field(default=MAX_BODY_BYTES, ge=1)
    max_unread_tokens: int = Field(default=8192, ge=1)
    resume_timeout_s: float = Field(default=60.0, gt=0)
    max_start_s: float = Field(default=600.0, gt=0)
    max_ttft_s: float = Field(default=60.0, gt=0)
    max_queued_tokens: int = Field(default=1_000_000, ge=1)
    api_keys: Annotated[str, AfterValidator(check_source)] | None = None
    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(check_origin)], ...], BeforeValidator(_split_at_commas)
    ] = ()
    control_tokens: ControlPolicy = "allow"
    tool_parser: ToolParserName = "auto"
    reasoning_parser: ReasoningParserName = "auto"
    request_log: Literal["text", "json", "off"] = "text"
    traces: TraceSettings = Field(default_factory=TraceSettings)

    def deployment_options(self) -> dict[str, Any]:
        """Return the options of this deployment, as `Deployment.options` takes them."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus}
        if self.node_labels:
            actor["label_selector"] = self.node_labels
        # Ray Serve's own lines of access tell less, and of every question for metrics, too.
        logs = LoggingConfig(encoding="JSON" if self.request_log == "json" else "TEXT", enable_access_log=False)
        return self.common_options() | {"ray_actor_options": actor, "logging_config": logs}


class PoolConfig(ReplicaConfig):
    """One pool of engines, prefill or decode.

    Attributes:
        num_cpus: CPUs that Ray reserves for each engine and, rounded, its threads; the default lets both pools and the
            ingress fit on a machine with two cores.
        num_gpus: GPUs of each engine; 0 runs it on CPUs, a fraction shares a GPU.
        resources: custom Ray resources of each engine, `NAME=AMOUNT` each.
        engine: what differs from the shared `engine.*` in this pool.
    """

    min_replicas: int = Field(default=1, ge=0, le=_MAX_COUNT)
    # What waits shall wait in the engines, which know of priorities and lengths, and tell how much it is.
    max_ongoing_requests: int = Field(default=4096, ge=1, le=_MAX_COUNT)
    num_cpus: Amount = Field(default=0.8, gt=0, le=_MAX_CPUS)
    num_gpus: Amount = Field(default=0, le=1)
    resources: dict[str, Amount] = Field(default_factory=dict)
    engine: EngineSettings = Field(default_factory=EngineSettings)

    @model_validator(mode="after")
    def _resources_are_custom(self) -> Self:
        for name, field in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            if name in self.resources:
                raise ValueError(f"resources.{name}={self.resources[name]:g}: set `{field}` instead")
        return self

    def deployment_options(self) -> dict[str, Any]:
        """Return the options of this deployment: the front in bundle 0, its engine in bundle 1, both on one node."""
        engine = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        bundles = [{"CPU": FRONT_NUM_CPUS}, {name: amount for name, amount in engine.items() if amount}]
        options: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": FRONT_NUM_CPUS},
            "placement_group_bundles": bundles,
            "placement_group_strategy": "STRICT_PACK",
            # Else a line for each call of ours, two of them each second for numbers.
            "logging_config": LoggingConfig(enable_access_log=False),
        }
        if self.node_labels:
            options["placement_group_bundle_label_selector"] = [self.node_labels] * len(bundles)
        return self.common_options() | options
