"""Between text and token ids: the tokenizer, its chat template, and detokenizing as tokens arrive.

Knows transformers and tokenizers, and imports neither before a tokenizer is loaded. Knows nothing of requests;
`calls.py` encodes with it, `choices.py` decodes. A `TextCodec` may be used from several threads at once.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from deployments.errors import InvalidRequestError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# ByteFallback judges a run of byte tokens as a whole, so a run is held until it ends; but no longer than this, or text
# in a script that the vocabulary lacks would arrive in one piece at its end.
_MAX_BYTE_RUN = 64
_LONGEST_CHARACTER_BYTES = 4
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text as they arrive.

    All pieces joined, `flush` included, are what the tokenizer's `decode(ids, skip_special_tokens=True)` gives without
    its clean-up of spaces. The work is linear in the number of tokens.
    """

    def push(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; return the text that is certain by now, perhaps none."""
        ...

    def flush(self) -> str:
        """Return what was held back; the sequence has ended."""
        ...


class TextCodec:
    """A model's tokenizer and chat template.

    Raises:
        UnsupportedModelError: the tokenizer is not of the kind that can be detokenized piece by piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedModelError(f"{type(tokenizer).__name__} is not backed by the tokenizers library")
        self._tokenizer = tokenizer
        self._backend: Tokenizer = backend
        # A saved truncation or padding would silently change prompts.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._vocabulary = _Vocabulary(self._backend)
        self._token_bytes = _TokenBytes(self._vocabulary)
        self._is_byte_level = _is_byte_level(self._backend)

    @classmethod
    def load(cls, path: str) -> TextCodec:
        """Load the tokenizer in the folder `path`; takes seconds."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(path, trust_remote_code=False))

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with the special tokens that the tokenizer adds by itself."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant speaks.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses these messages.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", "messages")
        try:
            text: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError) as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        # The template has written the special tokens already.
        return self._encode(text, add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # As a batch of one: only that lets other threads run. `encode` stopped every stream for 300 ms with a prompt of
        # 108,000 tokens, this for 9 ms (tokenizers 0.23, 2 cores of a shared CPU, 2026-11-24).
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def detokenizer(self) -> Detokenizer:
        """Build a detokenizer for one sequence."""
        if self._is_byte_level:
            return _ByteLevelDetokenizer(self._token_bytes)
        return _WindowDetokenizer(self._backend, self._vocabulary)


class _Vocabulary:
    """What the tokens are, as far as detokenizing must know."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._has_byte_tokens = "ByteFallback" in json.dumps(_decoder_state(backend))

    def visible(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None for special tokens and ids beyond the vocabulary."""
        return None if token_id in self._special_ids else self._backend.id_to_token(token_id)

    def is_byte(self, token_id: int) -> bool:
        """Does the token stand for one byte of a character (`<0xE2>`)?"""
        return self._has_byte_tokens and bool(_BYTE_TOKEN.fullmatch(self._backend.id_to_token(token_id) or ""))


class _TokenBytes(dict[int, bytes]):
    """UTF-8 bytes of each token of a byte-level vocabulary, computed when first asked for."""

    def __init__(self, vocabulary: _Vocabulary) -> None:
        super().__init__()
        self._vocabulary = vocabulary

    def __missing__(self, token_id: int) -> bytes:
        token = self._vocabulary.visible(token_id) or ""
        try:
            value = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token, written in plain text
            value = token.encode()
        self[token_id] = value
        return value


class _ByteLevelDetokenizer:
    """For byte-level BPE (GPT-2, Llama 3, Qwen): joins the tokens' bytes and emits whole characters.

    tokenizers' own `DecodeStream` is as fast on good text, but re-reads everything since the last whole character
    (4,000 continuation bytes took 1.8 s; tokenizers 0.23.3, one core of a shared CPU), and it has no flush.
    """

    def __init__(self, token_bytes: _TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join([self._token_bytes[token_id] for token_id in token_ids]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowDetokenizer:
    """For every other decoder (SentencePiece with byte fallback, WordPiece): decodes new tokens after the last one.

    The token before gives the decoder its place: only the first token of a text loses its leading space. Not
    `DecodeStream`: with byte fallback it failed on a quarter of 3,000 random sequences ("Invalid prefix encountered").
    A run of more than `_MAX_BYTE_RUN` byte tokens is judged in parts of that size, where `decode` judges it as one.
    """

    def __init__(self, backend: Tokenizer, vocabulary: _Vocabulary) -> None:
        self._backend = backend
        self._vocabulary = vocabulary
        self._last: list[int] = []
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        self._held += [token_id for token_id in token_ids if self._vocabulary.visible(token_id) is not None]
        return self._emit() if self._held and self._is_settled() else ""

    def flush(self) -> str:
        return self._emit() if self._held else ""

    def _is_settled(self) -> bool:
        if not self._vocabulary.is_byte(self._held[-1]):
            return True
        if len(self._held) < _MAX_BYTE_RUN:
            return False
        # Within the next bytes a good run completes a character; a bad one never does.
        is_bad = len(self._held) >= _MAX_BYTE_RUN + _LONGEST_CHARACTER_BYTES
        return is_bad or not self._decode(self._held).endswith("\N{REPLACEMENT CHARACTER}")

    def _emit(self) -> str:
        is_byte = self._vocabulary.is_byte
        # Bytes after bytes: a long run goes on, and must not be judged together with what was emitted of it.
        goes_on = bool(self._last) and is_byte(self._last[0]) and is_byte(self._held[0])
        context = [] if goes_on else self._last
        text = self._decode(context + self._held)[len(self._decode(context)) :]
        self._last, self._held = self._held[-1:], []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=True)


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
