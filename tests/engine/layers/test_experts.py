"""Kernels of mixtures of experts beside plain torch, and which layers of a model they replace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.layers.cuda_experts import FusedRouter, PackedExperts, WideExperts  # isort: skip
from deployments.engine.layers.replace_experts import fuse_experts, pack_experts  # isort: skip
from deployments.engine.kernels.cuda_experts import Gate, Tile, combine, down, gate_up  # isort: skip
from deployments.engine.kernels import cuda_routing  # isort: skip
from deployments.engine.kernels.cuda_few_experts import down_of_few, gate_up_of_few  # isort: skip
from deployments.engine.kernels.cuda_router import router_logits  # isort: skip
from deployments.engine.kernels.cuda_routing import Routing, plan_blocks, route  # isort: skip

from deployments.engine.kernels.mxfp4 import SHARED, Mxfp4
from deployments.engine.layers.stored_experts import StoredExperts
from deployments.errors import UnsupportedModelError
from tests.engine.families import small_model
from tests.tiny_models import ONE_LAYER_OF_EXPERTS

TILE = Tile(columns=16, depth=16, num_stages=2, num_warps=4)
EVERY_TILE = (TILE, Tile(columns=32, depth=32, num_stages=2, num_warps=4, weight_first=False))
OF_GPT_OSS = Gate(limit=2.0, alpha=1.702)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float16)


def choose(logits: Tensor, routing: Routing, correction: Tensor | None) -> tuple[Tensor, Tensor]:
    """As transformers' routers do."""
    scores = logits.sigmoid() if routing.is_sigmoid else logits.softmax(-1)
    choice = scores if correction is None else scores + correction
    if routing.num_groups > 1:
        groups = choice.unflatten(-1, (routing.num_groups, -1))
        best = groups.topk(2, -1).values.sum(-1).topk(routing.top_groups, -1).indices
        kept = torch.zeros_like(groups[..., 0]).scatter(1, best, 1.0) > 0
        choice = groups.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
    ids = choice.topk(routing.top_k, -1).indices
    weights = scores.gather(1, ids)
    if routing.renormalizes:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * routing.scale, ids


@pytest.mark.parametrize(
    "routing",
    [
        Routing(1),
        Routing(3),
        Routing(3, renormalizes=True),
        Routing(3, is_sigmoid=True, renormalizes=True, scale=2.5),
        Routing(3, is_sigmoid=True, num_groups=4, top_groups=2),
    ],
    ids=str,
)
def test_experts_are_chosen_as_transformers_does(routing: Routing) -> None:
    logits = torch.randn(5, 12, device=DEVICE)
    correction = torch.randn(12, device=DEVICE) if routing.is_sigmoid else None
    weights, ids = route(logits.unsqueeze(0), routing, correction)
    expected_weights, expected_ids = choose(logits, routing, correction)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_broken_logits_choose_experts_that_exist() -> None:
    logits = torch.randn(3, 5, device=DEVICE)
    logits[0], logits[1, 2] = float("nan"), float("inf")
    _, ids = route(logits.unsqueeze(0), Routing(5))
    assert ids.sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize(("num_tokens", "num_experts", "depth"), [(1, 3, 40), (19, 18, 24)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_are_summed_in_float32(num_tokens: int, num_experts: int, depth: int, dtype: torch.dtype) -> None:
    x, weight, bias = randn(num_tokens, depth), randn(num_experts, depth).to(dtype), randn(num_experts)
    logits = router_logits(x, weight, bias).sum(0)
    torch.testing.assert_close(logits, x.float() @ weight.float().t() + bias.float(), rtol=1e-5, atol=1e-5)


def even(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    return torch.rand(num_tokens, num_experts).topk(top_k, -1).indices.int().to(DEVICE)


def to_the_last(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    ids = torch.arange(num_experts - top_k, num_experts, dtype=torch.int32, device=DEVICE)
    return ids.expand(num_tokens, -1).contiguous()


@pytest.mark.parametrize("spread", [even, to_the_last])
@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(1, 2, 5), (7, 3, 40), (50, 2, 3), (700, 2, 3)])
def test_blocks_hold_each_assignment_once(
    spread: Callable[[int, int, int], Tensor], num_tokens: int, top_k: int, num_experts: int
) -> None:
    check_blocks(spread(num_tokens, top_k, num_experts), num_experts)


def test_many_more_assignments_than_are_counted_at_once_are_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_routing, "_CHUNK", 128)
    monkeypatch.setattr(cuda_routing, "_CHUNKS_AT_ONCE", 4)
    check_blocks(even(700, 2, 3), 3)


def check_blocks(ids: Tensor, num_experts: int) -> None:
    plan = plan_blocks(ids, num_experts, rows=16)
    assert torch.equal(plan.order.long(), ids.flatten().sort(stable=True).indices)
    experts, starts, ends = (part.tolist() for part in plan.blocks)
    num_blocks = sum(-(-count // 16) for count in ids.flatten().long().bincount().tolist())
    assert min(experts[:num_blocks]) >= 0 and set(experts[num_blocks:]) <= {-1}
    assert starts[:num_blocks] == [0, *ends[: num_blocks - 1]] and ends[num_blocks - 1] == ids.numel()
    flat = ids.flatten()[plan.order.long()].tolist()
    for expert, start, end in list(zip(experts, starts, ends, strict=True))[:num_blocks]:
        assert 0 < end - start <= 16 and set(flat[start:end]) == {expert}


class Weights:
    """Weights of some experts, and what plain torch computes with them."""

    def __init__(self, num_experts: int, size: int, inner: int, gate: Gate) -> None:
        self.gate, self.size = gate, size
        self.gate_up, self.down = 2 * randn(num_experts, 2 * inner, size) / size**0.5, randn(num_experts, size, inner)
        has_bias = gate.limit is not None
        self.gate_up_bias = randn(num_experts, 2 * inner) if has_bias else None
        self.down_bias = randn(num_experts, size) if has_bias else None

    def expected(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(len(x), self.size, dtype=torch.float64, device=x.device)
        for row, chosen, factors in zip(range(len(x)), ids.tolist(), weights.double(), strict=True):
            for expert, factor in zip(chosen, factors, strict=True):
                both = self.gate_up[expert].double() @ x[row].double()
                if self.gate_up_bias is not None:
                    both = both + self.gate_up_bias[expert].double()
                value = self.down[expert].double() @ self._gated(*both.chunk(2))
                out[row] += factor * (value if self.down_bias is None else value + self.down_bias[expert].double())
        return out

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.gate.limit is None:
            return nn.functional.silu(gate) * up
        gate = gate.clamp(max=self.gate.limit)
        return (up.clamp(-self.gate.limit, self.gate.limit) + 1) * gate * (self.gate.alpha * gate).sigmoid()


def check(out: Tensor, expected: Tensor) -> None:
    difference = (out.double() - expected).norm() / expected.norm()
    assert difference < 2e-3, f"relative difference {difference:.1e}"


@pytest.mark.parametrize("gate", [Gate(), OF_GPT_OSS], ids=str)
@pytest.mark.parametrize("tile", EVERY_TILE, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_experts", "spread"), [(1, 3, even), (6, 9, even), (19, 3, to_the_last)])
def test_experts_give_what_plain_torch_does(
    num_tokens: int, num_experts: int, spread: Callable[[int, int, int], Tensor], tile: Tile, gate: Gate
) -> None:
    of, x, ids = Weights(num_experts, 40, 24, gate), randn(num_tokens, 40), spread(num_tokens, 2, num_experts)
    weights, out = torch.rand(num_tokens, 2, device=DEVICE), torch.full_like(x, float("nan"))
    plan = plan_blocks(ids, num_experts, rows=16)
    inner = gate_up(x, of.gate_up, of.gate_up_bias, plan, 2, gate, tile)
    combine(down(inner, of.down, of.down_bias, plan, tile), weights, out, adds=False)
    check(out, of.expected(x, ids, weights))


@pytest.mark.parametrize("gate", [Gate(), OF_GPT_OSS], ids=str)
def test_few_tokens_need_no_plan(gate: Gate) -> None:
    of, x, ids = Weights(5, 40, 24, gate), randn(3, 40), even(3, 2, 5)
    weights, out = torch.rand(3, 2, device=DEVICE), torch.full_like(x, float("nan"))
    inner = gate_up_of_few(x, of.gate_up, of.gate_up_bias, ids, gate)
    down_of_few(inner, of.down, of.down_bias, ids, weights, out, adds=False)
    check(out, of.expected(x, ids, weights))


@pytest.mark.parametrize("num_tokens", [2, 5, 11])
def test_a_layer_of_experts_adds_to_the_residual_that_it_is_told_of(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tokens are taken in turn, for the memory that they need."""
    monkeypatch.setattr("deployments.engine.layers.cuda_experts._MAX_TOKENS", 6)
    of, x, ids = Weights(4, 32, 16, Gate()), randn(num_tokens, 32), even(num_tokens, 2, 4)
    weights, residual = torch.rand(num_tokens, 2, device=DEVICE), randn(1, num_tokens, 32)
    expected = residual[0].double() + of.expected(x, ids, weights)
    experts = WideExperts(of.gate_up, None, of.down, None, of.gate)
    experts.owed.residual = residual
    out = experts(x, ids.long(), weights)
    assert out.data_ptr() == residual.data_ptr()
    check(out, expected)
    check(experts(x, ids.long(), weights), expected - expected + of.expected(x, ids, weights))


def in_mxfp4(num_experts: int, rows: int, depth: int) -> Tensor:
    codes = torch.randint(0, 256, (num_experts, rows, depth // 2), device=DEVICE).byte()
    scales = torch.randint(121, 124, (num_experts, rows, depth // SHARED), device=DEVICE).byte()
    return Mxfp4(codes, scales).widen(torch.float16)


def build_in_mxfp4() -> PreTrainedModel:
    """A model as gpt-oss is."""
    changes = ONE_LAYER_OF_EXPERTS | {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 3}
    model: PreTrainedModel = small_model("GptOssConfig", "eager", **changes).half().to(DEVICE)
    for parameter in model.model.layers[0].mlp.experts.parameters():
        if parameter.dim() == 3:
            parameter.data.copy_(in_mxfp4(3, parameter.shape[2], parameter.shape[1]).mT)
    return model


@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_experts_that_stay_in_mxfp4_give_what_their_numbers_do(num_tokens: int) -> None:
    model = build_in_mxfp4()
    assert fuse_experts(model) == 1
    mlp = model.model.layers[0].mlp
    x = randn(1, num_tokens, 128)
    expected, num_bytes = mlp(x)[0].double(), mlp.experts.num_bytes
    pack_experts(model)
    check(mlp(x)[0], expected)
    assert mlp.experts.num_bytes * 16 == num_bytes * 4.25


@torch.inference_mode()
def as_stored(experts: nn.Module) -> StoredExperts:
    stored = StoredExperts(experts)
    for name, packed in ((name, Mxfp4.of(getattr(experts, name).mT)) for name in ("gate_up_proj", "down_proj")):
        assert packed is not None
        getattr(stored, f"{name}_blocks").copy_(packed.codes.unflatten(2, (-1, SHARED // 2)))
        getattr(stored, f"{name}_scales").copy_(packed.scales)
    return stored


@torch.inference_mode()
def test_experts_that_were_loaded_in_mxfp4_are_replaced() -> None:
    model = build_in_mxfp4()
    mlp, x = model.model.layers[0].mlp, randn(1, 9, 128)
    expected, mlp.experts = mlp(x)[0].double(), as_stored(mlp.experts)
    check(mlp(x)[0], expected)
    assert fuse_experts(model) == 1
    assert isinstance(mlp.experts, PackedExperts) and isinstance(mlp.router, FusedRouter)
    check(mlp(x)[0], expected)
    pack_experts(model)  # as it is


@torch.inference_mode()
def test_experts_with_scales_that_no_kernel_reads_are_widened_unless_they_are_to_stay() -> None:
    model = build_in_mxfp4()
    mlp = model.model.layers[0].mlp
    stored = mlp.experts = as_stored(mlp.experts)
    stored.down_proj_scales[1, 5, 0] = 130
    x = randn(1, 9, 128)
    expected = mlp(x)[0].double()
    assert fuse_experts(model) == 1 and isinstance(mlp.experts, WideExperts)
    check(mlp(x)[0], expected)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts have a scale of 2\*\*\d+; kernels read"):
        pack_experts(model)


@torch.inference_mode()
def test_kernels_that_give_other_numbers_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.engine.layers.replace_experts.is_near", lambda *_: False)
    model = build_in_mxfp4()
    mlp = model.model.layers[0].mlp
    mlp.experts = as_stored(mlp.experts)
    assert fuse_experts(model) == 1 and isinstance(mlp.experts, WideExperts)
    with pytest.raises(UnsupportedModelError, match=r"other numbers for model\.layers\.0\.mlp\.experts"):
        pack_experts(model)


def test_experts_that_are_not_in_mxfp4_are_refused_by_name() -> None:
    model = build_in_mxfp4()
    model.model.layers[0].mlp.experts.down_proj.data[2, 0, 0] = 0.3
    fuse_experts(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts are not in MXFP4"):
        pack_experts(model)


def test_experts_with_numbers_too_large_for_the_kernels_are_refused_by_name() -> None:
    model = build_in_mxfp4()
    fuse_experts(model)
    model.model.layers[0].mlp.experts.gate_up_proj[0] *= 1024
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.mlp\.experts have a scale of 2\*\*6; kernels read up to 2\*\*1",
    ):
        pack_experts(model)


def test_a_model_without_experts_cannot_keep_them_in_mxfp4() -> None:
    with pytest.raises(UnsupportedModelError, match="no experts"):
        pack_experts(nn.Linear(3, 3))


INNER: dict[str, Any] = {"moe_intermediate_size": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", INNER | {"num_experts": 6, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2MoeConfig", INNER | {"num_experts": 5, "shared_expert_intermediate_size": 24}),
    "glm4_moe": (
        "Glm4MoeConfig",
        INNER
        | {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
        | {"first_k_dense_replace": 0, "routed_scaling_factor": 1.5},
    ),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 3}),
}


def build(family: str) -> PreTrainedModel:
    name, changes = FAMILIES[family]
    return small_model(name, "eager", **ONE_LAYER_OF_EXPERTS, **changes).half().to(DEVICE)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_routers_and_experts_of_a_family_are_replaced(family: str) -> None:
    model = build(family)
    block = model.model.layers[0].mlp
    expected = copy.deepcopy(block).float()
    assert fuse_experts(model) == 1
    kinds = {type(child) for child in block.children()}
    assert kinds >= {FusedRouter, WideExperts}
    x = torch.randn(1, 5, 32, device=DEVICE).half()
    out, wanted = block(x), expected(x.float())
    check(*((part[0] if isinstance(part, tuple) else part).double() for part in (out, wanted)))


def test_a_router_that_does_something_else_stays_and_its_experts_do_not() -> None:
    model = build("mixtral")
    block = model.model.layers[0].mlp

    class Rounding(type(block.gate)):  # type: ignore[misc]  # whatever transformers calls it
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, scores, indices = super().forward(hidden_states)
            return logits, scores.round(), indices

    block.gate.__class__ = Rounding
    assert fuse_experts(model) == 1
    assert isinstance(block.gate, Rounding) and isinstance(block.experts, WideExperts)


def test_experts_with_another_activation_stay_as_they_are() -> None:
    model = build("mixtral")
    model.model.layers[0].mlp.experts.act_fn = nn.GELU()
    assert fuse_experts(model) == 0
