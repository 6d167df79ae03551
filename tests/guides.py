"""Grammars for a vocabulary of bytes, and answers that are drawn by them at random."""

from functools import cache
from random import Random
from typing import Any

from deployments.api.openai import ChatBody
from deployments.api.structured import read_grammar
from deployments.grammars import Guide, Vocabulary
from deployments.messages import Grammar
from tests.api.fakes import END_ID, build_codec

VOCAB_SIZE = 257
MAX_TOKENS = 2000


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(build_codec().backend.to_str(), VOCAB_SIZE, (END_ID,))


def grammar_of(schema: dict[str, Any]) -> Grammar:
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], "guided_json": schema})
    grammar = read_grammar(body, (END_ID,))
    assert grammar is not None
    return grammar


def draw(guide: Guide, random: Random) -> str | None:
    """An answer of tokens drawn from those that may follow, ends sooner than not; None: it did not end."""
    tokens: list[int] = []
    for _ in range(MAX_TOKENS):
        mask = guide.mask()
        allowed = [token for token in range(VOCAB_SIZE) if mask[token // 8] >> token % 8 & 1]
        closing = [token for token in allowed if token == END_ID or chr(token) in '"]}']
        token = random.choice(closing if closing and random.random() < 0.3 else allowed)
        if token == END_ID:
            return bytes(tokens).decode()
        tokens.append(token)
        guide.take([token])
    return None
