"""Linear layers with kernels of our own for few rows. Imported only where there is a GPU."""

from collections.abc import Callable

from torch import Tensor, nn

from deployments.engine.kernels.cuda import gelu_mul, silu_mul
from deployments.engine.kernels.cuda_matmul import add_linear, linear
from deployments.engine.kernels.cuda_step_products import Gate, multiply_gated, step_tile
from deployments.engine.layers.base import LinearLayer
from deployments.engine.layers.fused import FusedGatedMLP
from deployments.engine.layers.owed import Owed

_GATES: dict[Callable[[Tensor], Tensor], Gate] = {silu_mul: Gate.SILU, gelu_mul: Gate.GELU}


class SkinnyLinear(LinearLayer):
    """Multiplies few rows as fast as the weight is read, and adds to a residual on the way; shares its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.weight.dtype, layer.weight.device)
        self.weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach()
        self.owed: Owed = Owed()

    @property
    def has_bias(self) -> bool:
        return self._bias is not None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.owed.take()
        if residual is None:
            return linear(x, self.weight, self._bias)
        return add_linear(residual, x, self.weight, self._bias)


class _Gated:
    """The first product of a gated MLP and its activation, as one kernel for the rows of a small step.

    Each number is rounded as if it were two.
    """

    def __init__(self, gate_up: SkinnyLinear, activation: Callable[[Tensor], Tensor]) -> None:
        self._gate_up, self._activation, self._gate = gate_up, activation, _GATES[activation]

    def __call__(self, x: Tensor) -> Tensor:
        num_columns, depth = self._gate_up.out_features // 2, x.shape[-1]
        tile = step_tile(num_columns, depth, x.numel() // depth, is_gated=True)
        if tile is None:
            return self._activation(self._gate_up(x))
        out = x.new_empty((*x.shape[:-1], num_columns))
        multiply_gated(x, self._gate_up.weight, out, tile, self._gate)
        return out


def fuse_gates(model: nn.Module) -> int:
    """Have gated MLPs compute their activation within the product before it, in place; after `fuse_layers`.

    Returns:
        How many do.
    """
    num_fused = 0
    for mlp in model.modules():
        if not isinstance(mlp, FusedGatedMLP) or mlp.activation not in _GATES:
            continue
        parts = mlp.gate_up, mlp.down_proj
        if all(isinstance(part, SkinnyLinear) for part in parts) and not mlp.gate_up.has_bias:
            mlp.gated = _Gated(mlp.gate_up, mlp.activation)  # type: ignore[arg-type]  # checked just above
            num_fused += 1
    return num_fused
