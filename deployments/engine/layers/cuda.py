"""The layers of a model on a GPU, replaced by faster ones that compute the same. Imported only where there is a GPU."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention.base import AttentionStep
from deployments.engine.kernels.arguments import HeadNorms, Rotation, Scores
from deployments.engine.kernels.cuda import add_norm, gelu_mul, rms_norm, silu_mul
from deployments.engine.kernels.cuda_matmul import add_linear, linear
from deployments.engine.layers.cuda_experts import FusedExperts, FusedRouter, fuse_experts
from deployments.engine.layers.fused import (
    FusedGatedMLP,
    FusedKernels,
    FusedRMSNorm,
    fuse_layers,
    rotate_in_attention,
    rotate_plainly,
)
from deployments.engine.layers.owed import Owed

KERNELS = FusedKernels(rms_norm, (silu_mul, gelu_mul), rotate_in_attention)
# Names of the norms of a decoder layer: of the inputs of its two blocks, which some models lack, and of the outputs.
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
_PROBE_ROWS, _TOLERANCE = 4, 2e-2
logger = logging.getLogger(__name__)


class SkinnyLinear(nn.Module):
    """Takes the place of an `nn.Linear` for inference, with kernels of our own for few rows; shares its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = layer.weight.detach()
        self._bias = None if layer.bias is None else layer.bias.detach()
        self.owed = Owed()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.owed.take()
        if residual is None:
            return linear(x, self.weight, self._bias)
        return add_linear(residual, x, self.weight, self._bias)


def optimize_layers(model: PreTrainedModel) -> None:
    """Replace layers in place; after `merge_linears`. Attention layers leave the rotary embedding to attention."""
    fuse_layers(model, KERNELS)
    has_experts = bool(fuse_experts(model))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.is_contiguous():
                setattr(parent, name, SkinnyLinear(child))
    last = max(getattr(module, "layer_idx", None) or 0 for module in model.modules())
    for module in model.modules():
        is_last = getattr(getattr(module, "self_attn", None), "layer_idx", None) == last
        if not _fuse_norms(module, is_last):
            _fuse_residual(module, is_last)
    keep_rotary_where_it_is_wanted(model)
    if has_experts:  # where it was written for; dense models have not been measured with it
        leave_norms_to_attention(model)


def keep_rotary_where_it_is_wanted(model: PreTrainedModel) -> None:
    """Let those attention layers rotate by themselves that do something with queries or keys thereafter."""
    deferred = {module: module.forward for module in model.modules() if hasattr(module, "kvrelay_rotary")}
    ours = _Recorder.of(model)
    for module in deferred:
        del module.forward
    theirs = _Recorder.of(model)
    for module, forward in deferred.items():
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module types its attributes loosely
        if all(_is_near(a, b) for a, b in zip(ours.seen[layer], theirs.seen[layer], strict=True)):
            module.forward = forward
        else:
            logger.info("layer %d: %s rotates queries and keys itself", layer, type(module).__name__)
            del module.kvrelay_rotary


@torch.inference_mode()
def can_drop_rows(model: PreTrainedModel) -> bool:
    """Whether the last layer goes on with the rows that are wanted alone, and the model gives their logits then."""
    positions = torch.arange(_PROBE_ROWS, device=model.device).unsqueeze(0)
    rows = positions[0, 1::2]

    def logits(step: _Recorder, keep: Tensor | int) -> Tensor:
        given = {"input_ids": positions, "position_ids": positions, "use_cache": False}
        out: Tensor = model(**given, logits_to_keep=keep, paged_step=step).logits
        return out

    try:
        dropped, expected = logits(_Recorder(rows), 0), logits(_Recorder(), rows)
    except RuntimeError as error:
        logger.info("%s computes all rows in its last layer: %s", type(model).__name__, error)
        return False
    return dropped.shape == expected.shape and _is_near(dropped, expected)


class _LeftNorm(nn.Module):
    """Stands where a norm of heads was that attention applies."""

    def __init__(self, norm: FusedRMSNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x


def leave_norms_to_attention(model: PreTrainedModel) -> None:
    """Have those attention layers leave the norms of queries and keys to attention that rotate right after them."""
    expected = _Recorder.of(model)
    layers = [module for module in model.modules() if _leave_norms(module)]
    if not layers:
        return
    found = _Recorder.of(model)
    for layer in layers:
        index = int(layer.layer_idx)  # type: ignore[arg-type]  # nn.Module types its attributes loosely
        if not all(_is_near(a, b) for a, b in zip(found.seen[index], expected.seen[index], strict=True)):
            logger.info("layer %d: %s normalises queries and keys itself", index, type(layer).__name__)
            _take_norms_back(layer)


def _leave_norms(layer: Any) -> bool:
    rotary = getattr(layer, "kvrelay_rotary", None)
    norms = getattr(layer, "q_norm", None), getattr(layer, "k_norm", None)
    if rotary is None or not all(isinstance(norm, FusedRMSNorm) for norm in norms):
        return False
    query, key = norms
    if query.eps != key.eps or query.weight.dtype != key.weight.dtype or query.weight.shape != key.weight.shape:  # type: ignore[union-attr]
        return False
    rotary.norms = HeadNorms(query.weight, key.weight, query.eps)  # type: ignore[union-attr]
    layer.q_norm, layer.k_norm = _LeftNorm(query), _LeftNorm(key)  # type: ignore[arg-type]
    return True


def _take_norms_back(layer: Any) -> None:
    if isinstance(getattr(layer, "q_norm", None), _LeftNorm):
        layer.kvrelay_rotary.norms = None
        layer.q_norm, layer.k_norm = layer.q_norm.norm, layer.k_norm.norm


class _Recorder:
    """Stands in for attention: keeps queries and keys of each layer, rotated, and lets no token see another."""

    def __init__(self, rows: Tensor | None = None) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows = rows

    @classmethod
    @torch.inference_mode()
    def of(cls, model: PreTrainedModel) -> "_Recorder":
        step = cls()
        positions = torch.arange(_PROBE_ROWS, device=model.device).unsqueeze(0)
        model(input_ids=positions, position_ids=positions, use_cache=False, logits_to_keep=1, paged_step=step)
        return step

    def attend(
        self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scores: Scores, rotation: Rotation | None
    ) -> Tensor:
        given = queries.unsqueeze(0), keys.unsqueeze(0)
        if rotation is not None and rotation.norms is not None:
            weights, eps = rotation.norms[:2], rotation.norms.eps
            if rotation.num_dims != queries.shape[-1]:
                self.seen[layer] = torch.zeros_like(queries), torch.zeros_like(keys)  # like nothing that is expected
                return self._nothing(queries, values)
            given = tuple(rms_norm(x, weight, eps) for x, weight in zip(given, weights, strict=True))  # type: ignore[assignment]
        self.seen[layer] = given if rotation is None else tuple(rotate_plainly(x, rotation) for x in given)  # type: ignore[assignment]  # a pair
        return self._nothing(queries, values)

    def _nothing(self, queries: Tensor, values: Tensor) -> Tensor:
        return queries.new_zeros(queries.shape[1], queries.shape[0], values.shape[2])


def _is_near(out: Tensor, expected: Tensor) -> bool:
    return bool((out.float() - expected.float()).norm() <= _TOLERANCE * expected.float().norm())


def restore_rotary(model: nn.Module) -> None:
    """Let attention layers rotate queries and keys themselves again."""
    for module in model.modules():
        if hasattr(module, "kvrelay_rotary"):
            _take_norms_back(module)
            del module.kvrelay_rotary, module.forward


def _fuse_residual(layer: nn.Module, is_last: bool) -> None:
    """Have the two projections that end a decoder layer's halves add to the residual, if that is all it does."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return
    if not all(hasattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")):
        return
    attended, multiplied = getattr(attention, "o_proj", None), _last_of(mlp)
    if isinstance(attended, SkinnyLinear) and multiplied is not None:
        fused = partial(_forward, layer, is_last, attended.owed, multiplied)
        if _agree(layer, fused, attended.weight):
            layer.forward = fused
        attended.owed.residual = multiplied.residual = None  # of a try that was broken off


def _last_of(mlp: nn.Module) -> Owed | None:
    """What adds to the residual at the end of an MLP. Experts do, whatever the block adds to their output."""
    experts = getattr(mlp, "experts", None)
    if isinstance(experts, FusedExperts):
        return experts.owed
    last = mlp.down_proj if isinstance(mlp, FusedGatedMLP) else None
    return last.owed if isinstance(last, SkinnyLinear) else None


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


def _fuse_norms(layer: nn.Module, is_last: bool) -> bool:
    """Add what a layer's blocks give to the residual between the norms around it, if that is what the layer does."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return False
    for names in _NORMS:
        before, attended, between, multiplied = (getattr(layer, name, None) for name in names)
        if not isinstance(attended, FusedRMSNorm) or not isinstance(multiplied, FusedRMSNorm):
            continue
        if not all(norm is None or isinstance(norm, FusedRMSNorm) for norm in (before, between)):
            continue
        fused = partial(_forward_between_norms, layer, is_last, before, attended, between, multiplied)
        if _agree(layer, fused, attended.weight.to(_dtype_of(layer))):
            layer.forward = fused
            return True
    return False


def _dtype_of(layer: nn.Module) -> torch.dtype:
    return next(module.weight.dtype for module in layer.modules() if isinstance(module, SkinnyLinear))


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


class _Echo:
    """Stands in for attention: every head attends to its own query."""

    rows = None

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, *_: object) -> Tensor:
        return queries.transpose(0, 1).contiguous()


@torch.inference_mode()
def _agree(layer: Any, fused: "partial[Tensor]", weight: Tensor) -> bool:
    """Whether both give the same, where the residual is small beside what is added to it, as large, and large."""
    rotary = torch.ones(2, 1, _PROBE_ROWS, getattr(layer.self_attn, "head_dim", 1)).to(weight)
    needs: dict[str, Any] = {"position_embeddings": tuple(rotary), "paged_step": _Echo()}
    needs |= dict.fromkeys(("attention_mask", "position_ids", "cache"))
    rows = torch.randn(1, _PROBE_ROWS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    for scale in (0.01, 1.0, 100.0):
        try:
            with FusedRouter.pinned(layer):
                # Each writes over its own input.
                expected, out = layer(scale * rows, **needs), fused(scale * rows, **needs)
        except Exception as error:
            logger.info("%s adds its residuals itself: %s", type(layer).__name__, error)
            return False
        if not isinstance(expected, Tensor) or not (out - expected).norm() <= _TOLERANCE * expected.norm():
            return False
    return True
