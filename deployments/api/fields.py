"""Values of fields that Pydantic does not read as they come. `openai.py` says which field takes which."""

from typing import Annotated

from pydantic import Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.messages import MAX_LOGIT_BIAS

# Each is a number more to send to the device with every token.
MAX_LOGIT_BIASES = 1024
# OpenAI's bounds.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
# What JSON may hold for `as_logit_bias`.
LogitBias = Annotated[
    dict[str, float],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -MAX_LOGIT_BIAS, "maximum": MAX_LOGIT_BIAS},
            "maxProperties": MAX_LOGIT_BIASES,
        }
    ),
]


def none_if_false(value: object) -> object:
    """Chats say so that they want no logprobs, and some clients say it in completions."""
    return None if value is False else value


def as_logit_bias(value: object) -> object:
    """By token id, which JSON writes as text."""
    if not isinstance(value, dict) or not all(_is_decimal(key) for key in value):
        raise PydanticCustomError("logit_bias", "must be an object from token ids to numbers")
    if len(value) > MAX_LOGIT_BIASES:
        raise PydanticCustomError("logit_bias", f"must be of at most {MAX_LOGIT_BIASES} token ids")
    if not all(type(bias) in (int, float) and abs(bias) <= MAX_LOGIT_BIAS for bias in value.values()):
        raise PydanticCustomError("logit_bias", f"must be numbers from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}")
    return tuple({int(key): float(bias) for key, bias in value.items()}.items())


def _is_decimal(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10
