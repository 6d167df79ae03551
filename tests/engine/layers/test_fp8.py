"""Layers whose weights are in FP8 give what the model gives whose weights are rounded to the same grid."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels import cuda_fp8 as fp8_kernels, cuda_matmul  # isort: skip
from deployments.engine.kernels.cuda_fp8_prompts import Tile  # isort: skip
from deployments.engine.layers import cuda, cuda_fp8  # isort: skip
from deployments.engine.layers.cuda_decoder import fuse_residuals  # isort: skip
from deployments.engine.layers.cuda_fp8 import Fp8Linear, NormForFp8, round_in_norms  # isort: skip
from deployments.engine.layers.skinny import SkinnyLinear  # isort: skip

from deployments.engine.attention.base import IMPLEMENTATION, LayerAttention, register
from deployments.engine.config import EngineConfig
from deployments.engine.kernels.fp8 import Scales, round_to
from deployments.engine.layers.fp8 import are_read, note_scales, quantizable, quantize_weights, scales_of
from deployments.engine.layers.fused import fuse_layers
from deployments.engine.layers.linear import LinearKind, convert_linears
from deployments.engine.layers.merged import merge_linears
from tests.engine.families import randomize
from tests.tiny_models import INTERPRETED

SIZES: dict[str, Any] = INTERPRETED | {"dtype": torch.float16}


class _Echo:
    """Stands in for attention: every head attends to its own query."""

    rows = None

    def attend(self, asked: LayerAttention) -> Tensor:
        return asked.queries.transpose(0, 1).contiguous()


def build(config: LlamaConfig | Qwen2Config) -> PreTrainedModel:
    register()
    model: PreTrainedModel = randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float16)).to(DEVICE)  # type: ignore[arg-type]
    model.set_attn_implementation(IMPLEMENTATION)
    model.eval().requires_grad_(False)
    return model


def run(model: PreTrainedModel, num_tokens: int) -> Tensor:
    """All at position 0: the layers leave the rotary embedding to attention, which is not there."""
    token_ids = torch.arange(num_tokens, device=DEVICE).unsqueeze(0) % 64
    with torch.inference_mode():
        positions = torch.zeros_like(token_ids)
        out = model(input_ids=token_ids, position_ids=positions, use_cache=False, paged_step=_Echo())
    logits: Tensor = out.logits.float()
    return logits


def _fits(layer: nn.Linear, _: EngineConfig) -> bool:
    scales = scales_of(layer)
    return scales is not None and are_read(scales, layer.weight.shape)


# As on a GPU, whatever the device.
KINDS = (LinearKind("fp8", _fits, Fp8Linear), LinearKind("skinny", lambda *_: True, SkinnyLinear))


def optimize(model: PreTrainedModel) -> int:
    merge_linears(model)
    counts = convert_linears(model, EngineConfig(), KINDS)
    fuse_layers(model, cuda.KERNELS)
    fuse_residuals(model)
    round_in_norms(model)
    return counts[KINDS[0]]


@pytest.fixture(autouse=True)
def other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one row are of many columns: so there are few programs, each of which is interpreted."""
    tile = Tile(rows=16, columns=16, depth=32, num_stages=2, num_warps=4)
    monkeypatch.setattr(cuda_fp8, "prompt_tile", lambda *_, **__: tile)
    monkeypatch.setattr(cuda_matmul, "row_tile", lambda depth: (64, 64, 4))
    monkeypatch.setattr(fp8_kernels, "ROW_TILE", (64, 64, 4))


# With a bias on queries, keys and values, too.
@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), Qwen2Config(**SIZES)], ids=lambda config: config.model_type)
def test_a_model_in_fp8_gives_what_its_rounded_weights_give(config: LlamaConfig | Qwen2Config) -> None:
    model = build(config)
    quantize_weights(model)
    rounded = copy.deepcopy(model)
    assert optimize(model) == 8, "four of each layer: queries with keys and values, their output, gate with up, down"
    assert sum(isinstance(module, NormForFp8) for module in model.modules()) == 4, "two of each layer"
    out, expected = run(model, 1), run(rounded, 1)
    assert (out - expected).norm() <= 5e-3 * expected.norm()
    # Several rows are rounded, too; the interpreter cuts off instead, which moves all of them to one side.
    out, expected = run(model, 3), run(rounded, 3)
    assert (out - expected).norm() <= 0.25 * expected.norm()


def test_the_output_layer_and_layers_without_a_grid_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = build(LlamaConfig(**SIZES))
    names = [name for name, _ in quantizable(model)]
    assert "lm_head" not in names and len(names) == 14
    assert optimize(model) == 0
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())


def test_layers_are_merged_with_their_scales() -> None:
    model = build(LlamaConfig(**SIZES))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for name, value in (("q_proj", 0.5), ("k_proj", 2.0), ("v_proj", 1.0)):
        layer = getattr(attention, name)
        note_scales(layer, Scales(torch.full((1, 1), value, device=DEVICE), layer.out_features, layer.in_features))
    note_scales(mlp.gate_proj, Scales(torch.ones(1, 1, device=DEVICE), 48, 32))
    merge_linears(model)
    scales = scales_of(attention.q_proj.group.linear)
    assert scales is not None
    assert scales.values.flatten().tolist() == [0.5] * 32 + [2.0] * 16 + [1.0] * 16
    assert scales_of(mlp.gate_proj.group.linear) is None, "only one of the two has a grid"


def test_scales_that_the_kernels_do_not_read_leave_the_weight_as_it_is() -> None:
    model = build(LlamaConfig(**SIZES))
    for _, layer in quantizable(model):
        shape = -(-layer.out_features // 16), -(-layer.in_features // 16)
        scales = Scales(torch.full(shape, 1 / 64, device=DEVICE), 16, 16)
        layer.weight.copy_(round_to(layer.weight, scales).float() / 64)
        note_scales(layer, scales)
    expected = run(model, 3)
    assert optimize(model) == 0
    assert (run(model, 3) - expected).norm() <= 5e-3 * expected.norm()
