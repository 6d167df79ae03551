"""The application, put together: the only place where deployments are bound to each other."""

# No `from __future__ import annotations`: Ray Serve reads the annotation of `args` as a class.

from typing import Literal

from ray import serve
from ray.serve import Application, Deployment

from app.config import AppConfig, Pool
from deployments.decode import Decode
from deployments.engine_info import EngineResources
from deployments.ingress import Ingress
from deployments.prefill import Prefill


def graph(args: AppConfig) -> Application:
    """Build the graph that `serve run app:graph key=value ...` and `serve deploy` run.

    Args:
        args: every setting of the application; see `python -m app.local --help`.
    """
    prefill = None
    if args.mode == "disaggregated":
        prefill = _deploy(Prefill, args, "prefill").bind(args.engine_config("prefill"), _resources(args, "prefill"))
    decode = _deploy(Decode, args, "decode").bind(
        args.engine_config("decode"),
        _resources(args, "decode"),
        prefill,
        args.min_remote_prefill_tokens,
        args.parity_check,
    )
    ingress = _deploy(Ingress, args, "ingress")
    limits = args.ingress.max_request_bytes, args.ingress.max_unread_tokens, args.ingress.resume_timeout_s
    return ingress.bind(decode, prefill, args.model, args.served_model_name, *limits, args.admission_bounds())


def _deploy(cls: type, args: AppConfig, name: Pool | Literal["ingress"]) -> Deployment:
    return serve.deployment(**args.deployment_options(name))(cls)


def _resources(args: AppConfig, pool: Pool) -> EngineResources:
    config = args.pool(pool)
    return EngineResources(num_cpus=config.num_cpus, num_gpus=config.num_gpus, custom=config.resources)
