"""Experts of gpt-oss in MXFP4 as its checkpoints have them: what a model is loaded with until kernels take over.

`layers/cuda_experts.py` puts its own in their place; these run in plain torch, one expert after the other.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.engine.kernels.mxfp4 import NOT_A_NUMBER, SHARED, Mxfp4

_BYTES = SHARED // 2  # of the codes of a scale


class StoredExperts(nn.Module):
    """Takes the place of transformers' experts before weights are loaded; names and shapes are the checkpoint's.

    Args:
        experts: of gpt-oss; their weights are (E, in, out).
    """

    gate_up_proj_blocks: Tensor
    gate_up_proj_scales: Tensor
    gate_up_proj_bias: Tensor
    down_proj_blocks: Tensor
    down_proj_scales: Tensor
    down_proj_bias: Tensor

    def __init__(self, experts: Any) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            num_experts, size, rows = weight.shape
            shape = num_experts, rows, size // SHARED
            codes, scales = (
                torch.empty(shape, dtype=torch.uint8, device=weight.device) for shape in ((*shape, _BYTES), shape)
            )
            self.register_parameter(f"{name}_blocks", nn.Parameter(codes, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))
            self.register_parameter(f"{name}_bias", getattr(experts, f"{name}_bias"))
        self.num_experts: int = experts.num_experts
        self.limit, self.alpha = float(experts.limit), float(experts.alpha)

    @property
    def not_finite(self) -> list[str]:
        """Names of scales one of which is no number."""
        names = ("gate_up_proj_scales", "down_proj_scales")
        return [name for name in names if int(getattr(self, name).max()) == NOT_A_NUMBER]

    @property
    def gate_up(self) -> Mxfp4:
        """(E, 2 * I, H), the rows of the gate and the others by turns."""
        return Mxfp4(self.gate_up_proj_blocks.flatten(2), self.gate_up_proj_scales.data)

    @property
    def down(self) -> Mxfp4:
        """(E, H, I)."""
        return Mxfp4(self.down_proj_blocks.flatten(2), self.down_proj_scales.data)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """As transformers' do.

        Args:
            hidden_states: (T, H).
            router_indices: (T, top_k).
            routing_weights: (T, top_k).

        Returns:
            (T, H).
        """
        out = torch.zeros_like(hidden_states)
        for expert in router_indices.unique().tolist():
            token, place = torch.where(router_indices == expert)
            both = functional.linear(
                hidden_states[token], self._widened(self.gate_up, expert, out), self.gate_up_proj_bias[expert]
            )
            gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
            inner = (up + 1) * gate * torch.sigmoid(self.alpha * gate)
            value = functional.linear(inner, self._widened(self.down, expert, out), self.down_proj_bias[expert])
            out.index_add_(0, token, (value * routing_weights[token, place, None]).to(out.dtype))
        return out

    @staticmethod
    def _widened(weight: Mxfp4, expert: int, like: Tensor) -> Tensor:
        one = slice(expert, expert + 1)
        return Mxfp4(weight.codes[one], weight.scales[one]).widen(like.dtype)[0]
