"""Between text and token ids: the tokenizer and its chat template; the way back is in `detokenizer.py`.

Does its work with the tokenizers library; `tokenizer.py` reads what a codec is made of. Knows nothing of requests:
`calls.py` encodes with it, `choices.py` decodes. A `TextCodec` may be used from several threads at once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, cast

from deployments.api.chat_template import (
    BRIEF_LIMITS,
    LIMITS,
    ChatTemplate,
    Message,
    NoChatTemplateError,
    choose_template,
)
from deployments.api.control_tokens import ControlPolicy, ControlTokens, PlainEncoder
from deployments.api.detokenizer import DetokenizerFactory
from deployments.api.harmony import HarmonyTokens, is_harmony, read_tokens
from deployments.api.reasoning.support import ReasoningParserName, ReasoningSupport
from deployments.api.tools.families import ToolParserName
from deployments.api.tools.support import ToolSupport
from deployments.errors import InvalidRequestError, UnsupportedModelError

if TYPE_CHECKING:
    from deployments.api.tokenizer import AnyTokenizer

# Under which a template's variables go with the messages.
_VARIABLES = "variables"
_TOOLS = "tools"
logger = logging.getLogger(__name__)


class TextCodec:
    """A model's tokenizer and chat template.

    Args:
        tokenizer: as `read_tokenizer` gives it.
        control_tokens: what becomes of those that users write in messages.
        tool_parser: how the model writes calls of tools.
        reasoning_parser: how it marks its thoughts.

    Raises:
        UnsupportedModelError: the tokenizer cannot do with them what is asked for.

    Attributes:
        backend: the tokenizers library's own object.
        detokenizers: build what turns its ids back into text.
        tools: how the model is told of tools, and calls them.
        reasoning: how it marks its thoughts.
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        control_tokens: ControlPolicy = "allow",
        tool_parser: ToolParserName = "auto",
        reasoning_parser: ReasoningParserName = "auto",
    ) -> None:
        self._tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        # A saved truncation or padding would silently change prompts.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.detokenizers = DetokenizerFactory(self.backend)
        self._chat_template = _compile_template(tokenizer)
        harmony = self._find_harmony(tool_parser, reasoning_parser)
        self.tools = ToolSupport(self._chat_template, tool_parser if harmony is None else "harmony", self.backend)
        self.reasoning = ReasoningSupport(self._chat_template, reasoning_parser, self.backend, harmony)
        self._template_limits = LIMITS
        self._refused = ControlTokens(self.backend) if control_tokens == "refuse" else None
        self._plain = PlainEncoder(self.backend) if control_tokens == "text" else None

    def _find_harmony(self, tool_parser: str, reasoning_parser: str) -> HarmonyTokens | None:
        """The markers of gpt-oss, if the model's answers are in its format; calls and thoughts are then both."""
        parsers, template = {tool_parser, reasoning_parser}, self._chat_template
        shows = isinstance(template, ChatTemplate) and is_harmony(template.source)
        if parsers - {"auto", "harmony"} or not (shows or "harmony" in parsers):
            return None
        tokens = read_tokens(self.backend)
        if tokens is None and "harmony" in parsers:
            raise UnsupportedModelError("the tokenizer has not the control tokens of harmony, the format of gpt-oss")
        return tokens

    @cached_property
    def brief(self) -> TextCodec:
        """The same codec, whose `encode_chat` raises `TemplateLimitError` rather than take long."""
        brief = copy.copy(self)
        brief._template_limits = BRIEF_LIMITS
        return brief

    @property
    def is_brief(self) -> bool:
        """Whether this is one that rather raises than takes long."""
        return self._template_limits is BRIEF_LIMITS

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The id that the tokenizer itself says ends a text; none where it names none, or one it does not have."""
        end = self._tokenizer.eos_token
        # Not `eos_token_id`: that is the unknown token's for a name that the vocabulary lacks.
        token_id = None if end is None else self.backend.token_to_id(str(end))
        return () if token_id is None else (token_id,)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Compare with the model: some of its prompts cannot be computed if the tokenizer has tokens that it lacks.

        Args:
            vocab_size: of the model; its ids are below.

        Raises:
            UnsupportedModelError: none of its prompts could be, for they all begin or end with such a token.
        """
        always = [token_id for token_id in self.encode("") if token_id >= vocab_size]
        if always:
            named = f"{self.backend.id_to_token(always[0])!r}, id {always[0]}"
            raise UnsupportedModelError(
                f"the tokenizer adds {named}, to every prompt, and the model's ids are 0 to {vocab_size - 1}"
            )
        last = max([self.backend.get_vocab_size(with_added_tokens=False) - 1, *self.backend.get_added_tokens_decoder()])
        if last >= vocab_size:
            named = f"{self.backend.id_to_token(last)!r}, id {last}"
            logger.warning(
                "the tokenizer has tokens up to %s, and the model's ids are 0 to %d: prompts with others are refused",
                named,
                vocab_size - 1,
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer adds by itself."""
        return self._encode(text, add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        max_characters: int = 2**24,
        variables: Mapping[str, object] | None = None,
        tools: Sequence[Mapping[str, object]] = (),
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks.

        Args:
            messages: as `ChatTemplate.render` takes them, with its two choices of an end.
            add_special_tokens: those of a plain prompt, although templates write what is needed.
            max_characters: a template that writes more is refused.
            variables: what else the template may read.
            tools: that the model may call, as OpenAI has them.

        Raises:
            InvalidRequestError: the model has no chat template, its template refuses these messages, or they hold
                control tokens that are not allowed.
        """
        if isinstance(self._chat_template, NoChatTemplateError):
            raise InvalidRequestError(str(self._chat_template), "messages")
        if self._refused is not None:
            self._refused.refuse(messages, variables)
            self._refused.refuse_in({_TOOLS: tools}, _TOOLS)
        messages, tools = self.tools.write(self.reasoning.write(messages), tools)
        others: dict[str, object] = {_VARIABLES: variables or {}, _TOOLS: tools}
        masked = None if self._plain is None else self._plain.mask([*messages, others])
        if masked is not None:
            messages, others = masked[:-1], masked[-1]
        if masked is not None and add_special_tokens:
            message = "cannot go with control tokens in messages, which are read as text"
            raise InvalidRequestError(f"add_special_tokens {message}", "add_special_tokens")
        limits = self._template_limits
        text = self._chat_template.render(
            messages,
            tools=cast(Sequence[Mapping[str, object]], others[_TOOLS]),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            limits=replace(limits, max_size=min(limits.max_size, max_characters)),
            variables=cast(Mapping[str, object], others[_VARIABLES]),
        )
        if self._plain is not None and masked is not None:
            return self._plain.encode(text)
        return self._encode(text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # As a batch of one: only that lets other threads run. `encode` stopped every stream for 300 ms with a prompt of
        # 108,000 tokens, this for 9 ms (tokenizers 0.23, 2 cores of a shared CPU, 2026-11-24).
        (encoding,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids


def _compile_template(tokenizer: AnyTokenizer) -> ChatTemplate | NoChatTemplateError:
    """The model's template, or why it has none: the model still completes."""
    try:
        return ChatTemplate(choose_template(tokenizer.chat_template), tokenizer.special_tokens_map)
    except NoChatTemplateError as error:
        if tokenizer.chat_template:
            logger.warning("%s", error)
        return error
