"""What a GPU would take for nothing but reading: bounds that `bench_gpu` prints beside what it measures."""

import statistics

import numpy as np
import torch

from deployments.engine.engine import Engine
from deployments.engine.layers.base import Experts, LinearLayer, weights_of
from tests.bench.gpu_shapes import lengths
from tests.engine.insides import model_of


def copy_bandwidth() -> float:
    """Bytes per second of a copy on the GPU, those read and those written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(2 * source.nbytes / statistics.median(times))


def weight_bytes(engine: Engine, batch_size: int) -> float:
    """What a decode step reads of the model; of its experts those that are chosen if all are as likely."""
    model = model_of(engine)
    return weights_of(model, getattr(model.config, "num_experts_per_tok", None)).read_by(batch_size)


def floor(engine: Engine, batch_size: int, bandwidth: float, context: float) -> float:
    """Seconds that reading the weights and the KV of so many tokens of each sequence once takes."""
    num_bytes = weight_bytes(engine, batch_size) + batch_size * context * engine.kv_shape.bytes_per_token
    return float(num_bytes) / bandwidth


@torch.inference_mode()
def products_alone(engine: Engine, num_tokens: int) -> list[float]:
    """Seconds that the linear layers take for so many tokens of prompts, one behind the other and nothing between.

    The output layer is left out, which only last tokens go through. Layers are launched one by one: where that takes
    the host longer than the GPU (FP8, 512 tokens) an engine, which launches whole steps, is faster than this.

    Returns:
        Three runs; none for a model with experts, which are no linear layers.
    """
    model = model_of(engine)
    if any(isinstance(module, Experts) for module in model.modules()):
        return []
    layers = [m for m in model.modules() if isinstance(m, LinearLayer) and m is not model.get_output_embeddings()]
    numbers = torch.randn(num_tokens * max(m.in_features for m in layers), dtype=layers[0].dtype, device="cuda")
    rows = {m.in_features: numbers[: num_tokens * m.in_features].view(num_tokens, -1) for m in layers}
    times = []
    for _ in range(4):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for layer in layers:
            layer(rows[layer.in_features])
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times[1:]  # the first one warms up


def throughput_bound(engine: Engine, bandwidth: float, prompt_tokens_per_s: float) -> float:
    """Tokens per second of `throughput` if decode steps did nothing but read weights and KV at this bandwidth.

    Prompts are counted at the rate at which this engine computes them.
    """
    prompts, outputs = lengths().T
    return float(outputs.sum() / (sum(decode_bytes(engine)) / bandwidth + prompts.sum() / prompt_tokens_per_s))


def decode_bytes(engine: Engine) -> tuple[float, float]:
    """What the decode steps of `throughput` must read: of weights, of KV."""
    prompts, outputs = lengths().T
    # The first token is the prompt's; step n of a sequence reads its prompt and n tokens more.
    contexts = (prompts * (outputs - 1) + outputs * (outputs - 1) / 2).sum()
    running = (outputs[:, None] > np.arange(1, outputs.max())).sum(0)
    return sum(weight_bytes(engine, count) for count in running.tolist()), float(
        contexts * engine.kv_shape.bytes_per_token
    )
