"""A grammar that would take for ever ends the process that tries it, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from deployments.api.examiners import Apart
from deployments.api.grammar_check import GrammarCheck
from deployments.errors import InvalidRequestError
from deployments.grammars import GrammarError
from deployments.messages import Grammar
from tests.api.fakes import INFO, build_codec
from tests.api.reading import chat

PATIENCE_S = 120.0


def grammar_of(schema: dict[str, Any]) -> Grammar:
    grammar = chat(guided_json=schema).requests[0].sampling.grammar
    assert grammar is not None
    return grammar


def doubled(depth: int) -> dict[str, Any]:
    """Each schema is twice the one before it: compiling takes as many steps as 2 to the power of the depth."""
    definitions: dict[str, Any] = {"d0": {"pattern": "^a{10}$"}}
    for number in range(depth):
        definitions[f"d{number + 1}"] = {"allOf": [{"$ref": f"#/$defs/d{number}"}] * 2}
    return {"$defs": definitions, "$ref": f"#/$defs/d{depth}"}


@contextmanager
def apart(timeout_s: float) -> Iterator[Apart]:
    apart = Apart(build_codec().backend.to_str(), INFO.vocab_size, timeout_s)
    try:
        yield apart
    finally:
        apart.close()


def test_what_can_be_followed_passes_and_what_cannot_is_told_as_by_llguidance() -> None:
    good, bad = grammar_of(doubled(3)), grammar_of({"not": {}})
    with apart(PATIENCE_S) as examiner:
        examiner.prepare(good.end_token_ids)
        examiner.examine(good)
        with pytest.raises(GrammarError, match="Unimplemented keys"):
            examiner.examine(bad)
        examiner.examine(good)


async def test_one_that_does_not_end_is_ended_its_sender_told_and_the_next_one_tried() -> None:
    endless = grammar_of(doubled(40))
    with apart(0.2) as examiner:
        with pytest.raises(InvalidRequestError, match=r"guided_json .*takes too long") as refused:
            await GrammarCheck(examiner, PATIENCE_S).check(endless)
        assert refused.value.param == "guided_json"
        examiner.prepare(endless.end_token_ids)  # by another process: the vocabulary is there again
