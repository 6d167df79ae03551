"""The table of linear kinds: in which form a layer is kept."""

import pytest
import torch
from torch import nn

from deployments.engine.config import EngineConfig
from deployments.engine.layers.base import LinearLayer
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
