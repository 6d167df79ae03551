"""Routers and experts with kernels of our own. Imported only where there is a GPU.

`layers/replace_experts.py` puts them into a model.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deployments.engine.kernels.cuda_experts import Gate, Tile, combine, down, gate_up
from deployments.engine.kernels.cuda_few_experts import down_of_few, gate_up_of_few
from deployments.engine.kernels.cuda_mxfp4 import packed_product, packed_rows
from deployments.engine.kernels.cuda_router import router_logits
from deployments.engine.kernels.cuda_routing import Routing, plan_blocks, route
from deployments.engine.kernels.mxfp4 import Mxfp4
from deployments.engine.kernels.mxfp4_words import Packed
from deployments.engine.layers.base import Experts
from deployments.engine.layers.owed import Owed

# Up to here each token reads the weights of its experts for itself: they seldom meet.
_FEW_TOKENS = 4
# More tokens are taken in turn, for the memory that their experts' outputs take.
_MAX_TOKENS = 8192


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


class FusedExperts(Experts):
    """Experts with kernels of our own.

    Args:
        num_experts: how many there are: E.
        num_weights: numbers of both products, of all experts.
        num_bytes: of these.
        biases: of the first product (E, 2 * I), the gate's before the others, and of the second (E, H).
        gate: what is done to the outputs of the first.
    """

    def __init__(
        self,
        num_experts: int,
        num_weights: int,
        num_bytes: int,
        biases: tuple[Tensor | None, Tensor | None],
        gate: Gate,
    ) -> None:
        super().__init__(num_experts, num_weights, num_bytes)
        self._biases, self._gate = biases, gate
        self.owed = Owed()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        residual = self.owed.take()
        out = torch.empty_like(hidden_states) if residual is None else residual.view(hidden_states.shape)
        ids, weights = top_k_index.int().contiguous(), top_k_weights.float().contiguous()
        for start in range(0, len(hidden_states), _MAX_TOKENS):
            some = slice(start, start + _MAX_TOKENS)
            self._add(hidden_states[some], ids[some], weights[some], out[some], residual is not None)
        return out

    def _add(self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, adds: bool) -> None:
        """Write what the experts give, or add it."""
        raise NotImplementedError


class WideExperts(FusedExperts):
    """Experts with weights in the model's own type.

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
        num_weights = gate_up_proj.numel() + down_proj.numel()
        num_bytes = gate_up_proj.nbytes + down_proj.nbytes
        super().__init__(len(gate_up_proj), num_weights, num_bytes, (gate_up_bias, down_bias), gate)
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def packed(self) -> "PackedExperts | None":
        """The same experts in MXFP4, without a change of their numbers; None: they are not in it.

        Raises:
            ValueError: numbers that are too large for the kernels.
        """
        first, second = Mxfp4.of(self.gate_up_proj), Mxfp4.of(self.down_proj)
        return None if first is None or second is None else PackedExperts(first, second, self._biases, self._gate)

    def _add(self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, adds: bool) -> None:
        first_bias, second_bias = self._biases
        if len(x) <= _FEW_TOKENS:
            hidden = gate_up_of_few(x, self.gate_up_proj, first_bias, ids, self._gate)
            down_of_few(hidden, self.down_proj, second_bias, ids, weights, out, adds=adds)
            return
        rows, first, second = _tiles(ids.numel() / self.num_experts)
        plan = plan_blocks(ids, self.num_experts, rows)
        hidden = gate_up(x, self.gate_up_proj, first_bias, plan, ids.shape[1], self._gate, first)
        combine(down(hidden, self.down_proj, second_bias, plan, second), weights, out, adds=adds)


class PackedExperts(FusedExperts):
    """Experts with weights in MXFP4.

    Args:
        gate_up: (E, 2 * I, H), the gate's rows before the others.
        down: (E, H, I).
        biases: as for `FusedExperts`.
        gate: what is done to the outputs of the first.

    Raises:
        ValueError: numbers that are too large for the kernels.
    """

    def __init__(self, gate_up: Mxfp4, down: Mxfp4, biases: tuple[Tensor | None, Tensor | None], gate: Gate) -> None:
        first, second = Packed.of(gate_up), Packed.of(down)
        num_weights = 2 * (gate_up.codes.numel() + down.codes.numel())
        super().__init__(len(gate_up.codes), num_weights, first.nbytes + second.nbytes, biases, gate)
        self._first, self._second = first, second
        self.size = first.depth  # of a token

    def _add(self, x: Tensor, ids: Tensor, weights: Tensor, out: Tensor, adds: bool) -> None:
        plan = plan_blocks(ids, self.num_experts, packed_rows(ids.numel() / self.num_experts))
        hidden = packed_product(x, self._first, self._biases[0], plan, ids.shape[1], self._gate)
        combine(packed_product(hidden, self._second, self._biases[1], plan, 1, None), weights, out, adds=adds)


def _tiles(rows_per_expert: float) -> tuple[int, Tile, Tile]:
    """Rows of a block, and the tiles of both products: the best of those tried on an H100, the first on an H200."""
    if rows_per_expert <= 12:
        return 16, Tile(64, 128, 4, 4), Tile(128, 64, 5, 8)
    if rows_per_expert <= 48:
        return 32, Tile(64, 128, 4, 4), Tile(128, 64, 4, 8)
    if rows_per_expert <= 96:
        return 64, Tile(128, 64, 4, 8), Tile(256, 64, 3, 8, weight_first=False)
    return 128, Tile(128, 64, 4, 8, weight_first=False), Tile(256, 64, 4, 8, weight_first=False)
