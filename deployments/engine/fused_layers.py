"""Norms, gated MLPs and rotary embeddings of a loaded model, each as one kernel instead of five to twelve operators.

What is replaced is recognised by its parts, and only if the replacement gives the same output for random input; a
model whose layers are of another kind (norms of Gemma add one to the weight) runs as it is.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from deployments.engine.attention.base import Rotary
from deployments.engine.kernels.cpu import rms_norm, rotate, silu_mul
from deployments.engine.merged_linear import LinearPart

_PROBE_ROWS = 4
_ROTARY = "apply_rotary_pos_emb"  # the name that transformers' models give to it, each in its own file


Binder = Callable[[nn.Module, "Apply"], "Apply"]
Apply = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class FusedKernels:
    """What replaces the layers of a model on one kind of device.

    Attributes:
        rms_norm: of (x, weight, eps).
        silu_mul: of the gate's and the other outputs side by side.
        rotary: given an attention layer and the function that rotates its queries and keys, the one in its place.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    rotary: Binder


class FusedRMSNorm(nn.Module):
    """Takes the place of a model's RMSNorm."""

    def __init__(self, kernels: FusedKernels, weight: Tensor, eps: float) -> None:
        super().__init__()
        self._kernel, self._weight, self._eps = kernels.rms_norm, weight.detach(), eps

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel(x, self._weight, self._eps)


class FusedGatedMLP(nn.Module):
    """Takes the place of down(silu(gate(x)) * up(x)).

    Args:
        kernels: for the activation.
        gate_up: gives the gate's outputs, then the others.
        down_proj: as in the model.
    """

    def __init__(self, kernels: FusedKernels, gate_up: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down_proj
        self._activation = kernels.silu_mul

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self._activation(self.gate_up(x)))
        return out


@torch.inference_mode()
def fuse_layers(model: nn.Module, kernels: FusedKernels) -> int:
    """Replace what can be replaced; after `merge_linears`.

    Returns:
        How many layers were replaced.
    """
    num_fused = sum(_fuse_rotary(module, kernels.rotary) for module in model.modules())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused, weight = _fused_norm(child, kernels) or _fused_mlp(child, kernels) or (None, None)
            if fused is not None and weight is not None and _agree(child, fused, weight):
                setattr(parent, name, fused)
                num_fused += 1
    return num_fused


def _fused_norm(module: nn.Module, kernels: FusedKernels) -> tuple[nn.Module, Tensor] | None:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if eps is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    return FusedRMSNorm(kernels, weight, eps), weight


def _fused_mlp(module: nn.Module, kernels: FusedKernels) -> tuple[nn.Module, Tensor] | None:
    gate, down = getattr(module, "gate_proj", None), getattr(module, "down_proj", None)
    if not isinstance(gate, LinearPart) or not isinstance(down, nn.Linear):
        return None
    return FusedGatedMLP(kernels, gate.group.linear, down), gate.group.linear.weight


def _agree(module: nn.Module, fused: nn.Module, weight: Tensor) -> bool:
    """Whether both give the same for random rows, as long as those of the weight."""
    x = torch.randn(1, _PROBE_ROWS, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected, out = module(x), fused(x)
    tolerance = 1e-4 if weight.dtype is torch.float32 else 2e-2
    return expected.shape == out.shape and bool((out - expected).norm() <= tolerance * expected.norm())


def rotate_at_once(_: nn.Module, original: Apply) -> Apply:
    """Queries and keys are rotated by our kernel, where the layer asks for it."""

    def apply(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != queries.shape[-1]:  # a part of the head is rotated
            return original(queries, keys, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        return rotate(queries, cos, sin), rotate(keys, cos, sin)

    return apply


def rotate_in_attention(module: nn.Module, original: Apply) -> Apply:
    """Queries and keys stay as they are; attention finds with the layer how to rotate them."""
    rotary = Rotary()
    module.kvrelay_rotary = rotary  # type: ignore[assignment]  # nn.Module types its attributes loosely

    def apply(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if cos.shape[-1] != queries.shape[-1]:
            return original(queries, keys, cos, sin)
        rotary.owed = cos, sin
        return queries, keys

    return apply


CPU_KERNELS = FusedKernels(rms_norm, silu_mul, rotate_at_once)


def _fuse_rotary(module: nn.Module, bind: Binder) -> bool:
    """Bind the forward of one attention layer to our rotary embedding; other models' layers keep their own."""
    forward = inspect.unwrap(type(module).forward)
    original = forward.__globals__.get(_ROTARY) if isinstance(forward, FunctionType) else None
    if original is None or _ROTARY not in forward.__code__.co_names or not _is_known_rotary(original):
        return False
    bound = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: bind(module, original)},
        forward.__name__,
        forward.__defaults__,
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
