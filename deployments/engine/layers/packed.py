"""Linear layers whose weights are packed for our own matrix product: `kernels/cpu_matmul.py`, float32 on a CPU.

Milliseconds for all linear layers of SmolLM2-135M (540 MB of weights), one thread of a Zen 4 core, 2026-11, against
oneDNN's packed product, which this replaces: 1 row 20 and 42, 8 rows 26 and 42, 16 rows 48 and 59, 32 rows 82 and 100.
"""

import torch
from torch import Tensor, nn

from deployments.engine.kernels.cpu_matmul import PackedWeight, linear


class PackedLinear(nn.Module):
    """Takes the place of an `nn.Linear` for inference; the original weight is not kept."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        bias = None if layer.bias is None else layer.bias.detach()
        self.packed = PackedWeight(layer.weight.detach(), bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed)


def pack_linears(model: nn.Module) -> int:
    """Replace the float32 linear layers of a model in place.

    Returns:
        How many were replaced. Tied weights stay with their other owner (an embedding), at the price of one more copy.
    """
    num_packed = 0
    # Not all modules: a list that held the layers themselves would keep every weight beside its copy until the end.
    for parent in [module for module in model.modules() if next(module.children(), None) is not None]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype is torch.float32:
                setattr(parent, name, PackedLinear(child))
                num_packed += 1
    if num_packed:
        PackedLinear(nn.Linear(1, 1))(torch.zeros(1, 1))  # compiles, before the first request needs it
    return num_packed
