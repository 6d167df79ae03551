"""Decoder layers of several families that add to their residuals in kernels, beside transformers' own."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels import cuda_matmul  # isort: skip
from deployments.engine.layers.cuda import KERNELS, can_drop_rows, keep_rotary_where_it_is_wanted  # isort: skip
from deployments.engine.layers.cuda_decoder import fuse_residuals, given_to_layers  # isort: skip
from deployments.engine.layers.replace_experts import fuse_experts  # isort: skip
from deployments.engine.layers.skinny import SkinnyLinear, fuse_gates  # isort: skip
from deployments.engine.config import EngineConfig
from deployments.engine.layers.fused import FusedGatedMLP, fuse_layers
from deployments.engine.layers.linear import LinearKind, convert_linears
from deployments.engine.layers.merged import merge_linears
from deployments.engine.model.load import prepare_model
from tests.engine.families import build_config, randomize

SKINNY = LinearKind("skinny", lambda layer, config: True, SkinnyLinear)
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt_oss", "qwen2_moe", "hunyuan")
WITH_EXPERTS = ("gpt_oss", "qwen2_moe")


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of many columns are few programs, each of which is interpreted."""
    monkeypatch.setattr(cuda_matmul, "row_tile", lambda depth: (64, 64, 4))


def build(family: str, num_layers: int | None = None) -> PreTrainedModel:
    config = build_config(family)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
        config.layer_types = getattr(config, "layer_types", None) and config.layer_types[:num_layers]
    # Small, and so with few programs.
    config.vocab_size, config.intermediate_size = 32, 16
    if family in WITH_EXPERTS:
        config.intermediate_size = config.moe_intermediate_size = config.shared_expert_intermediate_size = 8
        config.num_experts_per_tok = 1
    model = randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    moved: PreTrainedModel = model.half().to(DEVICE)
    prepare_model(moved, "", DEVICE)
    return moved


def replace_parts(model: PreTrainedModel) -> None:
    """What `replace_layers` does on a GPU before decoder layers are replaced."""
    merge_linears(model)
    convert_linears(model, EngineConfig(), (SKINNY,))
    fuse_layers(model, KERNELS)
    fuse_experts(model)


@pytest.mark.parametrize(("family", "widths"), [("llama", {16}), ("gpt_oss", {8}), ("hunyuan", {16})])
def test_layers_are_tried_with_what_the_model_gives_them(family: str, widths: set[int]) -> None:
    given = given_to_layers(build(family))
    assert {its.kwargs["position_embeddings"][0].shape[-1] for its in given.values()} == widths


def test_each_layer_keeps_its_own_rotary_embedding() -> None:
    model = build("gemma3")
    first, second, third = (its.kwargs["position_embeddings"] for its in given_to_layers(model).values())
    assert torch.equal(first[0], third[0]) and not torch.equal(first[0], second[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_family_adds_to_its_residual_itself(family: str) -> None:
    num_layers = 2 if family == "gemma3" else 1  # its two kinds are rotated in their own ways
    model = build(family, num_layers)
    replace_parts(model)
    assert fuse_residuals(model) == num_layers
    assert can_drop_rows(model)


def test_layers_that_do_more_than_add_to_their_residuals_stay_as_they_are() -> None:
    model = build("llama")
    replace_parts(model)

    class Scaled(type(model.model.layers[0])):  # type: ignore[misc]  # whatever transformers calls it
        def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
            whole: Tensor = super().forward(hidden_states.clone(), **kwargs)
            return hidden_states + 0.5 * (whole - hidden_states)

    model.model.layers[0].__class__ = Scaled
    assert fuse_residuals(model) == model.config.num_hidden_layers - 1


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gated_mlps_compute_their_activation_within_the_product_before_it(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    replace_parts(model)
    assert fuse_gates(model) == model.config.num_hidden_layers
    mlp = next(module for module in model.modules() if isinstance(module, FusedGatedMLP))
    x = torch.randn(1, 20, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "activation", None)  # nothing else computes it
        fused = mlp(x)
    mlp.gated = None
    assert (fused - mlp(x)).norm() <= 1e-3 * fused.norm()


@pytest.mark.parametrize(
    ("family", "leaves"), [("llama", True), ("qwen3", True), ("gpt_oss", True), ("hunyuan", False)]
)
def test_attention_rotates_unless_a_layer_does_something_with_what_it_rotated(family: str, leaves: bool) -> None:
    model = build(family, num_layers=1)
    replace_parts(model)
    keep_rotary_where_it_is_wanted(model)
    assert all(("forward" in vars(layer.self_attn)) == leaves for layer in model.model.layers)
