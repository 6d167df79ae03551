"""Checkpoints in FP8 are read as they are, whoever wrote them, or refused by the name of the weight at fault."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.config import EngineConfig
from deployments.engine.kernels.fp8 import FP8, round_to
from deployments.engine.layers.fp8 import scales_of
from deployments.engine.model.check import check_weights_of
from deployments.engine.model.load import LoadedModel, load_model
from deployments.errors import UnsupportedModelError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import build_model, continue_greedily
from tests.engine.model.checkpoints import PROMPT, change_config, change_weights, refusal, tokens_of
from tests.engine.model.fp8_checkpoints import FINE_GRAINED, FORMS, write
from tests.engine.mxfp4_checkpoint import save_in_mxfp4

Change = Callable[[dict[str, Tensor]], dict[str, Tensor | None]]
Q_PROJ = "model.layers.0.self_attn.q_proj"
WEIGHT, SCALE = f"{Q_PROJ}.weight", f"{Q_PROJ}.weight_scale"
FIRST = "model.layers.0.mlp.down_proj"  # by its name


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_are_numbers_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    expected, _ = write(tmp_path, "fine-grained, of one scale", round_scale=lambda scale: scale.log2().ceil().exp2())
    weights = load_file(tmp_path / "model.safetensors")
    change_weights(tmp_path, **{name: scale.to(dtype) for name, scale in weights.items() if "weight_scale" in name})
    assert tokens_of(tmp_path) == continue_greedily(expected, PROMPT, 6)


@pytest.mark.parametrize("value", [torch.inf, -1.0])
def test_a_scale_of_no_such_value_is_named(tmp_path: Path, value: float) -> None:
    write(tmp_path, "by channel")
    change_weights(tmp_path, **{f"{Q_PROJ}.weight_scale": torch.full((1,), value)})
    assert refusal(tmp_path) == f"{Q_PROJ}.weight_scale has scales that are not finite, or less than 0"


def refusal_unread(folder: Path) -> str:
    """What the check before a server starts says; loading says the same."""
    with pytest.raises(UnsupportedModelError) as caught:
        check_weights_of(str(folder))
    said = str(caught.value).removeprefix(f"model {str(folder)!r}: ")
    assert said == refusal(folder)
    return said


def retyped(suffix: str, dtype: torch.dtype) -> Change:
    """Every weight of linear layers, or every scale."""
    return lambda weights: {
        name: weight.float().to(dtype) for name, weight in weights.items() if name.endswith(f"_proj.{suffix}")
    }


def put(name: str, weight: Tensor | None) -> Change:
    return lambda _: {name: weight}


def retyped_one(name: str, dtype: torch.dtype) -> Change:
    return lambda weights: {name: weights[name].float().to(dtype)}


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(SCALE, None), f"the checkpoint lacks the scale of {WEIGHT}"),
        (put(SCALE, torch.ones(3, 1)), f"{SCALE} has the shape [3, 1], which fits no weight of [64, 64]"),
        (put(f"{SCALE}_inv", torch.ones(64, 1)), f"{WEIGHT} has two scales, {SCALE} and {SCALE}_inv"),
        (put("model.norm.weight_scale", torch.ones(1)), "model.norm.weight is F32, with model.norm.weight_scale besi"),
        (put("model.norm.weight", torch.ones(64).to(FP8)), "model.norm.weight is in FP8, but is no linear layer's we"),
        (put("model.none.weight_scale", torch.ones(1)), "the checkpoint lacks the codes of model.none.weight_scale"),
        (retyped_one(SCALE, torch.uint8), f"{SCALE} is U8, and BF16, F16, F32, F64, F8_E8M0 are read"),
        (retyped("weight_scale", torch.uint8), f"{FIRST}.weight_scale is U8, and BF16, F16"),
        (retyped("weight_scale", torch.int32), f"{FIRST}.weight_scale is I32, and BF16, F16"),
        (retyped("weight_scale", FP8), f"{FIRST}.weight_scale is F8_E4M3, and BF16, F16"),
        (retyped_one(WEIGHT, torch.float8_e5m2), f"{WEIGHT} is F8_E5M2, with {SCALE} beside it, and F8_E4M3 is read"),
        (retyped_one(WEIGHT, torch.bfloat16), f"{WEIGHT} is BF16, with {SCALE} beside it, and F8_E4M3 is read"),
        (retyped_one(WEIGHT, torch.int8), f"{WEIGHT} is I8, with {SCALE} beside it, and F8_E4M3 is read"),
        (retyped("weight", torch.float8_e5m2), f"{FIRST}.weight is F8_E5M2, with {FIRST}.weight_scale beside it"),
        (retyped("weight", torch.bfloat16), f"{FIRST}.weight is BF16, with {FIRST}.weight_scale beside it"),
        (retyped("weight", torch.float32), f"{FIRST}.weight is F32, with {FIRST}.weight_scale beside it"),
        (retyped_one("lm_head.weight", torch.float8_e5m2), "lm_head.weight is F8_E5M2, and F8_E4M3 is read"),
        (retyped_one("lm_head.weight", torch.int8), "weights of whole numbers: lm_head.weight"),
    ],
)
def test_codes_and_scales_that_do_not_go_together_are_named_before_they_are_read(
    tmp_path: Path, change: Change, said: str
) -> None:
    write(tmp_path, "by channel")
    change_weights(tmp_path, **change(load_file(tmp_path / "model.safetensors")))
    assert refusal_unread(tmp_path).startswith(said)


@pytest.mark.usefixtures("unreadable")
def test_an_older_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "by channel")
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert refusal_unread(tmp_path) == "weights in FP8 are read from safetensors files alone"


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_experts_in_fp8_are_refused_before_they_are_read(tmp_path: Path, family: str) -> None:
    copy.deepcopy(build_model(family)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    experts = [name for name in weights if ".experts." in name]
    codes = {name: weights[name].to(FP8) for name in experts}
    change_weights(tmp_path, **codes, **{f"{name}_scale_inv": torch.ones(1) for name in experts})
    change_config(tmp_path, quantization_config=FINE_GRAINED)
    said = f"{min(experts)} is in FP8: experts are served in bfloat16 and in MXFP4, not in FP8"
    assert refusal_unread(tmp_path) == said


def test_weights_are_quantized_when_they_are_loaded(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    plain, quantized = load(tmp_path), load(tmp_path, quantization="fp8")
    assert plain.fingerprint != quantized.fingerprint, "KV of one must not reach the other"
    expected, _ = write(tmp_path, "by channel")
    (tokens,) = generate(build_engine(quantized), [greedy("r", PROMPT, 6)])
    assert tokens == continue_greedily(expected, PROMPT, 6)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_that_are_to_be_quantized_are_refused_before_they_are_read(tmp_path: Path, family: str) -> None:
    model = copy.deepcopy(build_model(family))
    (save_in_mxfp4 if family == "gpt_oss" else PreTrainedModel.save_pretrained)(model, tmp_path)
    reason = rf"{family}: experts \(model\.layers\.0\.mlp\.experts.* cannot be"
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tmp_path, quantization="fp8")
    with pytest.raises(UnsupportedModelError, match=reason):
        check_weights_of(str(tmp_path), to_fp8=True)
    check_weights_of(str(tmp_path))
    if family == "mixtral":  # a configuration that speaks of FP8 where nothing is in it
        change_config(tmp_path, quantization_config=FINE_GRAINED)
        with pytest.raises(UnsupportedModelError, match=reason):
            check_weights_of(str(tmp_path), to_fp8=True)


def test_a_checkpoint_in_fp8_is_not_quantized_again(tmp_path: Path) -> None:
    write(tmp_path, "by block")
    assert load(tmp_path).fingerprint == load(tmp_path, quantization="fp8").fingerprint
