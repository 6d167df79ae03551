"""The engine with FP8 weights on a GPU: tokens of a model whose weights, and inputs of prompts, are rounded."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.kernels.fp8 import FP8, LARGEST, Scales, dequantize, round_to
from deployments.engine.layers.fp8 import note_scales, quantizable, quantize_weights
from deployments.engine.model.load import LoadedModel, optimize_layers, prepare_model
from tests.engine.driving import Transcript, greedy, prefill_all, run
from tests.gpu.models import plain

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.layers.cuda_fp8 import Fp8Linear, NormForFp8  # noqa: E402  # Triton is there only with a GPU

NUM_TOKENS = 24
LENGTHS = (1, 2, 16, 17, 40, 255, 257, 700, 1500)
TIE = 0.13  # see `test_engine.py`
every_grid = pytest.mark.parametrize("grid", ["rows", "blocks"])


@cache
def rounded(grid: str) -> PreTrainedModel:
    """The model whose weights lie on a grid, in bfloat16 and otherwise as transformers has it."""
    model = copy.deepcopy(plain("llama"))
    if grid == "rows":
        quantize_weights(model)
        return model
    with torch.inference_mode():
        for _, layer in quantizable(model):
            bands = layer.weight.float().split(128)
            largest = [[block.abs().max() for block in band.split(128, 1)] for band in bands]
            scales = Scales(torch.tensor(largest, device="cuda") / LARGEST, 128, 128)
            layer.weight.copy_(dequantize(round_to(layer.weight, scales), scales, torch.bfloat16))
            note_scales(layer, scales)
    return model


@cache
def with_rounded_inputs(grid: str) -> PreTrainedModel:
    model = copy.deepcopy(rounded(grid))
    for _, layer in quantizable(model):
        layer.register_forward_pre_hook(_round_inputs)
    return model


def _round_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    x = inputs[0].float()
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-30)
    return ((x / scales).to(FP8).float() * scales).to(inputs[0].dtype)


@cache
def loaded(grid: str) -> LoadedModel:
    model = copy.deepcopy(rounded(grid))
    return optimize_layers(prepare_model(model, "random", torch.device("cuda")))


def build(grid: str, **overrides: object) -> Engine:
    settings = {"num_blocks": 64, "max_num_seqs": 40, "max_num_batched_tokens": 4096} | overrides
    return Engine(loaded(grid), EngineConfig.model_validate(settings))


def prompt(length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 3000, (length,), generator=torch.Generator().manual_seed(length)).tolist())


@torch.inference_mode()
def logits_of(model: PreTrainedModel, given: tuple[int, ...], tokens: list[int]) -> Tensor:
    """For each token, after those before it."""
    ids = torch.tensor([[*given, *tokens]], device="cuda")
    logits: Tensor = model(ids, use_cache=False).logits[0, len(given) - 1 : -1].float()
    return logits


def num_behind(logits: Tensor, tokens: Tensor) -> int:
    """How many tokens are further behind the likeliest than a tie."""
    return int((logits.amax(-1) - logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) > TIE).sum())


@every_grid
def test_the_layers_are_replaced(grid: str) -> None:
    modules = list(loaded(grid).model.modules())
    num_layers = loaded(grid).model.config.num_hidden_layers
    assert len({id(m) for m in modules if isinstance(m, Fp8Linear)}) == 4 * num_layers
    assert sum(isinstance(m, NormForFp8) for m in modules) == 2 * num_layers


@every_grid
def test_tokens_are_as_likely_as_rounding_allows(grid: str) -> None:
    """At most twice as often further behind than a tie as rounding inputs alone puts a token, and 2% more."""
    engine = build(grid)
    for length in LENGTHS:
        engine.add(greedy(f"r{length}", prompt(length), NUM_TOKENS))
    missed, expected = 0, 0
    for name, tokens in run(engine).tokens.items():
        given = prompt(int(name[1:]))
        assert len(tokens) == NUM_TOKENS
        logits = logits_of(rounded(grid), given, tokens)
        missed += num_behind(logits, torch.tensor(tokens, device="cuda"))
        expected += num_behind(logits, logits_of(with_rounded_inputs(grid), given, tokens).argmax(-1))
    assert missed <= 2 * expected + 0.02 * NUM_TOKENS * len(LENGTHS), (missed, expected)


def test_a_handed_over_prompt_continues_as_it_would_have_here() -> None:
    alone = build("rows", max_num_batched_tokens=512)
    request = greedy("r", prompt(1500), NUM_TOKENS)
    alone.add(request)
    expected = run(alone).tokens["r"]
    source, target = build("rows", max_num_batched_tokens=512), build("rows")
    transcript = Transcript()
    target.add(request, remote_threshold=100)
    transcript.note(target.step())
    for chunk, tensor in prefill_all(source, request):
        transcript.note(target.import_chunk(chunk, tensor))
    run(target, transcript)
    assert transcript.tokens["r"] == expected
