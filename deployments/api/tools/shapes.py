"""Calls of tools in OpenAI's shapes, whole and in pieces. `answers.py` has the rest of an answer."""

import secrets
import string

from deployments.api.forms import ChatFinishReason, ChatMessage, Delta, ToolCall, ToolCallDelta
from deployments.api.tools.parser import CallArguments, CallBegin, Content
from deployments.api.tools.parser import Delta as Read
from deployments.api.tools.rules import ToolRules
from deployments.messages import FinishReason

_LETTERS = string.ascii_letters + string.digits


class MessageShaper:
    """The message of one choice. Either `deltas` is called as its text comes, or `whole` once.

    Args:
        rules: of the call.
    """

    def __init__(self, rules: ToolRules) -> None:
        self._parser = rules.build_parser()
        self._id_length = rules.family.id_length

    def deltas(self, text: str, *, is_last: bool) -> list[Delta]:
        """What new text adds to the message."""
        read = self._parser.feed(text)
        if is_last:
            read += self._parser.flush()
        return [self._delta(one) for one in read]

    def whole(self, text: str) -> ChatMessage:
        """The message of a whole text."""
        content = ""
        calls: list[ToolCall] = []
        for one in [*self._parser.feed(text), *self._parser.flush()]:
            match one:
                case Content(piece):
                    content += piece
                case CallBegin(_, name):
                    calls.append(
                        {
                            "id": new_call_id(self._id_length),
                            "type": "function",
                            "function": {"name": name, "arguments": ""},
                        }
                    )
                case CallArguments(index, piece):
                    calls[index]["function"]["arguments"] += piece
        message: ChatMessage = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["content"] = content or None
            message["tool_calls"] = calls
        return message

    def finish_reason(self, reason: FinishReason | None) -> ChatFinishReason | None:
        """Of the message, once all of it is known. An answer that was cut off says so, calls or not."""
        return "tool_calls" if reason is FinishReason.STOP and self._parser.num_calls else reason

    def _delta(self, read: Read) -> Delta:
        match read:
            case Content(text):
                return {"content": text}
            case CallBegin(index, name):
                call: ToolCallDelta = {
                    "index": index,
                    "id": new_call_id(self._id_length),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
                return {"tool_calls": [call]}
            case CallArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def new_call_id(length: int) -> str:
    """Letters and digits behind a word that others begin theirs with, where there is room for it."""
    prefix = "call_" if length > 20 else ""
    return prefix + "".join(secrets.choice(_LETTERS) for _ in range(length - len(prefix)))
