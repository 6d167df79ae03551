"""Norms of single heads, the rotary embedding and the writing of KV as one kernel, beside plain torch."""

import pytest
import torch
from torch import Tensor

from deployments.engine.kernels.arguments import HeadNorms, Rotation
from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels.cuda_rotary import rotate_and_write  # isort: skip

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, EPS = 3, 4, 2, 16, 1e-6


def prepared(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalised as transformers does it, and rotated."""
    value = x.float()
    value = value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + EPS)
    rounded = (value * weight).to(x.dtype) if weight.dtype is torch.float32 else value.to(x.dtype) * weight
    low, high = rounded.float().chunk(2, -1)
    return rounded.float() * cos[0, :, None] + torch.cat((-high, low), -1) * sin[0, :, None]


@pytest.mark.parametrize("dtype_of_weights", [torch.float16, torch.float32])
def test_heads_are_normalised_before_they_are_rotated_and_values_are_not(dtype_of_weights: torch.dtype) -> None:
    sizes = [count * HEAD_DIM for count in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]
    parts = torch.randn(NUM_TOKENS, sum(sizes), device=DEVICE).half().split(sizes, -1)
    queries, keys, values = (part.unflatten(-1, (-1, HEAD_DIM)) for part in parts)
    angles = torch.randn(1, NUM_TOKENS, HEAD_DIM // 2, device=DEVICE)
    cos, sin = (torch.cat((half, half), -1).half() for half in (angles.cos(), angles.sin()))
    weights = torch.randn(2, HEAD_DIM, device=DEVICE).to(dtype_of_weights)
    pools = torch.zeros(2, 20, NUM_KV_HEADS, HEAD_DIM, device=DEVICE).half()
    slots = torch.tensor([3, -1, 7], device=DEVICE)
    rotation = Rotation(cos, sin, HEAD_DIM, HeadNorms(weights[0], weights[1], EPS))
    rotated, kept = rotate_and_write(queries, keys, values, rotation, pools[0], pools[1], slots, keep_keys=True)
    assert kept is not None
    for out, x, weight in ((rotated, queries, weights[0]), (kept, keys, weights[1])):
        expected = prepared(x, weight, cos, sin)
        assert (out.float() - expected).norm() < 1e-3 * expected.norm()
    written = [3, 7]
    assert torch.equal(pools[0][written], kept[[0, 2]]) and torch.equal(pools[1][written], values[[0, 2]])
    pools[:, written] = 0
    assert not pools.any(), "padding was written"
