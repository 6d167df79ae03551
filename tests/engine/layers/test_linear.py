"""The table of linear kinds: in which form a layer is kept, and what a step reads of all."""

import pytest
import torch
from torch import nn

from deployments.engine.config import EngineConfig
from deployments.engine.layers.base import Experts, LinearLayer, Weights, weights_of
from deployments.engine.layers.linear import LINEAR_KINDS, LinearKind, convert_linears
from deployments.engine.layers.packed import PackedLinear

CONFIG = EngineConfig()


class Kept(LinearLayer):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.weight.dtype, layer.weight.device)


def always(name: str, compiled: list[str]) -> LinearKind:
    return LinearKind(name, lambda layer, config: True, Kept, lambda: compiled.append(name))


def test_float32_on_a_cpu_is_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 4)), nn.ReLU())
    counts = convert_linears(model, CONFIG)
    assert {kind.name: count for kind, count in counts.items()} == {"packed": 2}
    assert isinstance(model[0], PackedLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_no_kind_fits_stays_plain(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 4, dtype=dtype))
    assert not convert_linears(model, CONFIG)
    assert type(model[0]) is nn.Linear


def test_a_layer_that_computes_something_else_stays_as_it_is() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(8, 4))
    assert not convert_linears(model, CONFIG)
    assert type(model[0]) is Scaled


def test_the_first_kind_that_fits_is_taken_and_compiled_once() -> None:
    compiled: list[str] = []
    kinds = (always("first", compiled), always("second", compiled))
    counts = convert_linears(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), CONFIG, kinds)
    assert counts == {kinds[0]: 2} and compiled == ["first"]


def test_a_kind_reads_the_engines_settings() -> None:
    def wants_float16(layer: nn.Linear, config: EngineConfig) -> bool:
        return config.dtype == "float16"

    kinds = (LinearKind("half", wants_float16, Kept), *LINEAR_KINDS)
    for dtype, kept in (("float16", Kept), ("auto", PackedLinear)):
        model = nn.Sequential(nn.Linear(8, 4))
        convert_linears(model, EngineConfig(dtype=dtype), kinds)
        assert type(model[0]) is kept


def test_a_layer_says_how_much_it_keeps() -> None:
    assert Kept(nn.Linear(8, 4, dtype=torch.bfloat16)).num_bytes == 64


def test_a_step_reads_the_experts_that_its_tokens_choose() -> None:
    model = nn.Sequential(Kept(nn.Linear(8, 4)), Experts(8, num_weights=1000, num_bytes=2000), Experts(8, 1000, 2000))
    weights = weights_of(model, 2)
    assert weights == Weights(num_bytes=128, expert_bytes=4000, num_expert_weights=2000, chosen=0.25)
    assert weights.read_by(1) == 128 + 1000
    assert weights.read_by(2) == 128 + 1750, "the second token chooses a quarter of those that the first one left"
    assert weights.read_by(100) == pytest.approx(128 + 4000)


@pytest.mark.parametrize("said", [None, 0, [2, 2], 9])
def test_where_nothing_says_how_many_experts_a_token_chooses_it_is_all(said: object) -> None:
    model = nn.Sequential(Kept(nn.Linear(8, 4)), Experts(8, 1000, 2000))
    assert weights_of(model, said).read_by(1) == 128 + 2000


def test_a_model_without_experts_reads_all_of_it() -> None:
    assert weights_of(nn.Sequential(Kept(nn.Linear(8, 4))), 2).read_by(1) == 128
