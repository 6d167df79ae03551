"""Experts on a GPU against plain torch in float32, in the shapes of real models and some that fit no tile."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.kernels.cuda_experts import Gate  # noqa: E402
from deployments.engine.kernels.cuda_mxfp4 import packed_product  # noqa: E402
from deployments.engine.kernels.cuda_router import router_logits  # noqa: E402
from deployments.engine.kernels.cuda_routing import Routing, plan_blocks, route  # noqa: E402
from deployments.engine.kernels.mxfp4 import Mxfp4  # noqa: E402
from deployments.engine.kernels.mxfp4_words import Packed  # noqa: E402
from deployments.engine.layers.cuda_experts import WideExperts  # noqa: E402

# Experts, of which chosen, sizes of tokens and within: Qwen3-30B-A3B; Mixtral, narrower; 60 as Qwen2-MoE has, of sizes
# that no tile divides; gpt-oss-20b.
SHAPES = [(128, 8, 2048, 768), (8, 2, 1024, 3584), (60, 4, 520, 264), (32, 4, 2880, 2880)]
OF_GPT_OSS = Gate(limit=7.0, alpha=1.702)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Layer:
    """Experts with random weights."""

    def __init__(self, num_experts: int, size: int, inner: int, gate: Gate) -> None:
        self.gate, has_bias = gate, gate.limit is not None
        self.weights = (
            3 / size**0.5 * randn(num_experts, 2 * inner, size),
            inner**-0.5 * randn(num_experts, size, inner),
        )
        self.biases = (randn(num_experts, 2 * inner), randn(num_experts, size)) if has_bias else (None, None)
        self.fused = WideExperts(self.weights[0], self.biases[0], self.weights[1], self.biases[1], gate)

    def expected(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        (first, second), (first_bias, second_bias) = self.weights, self.biases
        for expert in ids.unique().tolist():
            rows, place = torch.where(ids == expert)
            bias = None if first_bias is None else first_bias[expert].float()
            gate, up = functional.linear(x[rows].float(), first[expert].float(), bias).chunk(2, -1)
            bias = None if second_bias is None else second_bias[expert].float()
            value = functional.linear(self._gated(gate, up), second[expert].float(), bias)
            out.index_add_(0, rows, value * weights[rows, place, None])
        return out

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.gate.limit is None:
            return functional.silu(gate) * up
        gate = gate.clamp(max=self.gate.limit)
        return (up.clamp(-self.gate.limit, self.gate.limit) + 1) * gate * torch.sigmoid(self.gate.alpha * gate)


@pytest.mark.parametrize("gate", [Gate(), OF_GPT_OSS], ids=["silu", "clamped"])
@pytest.mark.parametrize(("num_experts", "top_k", "size", "inner"), SHAPES)
def test_experts_of_all_batches_and_spreads(num_experts: int, top_k: int, size: int, inner: int, gate: Gate) -> None:
    layer = Layer(num_experts, size, inner, gate)
    ramp = torch.linspace(0, 1, num_experts, device="cuda")
    for num_tokens in (1, 3, 5, 33, 128, 300, 1100, 3000):
        for skew in (0.0, 6.0, 500.0):  # even; some much more than others; all to the same experts
            logits = torch.randn(num_tokens, num_experts, device="cuda") + skew * ramp
            weights, ids = route(logits.unsqueeze(0), Routing(top_k, renormalizes=True))
            x, residual = randn(num_tokens, size), randn(1, num_tokens, size)
            expected = layer.expected(x, ids, weights)
            with_residual = expected + residual[0].float()
            torch.full(
                (num_tokens * top_k, 2 * max(size, inner)), float("nan"), device="cuda"
            )  # what buffers hold next
            out = layer.fused(x, ids, weights)
            again = layer.fused(x, ids, weights)
            assert torch.equal(out, again), "sums must not depend on the order in which programs end"
            layer.fused.owed.residual = residual
            layer.fused(x, ids, weights)
            for result, wanted in ((out, expected), (residual[0], with_residual)):
                difference = (result.float() - wanted).norm() / wanted.norm()
                assert difference < 1e-2, f"{num_tokens} tokens, skew {skew}: {difference:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_packed_weight_is_read_exactly(dtype: torch.dtype) -> None:
    """Each token picks out a column: every code with every scale that bfloat16 has a product for."""
    depth, lowest = 320, 1 if dtype is torch.bfloat16 else 114  # float16 has fewer exponents
    codes = torch.randint(0, 256, (2, 200, depth // 2), device="cuda").byte()
    scales = torch.randint(lowest, 129, (2, 200, depth // 32), device="cuda").byte()
    weight = Mxfp4(codes, scales)
    ids = torch.arange(2, device="cuda", dtype=torch.int32).repeat_interleave(depth)[:, None].contiguous()
    x = torch.eye(depth, device="cuda", dtype=dtype).repeat(2, 1)
    for rows in (16, 32, 64, 128):
        out = packed_product(x, Packed.of(weight), None, plan_blocks(ids, 2, rows), 1, None)
        assert torch.equal(out.view(2, depth, 200).mT, weight.widen(dtype))


@pytest.mark.parametrize(("num_experts", "top_k", "size", "inner"), [(32, 4, 2880, 2880), (6, 2, 160, 96)])
def test_packed_experts_give_what_their_numbers_do(num_experts: int, top_k: int, size: int, inner: int) -> None:
    layer = Layer(num_experts, size, inner, OF_GPT_OSS)
    for weight in layer.weights:
        weight.copy_(Mxfp4.nearest(weight).widen(torch.bfloat16))
    packed = layer.fused.packed()
    assert packed is not None
    ramp = torch.linspace(0, 1, num_experts, device="cuda")
    for num_tokens in (1, 3, 8, 33, 128, 300, 1100, 3000):
        for skew in (0.0, 6.0, 500.0):
            weights, ids = route(
                (torch.randn(num_tokens, num_experts, device="cuda") + skew * ramp)[None], Routing(top_k)
            )
            x = randn(num_tokens, size)
            out, expected = packed(x, ids, weights), layer.expected(x, ids, weights)
            difference = (out.float() - expected).norm() / expected.norm()
            assert difference < 1e-2, f"{num_tokens} tokens, skew {skew}: {difference:.1e}"


def test_a_graph_takes_another_routing_at_each_replay() -> None:
    layer, (num_tokens, top_k) = Layer(64, 512, 256, Gate()), (40, 4)
    x, logits = randn(num_tokens, 512), torch.randn(num_tokens, 64, device="cuda")

    def run() -> Tensor:
        weights, ids = route(logits.unsqueeze(0), Routing(top_k))
        out: Tensor = layer.fused(x, ids, weights)
        return out

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for skew in (0.0, 100.0, 0.0):
        logits.copy_(torch.randn(num_tokens, 64, device="cuda") + skew * torch.arange(64, device="cuda"))
        graph.replay()
        weights, ids = route(logits.unsqueeze(0), Routing(top_k))
        expected = layer.expected(x, ids, weights)
        assert (out.float() - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_experts", "depth"), [(128, 2048), (60, 1032), (8, 4096)])
@pytest.mark.parametrize("num_tokens", [1, 17, 256, 257, 3000])
def test_logits_of_routers(num_tokens: int, num_experts: int, depth: int, dtype: torch.dtype) -> None:
    x, weight, bias = randn(num_tokens, depth), randn(num_experts, depth).to(dtype), randn(num_experts)
    expected = x.double() @ weight.double().t() + bias.double()
    logits = router_logits(x, weight, bias).sum(0)
    assert logits.dtype is torch.float32
    assert (logits.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("num_experts", [8, 60, 128, 512])
def test_many_tokens_choose_as_torch_does(num_experts: int) -> None:
    logits = torch.randn(5000, num_experts, device="cuda")
    weights, ids = route(logits.unsqueeze(0), Routing(4))
    expected = logits.softmax(-1).topk(4, -1)
    assert torch.equal(ids.long(), expected.indices)
    torch.testing.assert_close(weights, expected.values)
