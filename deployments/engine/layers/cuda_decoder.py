"""Decoder layers on a GPU whose last kernels add to the residual. Imported only where there is a GPU.

A layer is replaced if ours gives the same for what the model gives it, wherever the residual is small or large beside
what is added.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention.base import AttentionStep, LayerAttention
from deployments.engine.kernels.cuda import add_norm
from deployments.engine.layers.base import LinearLayer
from deployments.engine.layers.cuda_experts import FusedExperts, FusedRouter
from deployments.engine.layers.fused import FusedGatedMLP, FusedRMSNorm
from deployments.engine.layers.owed import Owed
from deployments.engine.layers.trial import PROBE_ROWS, computes_alike, random_rows

# Names of the norms of a decoder layer: of the inputs of its two blocks, which some models lack, and of the outputs.
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
# Of the residual beside what is added to it.
_SCALES = (0.01, 1.0, 100.0)
# Layers are tried with one token, whose numbers stay as they are where those of several are rounded to FP8: two numbers
# that differ in their last bit may be rounded to two that differ by 6%.
_NUM_TOKENS = 1
logger = logging.getLogger(__name__)


def fuse_residuals(model: PreTrainedModel) -> int:
    """Replace decoder layers in place; their norms, projections and experts are replaced before.

    Returns:
        How many layers were replaced.
    """
    given = given_to_layers(model, _NUM_TOKENS)
    last = max(getattr(module, "layer_idx", None) or 0 for module in model.modules())
    num_fused = 0
    for layer, its in given.items():
        is_last = getattr(layer.self_attn, "layer_idx", None) == last
        if _fuse_norms(layer, is_last, its) or _fuse_residual(layer, is_last, its):
            num_fused += 1
        else:
            logger.info("%s adds its residuals itself", type(layer).__name__)
    return num_fused


class _Echo:
    """Stands in for attention: every head attends to its own query."""

    rows = None

    def attend(self, asked: LayerAttention) -> Tensor:
        return asked.queries.transpose(0, 1).contiguous()


@dataclass(frozen=True, slots=True)
class Given:
    """What a model gives one of its decoder layers beside hidden states, its first argument.

    Attributes:
        hidden_states: (1, T, hidden_size) such as these.
        args: the other positional ones.
        kwargs: by their names.
    """

    hidden_states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.inference_mode()
def given_to_layers(model: PreTrainedModel, num_tokens: int = PROBE_ROWS) -> dict[nn.Module, Given]:
    """Run a few tokens through a model and keep what each of its decoder layers was called with.

    What that is differs by family: of rotary embeddings gpt-oss gives half the width that others do, Gemma 3 another
    one to layers with a window.
    """
    given: dict[nn.Module, Given] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = dict(kwargs)
        hidden_states, *rest = args or (others.pop("hidden_states"),)
        given[layer] = Given(hidden_states, tuple(rest), others)

    hooks = [
        layer.register_forward_pre_hook(keep, with_kwargs=True)
        for layer in model.modules()
        if all(isinstance(getattr(layer, name, None), nn.Module) for name in ("self_attn", "mlp"))
    ]
    positions = torch.arange(num_tokens, device=model.device).unsqueeze(0)
    try:
        model(input_ids=positions, position_ids=positions, use_cache=False, logits_to_keep=1, paged_step=_Echo())
    finally:
        for hook in hooks:
            hook.remove()
    return given


def _fuse_residual(layer: Any, is_last: bool, given: Given) -> bool:
    """Have the two projections that end a decoder layer's halves add to the residual, if that is all it does."""
    if not all(hasattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")):
        return False
    attended, multiplied = _added_by(getattr(layer.self_attn, "o_proj", None)), _last_of(layer.mlp)
    if attended is None or multiplied is None:
        return False
    fused = partial(_forward, layer, is_last, attended, multiplied)
    is_fused = _agree(layer, fused, given)
    if is_fused:
        layer.forward = fused
    attended.residual = multiplied.residual = None  # of a try that was broken off
    return is_fused


def _added_by(linear: object) -> Owed | None:
    return linear.owed if isinstance(linear, LinearLayer) else None


def _last_of(mlp: nn.Module) -> Owed | None:
    """What adds to the residual at the end of an MLP. Experts do, whatever the block adds to their output."""
    experts = getattr(mlp, "experts", None)
    if isinstance(experts, FusedExperts):
        return experts.owed
    return _added_by(mlp.down_proj) if isinstance(mlp, FusedGatedMLP) else None


def _forward(
    layer: Any, is_last: bool, attended: Owed, multiplied: Owed, hidden_states: Tensor, **kwargs: Any
) -> Tensor:
    """A decoder layer of Llama's kind; writes over its input.

    Args:
        layer: whose parts are used.
        is_last: from its attention on only rows that are wanted are computed.
        attended: of the projection that ends attention.
        multiplied: of what ends the MLP.
        hidden_states: (1, T, hidden_size).
        kwargs: for attention.
    """
    normed = layer.input_layernorm(hidden_states)
    attended.residual = hidden_states
    hidden_states, _ = layer.self_attn(hidden_states=normed, **kwargs)
    if is_last:
        hidden_states = _wanted(hidden_states, kwargs["paged_step"])
    normed = layer.post_attention_layernorm(hidden_states)
    multiplied.residual = hidden_states
    out = layer.mlp(normed)
    whole: Tensor = out[0] if isinstance(out, tuple) else out  # gpt-oss gives its routing, too
    return whole


def _fuse_norms(layer: nn.Module, is_last: bool, given: Given) -> bool:
    """Add what a layer's blocks give to the residual between the norms around it, if that is what the layer does."""
    for names in _NORMS:
        before, attended, between, multiplied = (getattr(layer, name, None) for name in names)
        if not isinstance(attended, FusedRMSNorm) or not isinstance(multiplied, FusedRMSNorm):
            continue
        if not all(norm is None or isinstance(norm, FusedRMSNorm) for norm in (before, between)):
            continue
        fused = partial(_forward_between_norms, layer, is_last, before, attended, between, multiplied)
        if _agree(layer, fused, given):
            layer.forward = fused
            return True
    return False


def _forward_between_norms(
    layer: Any,
    is_last: bool,
    before: FusedRMSNorm | None,
    attended: FusedRMSNorm,
    between: FusedRMSNorm | None,
    multiplied: FusedRMSNorm,
    hidden_states: Tensor,
    **kwargs: Any,
) -> Tensor:
    """A decoder layer of Gemma's kind; writes over its input.

    Args:
        layer: whose parts are used.
        is_last: as of `_forward`.
        before: norm of attention's input.
        attended: norm of its output.
        between: norm of the MLP's input.
        multiplied: norm of its output.
        hidden_states: (1, T, hidden_size).
        kwargs: for attention.
    """
    normed = hidden_states if before is None else before(hidden_states)
    out, _ = layer.self_attn(hidden_states=normed, **kwargs)
    if is_last:
        hidden_states, out = (_wanted(part, kwargs["paged_step"]) for part in (hidden_states, out))
    if between is None:
        add_norm(hidden_states, out, attended.weight, attended.eps)
        out = layer.mlp(hidden_states)
    else:
        out = layer.mlp(add_norm(hidden_states, out, attended.weight, attended.eps, between.weight, between.eps))
    add_norm(hidden_states, out, multiplied.weight, multiplied.eps)
    return hidden_states


def _wanted(hidden_states: Tensor, step: AttentionStep) -> Tensor:
    return hidden_states if step.rows is None else hidden_states.index_select(1, step.rows)


@torch.inference_mode()
def _agree(layer: nn.Module, ours: Callable[..., Tensor], given: Given) -> bool:
    """Whether both give the same, where the residual is small beside what is added to it, as large, and large."""
    hidden = given.hidden_states
    rows = random_rows(hidden.shape[-1], hidden.dtype, hidden.device)[:, : hidden.shape[1]]

    def with_all_else(forward: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: forward(x, *given.args, **given.kwargs)

    with FusedRouter.pinned(layer):
        return all(computes_alike(with_all_else(layer), with_all_else(ours), scale * rows) for scale in _SCALES)
