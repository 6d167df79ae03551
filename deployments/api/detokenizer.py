"""From token ids back to text, piece by piece, as they arrive.

One `Detokenizer` per sequence; they share what was learned of the vocabulary. Knows the tokenizers library's backend
and nothing of requests, stop strings or templates; `text.py` builds them, `choices.py` feeds them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Mapping, Sequence
from enum import Enum, auto
from functools import cache, cached_property
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from deployments.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# ByteFallback judges a run of byte tokens as a whole, so a run is held until it ends; but no longer than this, or text
# in a script that the vocabulary lacks would arrive in one piece at its end.
_MAX_BYTE_RUN = 64
_LONGEST_CHARACTER_BYTES = 4
# The token before a piece nearly always has text of its own. Where it has none, more of them are looked at; a decoder
# that drops the text of this many tokens in a row is not known.
_MAX_CONTEXT_TOKENS = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text as they arrive.

    The text of the prompt and all pieces joined, `flush` included, are what the tokenizer's `decode` gives for all ids,
    without its clean-up of spaces. A character that the prompt leaves unfinished belongs to the first piece.
    The work is linear in the number of tokens, and what is kept does not grow with it.
    """

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that is certain by now, perhaps none."""
        ...

    def flush(self) -> str:
        """Return what was held back, as if the text ended here; more may follow."""
        ...

    @property
    def num_kept(self) -> int:
        """Tokens that it still has to look at again."""
        ...


class DetokenizerFactory:
    """Builds the detokenizers of one tokenizer.

    Args:
        backend: the tokenizer.

    Raises:
        UnsupportedModelError: its decoder is not of a kind that can be decoded piece by piece.
    """

    def __init__(self, backend: Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        self._special_texts = {token_id: token.content for token_id, token in added.items() if token.special}
        vocabulary = _TokenBytes if _is_byte_level(backend) else _Pieces
        self._skipping = vocabulary(backend, frozenset(self._special_texts))
        self._showing = vocabulary(backend, frozenset())
        self._build_showing = cache(lambda shown: vocabulary(backend, frozenset(self._special_texts) - shown))

    def build(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> Detokenizer:
        """Build a detokenizer for one sequence.

        Args:
            prompt_token_ids: what the text continues; empty: it stands alone, and loses the space that a tokenizer of
                SentencePiece's kind puts before a text.
            skip_special_tokens: special tokens have no text.
            shown: those that have one all the same; few different sets, for each is kept.
        """
        vocabulary = self._skipping if skip_special_tokens else self._showing
        if skip_special_tokens and shown:
            vocabulary = self._build_showing(shown)
        return vocabulary.detokenizer(prompt_token_ids)

    def read_prompt(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a prompt, behind which that of a detokenizer built for it is read.

        A character that the prompt leaves unfinished is not in it.
        """
        vocabulary = self._skipping if skip_special_tokens else self._showing
        return vocabulary.read_prompt(token_ids)

    def text_of(self, token_id: int) -> bytes:
        """UTF-8 of one token as it stands within a text, special or not; perhaps no whole character."""
        return self._showing.text_of(token_id)

    def special_texts(self, strings: Collection[str]) -> Mapping[int, str]:
        """Those special tokens that occur in any of the strings, with how they are written."""
        return {
            token_id: text
            for token_id, text in self._special_texts.items()
            if text and any(text in string for string in strings)
        }


class _TokenBytes(dict[int, bytes]):
    """UTF-8 bytes of each token of a byte-level vocabulary, computed when first asked for; none for `hidden` ones."""

    def __init__(self, backend: Tokenizer, hidden: frozenset[int]) -> None:
        super().__init__()
        self._backend = backend
        self._hidden = hidden

    def __missing__(self, token_id: int) -> bytes:
        token = "" if token_id in self._hidden else self._backend.id_to_token(token_id) or ""
        try:
            value = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token, written in plain text
            value = token.encode()
        self[token_id] = value
        return value

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        return _ByteLevelDetokenizer(self, prompt_token_ids)

    def read_prompt(self, token_ids: Sequence[int]) -> str:
        return self.detokenizer(()).push(token_ids)

    def text_of(self, token_id: int) -> bytes:
        return self[token_id]


class _ByteLevelDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen): joins the tokens' bytes and emits whole characters.

    tokenizers' own `DecodeStream` is as fast on good text, but re-reads everything since the last whole character
    (4,000 continuation bytes took 1.8 s; tokenizers 0.23.3, one core of a shared CPU), and it has no flush.
    """

    def __init__(self, token_bytes: _TokenBytes, prompt_token_ids: Sequence[int]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = token_bytes[token_id] + tail
            if len(tail) >= _LONGEST_CHARACTER_BYTES:
                break
        self._decoder.decode(tail)  # keeps the bytes of an unfinished character, wherever one began reading

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join([self._token_bytes[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    @property
    def num_kept(self) -> int:
        return 0  # bytes alone, of one character


class _Kind(Enum):
    """What a token is to a decoder."""

    HIDDEN = auto()  # it has no text: special, or beyond the vocabulary
    TEXT = auto()
    BYTE = auto()  # one byte of a character (`<0xE2>`)


class _Pieces(dict[int, _Kind]):
    """Kinds of the tokens of a vocabulary, found when first asked for, and its decoder."""

    def __init__(self, backend: Tokenizer, hidden: frozenset[int]) -> None:
        super().__init__()
        self._backend = backend
        self._hidden = hidden
        self._has_byte_tokens = "ByteFallback" in json.dumps(_decoder_state(backend))
        self._widths: dict[int, int] = {}
        self.neutral = self._find_neutral() if self._has_byte_tokens else []

    @cached_property
    def _before(self) -> list[int]:
        return self.neutral or self._find_neutral()

    def __missing__(self, token_id: int) -> _Kind:
        token = None if token_id in self._hidden else self._backend.id_to_token(token_id)
        if token is None:
            kind = _Kind.HIDDEN
        elif self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
            kind = _Kind.BYTE
        else:
            kind = _Kind.TEXT
        self[token_id] = kind
        return kind

    def detokenizer(self, prompt_token_ids: Sequence[int]) -> Detokenizer:
        return _WindowDetokenizer(self, prompt_token_ids)

    def read_prompt(self, token_ids: Sequence[int]) -> str:
        visible = [token_id for token_id in token_ids if self[token_id] is not _Kind.HIDDEN]
        return self.decode(visible[: len(visible) - self.num_unfinished_bytes(visible)])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, none of which is hidden."""
        return self._backend.decode(token_ids, skip_special_tokens=False)

    def width(self, token_id: int) -> int:
        """Characters of a text that is this token alone."""
        width = self._widths.get(token_id)
        if width is None:
            width = self._widths[token_id] = len(self.decode([token_id]))
        return width

    def text_of(self, token_id: int) -> bytes:
        """Behind something else: the first token of a text alone loses its space."""
        kind = self[token_id]
        if kind is _Kind.HIDDEN:
            return b""
        if kind is _Kind.BYTE:
            return bytes([self.byte(token_id)])
        before = self._before
        return self.decode([*before, token_id])[sum(map(self.width, before)) :].encode()

    def byte(self, token_id: int) -> int:
        match = _BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or "")
        assert match is not None, token_id
        return int(match[1], 16)

    def num_unfinished_bytes(self, token_ids: Sequence[int]) -> int:
        """How many of the last tokens, none of which is hidden, are bytes that begin a character and do not end it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in token_ids[-_LONGEST_CHARACTER_BYTES:]:
            if self[token_id] is _Kind.BYTE:
                decoder.decode(bytes([self.byte(token_id)]))
            else:
                decoder.reset()
        unfinished, _ = decoder.getstate()
        return len(unfinished)

    def _find_neutral(self) -> list[int]:
        """One token that has text and is no byte, if there is any."""
        ids = range(self._backend.get_vocab_size(with_added_tokens=True))
        return list(islice((i for i in ids if self[i] is _Kind.TEXT and self.width(i)), 1))


class _WindowDetokenizer:
    """For every other decoder (SentencePiece with byte fallback, WordPiece): decodes new tokens after some before them.

    What stands before gives the decoder its place: only the first token of a text loses its leading space. Not
    `DecodeStream`: with byte fallback it failed on a quarter of 3,000 random sequences ("Invalid prefix encountered").
    A run of more than `_MAX_BYTE_RUN` byte tokens is judged in parts, where `decode` judges it as one; so is a run that
    begins in the prompt, whose whole characters have been read by now.
    """

    def __init__(self, pieces: _Pieces, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        # Decoded before what is held, and cut off by its number of characters.
        self._context: list[int] = []
        self._width = 0
        self._held: list[int] = []
        visible = (token_id for token_id in reversed(prompt_token_ids) if pieces[token_id] is not _Kind.HIDDEN)
        tail = list(islice(visible, _MAX_CONTEXT_TOKENS + _LONGEST_CHARACTER_BYTES))[::-1]
        num_unfinished = pieces.num_unfinished_bytes(tail)
        self._move(tail[: len(tail) - num_unfinished])
        self._held = tail[len(tail) - num_unfinished :]

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        self._held += [token_id for token_id in token_ids if pieces[token_id] is not _Kind.HIDDEN]
        return self.flush() if self._held and self._is_settled() else ""

    def flush(self) -> str:
        if not self._held:
            return ""
        told = self._context + self._held
        text = self._pieces.decode(told)[self._width :]
        self._held = []
        self._move(told)
        return text

    @property
    def num_kept(self) -> int:
        return len(self._context) + len(self._held)

    def _move(self, told: list[int]) -> None:
        """Take as context the shortest end of what was told that has text."""
        pieces = self._pieces
        if not told:
            return
        last = told[-1]
        if pieces[last] is _Kind.BYTE:
            # A byte would be judged together with the bytes that follow, so something else takes its place.
            self._context, self._width = pieces.neutral, sum(map(pieces.width, pieces.neutral))
            return
        self._context, self._width = [last], pieces.width(last)
        while not self._width and len(self._context) < min(len(told), _MAX_CONTEXT_TOKENS):
            self._context = told[-len(self._context) - 1 :]
            self._width = len(pieces.decode(self._context))

    def _is_settled(self) -> bool:
        if self._pieces[self._held[-1]] is not _Kind.BYTE:
            return True
        if len(self._held) < _MAX_BYTE_RUN:
            return False
        # Within the next bytes a good run completes a character; a bad one never does.
        is_bad = len(self._held) >= _MAX_BYTE_RUN + _LONGEST_CHARACTER_BYTES
        return is_bad or not self._pieces.decode(self._held).endswith("\N{REPLACEMENT CHARACTER}")


def _decoder_state(backend: Tokenizer) -> dict[str, object]:
    """The decoder's entry in tokenizer.json; empty without a decoder."""
    if backend.decoder is None:
        return {}
    state: dict[str, object] = json.loads(backend.decoder.__getstate__())
    return state


def _is_byte_level(backend: Tokenizer) -> bool:
    """Are tokens written in GPT-2's byte alphabet, and nothing else done to them?

    Raises:
        UnsupportedModelError: the byte alphabet is only one of several steps, so neither detokenizer would be right.
    """
    state = _decoder_state(backend)
    if state.get("type") == "ByteLevel":
        return True
    if "ByteLevel" in json.dumps(state):
        raise UnsupportedModelError(f"the tokenizer's decoder mixes ByteLevel with other steps: {json.dumps(state)}")
    return False


def _build_byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on.

    Source: bytes_to_unicode in github.com/openai/gpt-2, src/encoder.py.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _build_byte_alphabet()
