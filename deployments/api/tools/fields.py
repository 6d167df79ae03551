"""What callers say of tools: those that they offer, which of them is to be called, and calls in earlier turns."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.strict import Strict

# OpenAI's bounds.
MAX_TOOLS = 128
_NAME = r"^[a-zA-Z0-9_-]{1,64}$"

FunctionName = Annotated[str, Field(pattern=_NAME)]


class Function(Strict):
    """A function that a model may call. `strict`: its schema is followed, also by a call that need not be."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One of `tools`."""

    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, object]:
        """What the chat template is given: as the caller wrote it, and always with parameters."""
        function = self.function.model_dump(include={"name", "description"}, exclude_none=True)
        return {"type": self.type, "function": {**function, "parameters": self.schema_of_arguments()}}

    def schema_of_arguments(self) -> dict[str, Any]:
        return {"type": "object", "properties": {}} if self.function.parameters is None else self.function.parameters


class NamedFunction(Strict):
    """Of a choice."""

    name: FunctionName


class NamedTool(Strict):
    """Have this one called."""

    type: Literal["function"]
    function: NamedFunction


class SomeTools(Strict):
    """Tools of a choice, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(Strict):
    """The model is offered these alone."""

    type: Literal["allowed_tools"]
    allowed_tools: SomeTools


class CalledFunction(Strict):
    """Of a call in an earlier turn; `arguments` is a JSON object as text."""

    name: str = Field(min_length=1, max_length=64)
    arguments: str

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        if read_object(self.arguments) is None:
            raise PydanticCustomError("arguments", "must be a JSON object, as text", {"field": "arguments"})
        return self


class ToolCall(Strict):
    """One of an assistant's `tool_calls`."""

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, object]:
        """What the chat template is given: arguments as an object, which is what templates write as JSON."""
        function = {"name": self.function.name, "arguments": read_object(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


def read_object(text: str) -> dict[str, object] | None:
    """What a JSON object holds; no text at all is an empty one. None: it is no object."""
    try:
        value = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


CHOICE_WORDS = ("none", "auto", "required")
_ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


def _as_choice(value: object) -> object:
    """A word, a tool by its name, or some of them."""
    is_list = isinstance(value, dict) and value.get("type") == "allowed_tools"
    try:
        return value if value in CHOICE_WORDS else (AllowedTools if is_list else NamedTool).model_validate(value)
    except ValidationError:
        message = (
            "must be 'none', 'auto', 'required', an object {type: 'function', function: {name}}, or "
            "{type: 'allowed_tools', allowed_tools: {mode, tools}} with such objects"
        )
        raise PydanticCustomError("tool_choice", message) from None


ToolChoice = Annotated[_ToolChoice, PlainValidator(_as_choice, json_schema_input_type=_ToolChoice)]


class ToolFields(Strict):
    """Fields of a chat about tools. Without `tools` the others may only ask for nothing."""

    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        if isinstance(self.tool_choice, AllowedTools):
            return [tool for tool in self.tools if tool.function.name in self._chosen_names]
        return [] if self.tool_choice == "none" else self.tools

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that it may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name in self._chosen_names]
        return self.offered_tools

    @property
    def must_call(self) -> bool:
        """Whether one of them at least must be called; else that is the model's choice."""
        choice = self.tool_choice
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
        return mode == "required" or isinstance(choice, NamedTool)

    @property
    def _chosen_names(self) -> list[str]:
        choice = self.tool_choice
        if isinstance(choice, AllowedTools):
            return [tool.function.name for tool in choice.allowed_tools.tools]
        return [choice.function.name] if isinstance(choice, NamedTool) else []

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        where = "allowed_tools.tools" if isinstance(self.tool_choice, AllowedTools) else "function.name"
        check_choice(names, self.tool_choice, self._chosen_names, "function.name", where)
        return self


def check_choice(names: Sequence[str], choice: object, chosen: Sequence[str], path: str, where: str) -> None:
    """Check that tools have each a name of their own, and that a choice is among them.

    Args:
        names: of the tools.
        choice: what `tool_choice` holds; None: nothing.
        chosen: the names in it.
        path: to the name of a tool.
        where: they stand in the choice.
    """
    _check_names(names, path)
    if not names and choice not in (None, "none"):
        raise PydanticCustomError("tool_choice", "cannot go without tools", {"field": "tool_choice"})
    for name in chosen:
        if name not in names:
            message = f"cannot go with these tools: none of them is {name!r}"
            raise PydanticCustomError("tool_choice", message, {"field": f"tool_choice.{where}"})


def _check_names(names: Sequence[str], path: str) -> None:
    for number, name in enumerate(names):
        if name in names[:number]:
            message = f"two tools cannot go with one name, {name!r}"
            raise PydanticCustomError("tools", message, {"field": f"tools.{number}.{path}"})
