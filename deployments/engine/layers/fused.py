"""Norms, gated MLPs and rotary embeddings of a loaded model, each as one kernel instead of five to twelve operators.

What is replaced is recognised by its parts, and only if the replacement gives the same output for random input; a
model whose layers are of another kind runs as it is.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.attention.base import Rotary
from deployments.engine.kernels.arguments import Rotation
from deployments.engine.kernels.cpu import rms_norm, rotate, silu_mul
from deployments.engine.layers.base import is_linear, rows_for
from deployments.engine.layers.merged import LinearPart
from deployments.engine.layers.trial import PROBE_ROWS, computes_alike, random_rows

_ROTARY = "apply_rotary_pos_emb"  # the name that transformers' models give to it, each in its own file


Apply = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# (columns of cos and sin, head_dim) to the leading dimensions of a head that are rotated, the first half of them paired
# with the second; None: something else is done.
NumRotated = Callable[[int, int], int | None]
Binder = Callable[[nn.Module, Apply, NumRotated], Apply]


@dataclass(frozen=True, slots=True)
class FusedKernels:
    """What replaces the layers of a model on one kind of device.

    Attributes:
        rms_norm: of (x, weight, eps); a weight of a wider type than x scales before it is rounded.
        gated: activations of the gate's and the other outputs side by side.
        rotary: given an attention layer, the function that rotates its queries and keys, and what it rotates, the
            function in its place; None: it stays.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    gated: tuple[Callable[[Tensor], Tensor], ...]
    rotary: Binder | None


class FusedRMSNorm(nn.Module):
    """Takes the place of a model's RMSNorm."""

    def __init__(self, kernels: FusedKernels, weight: Tensor, eps: float) -> None:
        super().__init__()
        self._kernel, self.weight, self.eps = kernels.rms_norm, weight.detach(), eps

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel(x, self.weight, self.eps)


class FusedGatedMLP(nn.Module):
    """Takes the place of down(activation(gate(x)) * up(x)).

    Args:
        activation: of the gate's outputs, times the others.
        gate_up: gives the gate's outputs, then the others.
        down_proj: as in the model.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], gate_up: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down_proj = gate_up, down_proj
        # What it gives is for `down_proj` alone, and may be of a form that only that knows.
        self.activation: Callable[[Tensor], Any] = activation
        # Both in one, where there is something faster; None: one after the other.
        self.gated: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.gate_up(x)) if self.gated is None else self.gated(x)
        out: Tensor = self.down_proj(activated)
        return out


@torch.inference_mode()
def fuse_layers(model: nn.Module, kernels: FusedKernels) -> int:
    """Replace what can be replaced; after `convert_linears`.

    Returns:
        How many layers were replaced.
    """
    rotary = kernels.rotary
    num_fused = 0 if rotary is None else sum(_fuse_rotary(module, rotary) for module in model.modules())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child, kernels)
            if fused is not None:
                setattr(parent, name, fused)
                num_fused += 1
    return num_fused


def _fused(module: nn.Module, kernels: FusedKernels) -> nn.Module | None:
    """What computes the same as this module, if one of ours does."""
    for candidate, rows in (*_norms(module, kernels), *_mlps(module, kernels)):
        if computes_alike(module, candidate, rows):
            return candidate
    return None


def _norms(module: nn.Module, kernels: FusedKernels) -> Iterator[tuple[nn.Module, Tensor]]:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1:
        return
    rows = random_rows(len(weight), weight.dtype, weight.device)
    yield FusedRMSNorm(kernels, weight, eps), rows
    yield FusedRMSNorm(kernels, 1 + weight.detach().float(), eps), rows  # as Gemma's


def _mlps(module: nn.Module, kernels: FusedKernels) -> Iterator[tuple[nn.Module, Tensor]]:
    gate, both, down = (getattr(module, name, None) for name in ("gate_proj", "gate_up_proj", "down_proj"))
    gate_up = gate.group.linear if isinstance(gate, LinearPart) else both
    if not is_linear(gate_up) or not is_linear(down):
        return
    for activation in kernels.gated:
        yield FusedGatedMLP(activation, gate_up, down), rows_for(gate_up)


def rotate_at_once(_: nn.Module, original: Apply, num_rotated: NumRotated) -> Apply:
    """Queries and keys are rotated by our kernel, where the layer asks for it."""

    def apply(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        width, head_dim = cos.shape[-1], queries.shape[-1]
        if width != head_dim or num_rotated(width, head_dim) != head_dim:  # a part of the head, or half a table
            return original(queries, keys, cos, sin)
        cos, sin = cos.contiguous(), sin.contiguous()
        return rotate(queries, cos, sin), rotate(keys, cos, sin)

    return apply


def rotate_in_attention(module: nn.Module, original: Apply, num_rotated: NumRotated) -> Apply:
    """Queries and keys stay as they are; attention finds with the layer how to rotate them."""
    rotary = Rotary()
    module.kvrelay_rotary = rotary  # type: ignore[assignment]  # nn.Module types its attributes loosely

    def apply(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        num_dims = num_rotated(cos.shape[-1], queries.shape[-1])
        if num_dims is None:
            return original(queries, keys, cos, sin)
        rotary.owed = Rotation(cos, sin, num_dims, rotary.norms)
        return queries, keys

    return apply


CPU_KERNELS = FusedKernels(rms_norm, (silu_mul,), rotate_at_once)


def _fuse_rotary(module: nn.Module, bind: Binder) -> bool:
    """Bind the forward of one attention layer to our rotary embedding; other models' layers keep their own."""
    forward = inspect.unwrap(type(module).forward)
    original = forward.__globals__.get(_ROTARY) if isinstance(forward, FunctionType) else None
    if original is None or _ROTARY not in forward.__code__.co_names:
        return False
    num_rotated = _rotated_by(original)
    if num_rotated is None:
        return False
    bound = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: bind(module, original, num_rotated)},
        forward.__name__,
        forward.__defaults__,
    )
    bound.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(bound, module)
    return True


def _rotated_by(function: Callable[..., tuple[Tensor, Tensor]]) -> NumRotated | None:
    """What a function rotates, found by trying it; None: not what our kernels do."""
    if list(inspect.signature(function).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    if _rotates(function, 8, 8):
        # With fewer columns some rotate as many dimensions (Phi-3) and some all, of two halves (gpt-oss).
        return _leading if _rotates(function, 4, 4) else _all_of_whole_tables
    return _all if _rotates(function, 4, 8) else None


def _leading(width: int, head_dim: int) -> int | None:
    return width if width <= head_dim else None


def _all_of_whole_tables(width: int, head_dim: int) -> int | None:
    return head_dim if width == head_dim else None


def _all(width: int, head_dim: int) -> int | None:
    return head_dim if 2 * width == head_dim else None


def _rotates(function: Callable[..., tuple[Tensor, Tensor]], width: int, num_dims: int) -> bool:
    """Whether a function with so many columns of cos and sin rotates so many of 8 dimensions."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(1, PROBE_ROWS, heads, 8, generator=generator).transpose(1, 2) for heads in (4, 2))
    halves = torch.randn(2, 1, PROBE_ROWS, num_dims // 2, generator=generator)
    cos, sin = torch.cat((halves, halves), -1)
    try:
        expected = function(queries, keys, *(table[..., :width] for table in (cos, sin)))
    except (RuntimeError, TypeError, ValueError):
        return False
    return all(
        x.shape == y.shape and torch.allclose(rotate_plainly(x, Rotation(cos, sin, num_dims)), y, atol=1e-5)
        for x, y in zip((queries, keys), expected, strict=True)
    )


def rotate_plainly(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys, (1, H, T, head_dim), rotated by torch."""
    half = rotation.num_dims // 2
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    cos, sin = (table[..., :half].unsqueeze(1) for table in (rotation.cos, rotation.sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
