"""Whatever a guide lets through is what its schema describes: 200 schemas, answers drawn at random from the masks."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import validate

from deployments import grammars
from deployments.grammars import GrammarError, Vocabulary, VocabularyError
from tests.api.fakes import END_ID
from tests.guides import VOCAB_SIZE, draw, grammar_of, vocabulary

NUM_SCHEMAS = 200


def random_schema(random: random.Random, depth: int = 0) -> dict[str, Any]:
    """Of what clients send: objects, lists, numbers and texts with bounds, choices, references."""

    def bounds(least: str, most: str, span: int) -> dict[str, int]:
        low = random.randrange(span)
        return {
            name: value for name, value in ((least, low), (most, low + random.randrange(span))) if random.random() < 0.7
        }

    def text() -> dict[str, Any]:
        kinds: list[dict[str, Any]] = [
            {"pattern": "^[a-z]+@[a-z]{2,8}\\.(com|org)$"},
            {"format": random.choice(["date", "date-time", "uuid", "ipv4", "email"])},
            {**bounds("minLength", "maxLength", 12)},
        ]
        return {"type": "string"} | random.choice(kinds)

    def several() -> dict[str, Any]:
        limits = {"maxItems": 4, "minItems": random.randrange(3)}
        return {"type": "array", "items": random_schema(random, depth + 1), **limits}

    def thing() -> dict[str, Any]:
        names = [f"{random.choice('abcdé')}{n}" for n in range(random.randrange(5))]
        properties = {name: random_schema(random, depth + 1) for name in names}
        required = [name for name in names if random.random() < 0.6]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    makers: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "integer", **bounds("minimum", "maximum", 1000)},
        lambda: {"type": "number", "minimum": -5, "maximum": 5.5},
        lambda: {"type": random.choice(["boolean", "null"])},
        lambda: {"enum": random.sample([1, 2.5, "x", None, True, "é\n", [1], {"a": 1}], 3)},
        lambda: {"const": {"k": [random.randrange(9)]}},
        text,
    ]
    if depth < 3:
        makers += [
            thing,
            thing,
            several,
            lambda: {"anyOf": [random_schema(random, depth + 1), random_schema(random, depth + 1)]},
        ]
    if depth == 0:
        inner = random_schema(random, 2)
        makers = [
            thing,
            several,
            lambda: {"$defs": {"t": inner}, "type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 3},
        ]
    return random.choice(makers)()


def test_answers_of_200_schemas_are_what_their_schemas_describe() -> None:
    source, num_finished = random.Random(0), 0
    for number in range(NUM_SCHEMAS):
        schema = random_schema(source)
        answer = draw(vocabulary().compile(grammar_of(schema)), source)
        if answer is not None:
            num_finished += 1
            try:
                validate(json.loads(answer), schema)
            except Exception as error:
                raise AssertionError(f"{number}: {answer!r} is not of {json.dumps(schema)}") from error
    assert num_finished > 0.95 * NUM_SCHEMAS


@pytest.mark.parametrize("text", ["<end>", "a<end>b", "é<end>"])
def test_text_that_looks_like_a_control_token_is_written_as_text(text: str) -> None:
    guide = vocabulary().compile(grammar_of({"const": text}))
    assert draw(guide, random.Random(0)) == json.dumps(text, ensure_ascii=False)


def test_an_answer_may_end_only_where_it_is_whole() -> None:
    guide = vocabulary().compile(grammar_of({"enum": ["a", "ab"]}))
    ends = []
    for token in [*b'"ab"', None]:
        ends.append(bool(guide.mask()[END_ID // 8] >> END_ID % 8 & 1))
        guide.take([] if token is None else [token])
    assert ends == [False, False, False, False, True]


def test_guides_of_one_grammar_know_nothing_of_each_other() -> None:
    grammar = grammar_of({"enum": ["ab", "cd"]})
    one, other = vocabulary().compile(grammar), vocabulary().compile(grammar)
    before = other.mask()
    one.take([*b'"a'])
    assert one.mask() != before == other.mask()


def test_what_others_wrote_by_a_grammar_uses_up_nothing_of_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_MAX_LEXER_STATES", 100)
    grammar = grammar_of({"pattern": "^(a[a-z]{45}|b[a-z]{45}c|d[a-z]{45}e|f[a-z]{45}g)$"})
    shared = vocabulary()
    for first in b"abdf":
        guide = shared.compile(grammar)
        guide.take([*b'"', first])
        for _ in range(40):
            assert guide.mask()
            guide.take([ord("x")])


def test_what_may_follow_guesses_is_what_follows_once_they_have_come() -> None:
    source, num_compared = random.Random(1), 0
    for _ in range(30):
        grammar = grammar_of(random_schema(source))
        answer = draw(vocabulary().compile(grammar), source)
        if answer is None:
            continue
        guide, tokens = vocabulary().compile(grammar), [*answer.encode()]
        for place in range(0, len(tokens), 5):
            before, ahead = guide.mask(), guide.masks_behind(tokens[place : place + 8])
            assert guide.masks_behind([]) == [] and guide.mask() == before, "the guide stays where it is"
            other = vocabulary().compile(grammar)
            other.take(tokens[:place])
            for token, mask in zip(tokens[place:], ahead, strict=False):
                other.take([token])
                assert other.mask() == mask
                num_compared += 1
            guide.take(tokens[place : place + 5])
    assert num_compared > 500


def test_nothing_is_told_behind_guesses_that_may_not_come_or_end_the_answer() -> None:
    guide = vocabulary().compile(grammar_of({"enum": ["ab", "cd"]}))
    assert len(guide.masks_behind([*b'"abx'])) == 3
    assert len(guide.masks_behind([*b'"ad'])) == 2
    assert guide.masks_behind([ord("x")]) == []
    assert len(guide.masks_behind([*b'"ab"', END_ID, END_ID])) == 4


def test_guesses_use_up_nothing_of_the_bounds_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_MAX_LEXER_STATES", 100)
    guide = vocabulary().compile(grammar_of({"pattern": "^(a[a-z]{45}|b[a-z]{45}c|d[a-z]{45}e|f[a-z]{45}g)$"}))
    guide.take([*b'"'])
    for first in b"bdf":
        guide.masks_behind([first, *b"x" * 40])
    for token in b"a" + b"x" * 40:
        assert guide.mask()
        guide.take([token])
        guide.masks_behind([*b"yz"])


def test_a_grammar_that_outgrows_its_bounds_says_so_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_MAX_LEXER_STATES", 100)
    grammar, shared, num_taken = grammar_of({"pattern": "^[a-z]{150}$"}), vocabulary(), []
    for _ in range(3):
        guide = shared.compile(grammar)
        guide.take([*b'"'])
        with pytest.raises(GrammarError, match="too many states"):
            while guide.mask():
                guide.take([ord("x")])
        num_taken.append(guide.num_tokens)
    assert len(set(num_taken)) == 1, "what it says is about the answer alone"


def test_a_guide_says_that_nothing_may_follow() -> None:
    guide = vocabulary().compile(grammar_of({"enum": ["a"]}))
    guide.take([*b'"x'])
    with pytest.raises(GrammarError):
        guide.mask()


def test_a_tokenizer_of_an_unknown_kind_is_told() -> None:
    with pytest.raises(VocabularyError, match="tokenizer"):
        Vocabulary("{}", VOCAB_SIZE, (END_ID,))
