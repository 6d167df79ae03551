"""Checkpoints of gpt-oss, whose experts are in MXFP4, are read to the last bit, or refused by the name at fault."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from deployments.engine.attention.base import register
from deployments.engine.config import EngineConfig
from deployments.engine.kernels.mxfp4 import Mxfp4
from deployments.engine.layers.stored_experts import StoredExperts
from deployments.engine.model.checkpoint import read_checkpoint
from deployments.engine.model.headers import Header, Headers
from deployments.engine.model.load import LoadedModel, _keeps_mxfp4, load_model
from deployments.engine.model.weights import load_weights
from deployments.errors import UnsupportedModelError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import build_model, continue_greedily, random_prompt
from tests.engine.mxfp4_checkpoint import save_in_mxfp4

PROMPT = random_prompt(20, seed=4)
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
Weights = dict[str, Tensor]


def write(folder: Path) -> PreTrainedModel:
    """Write a checkpoint as gpt-oss' are; the model that it stands for."""
    model = copy.deepcopy(build_model("gpt_oss"))
    save_in_mxfp4(model, folder)
    return model


def test_to_keep_them_in_mxfp4_is_refused_where_there_are_no_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setattr("deployments.engine.model.weights.AutoModelForCausalLM", None)  # nothing is read for it
    with pytest.raises(UnsupportedModelError, match=r"quantization is mxfp4.* torch\.float32 on cpu"):
        load_model(EngineConfig(model=str(tmp_path), device="cpu", quantization="mxfp4"))


def load_as_stored(folder: Path) -> PreTrainedModel:
    register()
    checkpoint = read_checkpoint(str(folder))
    model: PreTrainedModel = load_weights(
        str(folder),
        checkpoint.config,
        checkpoint.headers,
        keeps_mxfp4=True,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    model.eval()
    return model


def load(folder: Path) -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), device="cpu"))


def test_codes_are_read_to_the_last_bit(tmp_path: Path) -> None:
    expected = write(tmp_path)
    (tokens,) = generate(build_engine(load(tmp_path)), [greedy("r", PROMPT, 6)])
    assert tokens == continue_greedily(expected, PROMPT, 6)


def lack(suffix: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(EXPERTS + suffix)


def cut(suffix: str) -> Callable[[Weights], object]:
    return lambda weights: weights.update({EXPERTS + suffix: weights[EXPERTS + suffix][:, 1:].contiguous()})


@torch.inference_mode()
def test_experts_that_stay_as_they_are_give_what_their_numbers_do(tmp_path: Path) -> None:
    expected, loaded = write(tmp_path), load_as_stored(tmp_path)
    experts = loaded.model.layers[1].mlp.experts
    assert isinstance(experts, StoredExperts) and experts.gate_up_proj_blocks.dtype is torch.uint8
    ids = torch.tensor([PROMPT])
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)


def change(folder: Path, spoil: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def retype(suffix: str, dtype: torch.dtype) -> Callable[[Weights], object]:
    return lambda weights: weights.update({EXPERTS + suffix: weights[EXPERTS + suffix].to(dtype)})


def put(suffix: str, weight: Tensor) -> Callable[[Weights], object]:
    return lambda weights: weights.update({EXPERTS + suffix: weight})


@pytest.mark.parametrize("load", [lambda folder: load_as_stored(folder), lambda folder: load(folder)])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda weights: lack("_scales")(weights), f"lacks the scales of {EXPERTS}_blocks"),
        (retype("_blocks", torch.int8), f"{EXPERTS}_blocks and its scales are I8 and U8, and U8 is read"),
        (retype("_scales", torch.float8_e8m0fnu), "are U8 and F8_E8M0, and U8 is read"),
        (retype("_scales", torch.bool), "are U8 and BOOL, and U8 is read"),
        (retype("_blocks", torch.float32), "are F32 and U8, and U8 is read"),
        (put("", torch.zeros(2, 2, 2)), f"has {EXPERTS} twice, as codes and as numbers"),
    ],
)
def test_codes_that_are_none_are_refused_by_name(
    tmp_path: Path, load: Callable[[Path], object], spoil: Callable[[Weights], object], reason: str
) -> None:
    write(tmp_path)
    change(tmp_path, spoil)
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tmp_path)


def test_a_scale_that_is_no_number_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    change(tmp_path, lambda weights: weights[f"{EXPERTS}_scales"][1, 3].fill_(255))
    with pytest.raises(UnsupportedModelError, match=f"not finite .*: {EXPERTS}_scales"):
        load_as_stored(tmp_path)


def in_groups_of_16(weights: Weights) -> None:
    codes, scales = weights[f"{EXPERTS}_blocks"], weights[f"{EXPERTS}_scales"]
    weights[f"{EXPERTS}_blocks"] = codes.unflatten(-1, (2, -1)).flatten(2, 3)
    weights[f"{EXPERTS}_scales"] = scales.repeat_interleave(2, -1)


def widen_one(weights: Weights) -> None:
    codes, scales = weights.pop(f"{EXPERTS}_blocks"), weights.pop(f"{EXPERTS}_scales")
    weights[EXPERTS] = Mxfp4(codes.flatten(2), scales).widen(torch.float32).mT.contiguous()


@torch.inference_mode()
@pytest.mark.parametrize("other", [in_groups_of_16, widen_one])
def test_experts_that_are_not_all_stored_alike_are_widened(tmp_path: Path, other: Callable[[Weights], None]) -> None:
    expected = write(tmp_path)
    change(tmp_path, other)
    loaded, ids = load_as_stored(tmp_path), torch.tensor([PROMPT])
    assert not isinstance(loaded.model.layers[0].mlp.experts, StoredExperts)
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)


def test_how_transformers_is_told_of_stored_experts_is_no_form_of_files(tmp_path: Path) -> None:
    write(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "mxfp4_as_stored"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnsupportedModelError, match="quantized by mxfp4_as_stored, which is not served"):
        load(tmp_path)


def test_the_type_of_a_checkpoint_is_that_of_its_weights() -> None:
    """gpt-oss' config.json has none."""
    codes, numbers = Header((2,), "U8"), Header((2,), "BF16")
    assert Headers({"a": codes, "b": numbers, "c": numbers}).dtype is torch.bfloat16
    assert Headers({"a": codes, "b": numbers, "c": Header((1,), "F32")}).dtype is None
    assert Headers({"a": codes}).dtype is None and Headers({"a": Header((2,), "F8_E4M3")}).dtype is None


@pytest.mark.parametrize(
    ("quantization", "device", "dtype", "kept"),
    [
        (None, "cuda", torch.bfloat16, True),
        ("mxfp4", "cuda", torch.float16, True),
        (None, "cuda", torch.float16, False),  # slower than widened ones
        ("mxfp4", "cuda", torch.float32, False),
        ("fp8", "cuda", torch.bfloat16, False),
        (None, "cpu", torch.bfloat16, False),
        (None, "cuda", None, False),
    ],
)
def test_experts_stay_where_kernels_read_them(
    quantization: Literal["fp8", "mxfp4"] | None, device: str, dtype: torch.dtype | None, kept: bool
) -> None:
    assert _keeps_mxfp4(EngineConfig(quantization=quantization), torch.device(device), dtype) is kept


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lack("_scales"), f"the checkpoint lacks the scales of {EXPERTS}_blocks"),
        (lack("_blocks"), f"the checkpoint lacks the codes of {EXPERTS}_scales"),
        (cut("_scales"), rf"{EXPERTS}_blocks and its scales have the shapes \[.*\] and \["),
        (lambda weights: (cut("_scales")(weights), cut("_blocks")(weights)), rf"other shapes .* {EXPERTS} \("),
        (lambda weights: (lack("_scales")(weights), lack("_blocks")(weights)), rf"the checkpoint lacks {EXPERTS}$"),
    ],
)
def test_what_is_not_whole_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Weights], object], reason: str
) -> None:
    write(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    spoil(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr("deployments.engine.model.weights.AutoModelForCausalLM", None)
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tmp_path)
