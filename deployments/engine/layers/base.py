"""What stands where a linear layer of a model was, whatever form its weight is kept in."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from deployments.engine.layers.owed import Owed
from deployments.engine.layers.trial import random_rows


class LinearLayer(nn.Module):
    """Takes the place of an `nn.Linear` for inference: (..., in_features) to (..., out_features).

    Attributes:
        dtype: of inputs and outputs.
        device: of inputs and outputs.
        num_bytes: of the weight, as it is kept.
        owed: where it is told what to add its output to; None: it cannot add.
    """

    owed: Owed | None = None

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype, self.device = dtype, device
        self.num_bytes = in_features * out_features * dtype.itemsize


def is_linear(module: object) -> TypeGuard[nn.Linear | LinearLayer]:
    """Whether it is a linear layer, in one of our forms or as the model has it."""
    return isinstance(module, nn.Linear | LinearLayer)


def rows_for(layer: nn.Linear | LinearLayer) -> Tensor:
    """Random rows such as a linear layer takes."""
    kept = layer if isinstance(layer, LinearLayer) else layer.weight
    return random_rows(layer.in_features, kept.dtype, kept.device)


def weight_bytes(model: nn.Module) -> int:
    """Of all layers of a model that keep their weights in a form of ours, experts included."""
    return sum(int(getattr(module, "num_bytes", 0)) for module in model.modules())
