"""Decoder layers of Llama's kind on a CPU: compiled code in place of modules and operators.

What is replaced is recognised by its parts, and only if the replacement gives the same output, and the same KV, for
random input; a layer of another kind runs as it is. The first of some layers that follow each other runs them all, and
the others pass on what they are given, if the model's output stays the same bit by bit.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deployments.engine.attention.base import LayerAttention
from deployments.engine.attention.paged import can_attend, has_kernels
from deployments.engine.attention.sdpa import SdpaStep
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kernels.arguments import Scores
from deployments.engine.kernels.cpu_layers import LAYER, run_layers
from deployments.engine.kernels.cpu_matmul import PackedWeight
from deployments.engine.kv.cache import KVCache, KVShape
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.kv.slots import slots
from deployments.engine.layers.fused import FusedGatedMLP, FusedRMSNorm
from deployments.engine.layers.merged import LinearPart
from deployments.engine.layers.packed import PackedLinear

_PROBE_ROWS, _PROBE_BLOCK_SIZE, _TOLERANCE = 5, 4, 1e-4
# Some models scale queries by the positions of their tokens, once these pass what they were trained for.
_PROBE_POSITION = 1 << 24
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: np.ndarray
    eps: np.float32

    @classmethod
    def of(cls, norm: FusedRMSNorm) -> "_Norm":
        return cls(norm.weight.numpy(), np.float32(norm.eps))


_NO_NORM = _Norm(np.empty(0, np.float32), np.float32(0))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a layer is made of, as compiled code takes it. `*_heads`: norms of single heads, which most models lack."""

    before_attention: _Norm
    before_mlp: _Norm
    query_heads: _Norm
    key_heads: _Norm
    qkv: PackedWeight
    attended: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer that compiled code can run.

    Attributes:
        original: the layer's own forward, for rotary embeddings of a part of a head, and for KV that is rounded.
        parts: of the layer.
        index: of the layer.
        place: of its KV in its group's blocks.
        group: of layers that it is of.
        num_heads: of its queries.
        scores: as its attention asks for them.
        is_last: it is the model's last one.
        is_looked_at: others want to see its input.
    """

    original: Callable[..., Tensor]
    parts: _Parts
    index: int
    place: int
    group: int
    num_heads: int
    scores: Scores
    is_last: bool
    is_looked_at: bool

    def is_followed_by(self, other: "_Layer") -> bool:
        is_next = other.index == self.index + 1 and not other.is_looked_at
        return is_next and (other.scores, other.group) == (self.scores, self.group)

    def addresses(self) -> tuple[object, ...]:
        """A `LAYER`."""
        parts = self.parts
        norms = (parts.before_attention, parts.before_mlp, parts.query_heads, parts.key_heads)
        products = (parts.qkv, parts.attended, parts.gate_up, parts.down)
        return (
            self.place,
            self.num_heads,
            parts.down.depth,
            *(norm.weight.ctypes.data if norm.weight.size else 0 for norm in norms),
            *(norm.eps for norm in norms[:3]),
            *((p.panels.ctypes.data, p.panels.shape[1], p.bias.ctypes.data) for p in products),
        )


class _Run:
    """The forward of the first of some layers that follow each other: runs them all."""

    def __init__(self, layers: list[_Layer]) -> None:
        self._layers = layers  # keeps in memory what the table points to
        self._table = np.array([layer.addresses() for layer in layers], LAYER)

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        paged_step: SdpaStep,
        **others: object,
    ) -> Tensor:
        """Run the layers; writes over its input, and in the model's last layer only over the rows that are wanted.

        Args:
            hidden_states: (1, T, hidden_size).
            position_embeddings: cos and sin, (1, T, head_dim).
            paged_step: the step's attention.
        """
        if position_embeddings[0].shape[-1] != paged_step.cache.group.head_dim or not has_kernels(paged_step.cache):
            others |= {"position_embeddings": position_embeddings, "paged_step": paged_step}
            for layer in self._layers:
                hidden_states = layer.original(hidden_states, **others)
            return hidden_states
        hidden = hidden_states[0]
        last = self._layers[-1]
        rows = paged_step.rows if last.is_last else None
        paged = paged_step.paged(last.scores.window, last.group)
        arguments = (
            hidden.numpy(),
            *(table[0].contiguous().numpy() for table in position_embeddings),
            paged.slots,
            paged.pool,
            paged.runs,
            paged.window,
            np.float32(last.scores.scaling),
        )
        every = np.arange(len(hidden))
        wanted = every if rows is None else rows.numpy()
        for first, end in pairwise(self._edges(paged_step.watch)):
            # numba declares no parameters
            run_layers(self._table[first:end], *arguments, wanted if end == len(self._layers) else every)  # type: ignore[call-arg]
            paged_step.tell(self._layers[end - 1].index + 1)
        return hidden_states

    def _edges(self, watch: LayerWatch | None) -> list[int]:
        """Where the layers are cut for somebody who is told of some of them; both ends included."""
        ends = () if watch is None else watch.ends
        inner = [i for i, layer in enumerate(self._layers) if i and layer.index in ends]
        return [0, *inner, len(self._layers)]


def _pass_on(hidden_states: Tensor, **_: object) -> Tensor:
    """The forward of a layer that one before it has run."""
    return hidden_states


def fuse_decoder_layers(model: nn.Module, shape: KVShape, inputs_wanted: Collection[int] = ()) -> int:
    """Replace the forward of those layers that can be; after linears are packed.

    Args:
        model: its layers.
        shape: of its KV.
        inputs_wanted: layers that others look at the inputs of: none before them runs them.

    Returns:
        How many.
    """
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "self_attn", None), nn.Module)]
    last = max((_index_of(layer) for layer in layers), default=0)
    fused: list[tuple[Any, _Layer]] = []
    for layer in layers:
        parts = _parts_of(layer)
        index = _index_of(layer)
        known = None if parts is None else _known(layer, parts, shape, index == last, index in inputs_wanted)
        if known is not None:
            layer.forward = _Run([known])
            fused.append((layer, known))
    _join(model, fused, shape)
    return len(fused)


def _join(model: nn.Module, fused: list[tuple[Any, _Layer]], shape: KVShape) -> None:
    """Let layers that follow each other run in one call, unless the model does something between them."""
    runs = [[layer] for layer in fused[:1]]
    for before, after in pairwise(fused):
        if before[1].is_followed_by(after[1]):
            runs[-1].append(after)
        else:
            runs.append([after])
    if len(runs) == len(fused):
        return
    expected = _logits(model, shape)
    for run in runs:
        run[0][0].forward = _Run([known for _, known in run])
        for layer, _ in run[1:]:
            layer.forward = _pass_on
    if not torch.equal(_logits(model, shape), expected):
        logger.info("layers of %s run one by one", type(model).__name__)
        for layer, known in fused:
            layer.forward = _Run([known])


@torch.inference_mode()
def _logits(model: nn.Module, shape: KVShape) -> Tensor:
    """Of a few tokens of a sequence."""
    step, tokens = _probe_step(shape), torch.arange(_PROBE_ROWS).unsqueeze(0)
    output: Tensor = model(input_ids=tokens, position_ids=tokens, use_cache=False, paged_step=step).logits
    return output


def _index_of(layer: Any) -> int:
    index = getattr(layer.self_attn, "layer_idx", None)
    return index if isinstance(index, int) else 0


def _parts_of(layer: Any) -> _Parts | None:
    """What compiled code needs of a layer; None: it is of another kind."""
    attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
    if not isinstance(mlp, FusedGatedMLP):
        return None
    first = getattr(attention, "q_proj", None)
    qkv = first.group.linear if isinstance(first, LinearPart) else getattr(attention, "qkv_proj", None)
    linears: list[Any] = [qkv, getattr(attention, "o_proj", None), mlp.gate_up, mlp.down_proj]
    norms = _norms_of(layer)
    if norms is None or not all(isinstance(linear, PackedLinear) for linear in linears):
        return None
    return _Parts(*norms, *(linear.packed for linear in linears))


def _norms_of(layer: Any) -> tuple[_Norm, _Norm, _Norm, _Norm] | None:
    """Before attention and MLP, and of queries and keys; None: a norm is of another kind."""
    norms: list[Any] = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(layer.self_attn, name, None)) is not None]
    if not all(isinstance(norm, FusedRMSNorm) for norm in norms) or len(norms) == 3:
        return None
    before_attention, before_mlp, *heads = map(_Norm.of, norms)
    query_heads, key_heads = heads or (_NO_NORM, _NO_NORM)
    return None if query_heads.eps != key_heads.eps else (before_attention, before_mlp, query_heads, key_heads)


class _Recorder(SdpaStep):
    """Attention that remembers what a layer asked for."""

    scores: Scores | None = None

    def attend(self, asked: LayerAttention) -> Tensor:
        self.scores = asked.scores
        return super().attend(asked)


@torch.inference_mode()
def _known(layer: Any, parts: _Parts, shape: KVShape, *marks: bool) -> _Layer | None:
    """The layer, if compiled code gives the same where the residual is small beside what is added, and large."""
    index, head_dim = _index_of(layer), shape.group.head_dim
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _PROBE_ROWS, len(parts.before_attention.weight), generator=generator)
    halves = torch.randn(2, 1, _PROBE_ROWS, head_dim // 2, generator=generator)
    positions = torch.arange(_PROBE_POSITION, _PROBE_POSITION + _PROBE_ROWS).unsqueeze(0)
    needs: dict[str, Any] = {"position_embeddings": tuple(torch.cat((halves, halves), -1)), "position_ids": positions}
    needs |= dict.fromkeys(("attention_mask", "cache"))
    if any(norm.weight.size not in (0, head_dim) for norm in (parts.query_heads, parts.key_heads)):
        return None
    for scale in (0.01, 1.0, 100.0):
        theirs, ours = _probe_step(shape), _probe_step(shape)
        place = ours.cache.place_of[index]
        try:
            expected = layer(scale * rows, **needs, paged_step=theirs)
            if theirs.scores is None or not can_attend(ours.cache, theirs.scores):
                return None
            where = index, place, ours.cache.group_of[index], parts.attended.depth // head_dim
            known = _Layer(layer.forward, parts, *where, theirs.scores, *marks)
            out = _Run([known])(scale * rows, **needs, paged_step=ours)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            logger.info("%s runs as modules: %s", type(layer).__name__, error)
            return None
        if not isinstance(expected, Tensor) or not _is_near(out, expected):
            return None
        if not _is_near(ours.cache.blocks[place], theirs.cache.blocks[place]):
            return None
    return known


def _probe_step(shape: KVShape) -> _Recorder:
    """One step of a sequence, in blocks that do not follow each other."""
    cache = KVCache(shape, 4, _PROBE_BLOCK_SIZE, torch.device("cpu"))
    tables, at, none = np.array([[[3, 1]]] * cache.num_groups), np.arange(_PROBE_ROWS), np.zeros(0, np.int64)
    places = slots(tables, 0, at, _PROBE_BLOCK_SIZE)
    one_run = np.zeros(1, np.int64), np.array([_PROBE_ROWS])
    return _Recorder(cache, StepArrays(at, none, at, places, *one_run, tables, 0, at, at + 1))


def _is_near(out: Tensor, expected: Tensor) -> bool:
    return out.shape == expected.shape and bool((out - expected).norm() <= _TOLERANCE * expected.norm())
