"""A whole checkpoint to be changed."""

import copy
from pathlib import Path

import pytest

from tests.engine.families import build_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a small Llama of random weights."""
    copy.deepcopy(build_model("llama")).save_pretrained(tmp_path)
    return tmp_path
