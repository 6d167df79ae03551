"""Linear layers with kernels of our own for few rows. Imported only where there is a GPU."""

from torch import Tensor, nn

from deployments.engine.kernels.cuda_matmul import add_linear, linear
from deployments.engine.layers.base import LinearLayer
from deployments.engine.layers.owed import Owed


class SkinnyLinear(LinearLayer):
    """Multiplies few rows as fast as the weight is read, and adds to a residual on the way; shares its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.weight.dtype, layer.weight.device)
        self.weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach()
        self.owed: Owed = Owed()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.owed.take()
        if residual is None:
            return linear(x, self.weight, self._bias)
        return add_linear(residual, x, self.weight, self._bias)
