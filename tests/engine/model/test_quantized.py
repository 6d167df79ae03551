"""Checkpoints in FP8 are read as they are, whoever wrote them; what is not FP8 is refused by its name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.config import EngineConfig
from deployments.engine.kernels.fp8 import FP8, LARGEST, Scales, dequantize, round_to
from deployments.engine.layers.fp8 import scales_of
from deployments.engine.model.load import LoadedModel, load_model
from deployments.errors import UnsupportedModelError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import build_model, continue_greedily, random_prompt

PROMPT = random_prompt(20, seed=4)
BLOCK = 32  # so that the small model's layers have several, and parts of one
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}


def compressed(strategy: str, **changes: Any) -> dict[str, Any]:
    blocks = [BLOCK, BLOCK] if strategy == "block" else None
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": WEIGHTS | {"strategy": strategy, "block_structure": blocks},
        "input_activations": INPUTS,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | changes},
    }


FINE_GRAINED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
# By name: the configuration, what scales are called, and which tiles they are for.
FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "by channel": (compressed("channel"), "weight_scale", "row"),
    "by tensor": (compressed("tensor"), "weight_scale", "tensor"),
    "by block": (compressed("block"), "weight_scale", "block"),
    "fine-grained": (FINE_GRAINED, "weight_scale_inv", "block"),
    "fine-grained, of one scale": (FINE_GRAINED | {"weight_block_size": None}, "weight_scale", "tensor"),
}


def grid_of(weight: Tensor, tile: str) -> Scales:
    num_rows, depth = weight.shape
    rows, columns = {"row": (1, depth), "tensor": (num_rows, depth), "block": (BLOCK, BLOCK)}[tile]
    parts = [[part.abs().max() for part in band.split(columns, 1)] for band in weight.split(rows)]
    return Scales(torch.tensor(parts) / LARGEST, rows, columns)


def write(folder: Path, form: str) -> tuple[PreTrainedModel, dict[str, Scales]]:
    """Write a checkpoint; the model that it stands for, and the grid of each of its layers."""
    config, name_of_scale, tile = FORMS[form]
    model = copy.deepcopy(build_model("llama"))
    model.save_pretrained(folder)
    weights, grids = load_file(folder / "model.safetensors"), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight = layer.weight.detach()
            grid = grids[name] = grid_of(weight, tile)
            codes = weights[f"{name}.weight"] = round_to(weight, grid)
            weights[f"{name}.{name_of_scale}"] = grid.values.flatten() if tile == "tensor" else grid.values
            with torch.no_grad():
                layer.weight.copy_(dequantize(codes, grid, torch.float32))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    quantize(folder, config)
    return model, grids


def quantize(folder: Path, config: dict[str, Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))


def load(folder: Path, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), device="cpu", **settings))


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load(folder)
    return str(caught.value).removeprefix(f"model {str(folder)!r}: ")


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
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            compressed("channel", weights=WEIGHTS | {"num_bits": 4, "strategy": "tensor_group"}),
            "weights of 4 bits, flo",
        ),
        (compressed("channel", weights=WEIGHTS | {"num_bits": 4, "type": "int"}), "weights of 4 bits, integers"),
        (compressed("channel", weights=WEIGHTS | {"type": "int"}), "weights of 8 bits, integers"),
        (compressed("channel", weights=WEIGHTS | {"symmetric": False, "strategy": "channel"}), "with zero points"),
        (compressed("group"), "scales by group"),
        (compressed("channel", input_activations=INPUTS | {"dynamic": False}), "inputs with scales of the checkpoint"),
        (compressed("channel", input_activations=INPUTS | {"num_bits": 4}), "inputs of 4 bits"),
        (compressed("channel", output_activations=INPUTS), "quantizes outputs"),
        (compressed("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        (compressed("channel") | {"transform_config": {"config_groups": {"u": {}}}}, "transformed"),
        (compressed("channel") | {"config_groups": {}}, "no config_groups"),
        (FINE_GRAINED | {"fmt": "e5m2"}, "numbers of the form 'e5m2'"),
        (FINE_GRAINED | {"activation_scheme": "static"}, "inputs with scales of the checkpoint (static)"),
        (FINE_GRAINED | {"weight_block_size": [0, 128]}, "blocks of [0, 128]"),
        (FINE_GRAINED | {"weight_block_size": "all"}, "blocks of 'all'"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write(tmp_path, "by channel")
    quantize(tmp_path, config)
    told = refusal(tmp_path)
    assert told.startswith("config.json: quantization_config: ")
    assert message in told


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
    weights = load_file(tmp_path / "model.safetensors") | {name: tensor}
    kept = {key: weight for key, weight in weights.items() if weight is not None}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
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
