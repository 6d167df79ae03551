"""A whole checkpoint to be changed, and weights that are not to be read."""

import copy
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.engine.families import build_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a small Llama of random weights."""
    copy.deepcopy(build_model("llama")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that nobody may load."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loads the weights"))
