"""Grammars for tiny models: of bytes, in which token 256 ends an answer."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from deployments.engine.model.load import LoadedModel
from deployments.messages import Grammar
from tests.api.fakes import build_tokenizer
from tests.engine.families import load

END = 256


@cache
def load_with_tokenizer(family: str) -> LoadedModel:
    """A tiny model whose folder has a tokenizer."""
    folder = Path(mkdtemp(prefix="kvrelay-tokenizer-"))
    build_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    return replace(load(family), path=str(folder))


def regex(pattern: str) -> Grammar:
    return Grammar(json.dumps({"grammars": [{"lark_grammar": f"start: /{pattern}/"}]}), (END,), "regex")


def text_of(token_ids: tuple[int, ...]) -> str:
    """Of a whole answer, which a token ends."""
    assert token_ids[-1] == END and END not in token_ids[:-1], token_ids
    return bytes(token_ids[:-1]).decode()
