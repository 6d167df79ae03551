"""Routers and experts of a model on a GPU, replaced by those of `layers/cuda_experts.py`.

Experts are those of transformers' `use_experts_implementation`: the weights of all experts in two tensors. Blocks keep
their own `forward`, so shared experts and whatever else they have stay as they are. A router or a layer of experts that
computes something else than we know is not replaced; found out by trying, as with all other layers.
"""

import copy
import itertools
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.kernels.cuda_experts import Gate
from deployments.engine.kernels.cuda_routing import Routing
from deployments.engine.kernels.mxfp4 import Mxfp4
from deployments.engine.layers.cuda_experts import FusedExperts, FusedRouter, PackedExperts, WideExperts
from deployments.engine.layers.stored_experts import StoredExperts
from deployments.engine.layers.trial import PROBE_ROWS, is_near
from deployments.errors import UnsupportedModelError

logger = logging.getLogger(__name__)


@torch.inference_mode()
def fuse_experts(model: nn.Module) -> int:
    """Replace routers and experts in place.

    Returns:
        How many layers of experts were replaced.
    """
    num_fused = 0
    for _, parent in _with_experts(model):
        if isinstance(parent.experts, StoredExperts) or hasattr(parent.experts, "is_concatenated"):
            _replace_routers(parent)
            fused = _fused_experts(parent.experts)
            parent.experts = fused or parent.experts
            num_fused += fused is not None
    return num_fused


@torch.inference_mode()
def pack_experts(model: nn.Module) -> None:
    """Keep the weights of all experts in MXFP4, after `fuse_experts`.

    Raises:
        UnsupportedModelError: there are none that our kernels run, or some are not in MXFP4.
    """
    parents = [(name, parent) for name, parent in _with_experts(model) if isinstance(parent.experts, FusedExperts)]
    if not parents:
        raise UnsupportedModelError("quantization is mxfp4, and the model has no experts that kernels of ours run")
    for name, parent in parents:
        if isinstance(parent.experts, WideExperts):
            parent.experts = _pack(f"{name}.experts", parent.experts)


def _pack(name: str, experts: WideExperts) -> PackedExperts:
    try:
        packed = experts.packed()
    except ValueError as error:
        raise UnsupportedModelError(f"quantization is mxfp4, and the weights of {name} have {error}") from error
    if packed is None:
        raise UnsupportedModelError(f"quantization is mxfp4, and the weights of {name} are not in MXFP4")
    if not _give_the_same(packed, experts, experts.gate_up_proj):
        raise UnsupportedModelError(f"quantization is mxfp4, and on this GPU its kernels give other numbers for {name}")
    return packed


def _with_experts(model: nn.Module) -> list[tuple[str, Any]]:
    """Blocks that have experts. What they have is not held, so that it goes when something else takes its place."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]


def _of_stored(experts: StoredExperts) -> FusedExperts:
    both, gate = experts.gate_up, Gate(experts.limit, experts.alpha)
    codes, scales, bias = (
        torch.cat((rows[:, ::2], rows[:, 1::2]), 1) for rows in (both.codes, both.scales, experts.gate_up_proj_bias)
    )
    first, second, biases = Mxfp4(codes, scales), experts.down, (bias, experts.down_proj_bias.detach())
    try:
        packed = PackedExperts(first, second, biases, gate)
        reason = "" if _give_the_same(packed, experts, bias) else "on this GPU its kernels give other numbers"
    except ValueError as error:
        reason = str(error)
    if not reason:
        return packed
    logger.warning("experts in MXFP4 are turned into the model's own type: %s", reason)
    return WideExperts(first.widen(bias.dtype), bias, second.widen(bias.dtype), biases[1], gate)


def _give_the_same(packed: PackedExperts, others: FusedExperts | StoredExperts, like: Tensor) -> bool:
    rows, which, factors, some = _probe(packed.num_experts, packed.size, like)
    return is_near(packed(rows, some[which], factors), others(rows, some[which], factors))


def _probe(num_experts: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random rows, to which of some experts each goes and by what its output is multiplied, and which those are."""
    generator = torch.Generator().manual_seed(0)
    some = torch.tensor(sorted({0, num_experts // 2, num_experts - 1}), device=like.device)
    rows = torch.randn(PROBE_ROWS, size, generator=generator).to(like)
    which = torch.arange(PROBE_ROWS, device=like.device)[:, None] % len(some)
    return rows, which, torch.rand(which.shape, generator=generator).to(like) + 0.5, some


def _replace_routers(parent: nn.Module) -> None:
    for name, child in list(parent.named_children()):
        router = _fused_router(child)
        if router is not None:
            setattr(parent, name, router)


def _fused_router(router: nn.Module) -> FusedRouter | None:
    weight, top_k = getattr(router, "weight", None), getattr(router, "top_k", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(top_k, int) or top_k > len(weight):
        return None
    names = {name for name, _ in itertools.chain(router.named_parameters(), router.named_buffers())}
    if not names <= {"weight", "bias", "e_score_correction_bias"}:
        return None
    bias, correction = getattr(router, "bias", None), getattr(router, "e_score_correction_bias", None)
    known = Routing(
        top_k,
        scale=float(getattr(router, "routed_scaling_factor", 1.0)),
        num_groups=int(getattr(router, "num_group", 1) or 1),
        top_groups=int(getattr(router, "topk_group", 1) or 1),
    )
    parts = weight.detach(), bias, None if correction is None else correction.float()
    for is_sigmoid, renormalizes in itertools.product((False, True), repeat=2):
        candidate = FusedRouter(*parts, replace(known, is_sigmoid=is_sigmoid, renormalizes=renormalizes))
        if _route_alike(router, candidate):
            return candidate
    logger.info("%s routes by itself", type(router).__name__)
    return None


def _route_alike(router: nn.Module, ours: FusedRouter) -> bool:
    """Whether both send random rows to the same experts; theirs in float32, where no two logits are equal."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if ours.weight.dtype is torch.float32 else ours.weight.dtype
    rows = torch.randn(PROBE_ROWS, ours.weight.shape[1], generator=generator).to(ours.weight.device, dtype)
    try:
        _, weights, ids = copy.deepcopy(router).float()(rows.float())
    except (RuntimeError, TypeError, ValueError):
        return False
    _, our_weights, our_ids = ours(rows)
    if weights.shape != our_weights.shape:
        return False
    dense, our_dense = (
        torch.zeros(len(rows), len(ours.weight), device=rows.device).scatter(1, which.long(), values.float())
        for which, values in ((ids, weights), (our_ids, our_weights))
    )
    return is_near(our_dense, dense)


def _fused_experts(experts: Any) -> FusedExperts | None:
    return _of_stored(experts) if isinstance(experts, StoredExperts) else _of_wide(experts)


def _of_wide(experts: Any) -> WideExperts | None:
    others = ("has_post_expert_norm", "_is_expert_parallel")  # of which some versions of transformers know nothing
    if not experts.has_gate or any(getattr(experts, name, False) for name in others):
        return None
    weights = experts.gate_up_proj, experts.down_proj
    if any(weight.dtype not in (torch.bfloat16, torch.float16) or not weight.is_contiguous() for weight in weights):
        return None
    gate = _gate_of(experts)
    if gate is None or any(size % 8 for weight in weights for size in weight.shape[1:]):
        return None
    if not _compute_alike(experts, gate):
        logger.info("%s are run by transformers", type(experts).__name__)
        return None
    for weight, is_first in zip(weights, (True, False), strict=True):
        _turn_into_rows(weight.data, experts, is_first)
    biases = _biases_of(experts)
    return WideExperts(
        _as_rows_shape(weights[0], experts), biases[0], _as_rows_shape(weights[1], experts), biases[1], gate
    )


def _gate_of(experts: Any) -> Gate | None:
    """What an expert does to its gate's outputs, found by trying."""
    limit, alpha = getattr(experts, "limit", None), getattr(experts, "alpha", None)
    candidates = [Gate()]
    if isinstance(limit, float | int) and isinstance(alpha, float | int):
        candidates.append(Gate(float(limit), float(alpha)))
    both = 8 * torch.randn(PROBE_ROWS, 64, generator=torch.Generator().manual_seed(0)).to(experts.gate_up_proj.device)
    expected = experts._apply_gate(both)
    gate, up = both.chunk(2, -1) if experts.is_concatenated else (both[:, ::2], both[:, 1::2])
    return next(
        (candidate for candidate in candidates if torch.allclose(_apply(candidate, gate, up), expected, 1e-3)), None
    )


def _apply(gate: Gate, x: Tensor, up: Tensor) -> Tensor:
    if gate.limit is not None:
        x, up = x.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit) + 1
    return x * torch.sigmoid(gate.alpha * x) * up


def _compute_alike(experts: Any, gate: Gate) -> bool:
    """Whether both give the same for random rows; tries some experts of many, on copies of their weights."""
    weight = experts.gate_up_proj
    rows, which, scales, some = _probe(len(weight), weight.shape[1 if experts.is_transposed else 2], weight)
    expected = experts(rows, some[which], scales)
    gate_up_proj, down_proj = (_rows_of(w[some], experts, i == 0) for i, w in enumerate((weight, experts.down_proj)))
    biases = (None if bias is None else bias[some] for bias in _biases_of(experts))
    first_bias, second_bias = biases
    out = WideExperts(gate_up_proj, first_bias, down_proj, second_bias, gate)(rows, which, scales)
    return out.shape == expected.shape and is_near(out, expected)


def _biases_of(experts: Any) -> tuple[Tensor | None, Tensor | None]:
    if not experts.has_bias:
        return None, None
    first = experts.gate_up_proj_bias.detach()
    if not experts.is_concatenated:
        first = torch.cat((first[:, ::2], first[:, 1::2]), -1)
    return first.contiguous(), experts.down_proj_bias.detach()


def _rows_of(weight: Tensor, experts: Any, is_first: bool) -> Tensor:
    """Weights of some experts with a row for each output, those of the gate before the others."""
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    if is_first and not experts.is_concatenated:
        weight = torch.cat((weight[:, ::2], weight[:, 1::2]), 1)
    return weight.contiguous()


def _as_rows_shape(weight: Tensor, experts: Any) -> Tensor:
    shape = (len(weight), weight.shape[2], weight.shape[1]) if experts.is_transposed else weight.shape
    return weight.detach().view(shape)


def _turn_into_rows(weight: Tensor, experts: Any, is_first: bool) -> None:
    """Write weights anew where they are, one expert after the other: there is no room for another copy of all."""
    if experts.is_transposed or (is_first and not experts.is_concatenated):
        turned = _as_rows_shape(weight, experts)
        for index in range(len(weight)):
            turned[index] = _rows_of(weight[index : index + 1], experts, is_first)[0]
