"""What attention and the last layer's end take over of a model's layers on a GPU. Imported only where there is one.

Attention rotates queries and keys, and normalises their heads, within the kernel that writes the KV; a layer that does
something with them in between does it all itself. Tried on the whole model, with a stand-in for attention.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.attention.base import LayerAttention
from deployments.engine.kernels.arguments import HeadNorms
from deployments.engine.kernels.cuda import gelu_mul, rms_norm, silu_mul
from deployments.engine.layers.fused import FusedKernels, FusedRMSNorm, rotate_in_attention, rotate_plainly
from deployments.engine.layers.trial import PROBE_ROWS, is_near

KERNELS = FusedKernels(rms_norm, (silu_mul, gelu_mul), rotate_in_attention)
KERNELS_WITHOUT_ROTARY = replace(KERNELS, rotary=None)
logger = logging.getLogger(__name__)


def keep_rotary_where_it_is_wanted(model: PreTrainedModel) -> None:
    """Let those attention layers rotate by themselves that do something with queries or keys thereafter."""
    deferred = {module: module.forward for module in model.modules() if hasattr(module, "kvrelay_rotary")}
    ours = _Recorder.of(model)
    for module in deferred:
        del module.forward
    theirs = _Recorder.of(model)
    for module, forward in deferred.items():
        layer = int(module.layer_idx)  # type: ignore[arg-type]  # nn.Module types its attributes loosely
        if all(is_near(a, b) for a, b in zip(ours.seen[layer], theirs.seen[layer], strict=True)):
            module.forward = forward
        else:
            logger.info("layer %d: %s rotates queries and keys itself", layer, type(module).__name__)
            del module.kvrelay_rotary


@torch.inference_mode()
def can_drop_rows(model: PreTrainedModel) -> bool:
    """Whether the last layer goes on with the rows that are wanted alone, and the model gives their logits then."""
    positions = torch.arange(PROBE_ROWS, device=model.device).unsqueeze(0)
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
    return dropped.shape == expected.shape and is_near(dropped, expected)


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
        if not all(is_near(a, b) for a, b in zip(found.seen[index], expected.seen[index], strict=True)):
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
        positions = torch.arange(PROBE_ROWS, device=model.device).unsqueeze(0)
        model(input_ids=positions, position_ids=positions, use_cache=False, logits_to_keep=1, paged_step=step)
        return step

    def attend(self, asked: LayerAttention) -> Tensor:
        layer, queries, keys, _, _, rotation = asked
        given = queries.unsqueeze(0), keys.unsqueeze(0)
        if rotation is not None and rotation.norms is not None:
            weights, eps = rotation.norms[:2], rotation.norms.eps
            if rotation.num_dims != queries.shape[-1]:
                self.seen[layer] = torch.zeros_like(queries), torch.zeros_like(keys)  # like nothing that is expected
                return asked.nothing
            given = tuple(rms_norm(x, weight, eps) for x, weight in zip(given, weights, strict=True))  # type: ignore[assignment]
        self.seen[layer] = given if rotation is None else tuple(rotate_plainly(x, rotation) for x in given)  # type: ignore[assignment]  # a pair
        return asked.nothing
