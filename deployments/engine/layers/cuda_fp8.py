"""Linear layers whose weights are kept in FP8 on a GPU. Imported only where there is a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from triton import next_power_of_2

from deployments.engine.kernels.cuda import gelu_mul, silu_mul
from deployments.engine.kernels.cuda_fp8 import Fp8Weight, one_row
from deployments.engine.kernels.cuda_fp8_prompts import Tile, many_rows, many_rows_of_library
from deployments.engine.kernels.cuda_fp8_rows import (
    Fp8Rows,
    gelu_mul_quantized,
    quantize_rows,
    rms_norm_quantized,
    silu_mul_quantized,
)
from deployments.engine.kernels.fp8 import round_to
from deployments.engine.layers.base import LinearLayer
from deployments.engine.layers.cuda_decoder import Given, given_to_layers
from deployments.engine.layers.fp8 import scales_of
from deployments.engine.layers.fused import FusedGatedMLP, FusedRMSNorm
from deployments.engine.layers.owed import Owed
from deployments.engine.layers.trial import computes_alike

# From so many rows on torch's own product is faster than ours, where nothing is added in the same pass.
_FROM_ROWS_OF_LIBRARY = 129
_QUANTIZED: dict[Callable[[Tensor], Tensor], Callable[[Tensor], Fp8Rows]] = {
    silu_mul: silu_mul_quantized,
    gelu_mul: gelu_mul_quantized,
}


class Fp8Linear(LinearLayer):
    """Takes the place of a linear layer whose weight lies on a grid of FP8; the weight itself is not kept.

    How it computes depends on the number of rows alone, so engines that prefill and that decode give the same.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.weight.dtype, layer.weight.device)
        scales = scales_of(layer)
        assert scales is not None, layer
        if scales.values.shape[1] == 1:
            scales = scales.by_row(layer.out_features)  # as torch's own product wants them
        self.weight = Fp8Weight(round_to(layer.weight.detach(), scales), scales)
        self._bias = None if layer.bias is None else layer.bias.detach()
        self.owed: Owed = Owed()
        self.num_bytes = self.weight.codes.nbytes + scales.values.nbytes

    def forward(self, x: Tensor | Fp8Rows) -> Tensor:
        residual = self.owed.take()
        out = residual
        if out is None:
            out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device=self.device)
        adds = residual is not None
        if is_single(x.shape):
            assert isinstance(x, Tensor)
            one_row(x, self.weight, self._bias, out, adds=adds)
        else:
            rows = x if isinstance(x, Fp8Rows) else quantize_rows(x)
            self._multiply(rows, out, adds)
        return out

    def _multiply(self, rows: Fp8Rows, out: Tensor, adds: bool) -> None:
        num_rows, weight = len(rows.codes), self.weight
        by_library = num_rows >= _FROM_ROWS_OF_LIBRARY and out.dtype is torch.bfloat16 and not weight.has_blocks
        if by_library and not adds:
            many_rows_of_library(rows, weight, self._bias, out)
        else:
            tile = prompt_tile(self.out_features, num_rows, has_blocks=weight.has_blocks)
            many_rows(rows, weight, self._bias, out, tile, adds=adds)


class _GatedForFp8:
    """An activation whose outputs are rounded to FP8 at once, where the product after it wants them so."""

    def __init__(self, plain: Callable[[Tensor], Tensor]) -> None:
        self._plain, self._quantized = plain, _QUANTIZED[plain]

    def __call__(self, gate_up: Tensor) -> Tensor | Fp8Rows:
        return self._plain(gate_up) if is_single(gate_up.shape) else self._quantized(gate_up)


def is_single(shape: torch.Size) -> bool:
    """Whether there is one row, if any, which stays as it is. Several are rounded to FP8 for the tensor cores."""
    return shape.numel() <= shape[-1]


def prompt_tile(num_columns: int, num_rows: int, *, has_blocks: bool) -> Tile:
    """The best tile of those tried on an H100 (docs/log.md)."""
    if has_blocks:
        return Tile(64 if num_rows <= 64 else 128, 128, 128, 4, 8, stays=False)
    if num_rows <= 128:
        return _tile_of_step(num_columns, max(16, next_power_of_2(num_rows)))
    if num_rows <= 256 and num_columns < 16384:
        # Up to 192 rows leave less of tiles of 64 empty than of 128.
        shape = (64, 128, 256, 4, 8) if num_rows <= 192 else (128, 64, 128, 8, 4)
        return Tile(*shape, stays=False, weight_first=True)
    if num_rows <= 256:
        return Tile(128, 256, 128, 3, 8, stays=False)
    return Tile(128, 128, 128, 5, 4) if num_rows <= 1024 else Tile(128, 256, 128, 3, 8)


def _tile_of_step(num_columns: int, rows: int) -> Tile:
    """Of a step of decodes: the weight is read once, in tiles of all rows."""
    columns, depth, num_stages, num_warps = 64, 256, 4, 4
    if num_columns <= 4096:  # few programs, each with more under way
        depth, num_stages = (128, 8) if rows == 128 else (256, 6)
    elif num_columns >= 16384 and rows >= 64:
        columns, depth, num_stages, num_warps = (128, 256, 4, 8) if rows == 64 else (128, 128, 6, 4)
    return Tile(rows, columns, depth, num_stages, num_warps, stays=False, weight_first=True, ahead=512)


class NormForFp8(nn.Module):
    """A norm whose outputs are rounded to FP8 at once, where the products after it want them so."""

    def __init__(self, norm: FusedRMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor | Fp8Rows:
        return self.norm(x) if is_single(x.shape) else rms_norm_quantized(x, self.norm.weight, self.norm.eps)


@torch.inference_mode()
def round_in_norms(model: PreTrainedModel) -> int:
    """Have activations and norms round for the products after them, in place; after `fuse_residuals`.

    Returns:
        How many norms do.
    """
    for mlp in model.modules():
        if isinstance(mlp, FusedGatedMLP) and isinstance(mlp.down_proj, Fp8Linear):
            mlp.activation = _GatedForFp8(mlp.activation)
    if not any(isinstance(module, Fp8Linear) for module in model.modules()):
        return 0
    return sum(_round_in_norms(layer, given) for layer, given in given_to_layers(model).items())


def _round_in_norms(layer: Any, given: Given) -> int:
    """Have the norms before a decoder layer's two blocks round for them, where that is all the same to the layer."""
    num_rounding = 0
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(layer, name, None)
        if isinstance(norm, FusedRMSNorm):
            rounding = NormForFp8(norm)
            if computes_alike(
                partial(_outputs, layer, name, norm, given),
                partial(_outputs, layer, name, rounding, given),
                given.hidden_states,
            ):
                setattr(layer, name, rounding)
                num_rounding += 1
    return num_rounding


def _outputs(layer: Any, name: str, norm: nn.Module, given: Given, hidden_states: Tensor) -> Tensor:
    """What a layer gives with another norm, which it keeps."""
    kept = getattr(layer, name)
    setattr(layer, name, norm)
    try:
        out: Tensor = layer(hidden_states, *given.args, **given.kwargs)
    finally:
        setattr(layer, name, kept)
    return out
