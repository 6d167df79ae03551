"""Checkpoints of gpt-oss, whose experts are in MXFP4, are read to the last bit, or refused by the name at fault."""

import copy
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
from deployments.engine.layers.stored_experts import StoredExperts
from deployments.engine.model.checkpoint import read_checkpoint
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


def test_to_keep_them_in_mxfp4_is_refused_where_there_are_no_kernels(tmp_path: Path) -> None:
    write(tmp_path)
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


def test_experts_that_stay_as_they_are_are_loaded_whole_or_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lack("_scales")(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=f"lacks the scales of {EXPERTS}_blocks"):
        load_as_stored(tmp_path)


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
