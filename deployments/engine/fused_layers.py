"""Norms, gated MLPs and rotary embeddings of a loaded model, each as one kernel instead of five to twelve operators.

What is replaced is recognised by its parts, and only if the replacement gives the same output for random input; a
model whose layers are of another kind (norms of Gemma add one to the weight) runs as it is.
"""

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from deployments.engine.kernels.cpu import rms_norm, rotate, silu_mul
from deployments.engine.merged_linear import LinearPart

_PROBE_ROWS = 4
_ROTARY = "apply_rotary_pos_emb"  # the name that transformers' models give to it, each in its own file


class FusedRMSNorm(nn.Module):
    """Takes the place of a model's RMSNorm."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self._weight, self._eps = weight.detach().numpy(), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight, self._eps)


class FusedGatedMLP(nn.Module):
    """Takes the place of down(silu(gate(x)) * up(x)).

    Args:
        gate_up: gives the gate's outputs, then the others.
        down_proj: as in the model.
    """

    def __init__(self, gate_up: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down_proj

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu_mul(self.gate_up(x)))
        return out


@torch.inference_mode()
def fuse_layers(model: nn.Module) -> int:
    """Replace what can be replaced in a float32 model on a CPU; after `merge_linears`.

    Returns:
        How many layers were replaced.
    """
    num_fused = sum(_fuse_rotary(module) for module in model.modules())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused, size = _fused_norm(child) or _fused_mlp(child) or (None, 0)
            if fused is not None and _agree(child, fused, size):
                setattr(parent, name, fused)
                num_fused += 1
    return num_fused


def _fused_norm(module: nn.Module) -> tuple[nn.Module, int] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if eps is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    return FusedRMSNorm(weight, eps), len(weight)


def _fused_mlp(module: nn.Module) -> tuple[nn.Module, int] | None:
    gate, down = getattr(module, "gate_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate, LinearPart) or not isinstance(down, nn.Linear):
        return None
    return FusedGatedMLP(gate.group.linear, down), gate.in_features


def _agree(module: nn.Module, fused: nn.Module, size: int) -> bool:
    x = torch.randn(1, _PROBE_ROWS, size, generator=torch.Generator().manual_seed(0))
    expected, out = module(x), fused(x)
    return expected.shape == out.shape and torch.allclose(out, expected, rtol=1e-4, atol=1e-5)


def _fuse_rotary(module: nn.Module) -> bool:
    """Bind the forward of one attention layer to our rotary embedding; other models' layers keep their own."""
    forward = inspect.unwrap(type(module).forward)
    original = forward.__globals__.get(_ROTARY) if isinstance(forward, FunctionType) else None
    if original is None or _ROTARY not in forward.__code__.co_names or not _is_known_rotary(original):
        return False

    def apply(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != queries.shape[-1]:  # a part of the head is rotated
            out: tuple[Tensor, Tensor] = original(queries, keys, cos, sin)
            return out
        cos, sin = cos.contiguous(), sin.contiguous()
        return rotate(queries, cos, sin), rotate(keys, cos, sin)

    bound = FunctionType(
        forward.__code__, {**forward.__globals__, _ROTARY: apply}, forward.__name__, forward.__defaults__
    )
    bound.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(bound, module)
    return True


def _is_known_rotary(function: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, _PROBE_ROWS, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2))
    cos, sin = torch.randn(2, 1, _PROBE_ROWS, 8, generator=generator)
    try:
        expected = function(queries, keys, cos, sin)
    except (RuntimeError, TypeError, ValueError):
        return False
    return all(
        torch.allclose(rotate(x, cos, sin), y, atol=1e-5) for x, y in zip((queries, keys), expected, strict=True)
    )
