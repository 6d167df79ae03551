"""A model's control tokens in what users write: refused, or encoded as the plain text that they are.

Owns that a chat template's own control tokens stay what they are, whatever stands between them. Knows messages as
templates take them and the tokenizers library; `text.py` is its caller. May be used from several threads at once.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from deployments.errors import InvalidRequestError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

# `allow`: a control token that a user wrote is one, as in transformers. `refuse`: it is a 400. `text`: it is text.
ControlPolicy = Literal["allow", "refuse", "text"]
# Of a mark: those that nobody else knows, and those that say what it stands for. Digits: no template changes them.
_NUM_SECRET_DIGITS, _NUM_INDEX_DIGITS = 24, 6
# Of a pre-tokenizer, as its JSON has it.
_FIRST, _NEVER = '"prepend_scheme":"first"', '"prepend_scheme":"never"'
# Between control tokens, to see whether a text can be encoded piece by piece: spaces, lines, digits, other scripts.
_PROBES = (" a", "b ", "\n", "\n\nuser\n", "12 345", "naïve 日本語 👋", " ", "  x  ")


class ControlTokens:
    """Finds control tokens in messages. What a tokenizer calls special is one.

    Args:
        backend: the tokenizer.
    """

    def __init__(self, backend: Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        self.tokens = {token.content: (token_id, token) for token_id, token in added.items() if _is_control(token)}
        self.texts = sorted(self.tokens)
        self.written = re.compile(_longest_of(self.texts) or r"(?!)")

    def refuse(self, messages: Sequence[Mapping[str, object]], variables: Mapping[str, object] | None = None) -> None:
        """Let messages and a template's variables without control tokens pass.

        Raises:
            InvalidRequestError: names the message and the token.
        """
        for number, message in enumerate(messages):
            self.refuse_in(message, f"messages.{number}")
        self.refuse_in({"variables": variables}, "chat_template_kwargs")

    def refuse_in(self, holder: Mapping[str, object], param: str) -> None:
        """Let one message, or what else a template is given, pass; see `refuse`."""

        def check(text: str) -> str:
            if found := self.written.search(text):
                raise InvalidRequestError(f"{param} holds the control token {found[0]!r}, which is not allowed", param)
            return text

        _change_texts(holder, check)

    def occur_in(self, messages: Sequence[Mapping[str, object]]) -> bool:
        """Whether a user wrote one."""
        try:
            self.refuse(messages)
        except InvalidRequestError:
            return True
        return False

    def replace_in(
        self, messages: Sequence[Mapping[str, object]], mark: Callable[[int], str]
    ) -> list[dict[str, object]]:
        """Messages with a mark in place of each control token, made of its number among `texts`."""

        def change(text: str) -> str:
            return self.written.sub(lambda found: mark(self.texts.index(found[0])), text)

        return [_change_texts(message, change) for message in messages]


class PlainEncoder:
    """Encodes what a template wrote, with the control tokens in users' texts as plain text.

    The template is given marks in their place. What it wrote is taken apart at its own control tokens; the pieces
    between, with what the marks stand for, are encoded by a tokenizer that knows no control tokens.

    Args:
        backend: the tokenizer.

    Raises:
        UnsupportedModelError: it encodes a text otherwise than piece by piece.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._control = ControlTokens(backend)
        secret = secrets.randbelow(10**_NUM_SECRET_DIGITS)
        self._secret = f"{secret:0{_NUM_SECRET_DIGITS}}"
        self._marks = re.compile(rf"{self._secret}(\d{{{_NUM_INDEX_DIGITS}}})")
        source = backend.to_str()
        # The second one for what does not stand at the beginning of a text, where some have a space of their own.
        self._plain = [_as_text_reader(backend, text) for text in (source, source.replace(_FIRST, _NEVER))]
        self._check(backend)

    def mask(self, messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]] | None:
        """The messages to give to a template in place of these; None: there are no control tokens in them."""
        if not self._control.occur_in(messages):
            return None
        return self._control.replace_in(messages, lambda index: f"{self._secret}{index:0{_NUM_INDEX_DIGITS}}")

    def encode(self, text: str) -> list[int]:
        """Token ids of what a template wrote of masked messages."""
        pieces, ids = self._split(text)
        first, later = self._plain
        # As batches: only these let other threads run.
        (opening,) = first.encode_batch(pieces[:1], add_special_tokens=False)
        token_ids = list(opening.ids)
        for token_id, encoding in zip(ids, later.encode_batch(pieces[1:], add_special_tokens=False), strict=True):
            token_ids += [token_id, *encoding.ids]
        return token_ids

    def _split(self, text: str) -> tuple[list[str], list[int]]:
        """Unmasked pieces, and the control tokens between them."""
        pieces: list[str] = []
        ids: list[int] = []
        end = 0
        takes_spaces = False
        for border in self._control.written.finditer(text):
            token_id, token = self._control.tokens[border[0]]
            piece = text[end : border.start()]
            piece = piece.lstrip() if takes_spaces else piece
            pieces.append(self._unmask(piece.rstrip() if token.lstrip else piece))
            ids.append(token_id)
            end, takes_spaces = border.end(), token.rstrip
        pieces.append(self._unmask(text[end:].lstrip() if takes_spaces else text[end:]))
        return pieces, ids

    def _unmask(self, piece: str) -> str:
        return self._marks.sub(lambda mark: self._control.texts[int(mark[1])], piece)

    def _check(self, backend: Tokenizer) -> None:
        for text, (token_id, token) in self._control.tokens.items():
            whole = "".join(probe + text for probe in _PROBES)
            expected = backend.encode(whole, add_special_tokens=False).ids
            as_text = self._plain[0].encode(f"a{text}b", add_special_tokens=False).ids
            if self.encode(whole) != expected or token_id in as_text or token.single_word:
                raise UnsupportedModelError(f"the tokenizer cannot encode its control token {text!r} as text")


def _as_text_reader(backend: Tokenizer, source: str) -> Tokenizer:
    """A tokenizer from its JSON, to which control tokens are text."""
    tokenizer: Tokenizer = type(backend).from_str(source)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _is_control(token: AddedToken) -> bool:
    return bool(token.special and token.content)


def _longest_of(texts: Sequence[str]) -> str:
    """Pattern of the longest of some texts that stands at a place, as tokenizers choose.

    What begins alike is tried once: Llama 3 has 256 control tokens, one after the other they take 0.6 s per MB.
    """
    beginnings: dict[str, list[str]] = {}
    for text in texts:
        if text:
            beginnings.setdefault(text[0], []).append(text[1:])
    branches = [re.escape(first) + _longest_of(rest) for first, rest in beginnings.items()]
    pattern = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""
    return f"(?:{pattern})?" if pattern and "" in texts else pattern


def _change_texts(message: Mapping[str, object], change: Callable[[str], str]) -> dict[str, object]:
    """A message with every text in it changed, but for its role."""

    def walk(value: object) -> object:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {change(key): walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return value

    try:
        return {name: item if name == "role" else walk(item) for name, item in message.items()}
    except RecursionError:
        raise InvalidRequestError("messages are nested too deeply", "messages") from None
