"""OpenAI's request bodies: which fields exist and what they may hold.

Every field that is accepted takes effect. A field of OpenAI's API that is not supported yet is accepted only with the
value that changes nothing (`functions: []`), and refused by name with any other; an unknown field is refused by name.
The exceptions go to the operator's log and never change an answer: `user`, `safety_identifier`, `metadata`.
Knows nothing of tokens or HTTP; `calls.py` reads bodies with it.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.common_fields import DrawFields, LabelFields
from deployments.api.fields import MAX_PROMPTS, LogprobCount, OptionalContent, Prompts
from deployments.api.reasoning.support import Effort
from deployments.api.strict import NoOps, Strict
from deployments.api.structured import ONE_AT_MOST, StructuredFields, fields_that_ask
from deployments.api.tools.fields import ToolCall, ToolFields
from deployments.messages import MAX_LOGPROBS

# OpenAI's.
MAX_SAMPLES = 128
MAX_CALLS_OF_TURN = 128

_NO_OPS: NoOps = {
    "store": (False,),
}
_COMPLETION_NO_OPS: NoOps = {**_NO_OPS, "suffix": ("",)}
_CHAT_NO_OPS: NoOps = {
    **_NO_OPS,
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}
_MESSAGE_NO_OPS: NoOps = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
}


class StreamOptions(Strict):
    """`include_usage` is about the end of a stream; `continuous_usage_stats`, an extension, about each chunk.

    `include_receipt`, an extension of our own, puts a receipt into the chunk with the usage, which then comes.
    """

    no_ops: ClassVar[NoOps] = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_receipt: bool = False


class ModelBody(Strict):
    """Names the model; it may be left out, since one is served."""

    model: str | None = None


# Said to those who read the description; the checks are `_check_stream_options` and `_check_content`.
STREAM_OPTIONS_ONLY_WITH_STREAM: dict[str, Any] = {
    "if": {"properties": {"stream_options": {"type": "object"}}, "required": ["stream_options"]},
    "then": {"properties": {"stream": {"const": True}}, "required": ["stream"]},
}
_NOT_EMPTY: dict[str, Any] = {"type": ["string", "array"], "minLength": 1, "minItems": 1}
_CONTENT_UNLESS_ASSISTANT: dict[str, Any] = {
    "if": {"properties": {"role": {"const": "assistant"}}},
    "then": {"not": {"properties": {"content": _NOT_EMPTY, "refusal": _NOT_EMPTY}, "required": ["content", "refusal"]}},
    "else": {
        "properties": {
            "content": {"type": ["string", "array"]},
            "refusal": {"enum": [None, ""]},
            "tool_calls": {"enum": [None, []]},
            "reasoning_content": {"enum": [None, ""]},
        },
        "required": ["content"],
    },
}


class GenerateBody(ModelBody, DrawFields, LabelFields, StructuredFields):
    """What both endpoints take.

    `top_k` (0 and -1 are off), `min_p`, `repetition_penalty`, `min_tokens`, `stop_token_ids`, `ignore_eos`,
    `include_stop_str_in_output`, `skip_special_tokens`, `return_token_ids`, `prompt_logprobs`, `cache_salt`,
    `truncate_prompt_tokens`, `priority` (the lower, the sooner), `structured_outputs` and `guided_*` are extensions,
    named as in vLLM and with its meaning.
    """

    model_config = ConfigDict(json_schema_extra=STREAM_OPTIONS_ONLY_WITH_STREAM | {"allOf": ONE_AT_MOST})

    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    max_tokens: int | None = Field(default=None, ge=1)
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, json_schema_extra={"not": {"const": 0}})

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
    def _check_structure(self) -> Self:
        asked = fields_that_ask(self)
        if len(asked) > 1:
            message = f"cannot go with {asked[0]}: an answer has one form"
            raise PydanticCustomError("structure", message, {"field": asked[1]})
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

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0)
    best_of: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    echo: bool = False
    logprobs: LogprobCount = None

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


class Message(Strict):
    """One turn; the model's template decides what it does with the role, the name and the tool_call_id.

    Only an assistant's may be without content, which then is empty, or what it said in refusing.
    """

    model_config = ConfigDict(json_schema_extra=_CONTENT_UNLESS_ASSISTANT)
    no_ops = _MESSAGE_NO_OPS

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: OptionalContent = None
    refusal: str | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list, max_length=MAX_CALLS_OF_TURN)

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "is required", {"field": "content"})
        if self.refusal and (self.content or self.role != "assistant"):
            message = "only allowed in place of an assistant's content"
            raise PydanticCustomError("refusal", message, {"field": "refusal"})
        if self.reasoning_content and self.role != "assistant":
            raise PydanticCustomError("reasoning", "only allowed of an assistant", {"field": "reasoning_content"})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only allowed of an assistant", {"field": "tool_calls"})
        return self

    @property
    def num_characters(self) -> int:
        """Of its text."""
        content = self.content or self.refusal or ""
        length = len(content) if isinstance(content, str) else sum(len(str(part["text"])) for part in content)
        length += len(self.reasoning_content or "")
        return length + sum(len(call.function.arguments) for call in self.tool_calls)

    def for_template(self) -> dict[str, object]:
        """What the chat template is given."""
        fields = self.model_dump(include={"role", "name", "tool_call_id"}, exclude_none=True)
        if self.tool_calls:
            fields["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.reasoning_content:
            fields["reasoning_content"] = self.reasoning_content
        return fields | {"content": self.content or self.refusal or ""}


class ChatBody(GenerateBody, ToolFields):
    """`POST /v1/chat/completions`: `n` choices. `max_tokens` is the older name of `max_completion_tokens`.

    `add_generation_prompt`, `continue_final_message` and `chat_template_kwargs` are extensions, named as in vLLM.
    """

    no_ops = _CHAT_NO_OPS

    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)
    reasoning_effort: Effort | None = None
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
