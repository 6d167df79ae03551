"""The body of `/v1/responses`: which fields exist and what they may hold, by the rules of `openai.py`.

Nothing is stored: what would need that is refused in words that say so.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.common_fields import DrawFields, LabelFields
from deployments.api.openai import STREAM_OPTIONS_ONLY_WITH_STREAM, ModelBody
from deployments.api.reasoning.support import Effort
from deployments.api.responses.items import Input
from deployments.api.strict import NoOps, Refusals, Strict
from deployments.api.tools.fields import CHOICE_WORDS, MAX_TOOLS, FunctionName, check_choice
from deployments.messages import MAX_LOGPROBS

PACKED_THOUGHTS = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"

_STATELESS = "nothing is stored here; send the earlier items in input"
_NO_OPS: NoOps = {
    "store": (False,),
    "background": (False,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
}
_REFUSALS: Refusals = {
    "store": "nothing is stored here, only false is possible",
    "background": "nothing is stored here, so that nobody could ask for the answer later",
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "no prompts are stored here; send instructions and input",
}


class FunctionTool(Strict):
    """One of `tools`. `strict` means what it does in chats."""

    no_ops: ClassVar[NoOps] = {"defer_loading": (False,)}

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(Strict):
    """Of a choice."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(Strict):
    """The model is offered these alone."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedFunction] = Field(min_length=1, max_length=MAX_TOOLS)


_ToolChoice = Literal["none", "auto", "required"] | NamedFunction | AllowedTools


def _as_choice(value: object) -> object:
    """A word, a tool by its name, or some of them."""
    if value in CHOICE_WORDS:
        return value
    is_list = isinstance(value, dict) and value.get("type") == "allowed_tools"
    try:
        return (AllowedTools if is_list else NamedFunction).model_validate(value)
    except ValidationError:
        message = (
            "must be 'none', 'auto', 'required', an object {type: 'function', name}, or "
            "{type: 'allowed_tools', mode, tools} with such objects"
        )
        raise PydanticCustomError("tool_choice", message) from None


ToolChoice = Annotated[_ToolChoice, PlainValidator(_as_choice, json_schema_input_type=_ToolChoice)]

# Said to those who read the description; the check is `_check_schema`.
_SCHEMA_ONLY_WITH_ITS_TYPE: dict[str, Any] = {
    "if": {"properties": {"type": {"const": "json_schema"}}},
    "then": {
        "properties": {"name": {"type": "string"}, "schema": {"type": "object"}},
        "required": ["name", "schema"],
    },
    "else": {"properties": {name: {"type": "null"} for name in ("name", "description", "schema", "strict")}},
}


class TextFormat(Strict):
    """Any text, any JSON object, or JSON that a schema describes. `strict` means what it does in chats."""

    model_config = ConfigDict(json_schema_extra=_SCHEMA_ONLY_WITH_ITS_TYPE)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> Self:
        if self.type == "json_schema":
            for field, value in (("name", self.name), ("schema", self.schema_)):
                if value is None:
                    raise PydanticCustomError("missing", "is required", {"field": field})
        elif others := sorted(self.model_fields_set - {"type"}):
            message = "only allowed with the type 'json_schema'"
            raise PydanticCustomError("json_schema", message, {"field": others[0].rstrip("_")})
        return self


class TextOptions(Strict):
    """`text`."""

    no_ops: ClassVar[NoOps] = {"verbosity": ()}

    format: TextFormat = TextFormat()


class ReasoningOptions(Strict):
    """`reasoning`. Thoughts are told as they are, and not summed up."""

    no_ops: ClassVar[NoOps] = {"summary": (), "generate_summary": ()}

    effort: Effort | None = None


class ResponseStreamOptions(Strict):
    """`stream_options`. `include_receipt`, an extension of our own, puts a receipt into the last event."""

    no_ops: ClassVar[NoOps] = {"include_obfuscation": (False,)}

    include_receipt: bool = False


class ResponseBody(ModelBody, DrawFields, LabelFields):
    """`POST /v1/responses`: one answer, of which nothing is kept.

    Fields that OpenAI does not have, and those of its other endpoints, mean what they mean in chats.
    """

    model_config = ConfigDict(json_schema_extra=STREAM_OPTIONS_ONLY_WITH_STREAM)
    no_ops = _NO_OPS
    refusals = _REFUSALS

    input: Input
    instructions: str | None = None
    text: TextOptions = TextOptions()
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = Field(default=None, ge=1)
    # Of calls of built-in tools: there are none, so no call is ever one too many.
    max_tool_calls: int | None = Field(default=None, ge=1)
    truncation: Literal["auto", "disabled"] = "disabled"
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(default_factory=list)
    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    reasoning: ReasoningOptions = ReasoningOptions()
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)
    stream: bool = False
    stream_options: ResponseStreamOptions = ResponseStreamOptions()

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        choice = self.tool_choice
        named = [choice] if isinstance(choice, NamedFunction) else []
        named = choice.tools if isinstance(choice, AllowedTools) else named
        where = "tools" if isinstance(choice, AllowedTools) else "name"
        check_choice([tool.name for tool in self.tools], choice, [tool.name for tool in named], "name", where)
        return self

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and LOGPROBS not in self.include:
            message = f"only allowed with logprobs: include must hold '{LOGPROBS}'"
            raise PydanticCustomError("top_logprobs", message, {"field": "top_logprobs"})
        return self

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise PydanticCustomError("stream_options", "only allowed with stream", {"field": "stream_options"})
        return self
