"""Small checkpoints in folders, changed on purpose, and what loading says of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.engine.config import EngineConfig
from deployments.engine.model.load import LoadedModel, load_model
from deployments.errors import UnsupportedModelError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import random_prompt

PROMPT = random_prompt(20, seed=4)


def load(folder: Path) -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), device="cpu"))


def tokens_of(folder: Path) -> tuple[int, ...]:
    (tokens,) = generate(build_engine(load(folder)), [greedy("r", PROMPT, 6)])
    return tokens


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value).removeprefix(f"model {str(folder)!r}: ")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Put tensors in, or, by None, leave them out."""
    weights = load_file(folder / "model.safetensors") | changes
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
