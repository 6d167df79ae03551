"""What a model knows of tools: how it is told of them, how it calls them, and what can be asked of it therefore.

Owns which of a template and ourselves writes tools and calls into a prompt. `text.py` builds and uses it; `rules.py`
asks it what an answer may be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from deployments.api.chat_template import ChatTemplate, Message, NoChatTemplateError
from deployments.api.tools.families import FAMILIES, HARMONY, HERMES, Family, ToolParserName, family_of
from deployments.errors import InvalidRequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Definition = Mapping[str, object]


class ToolSupport:
    """Of one model.

    Args:
        template: its own, or why it has none.
        parser: how it writes calls, as the operator says.
        backend: its tokenizer.
    """

    def __init__(
        self, template: ChatTemplate | NoChatTemplateError, parser: ToolParserName, backend: Tokenizer
    ) -> None:
        self._shows_tools = isinstance(template, ChatTemplate) and template.shows_tools
        self._shows_calls = isinstance(template, ChatTemplate) and template.shows_calls
        self._is_told = parser != "auto"
        self._family: Family | None = None
        if parser != "auto":
            self._family = FAMILIES[parser]
        elif isinstance(template, ChatTemplate) and self._shows_tools:
            self._family = family_of(template.source)
        self._backend = backend
        self._template = template

    def family(self, *, is_forced: bool) -> Family:
        """How the model writes calls.

        Args:
            is_forced: a grammar has it write them.

        Raises:
            InvalidRequestError: it is not known, or nobody taught the model to write any.
        """
        if self._family is not None and (self._family is not HARMONY or self._shows_tools):
            return self._family
        if self._shows_tools:
            message = "how this model writes calls of tools is not known here; its operator may set ingress.tool_parser"
            raise InvalidRequestError(f"tools: {message}", "tools")
        if not is_forced or self._family is HARMONY:
            message = "this model's chat template knows no tools"
            hint = "tool_choice 'required', a tool by name and 'none' are possible"
            raise InvalidRequestError(f"tools: {message}; {hint}", "tools")
        return HERMES

    def token_of(self, marker: str) -> int | None:
        """The token that stands for a marker, if there is one."""
        token_id = self._backend.token_to_id(marker) if marker else None
        return None if token_id is None else int(token_id)

    def marker_ids(self, family: Family) -> frozenset[int]:
        """Tokens that must have a text for calls to be read."""
        ids = (self.token_of(marker) for marker in (family.opening, family.closing))
        return frozenset(token_id for token_id in ids if token_id is not None)

    def write(
        self, messages: Sequence[Message], tools: Sequence[Definition]
    ) -> tuple[Sequence[Message], Sequence[Definition]]:
        """What to give to the template: messages, and tools unless they are in the messages.

        What the template does not show is written as text, in the way of the model's family.

        Raises:
            InvalidRequestError: the template would leave a message out, or what is said here of tools.
        """
        if isinstance(self._template, ChatTemplate):
            self._template.check_systems(messages)
        family = self._family or HERMES
        if family is HARMONY:
            messages = [*_with_one_call_each(messages)]
        if not self._shows_calls:
            messages = [_with_calls_as_text(message, family) for message in messages]
        if tools and not self._shows_tools:
            return self._with_instructions(messages, _instructions(family, tools)), ()
        return messages, tools

    def _with_instructions(self, messages: Sequence[Message], instructions: str) -> list[Message]:
        """In the first system message, or in one of their own."""
        told: list[Message] = [{"role": "system", "content": instructions}, *messages]
        if messages and messages[0]["role"] in ("system", "developer"):
            told = [_append(messages[0], instructions, "\n\n"), *messages[1:]]
        try:
            if isinstance(self._template, ChatTemplate):
                self._template.check_systems(told[:1])
        except InvalidRequestError:
            message = "this model's chat template shows neither tools nor a system message that could describe them"
            raise InvalidRequestError(f"tools: {message}", "tools") from None
        return told


def _with_one_call_each(messages: Sequence[Message]) -> Iterator[Message]:
    """Several calls of one message as messages of their own, each before what it gave.

    gpt-oss' template shows the first call of a message alone, and takes what tools gave for its.
    """
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or len(calls) < 2:
            yield message
            continue
        given = [*takewhile(lambda following: following["role"] == "tool", rest)]
        del rest[: len(given)]
        yield from _one_by_one(message, calls, given)


def _one_by_one(message: Message, calls: Sequence[Any], given: Sequence[Message]) -> Iterator[Message]:
    """Each call with what it gave; at the end what was given for none of them."""
    for number, call in enumerate(calls):
        fields = message if number == 0 else {"role": message["role"], "content": ""}
        yield {**fields, "tool_calls": [call]}
        yield from (result for result in given if result.get("tool_call_id") == call.get("id"))
    ids = [call.get("id") for call in calls]
    yield from (result for result in given if result.get("tool_call_id") not in ids)


def _with_calls_as_text(message: Message, family: Family) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    objects = [{"name": call["function"]["name"], family.arguments: call["function"]["arguments"]} for call in calls]
    return _append(others, write_calls(family, objects), "\n")


def write_calls(family: Family, objects: Sequence[Mapping[str, object]]) -> str:
    """Calls as a model of the family writes them, with its own words for a name and arguments."""
    texts = [_to_json(one) for one in objects]
    if family.is_list:
        return f"{family.opening}[{', '.join(texts)}]{family.closing}"
    if family.is_bare:
        return "; ".join(texts)
    return "\n".join(f"{family.opening}\n{text}\n{family.closing}" for text in texts)


def _to_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequestError("tools or their calls are nested too deeply", "tools") from None


def _instructions(family: Family, tools: Sequence[Definition]) -> str:
    listed = "\n".join(_to_json(tool) for tool in tools)
    example = {"name": "<function name>", family.arguments: {"<parameter name>": "<value>"}}
    return (
        f"You may call one or more of these functions, each described as JSON:\n<tools>\n{listed}\n</tools>\n\n"
        f"To call a function, answer in this form:\n{write_calls(family, [example])}"
    )


def _append(message: Message, text: str, between: str) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{content}{between}{text}" if content else text}
    assert isinstance(content, Sequence)
    return {**message, "content": [*content, {"type": "text", "text": between + text}]}
