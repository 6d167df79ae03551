"""Routers and experts of a model on a GPU, replaced by kernels of our own. Imported only where there is a GPU.

Experts are those of transformers' `use_experts_implementation`: the weights of all experts in two tensors. Blocks keep
their own `forward`, so shared experts and whatever else they have stay as they are. A router or a layer of experts that
computes something else than we know is not replaced; found out by trying, as with all other layers.
"""

import copy
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.kernels.cuda_experts import Gate, Tile, combine, down, gate_up
from deployments.engine.kernels.cuda_few_experts import down_of_few, gate_up_of_few
from deployments.engine.kernels.cuda_mxfp4 import packed_product
from deployments.engine.kernels.cuda_router import router_logits
from deployments.engine.kernels.cuda_routing import Routing, plan_blocks, route
from deployments.engine.kernels.mxfp4 import Mxfp4
from deployments.engine.layers.owed import Owed
from deployments.engine.layers.trial import PROBE_ROWS, is_near
from deployments.errors import UnsupportedModelError

# Up to here each token reads the weights of its experts for itself: they seldom meet.
_FEW_TOKENS = 4
# More tokens are taken in turn, for the memory that their experts' outputs take.
_MAX_TOKENS = 8192
logger = logging.getLogger(__name__)


class FusedRouter(nn.Module):
    """Takes the place of a router: gives logits, weights and ids, as transformers' routers do.

    Logits are summed and kept in float32: in bfloat16 many would be equal.

    Args:
        weight: (num_experts, H).
        bias: (num_experts,) of the logits.
        correction: (num_experts,) float32, added to scores for the choice alone.
        routing: how it chooses.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, correction: Tensor | None, routing: Routing) -> None:
        super().__init__()
        self.weight, self._bias, self._correction = weight, bias, correction
        self._routing = routing
        self._is_pinned = False

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = router_logits(x, self.weight, self._bias)
        weights, ids = route(logits, self._routing, self._correction)
        return logits[0], *(self._pinned(len(x)) if self._is_pinned else (weights, ids))

    def _pinned(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        num_experts, device, top_k = len(self.weight), self.weight.device, self._routing.top_k
        ids = torch.arange(num_tokens, device=device)[:, None] + torch.arange(top_k, device=device)
        return torch.full(ids.shape, 1 / top_k, device=device), (ids % num_experts).int()

    @classmethod
    @contextmanager
    def pinned(cls, layer: nn.Module) -> Iterator[None]:
        """Have routers choose by place alone: a rounding must not decide which experts are tried."""
        routers = [module for module in layer.modules() if isinstance(module, cls)]
        for router in routers:
            router._is_pinned = True
        try:
            yield
        finally:
            for router in routers:
                router._is_pinned = False


class FusedExperts(nn.Module):
    """Takes the place of a layer's experts.

    Args:
        gate_up_proj: (E, 2 * I, H), the gate's rows before the others.
        gate_up_bias: (E, 2 * I).
        down_proj: (E, H, I).
        down_bias: (E, H).
        gate: what is done to the outputs of the first.
    """

    def __init__(
        self, gate_up_proj: Tensor, gate_up_bias: Tensor | None, down_proj: Tensor, down_bias: Tensor | None, gate: Gate
    ) -> None:
        super().__init__()
        self.gate_up_proj, self._gate_up_bias = gate_up_proj, gate_up_bias
        self.down_proj, self._down_bias = down_proj, down_bias
        self._gate = gate
        self.owed = Owed()
        self.num_experts = len(gate_up_proj)
        self.num_bytes = gate_up_proj.nbytes + down_proj.nbytes
        self._packed: tuple[Mxfp4, Mxfp4] | None = None

    def pack(self) -> bool:
        """Keep the weights in MXFP4 from now on, without a change of their numbers; False: they are not in it."""
        first, second = Mxfp4.of(self.gate_up_proj), Mxfp4.of(self.down_proj)
        if first is None or second is None:
            return False
        self._packed, self.num_bytes = (first, second), first.nbytes + second.nbytes
        del self.gate_up_proj, self.down_proj
        return True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        residual = self.owed.take()
        out = torch.empty_like(hidden_states) if residual is None else residual.view(hidden_states.shape)
        ids, weights = top_k_index.int().contiguous(), top_k_weights.float().contiguous()
        for start in range(0, len(hidden_states), _MAX_TOKENS):
            some = slice(start, start + _MAX_TOKENS)
            self._add(hidden_states[some], ids[some], weights[some], out[some], residual is not None)
        return out

    def _add(self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, adds: bool) -> None:
        if self._packed is not None:
            plan = plan_blocks(ids, self.num_experts, _tiles(ids.numel() / self.num_experts)[0])
            hidden = packed_product(x, self._packed[0], self._gate_up_bias, plan, ids.shape[1], self._gate)
            products = packed_product(hidden, self._packed[1], self._down_bias, plan, 1, None)
            combine(products, weights, out, adds=adds)
            return
        if len(x) <= _FEW_TOKENS:
            hidden = gate_up_of_few(x, self.gate_up_proj, self._gate_up_bias, ids, self._gate)
            down_of_few(hidden, self.down_proj, self._down_bias, ids, weights, out, adds=adds)
            return
        rows, first, second = _tiles(ids.numel() / self.num_experts)
        plan = plan_blocks(ids, self.num_experts, rows)
        hidden = gate_up(x, self.gate_up_proj, self._gate_up_bias, plan, ids.shape[1], self._gate, first)
        combine(down(hidden, self.down_proj, self._down_bias, plan, second), weights, out, adds=adds)


def _tiles(rows_per_expert: float) -> tuple[int, Tile, Tile]:
    """Rows of a block, and the tiles of both products: the best of those tried on an H100, the first on an H200."""
    if rows_per_expert <= 12:
        return 16, Tile(64, 128, 4, 4), Tile(128, 64, 5, 8)
    if rows_per_expert <= 48:
        return 32, Tile(64, 128, 4, 4), Tile(128, 64, 4, 8)
    if rows_per_expert <= 96:
        return 64, Tile(128, 64, 4, 8), Tile(256, 64, 3, 8, weight_first=False)
    return 128, Tile(128, 64, 4, 8, weight_first=False), Tile(256, 64, 4, 8, weight_first=False)


@torch.inference_mode()
def fuse_experts(model: nn.Module) -> int:
    """Replace routers and experts in place.

    Returns:
        How many layers of experts were replaced.
    """
    num_fused = 0
    for parent in list(model.modules()):
        experts = getattr(parent, "experts", None)
        if not isinstance(experts, nn.Module) or not hasattr(experts, "is_concatenated"):
            continue
        _replace_routers(parent)
        fused = _fused_experts(experts)
        if fused is not None:
            parent.experts = fused
            num_fused += 1
    return num_fused


@torch.inference_mode()
def pack_experts(model: nn.Module) -> None:
    """Keep the weights of all experts in MXFP4, after `fuse_experts`.

    Raises:
        UnsupportedModelError: there are none that our kernels run, or some are not in MXFP4.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedExperts)]
    if not layers:
        raise UnsupportedModelError("quantization is mxfp4, and the model has no experts that kernels of ours run")
    for name, experts in layers:
        if not experts.pack():
            raise UnsupportedModelError(f"quantization is mxfp4, and the weights of {name} are not in MXFP4")


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
    return FusedExperts(
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
    generator, weight = torch.Generator().manual_seed(0), experts.gate_up_proj
    num_experts = len(weight)
    some = sorted({0, num_experts // 2, num_experts - 1})
    size = weight.shape[1 if experts.is_transposed else 2]
    rows = torch.randn(PROBE_ROWS, size, generator=generator).to(weight)
    which = torch.arange(PROBE_ROWS, device=weight.device)[:, None] % len(some)  # of `some`
    scales = torch.rand(which.shape, generator=generator).to(weight) + 0.5
    ids = torch.tensor(some, device=weight.device)[which]
    expected = experts(rows, ids, scales)
    gate_up_proj, down_proj = (_rows_of(w[some], experts, i == 0) for i, w in enumerate((weight, experts.down_proj)))
    biases = (None if bias is None else bias[some] for bias in _biases_of(experts))
    first_bias, second_bias = biases
    out = FusedExperts(gate_up_proj, first_bias, down_proj, second_bias, gate)(rows, which, scales)
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
