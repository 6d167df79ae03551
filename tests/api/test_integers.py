"""Every integer field of every body: what is refused is named as it was written, in a message of bounded length."""

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from deployments.api.calls import parse_body
from deployments.api.openai import ChatBody, CompletionBody, ModelBody
from deployments.api.responses.fields import ResponseBody
from deployments.api.tokenization import DetokenizeBody, TokenizeBody
from deployments.errors import InvalidRequestError
from tests.api.fakes import INFO

BODIES: dict[type[ModelBody], dict[str, Any]] = {
    CompletionBody: {"prompt": "a"},
    ChatBody: {"messages": [{"role": "user", "content": "a"}], "logprobs": True},
    ResponseBody: {"input": "a"},
    TokenizeBody: {"prompt": "a"},
    DetokenizeBody: {"tokens": [1]},
}


def may_be_integer(field: Any) -> bool:
    return (
        "int" in str(field.annotation) and "tuple" not in str(field.annotation) and "list" not in str(field.annotation)
    )


def integer_fields() -> Iterator[Any]:
    for kind in BODIES:
        for name, field in kind.model_fields.items():
            if may_be_integer(field):
                yield pytest.param(kind, field.alias or name, id=f"{kind.__name__}.{name}")


def refusal(kind: type[ModelBody], field: str, value: str) -> InvalidRequestError | None:
    written = orjson.dumps(BODIES[kind] | {field: "@"}).replace(b'"@"', value.encode())
    try:
        parse_body(written, kind, INFO)
    except InvalidRequestError as error:
        return error
    return None


@pytest.mark.parametrize(("kind", "field"), list(integer_fields()))
def test_an_integer_that_is_refused_is_named_as_it_was_written(kind: type[ModelBody], field: str) -> None:
    for value, shown in (
        (str(2**64), str(2**64)),
        (str(-(2**64)), str(-(2**64))),
        (str(10**30 + 1), str(10**30 + 1)),
        ("-3", "-3"),
        ("1.5", "1.5"),
        ("true", "true"),
        ('"5"', "'5'"),
        ("[1]", "[1]"),
        (f'"{"x" * 100_000}"', "'xxx"),
    ):
        error = refusal(kind, field, value)
        if error is not None:  # some have no bound of their own: what the model allows is asked later
            assert (error.param or "").startswith(field), value
            assert f"got {shown}" in str(error), value
            assert len(str(error)) < 500
        else:
            assert value.removeprefix("-").isdigit(), "what is no integer is refused"
    error = refusal(kind, field, "9" * 400)
    assert error is not None and "out of range" in str(error) and len(str(error)) < 200
    refused = refusal(kind, field, "null")
    assert refused is None or "stream" in str(refused)


@pytest.mark.parametrize("value", [str(2**64), str(-(2**63) - 1)])
def test_the_bound_of_a_seed_is_named(value: str) -> None:
    error = refusal(CompletionBody, "seed", value)
    assert str(2**63) in str(error) and f"got {value}" in str(error)


@pytest.mark.parametrize("value", [str(2**31), str(2**64)])
def test_the_bound_of_a_priority_is_named(value: str) -> None:
    error = refusal(ChatBody, "priority", value)
    assert str(2**31) in str(error) and f"got {value}" in str(error)


@pytest.mark.parametrize("key", ["9" * 400, "a" * 100_000, "-1", "1.5", "\u0661"])
def test_a_key_of_logit_bias_that_is_no_token_id_is_told_in_few_words(key: str) -> None:
    error = refusal(CompletionBody, "logit_bias", orjson.dumps({key: 1}).decode())
    assert "logit_bias: must have token ids for keys" in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    "fields",
    [{"metadata": {"k" * 100_000: "v"}}, {"metadata": {"k" * 60: 5}}, {"x" * 100_000: 1}, {"user": "u" * 100_000}],
)
def test_no_refusal_repeats_more_than_a_little_of_what_was_sent(fields: dict[str, Any]) -> None:
    body = orjson.dumps(BODIES[CompletionBody] | fields)
    with pytest.raises(InvalidRequestError) as raised:
        parse_body(body, CompletionBody, INFO)
    assert len(str(raised.value)) < 700
    assert len(raised.value.param or "") < 300
