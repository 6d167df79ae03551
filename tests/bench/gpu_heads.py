"""What an EAGLE-3 head costs on a GPU, of the public shape with random weights. Part of `bench_speculation_gpu`."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import LlamaConfig

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.execution.heads import HeadRunner, KnownTokens, NewestTokens
from deployments.engine.layers.replace import replace_head_layers
from deployments.engine.model.eagle3 import Eagle3Form, Eagle3Head
from deployments.engine.model.load import LoadedModel
from deployments.engine.sampling.guessing import GuessDraws
from deployments.engine.sampling.sampler import SamplingPreparation
from deployments.messages import SamplingParams
from tests.engine.insides import guessing_graph, head_runner_of, model_of

# Of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B; heads for other models are alike.
DRAFT_VOCAB_SIZE = 32_000
WARM_UPS, REPEATS = 5, 30


@dataclass(frozen=True)
class HeadCosts:
    """Seconds of one step of so many sequences.

    Attributes:
        states_s: that the model's step takes more, which fuses what the head goes by.
        kv_s: the KV of as many tokens, launched one behind the other.
        first_s: one guess of each, until it is told.
        more_s: each further one.
        gpu_s: one guess of each, what it takes the GPU alone.
    """

    states_s: float
    kv_s: float
    first_s: float
    more_s: float
    gpu_s: float


def with_random_head(loaded: LoadedModel) -> LoadedModel:
    """A model with a head of its own hidden size, of one layer of Llama's kind, that knows 32,000 tokens."""
    model, config = loaded.model, loaded.model.config
    of_head = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=128,
    )
    layers = 2, config.num_hidden_layers // 2, config.num_hidden_layers - 3
    with torch.device(loaded.device):
        head = Eagle3Head(Eagle3Form(of_head, layers, config.hidden_size, DRAFT_VOCAB_SIZE, False, False))
    head.to(model.dtype)
    generator = torch.Generator(loaded.device).manual_seed(1)
    for weight in head.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.02, generator=generator)
    head.complete(model.get_input_embeddings(), torch.arange(DRAFT_VOCAB_SIZE))
    replace_head_layers(head, EngineConfig())
    head.leave_rotary()
    return replace(loaded, head=head)


def head_costs(engine: Engine, num_seqs: int, most: int, context: int, states_s: float) -> HeadCosts:
    """Measure the steps of a head.

    Args:
        engine: that it guesses for.
        num_seqs: sequences that are guessed for.
        most: guesses of each.
        context: tokens of each before.
        states_s: see `HeadCosts`.
    """
    runner: HeadRunner = head_runner_of(engine)
    size, device = runner.cache.block_size, runner.cache.blocks.device
    blocks = -(-(context + most) // size)
    tables = np.arange(num_seqs * blocks).reshape(num_seqs, blocks) % runner.cache.num_blocks
    ids, positions = np.arange(num_seqs), np.full(num_seqs, context)
    states = torch.randn(num_seqs, model_of(engine).config.hidden_size, device=device).to(runner.cache.dtype)
    known = KnownTokens(ids, ids, positions, tables[:, context // size] * size + context % size)
    greedy = [SamplingParams(max_tokens=1, temperature=0.0)] * num_seqs
    draws = GuessDraws(SamplingPreparation(), greedy, positions, [None] * num_seqs)

    def guess(count: int) -> None:
        runner.guess(states, NewestTokens(ids, ids, positions, 0 * ids, tables, np.full(num_seqs, count)), draws)

    first_s, all_s = seconds(lambda: guess(1)), seconds(lambda: guess(most))
    kv_s, gpu_s = seconds(lambda: runner.learn(states, known)), seconds(guessing_graph(engine, num_seqs).replay)
    return HeadCosts(states_s, kv_s, first_s, (all_s - first_s) / (most - 1), gpu_s)


def seconds(run: Callable[[], object]) -> float:
    """Of one of several, one behind the other."""
    for _ in range(WARM_UPS):
        run()
    torch.cuda.synchronize()
    begun_s = time.perf_counter()
    for _ in range(REPEATS):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun_s) / REPEATS
