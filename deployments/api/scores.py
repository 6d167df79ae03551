"""Tokens and how likely they were, in OpenAI's shapes of logprobs and in vLLM's of a prompt's.

`choices.py` makes `ScoredToken`s of what engines tell; `answers.py` puts the shapes into answers.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

# Before Python 3.12 pydantic describes these alone.
from typing_extensions import TypedDict

from deployments.messages import MAX_LOGPROBS, DrawnToken, Draws

# JSON has no infinity; vLLM and OpenAI write the same.
_LEAST_LOGPROB = -9999.0


class ScoredToken(msgspec.Struct, frozen=True, gc=False):
    """A token that was generated, or one of a prompt, and how likely it was there; see `DrawnToken`.

    Attributes:
        token_id: the token.
        text: UTF-8 of it alone; perhaps no whole character.
        logprob: None for the first token of a prompt, which follows nothing.
        rank: among all tokens, from 1; 0 without a logprob.
        top: the likeliest tokens, likeliest first.
    """

    token_id: int
    text: bytes
    logprob: float | None = None
    rank: int = 0
    top: tuple["ScoredToken", ...] = ()


def score(draw: DrawnToken, text_of: Callable[[int], bytes], num_top: int = MAX_LOGPROBS) -> ScoredToken:
    """What an engine tells of a token, with its text and that of those beside it."""
    top = tuple(
        ScoredToken(token_id, text_of(token_id), max(logprob, _LEAST_LOGPROB), rank)
        for rank, (token_id, logprob) in enumerate(draw.top[:num_top], 1)
    )
    own = None if draw.logprob is None else max(draw.logprob, _LEAST_LOGPROB)
    return ScoredToken(draw.token_id, text_of(draw.token_id), own, draw.rank, top)


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What an engine tells of a prompt; long ones take a while to read, so a thread does.

    Attributes:
        first: its first token.
        draws: those behind it.
        text_of: UTF-8 of a token alone.
    """

    first: int
    draws: Draws
    text_of: Callable[[int], bytes]

    def read(self, num_top: int) -> list[ScoredToken]:
        """All of its tokens, with so many of the likeliest beside each."""
        first = ScoredToken(self.first, self.text_of(self.first))
        return [first, *[score(draw, self.text_of, num_top) for draw in self.draws]]


class TopLogprob(TypedDict):
    """One of the likeliest tokens of a place, in a chat."""

    token: str
    logprob: float | None
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """One of `logprobs.content`."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """`choices[].logprobs` of a chat."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """`choices[].logprobs` of a completion: lists with one entry per token."""

    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None


class PromptLogprob(TypedDict):
    """One token of one place in `prompt_logprobs`."""

    logprob: float | None
    rank: int
    decoded_token: str


PromptLogprobs = Sequence[dict[str, PromptLogprob] | None]


def shape_chat(scores: Sequence[ScoredToken]) -> ChatLogprobs:
    """As chats have them."""
    content: list[TokenLogprob] = [
        {**_shape_top(token), "top_logprobs": [_shape_top(top) for top in token.top]} for token in scores
    ]
    return {"content": content, "refusal": None}


def shape_prompt(prompt: PromptScores | None, num_top: int) -> PromptLogprobs:
    """As vLLM has those of a prompt: by token id, the likeliest and the prompt's own; nothing for the first token."""
    return [
        None if own.logprob is None else {str(token.token_id): _shape_placed(token) for token in (own, *own.top)}
        for own in (() if prompt is None else prompt.read(num_top))
    ]


class CompletionScores:
    """Shapes of one choice of a completion, from its tokens in order.

    Args:
        num_top: how many of the likeliest tokens were asked for.
    """

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def shape(self, scores: Sequence[ScoredToken]) -> CompletionLogprobs:
        """The next tokens; offsets go on where those before ended, as if every token were shown."""
        offsets = []
        for token in scores:
            offsets.append(self._num_characters)
            self._num_characters += len(self._decoder.decode(token.text))
        return {
            "text_offset": offsets,
            "tokens": [_name(token) for token in scores],
            "token_logprobs": [token.logprob for token in scores],
            "top_logprobs": [_shape_tops(token) for token in scores] if self._num_top else None,
        }


def _shape_top(token: ScoredToken) -> TopLogprob:
    return {"token": token.text.decode(errors="replace"), "logprob": token.logprob, "bytes": list(token.text)}


def _shape_tops(own: ScoredToken) -> dict[str, float | None] | None:
    """By text, with the token itself; of two with one text the likelier counts."""
    if own.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for token in (*own.top, own):
        found.setdefault(_name(token), token.logprob)
    return found


def _shape_placed(token: ScoredToken) -> PromptLogprob:
    return {"logprob": token.logprob, "rank": token.rank, "decoded_token": token.text.decode(errors="replace")}


def _name(token: ScoredToken) -> str:
    """Its text; bytes that are no whole character are spelled out, as OpenAI does, so that no two are the same."""
    try:
        return token.text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.text)
