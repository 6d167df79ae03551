"""Checkpoints in FP8 are read as they are, whoever wrote them, or refused by the name of the weight at fault."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from deployments.engine.config import EngineConfig
from deployments.engine.kernels.fp8 import FP8, round_to
from deployments.engine.layers.fp8 import scales_of
from deployments.engine.model.load import LoadedModel, load_model
from deployments.errors import UnsupportedModelError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import build_model, continue_greedily
from tests.engine.model.checkpoints import PROMPT, change_weights, refusal
from tests.engine.model.fp8_checkpoints import FORMS, write


def load(folder: Path, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), device="cpu", **settings))


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_in_fp8_is_read_to_the_last_bit(tmp_path: Path, form: str) -> None:
    expected, _ = write(tmp_path, form)
    (tokens,) = generate(build_engine(load(tmp_path)), [greedy("r", PROMPT, 6)])
    assert tokens == continue_greedily(expected, PROMPT, 6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_codes_are_found_again_in_the_weights(
    tmp_path: Path, form: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, form)
    codes = load_file(tmp_path / "model.safetensors")
    monkeypatch.setattr("deployments.engine.model.load.optimize_layers", lambda loaded, _: loaded)
    model = load(tmp_path, dtype=dtype).model
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            scales = scales_of(layer)
            assert scales is not None
            assert torch.equal(round_to(layer.weight, scales).float(), codes[f"{name}.weight"].float()), name


def test_a_layer_that_the_checkpoint_leaves_out_stays_as_it_is(tmp_path: Path) -> None:
    expected, _ = write(tmp_path, "by channel")
    model = load(tmp_path).model
    assert not any(scales_of(module) for name, module in model.named_modules() if "lm_head" in name)
    ours, theirs = (dict(each.named_parameters())["model.embed_tokens.weight"] for each in (model, expected))
    assert torch.equal(ours, theirs)


def test_scales_of_kv_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, "by channel")
    change_weights(tmp_path, **{"model.layers.0.self_attn.k_scale": torch.ones(1)})
    load(tmp_path)


Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q_PROJ}.weight_scale", None, f"the checkpoint lacks the scale of {Q_PROJ}.weight"),
        (f"{Q_PROJ}.weight_scale", torch.ones(3, 1), f"{Q_PROJ}.weight_scale has the shape [3, 1], which fits no"),
        (f"{Q_PROJ}.weight_scale", torch.full((1,), torch.inf), f"{Q_PROJ}.weight_scale has scales that are not fin"),
        (f"{Q_PROJ}.weight_scale", torch.full((1,), -1.0), f"{Q_PROJ}.weight_scale has scales that are not fin"),
        ("model.norm.weight", torch.ones(64).to(FP8), "model.norm.weight is in FP8, but is no linear layer's weight"),
    ],
)
def test_codes_need_scales_that_fit(tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    write(tmp_path, "by channel")
    change_weights(tmp_path, **{name: tensor})
    assert refusal(tmp_path).startswith(message)


def test_weights_are_quantized_when_they_are_loaded(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    plain, quantized = load(tmp_path), load(tmp_path, quantization="fp8")
    assert plain.fingerprint != quantized.fingerprint, "KV of one must not reach the other"
    expected, _ = write(tmp_path, "by channel")
    (tokens,) = generate(build_engine(quantized), [greedy("r", PROMPT, 6)])
    assert tokens == continue_greedily(expected, PROMPT, 6)


def test_experts_are_not_quantized(tmp_path: Path) -> None:
    build_model("mixtral").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"mixtral: experts \(model.layers.0.mlp.experts.* cannot be"):
        load(tmp_path, quantization="fp8")


def test_a_checkpoint_in_fp8_is_not_quantized_again(tmp_path: Path) -> None:
    write(tmp_path, "by block")
    assert load(tmp_path).fingerprint == load(tmp_path, quantization="fp8").fingerprint
