"""OpenAI's request bodies: which fields exist and what they may hold.

Every field that is accepted takes effect. A field of OpenAI's API that is not supported yet is accepted only with the
value that changes nothing (`tools: []`), and refused by name with any other; an unknown field is refused by name.
The exceptions go to the operator's log and never change an answer: `user`, `safety_identifier`, `metadata`, and
`prompt_cache_key`, which tells other routers what the one here finds by itself.
Knows nothing of tokens or HTTP; `calls.py` reads bodies with it.
"""

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import TypedDict

from deployments.api.fields import LogitBias, Metadata, as_logit_bias, none_if_false
from deployments.errors import InvalidRequestError
from deployments.messages import MAX_LOGPROBS, MAX_PENALTY, REPETITION_PENALTIES

MAX_PROMPTS = 1024
# OpenAI allows 4, some peers any number; each costs a step per character of output.
MAX_STOPS = 32
MAX_STOP_CHARACTERS = 1024
# Each is compared with every token.
MAX_STOP_TOKEN_IDS = 128
# OpenAI's.
MAX_SAMPLES = 128

Prompt = str | tuple[int, ...]
Part = dict[str, object]
Content = str | tuple[Part, ...]
_NoOps = Mapping[str, tuple[object, ...]]

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

# Fields not supported yet, with the values that ask for nothing; null is always one of them.
_NO_OPS: _NoOps = {
    "response_format": ({"type": "text"},),
    "store": (False,),
}
_COMPLETION_NO_OPS: _NoOps = {**_NO_OPS, "suffix": ("",)}
_CHAT_NO_OPS: _NoOps = {
    **_NO_OPS,
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_MESSAGE_NO_OPS: _NoOps = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
    "reasoning_content": (),
}


class _Strict(BaseModel):
    """Refuses unknown fields and unsupported ones; null means that a field was left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    no_ops: ClassVar[_NoOps] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        kept: dict[str, object] = {}
        for name, value in fields.items():
            if name in cls.no_ops:
                if not _asks_for_nothing(value, cls.no_ops[name]):
                    raise PydanticCustomError("unsupported", "not supported yet", {"field": name})
            elif value is not None or name not in cls.model_fields:
                kept[name] = value
        return kept

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """As pydantic has it, with null for what may be left out, and with the fields that may only ask for nothing."""
        described = handler.resolve_ref_schema(handler(schema))
        fields: dict[str, Any] = described.setdefault("properties", {})
        for name, field in fields.items():
            if name not in described.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
                outer = {key: field.pop(key) for key in ("default", "title") if key in field}
                fields[name] = {"anyOf": [field, {"type": "null"}], **outer}
        for name, no_ops in cls.no_ops.items():
            values = [value for index, value in enumerate(no_ops) if value not in no_ops[:index]]  # 0 and 0.0 are one
            fields[name] = {"enum": [*values, None], "x-unsupported": True}
        return described


def _asks_for_nothing(value: object, no_ops: tuple[object, ...]) -> bool:
    # Compare types as well: to Python `True` is 1.
    return value is None or any(type(value) is type(no_op) and value == no_op for no_op in no_ops)


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


class StreamOptions(_Strict):
    """`include_usage` is about the end of a stream; `continuous_usage_stats`, an extension, about each chunk."""

    no_ops = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ModelBody(_Strict):
    """Names the model; it may be left out, since one is served."""

    model: str | None = None


# Said to those who read the description; the checks are `_check_stream_options` and `_check_content`.
_OPTIONS_ONLY_WITH_STREAM: dict[str, Any] = {
    "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
}
_NOT_EMPTY: dict[str, Any] = {"type": ["string", "array"], "minLength": 1, "minItems": 1}
_CONTENT_UNLESS_ASSISTANT: dict[str, Any] = {
    "if": {"properties": {"role": {"const": "assistant"}}},
    "then": {"not": {"properties": {"content": _NOT_EMPTY, "refusal": _NOT_EMPTY}, "required": ["content", "refusal"]}},
    "else": {
        "properties": {"content": {"type": ["string", "array"]}, "refusal": {"enum": [None, ""]}},
        "required": ["content"],
    },
}


class GenerateBody(ModelBody):
    """What both endpoints take.

    `top_k` (0 and -1 are off), `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`,
    `include_stop_str_in_output`, `skip_special_tokens`, `return_token_ids`, `prompt_logprobs`, `cache_salt`,
    `truncate_prompt_tokens` and `priority` (the lower, the sooner) are extensions, named as in vLLM and with its
    meaning.
    """

    model_config = ConfigDict(json_schema_extra=_OPTIONS_ONLY_WITH_STREAM)

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    frequency_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY)
    repetition_penalty: float = Field(default=1.0, ge=REPETITION_PENALTIES[0], le=REPETITION_PENALTIES[1])
    logit_bias: Annotated[
        tuple[tuple[int, float], ...], BeforeValidator(as_logit_bias, json_schema_input_type=LogitBias)
    ] = ()
    min_tokens: int = Field(default=0, ge=0)
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_stops, json_schema_input_type=_Stops)] = ()
    stop_token_ids: Annotated[
        tuple[int, ...], BeforeValidator(_as_stop_token_ids, json_schema_input_type=_StopIds)
    ] = ()
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    max_tokens: int | None = Field(default=None, ge=1)
    ignore_eos: bool = False
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, json_schema_extra={"not": {"const": 0}})
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    prompt_cache_key: str | None = Field(default=None, max_length=256)
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    user: str | None = Field(default=None, max_length=256)
    safety_identifier: str | None = Field(default=None, max_length=256)
    metadata: Metadata = {}

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each generated one; None: no logprobs."""
        raise NotImplementedError

    @property
    def num_samples(self) -> int:
        """Choices that are generated of each prompt."""
        return self.n

    @model_validator(mode="after")
    def _check_truncation(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            message = "must be at least 1, or -1 for as many tokens as fit, got 0"
            raise PydanticCustomError("truncate_prompt_tokens", message, {"field": "truncate_prompt_tokens"})
        return self

    @model_validator(mode="after")
    def _check_priority(self) -> Self:
        if self.priority is not None and self.service_tier in ("flex", "priority"):
            message = "means the same as service_tier; give one of them"
            raise PydanticCustomError("priority", message, {"field": "priority"})
        return self

    @model_validator(mode="after")
    def _check_prompt_logprobs(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise PydanticCustomError("prompt_logprobs", "not with stream", {"field": "prompt_logprobs"})
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise PydanticCustomError("stream_options", "only allowed with stream", {"field": "stream_options"})
        return self


class CompletionBody(GenerateBody):
    """`POST /v1/completions`: `n` choices per prompt, the best of `best_of`.

    `logprobs` is how many of the likeliest tokens are told beside each; with `echo` those of the prompt as well.
    """

    no_ops = _COMPLETION_NO_OPS

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_as_prompts, json_schema_input_type=_Prompts)]
    max_tokens: int | None = Field(default=None, ge=0)
    best_of: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    echo: bool = False
    logprobs: Annotated[
        int | None, BeforeValidator(none_if_false, json_schema_input_type=int | Literal[False] | None)
    ] = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_samples(self) -> int:
        return self.best_of or self.n

    @model_validator(mode="after")
    def _check_number_of_choices(self) -> Self:
        if self.num_samples < self.n:
            message = f"must be at least n, which is {self.n}, got {self.num_samples}"
            raise PydanticCustomError("best_of", message, {"field": "best_of"})
        if self.stream and self.num_samples > self.n:
            message = "above n it cannot be streamed: the best are known at the end"
            raise PydanticCustomError("best_of", message, {"field": "best_of"})
        if len(self.prompt) * self.num_samples > MAX_PROMPTS:
            message = f"{len(self.prompt)} prompts times {self.num_samples} are more than {MAX_PROMPTS} choices"
            raise PydanticCustomError("n", message, {"field": "n"})
        return self

    @model_validator(mode="after")
    def _check_no_output(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            message = "must be at least 1, or 0 with echo or prompt_logprobs: else there is no answer"
            raise PydanticCustomError("max_tokens", message, {"field": "max_tokens"})
        return self


class Message(_Strict):
    """One turn; the model's template decides what it does with the role, the name and the tool_call_id.

    Only an assistant's may be without content, which then is empty, or what it said in refusing.
    """

    model_config = ConfigDict(json_schema_extra=_CONTENT_UNLESS_ASSISTANT)
    no_ops = _MESSAGE_NO_OPS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Content | None, PlainValidator(_as_content, json_schema_input_type=_Contents)] = None
    refusal: str | None = None
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "is required", {"field": "content"})
        if self.refusal and (self.content or self.role != "assistant"):
            message = "only allowed in place of an assistant's content"
            raise PydanticCustomError("refusal", message, {"field": "refusal"})
        return self

    @property
    def num_characters(self) -> int:
        """Of its text."""
        content = self.content or self.refusal or ""
        return len(content) if isinstance(content, str) else sum(len(str(part["text"])) for part in content)

    def for_template(self) -> dict[str, object]:
        """What the chat template is given."""
        fields = self.model_dump(include={"role", "name", "tool_call_id"}, exclude_none=True)
        return fields | {"content": self.content or self.refusal or ""}


class ChatBody(GenerateBody):
    """`POST /v1/chat/completions`: `n` choices. `max_tokens` is the older name of `max_completion_tokens`.

    `add_generation_prompt`, `continue_final_message` and `chat_template_kwargs` are extensions, named as in vLLM.
    """

    no_ops = _CHAT_NO_OPS

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, object] = {}
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def opens_turn(self) -> bool:
        """Does the assistant begin a turn of its own?"""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    @model_validator(mode="after")
    def _check_ending(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            message = "cannot go with add_generation_prompt: the last message goes on, or a new one begins"
            raise PydanticCustomError("continue_final_message", message, {"field": "continue_final_message"})
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "only allowed with logprobs", {"field": "top_logprobs"})
        return self

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "means the same as max_completion_tokens; give one of them"
            raise PydanticCustomError("max_tokens", message, {"field": "max_tokens"})
        return self


class _JsonRepr(reprlib.Repr):
    """Shows a value in short, and what JSON calls otherwise than Python by JSON's name."""

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"


_JSON_REPR = _JsonRepr()


def explain(error: ValidationError) -> InvalidRequestError:
    """Say what is wrong with the first faulty field, by its path (`messages.0.content`)."""
    fault = error.errors(include_url=False)[0]
    # A check of several fields has the whole body as its input, and names the field itself.
    field = fault.get("ctx", {}).get("field")
    param = ".".join(str(part) for part in (*fault["loc"], field) if part is not None)
    match fault["type"]:
        case "extra_forbidden":
            return InvalidRequestError(f"unknown field {reprlib.repr(param)}", param[:100])
        case "missing":
            return InvalidRequestError(f"{param} is required", param)
        case "unsupported":
            return InvalidRequestError(f"{param} is not supported yet", param)
        case "model_type":
            fault["msg"] = "must be a JSON object"  # pydantic's own words name a class of ours
        case "int_type" if isinstance(fault["input"], float) and abs(fault["input"]) >= 2**63:
            # JSON's integers of more than 64 bits arrive so.
            fault["msg"] = "is too large, must be an integer of at most 64 bits"
    value = "" if field is not None else f", got {_JSON_REPR.repr(fault['input'])}"
    return InvalidRequestError(f"{param or 'the body'}: {fault['msg']}{value}", param or None)
