"""From a body of `/v1/responses` to a call: what a chat with the same contents would be, and what its answer repeats.

Owns how items become messages, and that errors name the fields of this endpoint. `exchange.py` calls `read_response`.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from deployments.api.call import Call
from deployments.api.calls import build_chat, parse_body
from deployments.api.common_fields import TIERS, DrawFields, LabelFields
from deployments.api.fields import Content
from deployments.api.openai import ChatBody, Message, StreamOptions
from deployments.api.responses.fields import (
    LOGPROBS,
    PACKED_THOUGHTS,
    AllowedTools,
    FunctionTool,
    NamedFunction,
    ResponseBody,
)
from deployments.api.responses.forms import Repeated
from deployments.api.responses.items import AnyItem, FunctionCall, FunctionCallOutput, InputMessage, Reasoning
from deployments.api.responses.truncation import build_fitting
from deployments.api.structured import JsonSchema, ResponseFormat
from deployments.api.text import TextCodec
from deployments.api.tools.fields import CalledFunction, Function, Tool, ToolCall
from deployments.api.tools.fields import NamedFunction as ChatFunction
from deployments.api.tools.fields import NamedTool as ChatTool
from deployments.errors import InvalidRequestError
from deployments.messages import ModelInfo, Priority

_SAME_FIELDS = (*DrawFields.model_fields, *LabelFields.model_fields, "stream", "chat_template_kwargs")
# Names that a chat has for what is called otherwise here.
_NAMES = {
    "response_format.json_schema.schema": "text.format.schema",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}
# In errors. The last one is a common word: it counts only where it comes first.
_NAME = re.compile(
    r"response_format\.json_schema\.schema|response_format\b|max_completion_tokens\b|reasoning_effort\b|^messages\b"
)
_MESSAGE = re.compile(r"^messages\.(\d+)")


def read_response(
    data: bytes, call_id: str, codec: TextCodec, info: ModelInfo, priority: Priority = Priority.NORMAL
) -> Call:
    """Read the body of a request, apply the template and encode the result.

    Raises:
        InvalidRequestError: names the field, its value and the bound.
        TemplateLimitError: with `codec.brief`: the template takes longer than an event loop may wait.
    """
    body = parse_body(data, ResponseBody, info)
    named = [*read_messages(body.instructions, body.input)]
    names = {id(message): name for name, message in named}  # a chat that is cut keeps some of them

    def build(chat: ChatBody) -> Call:
        with _naming_our_fields([names[id(message)] for message in chat.messages]):
            return build_chat(chat, call_id, codec, info, priority)

    chat = _as_chat(body, [message for _, message in named])
    call = build_fitting(chat, build, is_brief=codec.is_brief) if body.truncation == "auto" else build(chat)
    (request,) = call.requests
    if (grammar := request.sampling.grammar) is not None:
        ours = replace(grammar, field=_rename(grammar.field))
        request = replace(request, sampling=replace(request.sampling, grammar=ours))
    repeated = _repeated(body, request.priority)
    return replace(call, requests=(request,), repeated=repeated, packs_thoughts=PACKED_THOUGHTS in body.include)


@contextmanager
def _naming_our_fields(messages: Sequence[str]) -> Iterator[None]:
    """Have errors say of a chat what it is called here; of its messages, by these names."""

    def rename(text: str) -> str:
        return _rename(_MESSAGE.sub(lambda number: messages[int(number[1])], text))

    try:
        yield
    except InvalidRequestError as error:
        raise type(error)(rename(error.message), rename(error.param or "") or None) from None


def _rename(text: str) -> str:
    return _NAME.sub(lambda name: _NAMES[name[0]], text)


def _as_chat(body: ResponseBody, messages: list[Message]) -> ChatBody:
    """A chat that asks for the same. Its fields were checked when the body was read."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME_FIELDS if name in body.model_fields_set}
    choice = body.tool_choice
    if isinstance(choice, NamedFunction):
        fields["tool_choice"] = ChatTool(type="function", function=ChatFunction(name=choice.name))
    elif choice is not None:
        fields["tool_choice"] = choice.mode if isinstance(choice, AllowedTools) else choice
    return ChatBody.model_construct(
        **fields,
        stream_options=StreamOptions(include_receipt=body.stream_options.include_receipt),
        messages=messages,
        response_format=_read_format(body),
        tools=[_as_chats_tool(tool) for tool in _allowed_tools(body)],
        parallel_tool_calls=body.parallel_tool_calls,
        max_completion_tokens=body.max_output_tokens,
        reasoning_effort=body.reasoning.effort,
        logprobs=LOGPROBS in body.include,
        top_logprobs=body.top_logprobs,
    )


def _read_format(body: ResponseBody) -> ResponseFormat:
    asked = body.text.format
    if asked.type != "json_schema":
        return ResponseFormat(type=asked.type)
    return ResponseFormat(
        type=asked.type, json_schema=JsonSchema(name=asked.name or "", schema=asked.schema_, strict=asked.strict)
    )


def _allowed_tools(body: ResponseBody) -> list[FunctionTool]:
    if not isinstance(body.tool_choice, AllowedTools):
        return body.tools
    allowed = {tool.name for tool in body.tool_choice.tools}
    return [tool for tool in body.tools if tool.name in allowed]


def _as_chats_tool(tool: FunctionTool) -> Tool:
    return Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}, exclude_none=True)))


def read_messages(instructions: str | None, given: str | Sequence[AnyItem]) -> Iterator[tuple[str, Message]]:
    """The conversation, with the instructions at its beginning; each message behind the name of what it begins with.

    What the assistant says and then calls is one message of a chat, and instructions are one with a system message
    behind them: there are templates that take no second one.
    """
    turn = _Turn()
    for name, item in _with_instructions(instructions, given):
        if isinstance(item, Reasoning):
            if turn.has_spoken:
                yield from turn.end()
            turn.thoughts += item.thought
            continue
        if isinstance(item, FunctionCall):
            turn.begin(name)
            turn.calls.append(_as_chats_call(item))
            continue
        is_assistants = isinstance(item, InputMessage) and item.role == "assistant"
        if isinstance(item, FunctionCallOutput | InputMessage) and (not is_assistants or turn.has_spoken):
            yield from turn.end()
        if isinstance(item, FunctionCallOutput):
            yield name, Message.model_construct(role="tool", content=item.output, tool_call_id=item.call_id)
        elif isinstance(item, InputMessage) and is_assistants:
            turn.begin(name)
            turn.content = item.content
        elif isinstance(item, InputMessage):
            yield name, Message.model_construct(role=item.role, content=item.content)
    yield from turn.end()


def _with_instructions(instructions: str | None, given: str | Sequence[AnyItem]) -> list[tuple[str, AnyItem]]:
    """Items behind their names: in errors they are called as the caller's body has them."""
    items: list[tuple[str, AnyItem]]
    if isinstance(given, str):
        items = [("input", InputMessage(role="user", content=given))]
    else:
        items = [(f"input.{place}", item) for place, item in enumerate(given)]
    if instructions:
        name, first = items[0]
        if isinstance(first, InputMessage) and first.role in ("system", "developer"):
            items[0] = name, first.model_copy(update={"content": _join(instructions, first.content)})
        else:
            items.insert(0, ("instructions", InputMessage(role="system", content=instructions)))
    return items


class _Turn:
    """What the assistant has said and called since others had their turn."""

    def __init__(self) -> None:
        self.name = ""
        self.content: Content | None = None
        self.calls: list[ToolCall] = []
        self.thoughts = ""

    @property
    def has_spoken(self) -> bool:
        return self.content is not None or bool(self.calls)

    def begin(self, name: str) -> None:
        """It says or calls what is named so; what it begins with gives it its name."""
        if not self.has_spoken:
            self.name = name

    def end(self) -> Iterator[tuple[str, Message]]:
        if self.has_spoken:
            yield (
                self.name,
                Message.model_construct(
                    role="assistant",
                    content=self.content,
                    tool_calls=self.calls,
                    reasoning_content=self.thoughts or None,
                ),
            )
        self.content, self.calls, self.thoughts = None, [], ""


def _as_chats_call(item: FunctionCall) -> ToolCall:
    function = CalledFunction.model_construct(name=item.name, arguments=item.arguments)
    return ToolCall.model_construct(id=item.call_id, type="function", function=function)


def _join(instructions: str, content: Content) -> Content:
    if isinstance(content, str):
        return f"{instructions}\n\n{content}"
    return ({"type": "text", "text": f"{instructions}\n\n"}, *content)


def _repeated(body: ResponseBody, priority: Priority) -> Repeated:
    choice = body.tool_choice
    form = body.text.format.model_dump(by_alias=True, exclude_none=True)
    return {
        "instructions": body.instructions,
        "tools": [tool.model_dump() for tool in body.tools],
        "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
        "parallel_tool_calls": body.parallel_tool_calls,
        "text": {"format": form | ({"description": None, "strict": None} | form if "schema" in form else {})},
        "temperature": body.temperature,
        "top_p": body.top_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "top_logprobs": body.top_logprobs,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "truncation": body.truncation,
        "service_tier": TIERS[priority],
        "metadata": body.metadata,
        "user": body.user,
        "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": None if body.reasoning.effort is None else {"effort": body.reasoning.effort, "summary": None},
    }
