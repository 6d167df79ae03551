"""Graphs that start in seconds, for tests of what starts them."""

import logging

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from app.config import AppConfig


class Healthy:
    """Answers every path with the model's name."""

    def __init__(self, model: str) -> None:
        logging.getLogger("deployments.engine.model.load").info("converting %s to %s (once)", "a.gguf", "a")
        self.model = model

    async def __call__(self, request: Request) -> JSONResponse:
        return JSONResponse({"model": self.model})


class Broken:
    """Never starts."""

    def __init__(self) -> None:
        raise ValueError("layer 7 cannot be run")


_small = serve.deployment(ray_actor_options={"num_cpus": 0.1})


def healthy(args: AppConfig) -> serve.Application:
    return _small(Healthy).bind(args.model)


def broken(args: AppConfig) -> serve.Application:
    return _small(Broken).options(max_constructor_retry_count=1).bind()  # three times would fail alike, a minute later
