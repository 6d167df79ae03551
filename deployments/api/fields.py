"""Values of fields that Pydantic does not read as they come. `openai.py` says which field takes which."""

import reprlib
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from deployments.messages import MAX_LOGIT_BIAS, MAX_LOGPROBS

MAX_PROMPTS = 1024
# OpenAI allows 4, some peers any number; each costs a step per character of output.
MAX_STOPS = 32
MAX_STOP_CHARACTERS = 1024
# Each is compared with every token.
MAX_STOP_TOKEN_IDS = 128
# Each is a number more to send to the device with every token.
MAX_LOGIT_BIASES = 1024
# OpenAI's bounds.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Prompt = str | tuple[int, ...]
Part = dict[str, object]
Content = str | tuple[Part, ...]

# What JSON may hold for a field that is read by a function of ours, for the description of the API.
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_Prompts = (
    _Text
    | Annotated[list[_Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | _Ids
    | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
)
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
_Stops = _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)]
_StopIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_STOP_TOKEN_IDS)]
_LogitBias = Annotated[
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


def _none_if_false(value: object) -> object:
    return None if value is False else value


def _as_logit_bias(value: object) -> object:
    """By token id, which JSON writes as text."""
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object from token ids to numbers")
    if not all(_is_decimal(key) for key in value):
        raise PydanticCustomError("logit_bias", "must have token ids for keys, in at most 9 decimal digits")
    if len(value) > MAX_LOGIT_BIASES:
        raise PydanticCustomError("logit_bias", f"must be of at most {MAX_LOGIT_BIASES} token ids")
    if not all(type(bias) in (int, float) and abs(bias) <= MAX_LOGIT_BIAS for bias in value.values()):
        raise PydanticCustomError("logit_bias", f"must be numbers from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}")
    return tuple({int(key): float(bias) for key, bias in value.items()}.items())


def _is_decimal(key: str) -> bool:
    return key.isascii() and key.isdecimal() and len(key) < 10


def _as_stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise PydanticCustomError("stop", f"must be at most {MAX_STOPS} strings")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise PydanticCustomError("stop", f"must be strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(stops)


def _is_id_list(value: object) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _as_stop_token_ids(value: object) -> object:
    if not _is_id_list(value):
        raise PydanticCustomError("stop_token_ids", "must be a list of token ids")
    token_ids = tuple(cast(list[int], value))
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise PydanticCustomError("stop_token_ids", f"must be at most {MAX_STOP_TOKEN_IDS} token ids")
    return token_ids


def _as_prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        prompts: list[Prompt] = [value]
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        prompts = value
    elif _is_id_list(value):
        prompts = [tuple(cast(list[int], value))]
    elif isinstance(value, list) and all(_is_id_list(item) for item in value):
        prompts = [tuple(item) for item in value]
    else:
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, of token ids, or of lists of token ids"
        )
    if not prompts or not all(prompts):
        raise PydanticCustomError("prompt", "must not be empty")
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", f"must be at most {MAX_PROMPTS} prompts")
    return tuple(prompts)


def _as_content(value: object) -> Content:
    """A text, or parts that hold text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return tuple(_as_text_part(part) for part in value)
    raise PydanticCustomError("content", "must be a list of parts or a valid string")


# Kinds of parts that hold text, and where. The last two are those of OpenAI's newer API, and mean the same.
_TEXT_PARTS = {"text": "text", "refusal": "refusal", "input_text": "text", "output_text": "text"}


def _as_text_part(part: object) -> Part:
    """A part as `type` and `text`; what else it holds (`cache_control`, a language) is for the template to read."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _TEXT_PARTS:
        named = reprlib.repr(kind) if isinstance(kind, str) else "without a type"
        raise PydanticCustomError("content", f"content part {named} is not supported, only 'text' is")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise PydanticCustomError("content", f"a part of type '{kind}' must hold a string '{_TEXT_PARTS[kind]}'")
    return part | {"type": "text", "text": text}


class _TextPart(TypedDict):
    """A part of a message; templates may read further keys."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    type: Literal["text", "input_text", "output_text"]
    text: str


class _RefusalPart(TypedDict):
    """A part in which an assistant refused."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    type: Literal["refusal"]
    refusal: str


_Contents = str | list[_TextPart | _RefusalPart]


LogitBias = Annotated[tuple[tuple[int, float], ...], BeforeValidator(_as_logit_bias, json_schema_input_type=_LogitBias)]
Stops = Annotated[tuple[str, ...], BeforeValidator(_as_stops, json_schema_input_type=_Stops)]
StopTokenIds = Annotated[tuple[int, ...], BeforeValidator(_as_stop_token_ids, json_schema_input_type=_StopIds)]
Prompts = Annotated[tuple[Prompt, ...], PlainValidator(_as_prompts, json_schema_input_type=_Prompts)]
RequiredContent = Annotated[Content, PlainValidator(_as_content, json_schema_input_type=_Contents)]
# A message's, or none.
OptionalContent = Annotated[Content | None, PlainValidator(_as_content, json_schema_input_type=_Contents)]
_BoundedCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
# How many of the likeliest tokens are told. Chats say with false that they want none, and some clients in completions.
LogprobCount = Annotated[
    _BoundedCount | None, BeforeValidator(_none_if_false, json_schema_input_type=_BoundedCount | Literal[False] | None)
]
