"""Reads a model's tokenizer from its folder. The one place that needs transformers, which imports torch if it can.

What it reads is plain and can be pickled, so that it may be read in another process: `TextCodec` is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from deployments.api.chat_template import read_legacy_template
from deployments.errors import UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class AnyTokenizer(Protocol):
    """What `TextCodec` needs of a tokenizer; transformers' own have it, too."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...

    @property
    def chat_template(self) -> object: ...

    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...

    @property
    def eos_token(self) -> object: ...


@dataclass(frozen=True, slots=True)
class ReadTokenizer:
    """What was read of a tokenizer.

    Attributes:
        backend_tokenizer: does the work.
        chat_template: one, or several by name, or none.
        special_tokens_map: what templates may name.
        eos_token: what ends a text; None: nothing is named.
    """

    backend_tokenizer: Tokenizer
    chat_template: object
    special_tokens_map: Mapping[str, object]
    eos_token: str | None


def read_tokenizer(path: str) -> ReadTokenizer:
    """Read the tokenizer in the folder, or of the hub id, `path`; takes seconds.

    Raises:
        UnsupportedModelError: the tokenizer is not of the kind that can be detokenized piece by piece.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    end = tokenizer.eos_token
    return ReadTokenizer(
        backend_tokenizer=_backend_of(tokenizer),
        chat_template=tokenizer.chat_template or read_legacy_template(path),
        special_tokens_map=tokenizer.special_tokens_map,
        eos_token=None if end is None else str(end),
    )


def _backend_of(tokenizer: Any) -> Tokenizer:
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(f"{type(tokenizer).__name__} is not backed by the tokenizers library")
    return backend
