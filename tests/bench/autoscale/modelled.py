"""An engine whose steps take what curves say, and compute nothing. All else of it is the product.

Scheduling, prefix cache, hand-off and numbers are those of the real engine around a tiny model, of which the weights
are never used: a step sleeps for as long as the simulator's curves have it, and draws the same token for everybody. So
several engines fit on two cores, and their pace does not depend on who else uses these.
"""

import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from deployments.engine.config import EngineConfig
from deployments.engine.execution.base import LaunchedStep, Preparation
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.model.load import prepare_model
from deployments.engine.model.resolve import resolve_model
from deployments.engine.process import configure_process
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine_builder import BuiltEngine, assemble_engine
from deployments.simulator.curves import Curves
from tests.engine.insides import replace_runner, runner_of
from tests.tiny_models import MODELLED

# A prompt of 1,000 tokens takes a second, a token 30 ms and more the more sequences there are.
CURVES = Curves(step_s=0.03, token_s=0.001, sequence_s=0.004, context_s=0.0)
# What the tokenizer of the default model has; any of its tokens may be in a prompt.
_VOCAB_SIZE = 49_152
_ANY_TOKEN = 1000


class ModelledRunner:
    """Prepares steps as all runners do, and sleeps; see `Runner`."""

    def __init__(self, cache: KVCache, curves: Curves) -> None:
        self.cache = cache
        self._curves = curves
        self._preparation = Preparation(cache)

    def launch(self, scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        step = self._preparation.prepare(scheduled)
        num_draws = len(step.arrays.draw_rows)
        launched = LaunchedStep(step.items, torch.full((num_draws,), _ANY_TOKEN), None)
        curves = self._curves
        time.sleep(curves.step_s + curves.token_s * launched.num_prompt_tokens + curves.sequence_s * num_draws)
        return launched


def build_modelled(config: EngineConfig) -> BuiltEngine:
    """Stands in for `build_engine`; the tokenizer is the default model's."""
    configure_process(1)
    shape = LlamaConfig(vocab_size=_VOCAB_SIZE, **MODELLED)
    torch.manual_seed(0)  # one fingerprint for all
    model = AutoModelForCausalLM.from_config(shape)
    built = assemble_engine(prepare_model(model, resolve_model(config.model), torch.device("cpu")), config)
    replace_runner(built.engine, ModelledRunner(runner_of(built.engine).cache, CURVES))
    return built
