"""JSON Schema's own test suite: a schema is followed to the letter, or refused in words that name what is not.

`tests/json_schema_suite/` has those of draft 2020-12 that jsonschema 4.26 ships: of each its file, what it is about,
the schema, and instances that are valid and that are not. Left out are schemas that are no objects, the dialect of
regular expressions of JavaScript, and files that need other drafts.
"""

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from jsonschema import Draft202012Validator

from deployments.errors import InvalidRequestError
from deployments.grammars import GrammarError
from deployments.messages import Grammar
from tests.api.fakes import END_ID
from tests.guides import draw, grammar_of, vocabulary

SUITE: list[tuple[str, str, dict[str, Any], list[Any], list[Any]]] = json.loads(
    (Path(__file__).parent / "json_schema_suite" / "draft2020-12.json").read_text()
)
NUM_FOLLOWED, NUM_DRAWS = 180, 2
# What a refusal names where it names no word of the schema itself.
KINDS = ("schema is false", "float range", "64-bit", "$dynamicAnchor", "http://localhost:1234/")


def compile_schema(schema: dict[str, Any]) -> Grammar | str:
    """A grammar that can be followed, or why there is none."""
    try:
        grammar = grammar_of(schema)
        vocabulary().compile(grammar).mask()
    except (InvalidRequestError, GrammarError) as error:
        return str(error)
    return grammar


def written(item: object) -> str:
    """As models do."""
    return json.dumps(item, ensure_ascii=False)


def with_names_in_escapes(item: object) -> str:
    """The same, in another way of writing."""
    if isinstance(item, dict):
        names = ("".join(f"\\u{ord(letter):04x}" for letter in name) for name in item)
        pairs = zip(names, map(with_names_in_escapes, item.values()), strict=True)
        return "{" + ",".join(f'"{name}":{value}' for name, value in pairs) + "}"
    return written(item)


def takes(grammar: Grammar, text: str) -> bool:
    guide = vocabulary().compile(grammar)
    for token in (*text.encode(), END_ID):
        mask = guide.mask()
        if not mask[token // 8] >> token % 8 & 1:
            return False
        guide.take([] if token == END_ID else [token])
    return True


def words_of(schema: object) -> set[str]:
    """All keys and texts in a schema, of which a refusal has to name one."""
    if isinstance(schema, dict):
        return {*schema, *(word for value in schema.values() for word in words_of(value))}
    if isinstance(schema, list):
        return {word for value in schema for word in words_of(value)}
    return {schema} if isinstance(schema, str) else set()


def test_every_schema_of_the_suite_is_followed_to_the_letter_or_refused_by_name() -> None:
    source, counts, faults = Random(0), Counter[str](), []
    for file, about, schema, valid, invalid in SUITE:
        grammar = compile_schema(schema)
        if isinstance(grammar, str):
            counts["refused"] += 1
            is_named = any(word and word in grammar for word in words_of(schema))
            if not is_named and not any(kind in grammar for kind in KINDS):
                faults.append(f"{file}, {about}: refused without a name: {grammar}")
            continue
        counts["followed"] += 1
        counts["valid instances"] += len(valid)
        counts["valid instances that may be written"] += sum(takes(grammar, written(item)) for item in valid)
        ways = [write(item) for item in invalid for write in (written, with_names_in_escapes)]
        faults += [f"{file}, {about}: takes {text}" for text in ways if takes(grammar, text)]
        for _ in range(NUM_DRAWS):
            answer = draw(vocabulary().compile(grammar), source)
            if answer is None:
                counts["answers without end"] += 1
            elif not Draft202012Validator(schema).is_valid(json.loads(answer)):
                faults.append(f"{file}, {about}: wrote {answer!r}")
    assert not faults, "\n".join(faults)
    assert counts["followed"] >= NUM_FOLLOWED, counts
    assert counts["valid instances that may be written"] > 0.9 * counts["valid instances"], counts
    assert counts["answers without end"] < 0.05 * counts["followed"] * NUM_DRAWS, counts
