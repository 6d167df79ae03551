"""Kernels beside what torch computes in float64, and which layers of a model they replace."""

import copy

import pytest
import torch
from torch import nn

from deployments.engine.kernels.cpu import rms_norm, rotate, silu_mul
from deployments.engine.layers.fused import CPU_KERNELS, FusedGatedMLP, FusedRMSNorm, fuse_layers
from deployments.engine.layers.merged import merge_linears
from tests.engine.families import build_model


@pytest.mark.parametrize("shape", [(1, 576), (3, 1, 7), (2, 5, 4, 64)])
def test_rms_norm_matches_float64(shape: tuple[int, ...]) -> None:
    x, weight = 100 * torch.randn(shape), torch.randn(shape[-1])
    wide = x.double()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_takes_views_whose_rows_lie_apart() -> None:
    x, weight = torch.randn(5, 96), torch.randn(4)
    heads = x[:, :32].view(5, 8, 4)
    torch.testing.assert_close(rms_norm(heads, weight, 1e-6), rms_norm(heads.clone(), weight, 1e-6))


@pytest.mark.parametrize("size", [1, 15, 1536])
def test_silu_mul_matches_float64_also_far_from_zero(size: int) -> None:
    gate_up = torch.randn(1, 6, 2 * size) * torch.tensor([0.0, 1e-3, 1.0, 10.0, 90.0, 1e4])[:, None]
    gate, up = gate_up.double().split(size, -1)
    torch.testing.assert_close(silu_mul(gate_up).double(), nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-25)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_rotate_reads_heads_out_of_a_merged_projection(num_tokens: int) -> None:
    merged = torch.randn(1, num_tokens, 160)
    x = merged[..., 32:96].view(1, num_tokens, 4, 16).transpose(1, 2)
    cos, sin = torch.randn(2, 1, num_tokens, 16)
    a, b = x.double().chunk(2, -1)
    expected = x * cos[:, None].double() + torch.cat((-b, a), -1) * sin[:, None]
    torch.testing.assert_close(rotate(x, cos, sin).double(), expected, rtol=1e-5, atol=1e-6)


def test_rotate_takes_heads_that_lie_one_behind_the_other() -> None:
    x = torch.randn(1, 4, 9, 16)
    cos, sin = torch.randn(2, 1, 9, 16)
    as_rows = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotate(x, cos, sin), rotate(as_rows, cos, sin))


def fuse(family: str) -> tuple[nn.Module, int]:
    model = copy.deepcopy(build_model(family))
    merge_linears(model)
    return model, fuse_layers(model, CPU_KERNELS)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_all_norms_mlps_and_rotary_embeddings_of_a_llama_are_fused() -> None:
    model, num_fused = fuse("llama")
    assert (count(model, FusedRMSNorm), count(model, FusedGatedMLP), num_fused) == (5, 2, 5 + 2 + 2)


def test_norms_of_single_heads_are_fused_too() -> None:
    assert count(fuse("qwen3")[0], FusedRMSNorm) == 2 * 4 + 1


def test_norms_that_add_one_to_the_weight_are_fused_too() -> None:
    model, num_fused = fuse("gemma2")
    assert (count(model, FusedRMSNorm), num_fused) == (3 * 4 + 1, 3 * 4 + 1 + 3)


def test_mlps_whose_projections_come_merged_are_fused_too() -> None:
    assert count(fuse("phi3")[0], FusedGatedMLP) == 2


def test_an_mlp_with_another_activation_stays_as_it_is() -> None:
    assert count(fuse("gemma2")[0], FusedGatedMLP) == 0


def test_a_norm_that_computes_something_else_stays_as_it_is() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight

    assert fuse_layers(nn.ModuleList([Shifted()]), CPU_KERNELS) == 0


def test_other_models_in_the_process_keep_their_own_layers() -> None:
    untouched = copy.deepcopy(build_model("llama"))
    tokens = torch.arange(20)[None]
    before = untouched(tokens).logits
    fuse("llama")
    assert "forward" not in vars(untouched.model.layers[0].self_attn)
    assert torch.equal(untouched(tokens).logits, before)
