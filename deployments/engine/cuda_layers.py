"""The layers of a model on a GPU, replaced by faster ones that compute the same. Imported only where there is a GPU."""

from torch import Tensor, nn

from deployments.engine.fused_layers import FusedKernels, fuse_layers, rotate_in_attention
from deployments.engine.kernels.cuda import rms_norm, silu_mul
from deployments.engine.kernels.cuda_matmul import linear

KERNELS = FusedKernels(rms_norm, silu_mul, rotate_in_attention)


class SkinnyLinear(nn.Module):
    """Takes the place of an `nn.Linear` for inference, with kernels of our own for few rows; shares its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)


def optimize_layers(model: nn.Module) -> None:
    """Replace layers in place; after `merge_linears`. Attention layers leave the rotary embedding to attention."""
    fuse_layers(model, KERNELS)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.is_contiguous():
                setattr(parent, name, SkinnyLinear(child))


def restore_rotary(model: nn.Module) -> None:
    """Let attention layers rotate queries and keys themselves again."""
    for module in model.modules():
        if hasattr(module, "kvrelay_rotary"):
            del module.kvrelay_rotary, module.forward
