"""Messages in OpenAI's shapes, calls and thoughts included, whole and in pieces. `answers.py` has what is around."""

import secrets
import string

from deployments.api.answer_reader import Part, build_reader
from deployments.api.forms import ChatFinishReason, ChatMessage, Delta, ToolCall, ToolCallDelta
from deployments.api.harmony import HarmonyRules
from deployments.api.reasoning.parser import Thought, ThoughtRules
from deployments.api.tools.parser import CallArguments, CallBegin, Content
from deployments.api.tools.rules import ToolRules
from deployments.messages import FinishReason

_LETTERS = string.ascii_letters + string.digits


class MessageShaper:
    """The message of one choice. Either `deltas` is called as its text comes, or `whole` once.

    Args:
        tools: of the call.
        thoughts: likewise.
    """

    def __init__(self, tools: ToolRules | None, thoughts: ThoughtRules | HarmonyRules | None) -> None:
        self._reader = build_reader(tools, thoughts)
        self._id_length = 0 if tools is None else tools.family.id_length

    def deltas(self, text: str, *, is_last: bool) -> list[Delta]:
        """What new text adds to the message."""
        return [self._delta(part) for part in self._reader.read(text, is_last=is_last)]

    def whole(self, text: str) -> ChatMessage:
        """The message of a whole text."""
        content = thoughts = ""
        calls: list[ToolCall] = []
        for one in self._reader.read(text, is_last=True):
            match one:
                case Content(piece):
                    content += piece
                case Thought(piece):
                    thoughts += piece
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
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["content"] = content or None
            message["tool_calls"] = calls
        return message

    def finish_reason(self, reason: FinishReason | None) -> ChatFinishReason | None:
        """Of the message, once all of it is known. An answer that was cut off says so, calls or not."""
        return "tool_calls" if reason is FinishReason.STOP and self._reader.num_calls else reason

    def _delta(self, part: Part) -> Delta:
        match part:
            case Content(text):
                return {"content": text}
            case Thought(text):
                return {"reasoning_content": text}
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
