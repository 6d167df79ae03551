"""The ingress runs no model, so its process loads none of what does: it starts sooner, and is a third as large."""

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.api.text import TextCodec
from deployments.api.tokenizer import read_tokenizer
from deployments.ingress import load_codec
from tests.api.fakes import build_tokenizer

# `ray.experimental` is not among them: Ray's own actors import it.
HEAVY = {"torch", "transformers", "accelerate", "cupy", "numba", "triton"}
HEAVY_ROOMS = {"deployments.kv_transfer.direct", "deployments.engine.engine", "deployments.engine.model.load"}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tokenizer = build_tokenizer("{{ messages[0].content }}!")
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_ingress_loads_neither_torch_nor_transports_nor_models_with_its_tokenizer_loaded(folder: str) -> None:
    script = (
        f"import sys, deployments.ingress; codec = deployments.ingress.load_codec({folder!r}, 'any');"
        f"assert codec.encode('hi'); print({HEAVY | HEAVY_ROOMS!r} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_a_tokenizer_that_was_read_in_another_process_is_the_same(folder: str) -> None:
    ours, theirs = TextCodec(read_tokenizer(folder)), load_codec(folder, "any")
    for text in ("plain words", "日本語 👩‍👩‍👧‍👦 <end>", ""):
        assert theirs.encode(text) == ours.encode(text)
    assert theirs.encode_chat([{"role": "user", "content": "hi"}]) == list(b"hi!")
    assert theirs.end_token_ids == ours.end_token_ids != ()
