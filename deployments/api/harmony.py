"""The format of gpt-oss, harmony: an answer is messages with headers, which say a channel and whom each is for.

Owns its markers, and which models write it. `harmony_reader.py` reads answers, `harmony_grammar.py` has those that must
have a form. Source: the format's description, docs/format.md in github.com/openai/harmony.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END, MESSAGE, CHANNEL = "<|start|>", "<|end|>", "<|message|>", "<|channel|>"
CONSTRAIN, CALL, RETURN = "<|constrain|>", "<|call|>", "<|return|>"
MARKERS = (START, END, MESSAGE, CHANNEL, CONSTRAIN, CALL, RETURN)
# The channel of thoughts.
ANALYSIS = "analysis"


@dataclass(frozen=True, slots=True)
class HarmonyTokens:
    """The ids of the format's markers."""

    start: int
    end: int
    message: int
    channel: int
    constrain: int
    call: int
    return_: int

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(astuple(self))


def read_tokens(backend: Tokenizer) -> HarmonyTokens | None:
    """Those of a tokenizer; None: it lacks some."""
    ids = [token_id for marker in MARKERS if (token_id := backend.token_to_id(marker)) is not None]
    return HarmonyTokens(*ids) if len(ids) == len(MARKERS) else None


def is_harmony(template: str) -> bool:
    """Whether a chat template writes messages in this format, channels included."""
    return all(marker in template for marker in (START, CHANNEL, MESSAGE))


def encode_analysis(backend: Tokenizer) -> list[int]:
    """The channel of thoughts, as tokens."""
    return list(backend.encode(ANALYSIS, add_special_tokens=False).ids)


@dataclass(frozen=True, slots=True)
class HarmonyRules:
    """How the answers of one call are read.

    Attributes:
        tokens: the markers.
        analysis_ids: how the channel of thoughts is encoded.
        is_body: the prompt ends within a message, which goes on; else an answer begins with a header.
    """

    tokens: HarmonyTokens
    analysis_ids: tuple[int, ...]
    is_body: bool = False

    @property
    def marker_ids(self) -> frozenset[int]:
        """Tokens that must have a text for messages to be found."""
        return self.tokens.ids


def is_within_message(tokens: HarmonyTokens, prompt_token_ids: Sequence[int]) -> bool:
    """Whether a prompt ends in the body of a message."""
    markers = (token_id for token_id in reversed(prompt_token_ids) if token_id in tokens.ids)
    return next(markers, None) == tokens.message


class HarmonyCount:
    """How many of an answer's tokens are thoughts, their headers and ends included.

    Args:
        rules: of the call.

    Attributes:
        num_tokens: by now.
    """

    def __init__(self, rules: HarmonyRules) -> None:
        self._rules = rules
        self._channel: list[int] | None = None  # behind its marker; None: it is not being named
        self._num_of_message = 0
        self._is_thought = False
        self.num_tokens = 0

    def add(self, token_ids: Sequence[int], text: str) -> None:
        """More tokens have come."""
        tokens = self._rules.tokens
        for token_id in token_ids:
            self._num_of_message += 1
            if token_id == tokens.channel:
                self._channel = []
            elif token_id == tokens.message:
                self._is_thought = tuple(self._channel or ()) == self._rules.analysis_ids
                self._channel = None
                self.num_tokens += self._num_of_message if self._is_thought else 0
            elif self._channel is not None:
                self._channel.append(token_id)
            elif self._is_thought:
                self.num_tokens += 1
            if token_id == tokens.end:
                self._is_thought, self._num_of_message = False, 0
