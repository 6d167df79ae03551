"""What a model knows of thoughts: how it marks them, and how it is told to think more or less.

`text.py` builds it, `calls.py` asks it for each chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from deployments.api.chat_template import ChatTemplate, Message, NoChatTemplateError
from deployments.api.harmony import HarmonyRules, HarmonyTokens, encode_analysis, is_within_message
from deployments.api.reasoning.parser import ThoughtRules
from deployments.errors import InvalidRequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How `ingress.reasoning_parser` names them; `auto`: by the template.
ReasoningParserName = Literal["auto", "none", "think", "harmony"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]

_OPENING, _CLOSING = "<think>", "</think>"
# The opening, and white space behind it.
_NUM_LAST_TOKENS = 16


class ReasoningSupport:
    """Of one model.

    Args:
        template: its own, or why it has none.
        parser: how it marks thoughts, as the operator says.
        backend: its tokenizer.
        harmony: the markers of its messages, if its answers are in the format of gpt-oss.
    """

    def __init__(
        self,
        template: ChatTemplate | NoChatTemplateError,
        parser: ReasoningParserName,
        backend: Tokenizer,
        harmony: HarmonyTokens | None = None,
    ) -> None:
        self._template = template
        self._backend = backend
        shows = isinstance(template, ChatTemplate) and _CLOSING in template.source
        opening_id, closing_id = backend.token_to_id(_OPENING), backend.token_to_id(_CLOSING)
        rules = ThoughtRules(_OPENING, _CLOSING, opening_id=opening_id, closing_id=closing_id)
        self._rules = rules if parser == "think" or (parser == "auto" and shows) else None
        self._harmony = None if harmony is None else HarmonyRules(harmony, tuple(encode_analysis(backend)))

    def rules(self, prompt_token_ids: Sequence[int]) -> ThoughtRules | HarmonyRules | None:
        """How thoughts are found in what follows a prompt; None: none are looked for."""
        if self._harmony is not None:
            return replace(self._harmony, is_body=is_within_message(self._harmony.tokens, prompt_token_ids))
        if self._rules is None:
            return None
        end = self._backend.decode(list(prompt_token_ids[-_NUM_LAST_TOKENS:]), skip_special_tokens=False).rstrip()
        return replace(self._rules, is_open=end.endswith(_OPENING), is_over=end.endswith(_CLOSING))

    def write(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages to give to a template: it may have its own word for thoughts.

        That of gpt-oss takes thoughts or words before a call, and not both.
        """
        if self._harmony is None:
            return messages
        return [_with_thinking(message) if message.get("reasoning_content") else message for message in messages]

    def variables(self, effort: Effort | None) -> dict[str, object]:
        """What the chat template is given besides, so that the model thinks as much.

        Raises:
            InvalidRequestError: the template does not know efforts, or not this one.
        """
        if effort is None:
            return {}
        template = self._template
        if isinstance(template, ChatTemplate) and template.reads("reasoning_effort"):
            return {"reasoning_effort": effort}
        if isinstance(template, ChatTemplate) and template.reads("enable_thinking"):
            if effort == "none":
                return {"enable_thinking": False}
            message = "this model's chat template knows but 'none', and thinking when it is left out"
        else:
            message = "this model's chat template does not read it"
        raise InvalidRequestError(f"reasoning_effort: {message}", "reasoning_effort")


def _with_thinking(message: Message) -> Message:
    fields = {name: value for name, value in message.items() if name != "reasoning_content"}
    thoughts, content = message["reasoning_content"], message.get("content")
    if message.get("tool_calls") and isinstance(content, str) and content:
        return {**fields, "thinking": f"{thoughts}\n{content}", "content": ""}
    return {**fields, "thinking": thoughts}
