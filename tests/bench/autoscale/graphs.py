"""`app:graph` with modelled engines."""

from ray import serve
from ray.serve import Application

from app.config import AppConfig, Pool
from app.graph import ingress_settings
from deployments.decode import Decode
from deployments.engine_info import EngineResources
from deployments.front import SpawnedEngine
from deployments.ingress import Ingress
from deployments.prefill import Prefill
from deployments.routing.crossover import default_tokens
from tests.bench.autoscale.modelled import build_modelled


def graph(args: AppConfig) -> Application:
    """Build the application; `python -m app.local up --app` takes it as well."""
    prefill = serve.deployment(**args.deployment_options("prefill"))(Prefill).bind(_engine(args, "prefill"))
    decode = serve.deployment(**args.deployment_options("decode"))(Decode).bind(
        _engine(args, "decode"), prefill, default_tokens(args.min_remote_prefill_tokens), False
    )
    ingress = serve.deployment(**args.deployment_options("ingress"))(Ingress)
    return ingress.bind(decode, prefill, ingress_settings(args))


def _engine(args: AppConfig, pool: Pool) -> SpawnedEngine:
    settings = args.pool(pool)
    resources = EngineResources(settings.num_cpus, settings.num_gpus, settings.resources)
    return SpawnedEngine(args.engine_config(pool), resources, build_modelled, tells_planner=args.planner.enabled)
