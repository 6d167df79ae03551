"""Layers that a model's own code looks into stay as they are."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deployments.engine.config import EngineConfig
from deployments.engine.layers.linear import convert_linears
from deployments.engine.layers.looked_into import watching_linears
from deployments.engine.layers.merged import merge_linears
from deployments.engine.model.load import optimize_layers, prepare_model
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import CPU, continue_greedily, random_prompt, small_model

ROWS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Gate(nn.Module):
    """Asks for the type of a weight, as HunYuan's does, where it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.v_proj(self.k_proj(self.q_proj(x.to(self.q_proj.weight.dtype))))
        return out


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(Gate() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.each[1](x)
        return out


def plain(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) is nn.Linear}


@torch.inference_mode()
def test_a_layer_that_is_looked_into_stays_plain_and_so_do_its_like_that_did_not_run() -> None:
    model = Experts()
    expected = model(ROWS)
    with watching_linears(model):
        assert torch.equal(model(ROWS), expected)
    assert merge_linears(model) == 0
    convert_linears(model, EngineConfig())
    assert plain(model) == {f"each.{i}.q_proj" for i in range(3)}
    torch.testing.assert_close(model(ROWS), expected)


def test_a_model_is_as_it_was_after_it_was_watched_even_if_its_run_fails() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    with pytest.raises(RuntimeError), watching_linears(model):
        model(ROWS[:, 1:])
    assert type(model[0]) is nn.Linear
    assert convert_linears(model, EngineConfig()).total() == 1


def test_a_family_whose_gate_looks_into_its_layer_generates_what_transformers_does() -> None:
    model = small_model("HunYuanMoEV1Config", num_experts=4, moe_topk=2, moe_intermediate_size=48)
    loaded = optimize_layers(prepare_model(copy.deepcopy(model), "", CPU))
    assert {name.rpartition(".")[2] for name in plain(loaded.model)} == {"wg"}
    prompts = [random_prompt(length, seed=length) for length in (1, 20, 41)]
    engine = build_engine(loaded, max_num_batched_tokens=16)
    got = generate(engine, [greedy(f"r{i}", prompt, 8) for i, prompt in enumerate(prompts)])
    assert got == [continue_greedily(model, prompt, 8) for prompt in prompts]
