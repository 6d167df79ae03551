"""Linear layers whose weights are packed for our own matrix product: `kernels/cpu_matmul.py`, float32 on a CPU.

Milliseconds for all linear layers of SmolLM2-135M as float32 (540 MB of weights; 111 since they are kept in the fewest
bytes), one thread of a Zen 4 core, 2026-11, against oneDNN's packed product, which this replaces:
1 row 20 and 42, 8 rows 26 and 42, 16 rows 48 and 59, 32 rows 82 and 100.
"""

import torch
from torch import Tensor, nn

from deployments.engine.kernels.cpu_matmul import PackedWeight, linear
from deployments.engine.layers.base import LinearLayer


class PackedLinear(LinearLayer):
    """The original weight is not kept. One that is tied stays with its other owner (an embedding), as one more copy."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.weight.dtype, layer.weight.device)
        bias = None if layer.bias is None else layer.bias.detach()
        self.packed = PackedWeight(layer.weight.detach(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed)


def compile_packed() -> None:
    """Compile the product, before the first request needs it."""
    PackedLinear(nn.Linear(1, 1))(torch.zeros(1, 1))
