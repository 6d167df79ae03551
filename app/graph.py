"""The application, put together: the only place where deployments are bound to each other."""

# No `from __future__ import annotations`: Ray Serve reads the annotation of `args` as a class.

from typing import Literal

from ray import serve
from ray.serve import Application, Deployment

from app.config import AppConfig, Pool, api_name
from deployments.decode import Decode, own_deployment
from deployments.engine_info import EngineResources
from deployments.front import SpawnedEngine
from deployments.ingress import Ingress, IngressSettings
from deployments.prefill import Prefill
from deployments.routing.crossover import Crossover, Goals, default_tokens


def graph(args: AppConfig) -> Application:
    """Build the graph that `serve run app:graph key=value ...` and `serve deploy` run.

    Args:
        args: every setting of the application; see `python -m app.local --help`.
    """
    prefill = None
    if args.mode == "disaggregated":
        prefill = _deploy(Prefill, args, "prefill").bind(_engine(args, "prefill"))
    decode = _deploy(Decode, args, "decode").bind(
        _engine(args, "decode"),
        prefill,
        _least_remote(args),
        args.parity_check,
        own_deployment if args.planner.flip else None,
    )
    ingress = _deploy(Ingress, args, "ingress")
    return ingress.bind(decode, prefill, ingress_settings(args))


def ingress_settings(args: AppConfig) -> IngressSettings:
    """Return what each ingress replica is told."""
    return IngressSettings(
        model=args.model,
        served_model_name=args.served_model_name,
        model_root=api_name(args.model),
        max_request_bytes=args.ingress.max_request_bytes,
        max_unread_tokens=args.ingress.max_unread_tokens,
        resume_timeout_s=args.ingress.resume_timeout_s,
        bounds=args.admission_bounds(),
        crossover=None if args.mode == "colocated" else _crossover(args),
        routing=args.routing,
        api_keys=args.ingress.api_keys,
        max_replicas=args.ingress.max_replicas,
        cors_origins=args.ingress.cors_origins,
        control_tokens=args.ingress.control_tokens,
        tool_parser=args.ingress.tool_parser,
        reasoning_parser=args.ingress.reasoning_parser,
        logs_requests=args.ingress.request_log != "off",
        traces=args.ingress.traces,
        metrics=args.metrics_plan(),
        tells_planner=args.planner.enabled,
        hold=args.hold_bounds(),
    )


def _crossover(args: AppConfig) -> Crossover:
    goals = Goals(args.planner.ttft_s, args.planner.itl_s)
    return Crossover(goals, args.min_remote_prefill_tokens, args.prefill.min_replicas == 0)


def _least_remote(args: AppConfig) -> int | None:
    """What a decode replica goes by that is not told where a prompt is to be computed."""
    return None if args.prefill.min_replicas == 0 else default_tokens(args.min_remote_prefill_tokens)


def _deploy(cls: type, args: AppConfig, name: Pool | Literal["ingress"]) -> Deployment:
    return serve.deployment(**args.deployment_options(name))(cls)


def _engine(args: AppConfig, pool: Pool) -> SpawnedEngine:
    settings = args.pool(pool)
    resources = EngineResources(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, custom=settings.resources)
    return SpawnedEngine(
        args.engine_config(pool),
        resources,
        tier=args.tier,
        tells_planner=args.planner.enabled,
        metrics=args.metrics_plan(),
        may_flip=args.planner.flip and pool == "decode",
    )
