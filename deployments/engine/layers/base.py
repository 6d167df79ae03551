"""What stands where a linear layer of a model was, or its experts, whatever form their weights are kept in."""

from dataclasses import dataclass
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


class Experts(nn.Module):
    """Takes the place of a layer's experts.

    Args:
        num_experts: how many there are.
        num_weights: of all of them.
        num_bytes: these weights, as they are kept.
    """

    def __init__(self, num_experts: int, num_weights: int, num_bytes: int) -> None:
        super().__init__()
        self.num_experts, self.num_weights, self.num_bytes = num_experts, num_weights, num_bytes


@dataclass(frozen=True, slots=True)
class Weights:
    """What a model's layers that keep their weights in a form of ours read and compute.

    Attributes:
        num_bytes: of all layers but experts.
        expert_bytes: of all experts.
        num_expert_weights: numbers that those bytes hold.
        chosen: share of a layer's experts that one token goes through.
    """

    num_bytes: int
    expert_bytes: int = 0
    num_expert_weights: int = 0
    chosen: float = 1.0

    def read_by(self, num_tokens: int) -> float:
        """Bytes that a step of so many tokens reads, where all experts are as likely."""
        return self.num_bytes + (1 - (1 - self.chosen) ** num_tokens) * self.expert_bytes


def weights_of(model: nn.Module, experts_per_token: object) -> Weights:
    """Those of a model.

    Args:
        model: whose layers are replaced.
        experts_per_token: that each layer with experts chooses, as its configuration says; if it says no number: all.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    chosen = 1.0
    if experts and isinstance(experts_per_token, int) and experts_per_token > 0:
        chosen = experts_per_token / experts[0].num_experts
    return Weights(
        sum(module.num_bytes for module in model.modules() if isinstance(module, LinearLayer)),
        sum(module.num_bytes for module in experts),
        sum(module.num_weights for module in experts),
        min(chosen, 1.0),
    )
