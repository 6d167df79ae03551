"""Grammars of answers: compiled for a vocabulary, they say after each token which ones may be next.

The ingress compiles each to tell what is wrong with it, the engines compile it to go by it. Both do it with the same
bounds, which llguidance counts in work and not in seconds: what one takes the other takes, however busy it is. Nothing
here but reading a vocabulary blocks other threads, for llguidance lets go of the interpreter's lock. Knows no torch;
loads llguidance when it is asked for.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from deployments.errors import InvalidRequestError
from deployments.messages import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# One of 2,200 optional properties, which nearly fills it, takes 1.0 s to compile and for its first mask (2 busy cores
# of a shared Xeon, 2026-11-28). Whether another takes longer is not known.
MAX_SOURCE_CHARACTERS = 2**16
# llguidance's own bounds of work, tightened where a grammar of `MAX_SOURCE_CHARACTERS` has no use for more.
_MAX_GRAMMAR_SIZE, _MAX_LEXER_STATES = 250_000, 100_000
_MAX_CACHED = 64
_MAX_REASON_CHARACTERS = 500
# Of a step's time, to look at what may follow guesses: those of eight tokens take 0.09 ms (a shared Xeon, 2026-11-29).
_MAX_AHEAD_S = 0.002


class Guide:
    """What may follow the tokens of one answer. Used by one thread at a time.

    Copies of a matcher share what llguidance finds out of their grammar. That saves work, but counts for the bounds of
    all: what others wrote can use them up. So a guide that fails begins again with a matcher of its own, and only what
    that says is about the answer.

    Args:
        matcher: at the beginning of the answer; others share what it knows.
        build_own: one that nobody shares.
        num_mask_bytes: of its masks.
    """

    def __init__(self, matcher: "LLMatcher", build_own: Callable[[], "LLMatcher"], num_mask_bytes: int) -> None:
        self._matcher = matcher
        self._build_own: Callable[[], LLMatcher] | None = build_own
        self._num_mask_bytes = num_mask_bytes
        self._token_ids: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Of the answer so far."""
        return len(self._token_ids)

    def take(self, token_ids: list[int]) -> None:
        """The answer goes on with these; they are allowed, and none of them ends it."""
        self._matcher.consume_tokens(token_ids)
        self._token_ids += token_ids

    def mask(self) -> bytes:
        """Which tokens may be next: one bit each, the lowest first, in whole words of 32 bits.

        Raises:
            GrammarError: none may, or the grammar has grown out of its bounds.
        """
        try:
            return self._mask()
        except GrammarError:
            if self._build_own is None:
                raise
        self._matcher, self._build_own = self._build_own(), None
        self._matcher.consume_tokens(self._token_ids)
        return self._mask()

    def masks_behind(self, token_ids: Sequence[int]) -> list[bytes]:
        """What might follow each of these tokens, were they next; the guide stays where it is.

        Up to the first that may not come, or behind which nothing may; and no further than can be told at once. What is
        looked at counts for the bounds as well, so a guide with a matcher of its own looks at nothing.
        """
        masks: list[bytes] = []
        if self._build_own is None:
            return masks
        matcher = self._matcher.deep_copy()
        until_s = time.monotonic() + _MAX_AHEAD_S
        for token_id in token_ids[: matcher.validate_tokens(list(token_ids))]:
            matcher.consume_tokens([token_id])
            if matcher.is_stopped() and not matcher.is_accepting():
                break  # it was the end itself
            mask: bytes = matcher.compute_bitmask()[: self._num_mask_bytes]
            if matcher.is_error() or not any(mask):
                break
            masks.append(mask)
            if time.monotonic() > until_s:
                break
        return masks

    def _mask(self) -> bytes:
        mask: bytes = self._matcher.compute_bitmask()[: self._num_mask_bytes]
        if self._matcher.is_error():
            raise GrammarError(_brief(self._matcher.get_error()))
        if not any(mask):
            raise GrammarError("no token may follow")
        return mask


class GrammarError(Exception):
    """A grammar cannot be compiled, or cannot go on, wherever that is tried; the message says why."""


class VocabularyError(Exception):
    """The tokens of a model cannot be read here, and so no grammar be followed; the message says why."""


class Vocabulary:
    """The tokens of a model, as grammars see them; from any thread.

    Args:
        tokenizer_json: what `tokenizer.json` holds.
        vocab_size: of the model.
        end_token_ids: of the grammars.

    Raises:
        VocabularyError: the tokenizer is of a kind that llguidance does not know.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, end_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = _build_tokenizer(tokenizer_json, vocab_size, end_token_ids)
        self._num_mask_bytes = -(-vocab_size // 32) * 4
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> Guide:
        """A guide for one answer, at its beginning.

        Raises:
            GrammarError: says what is wrong with the grammar.
        """
        with self._lock:
            matcher = self._compiled.get(grammar.source)
        if matcher is None:
            matcher = self._compile(grammar.source)
            with self._lock:
                self._compiled[grammar.source] = matcher
                if len(self._compiled) > _MAX_CACHED:
                    self._compiled.popitem(last=False)
        return Guide(matcher.deep_copy(), partial(self._compile_anew, grammar.source, matcher), self._num_mask_bytes)

    def _compile_anew(self, source: str, used_up: "LLMatcher") -> "LLMatcher":
        with self._lock:
            if self._compiled.get(source) is used_up:
                del self._compiled[source]
        return self._compile(source)

    def _compile(self, source: str) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        if len(source) > MAX_SOURCE_CHARACTERS:
            raise GrammarError(f"it has {len(source)} characters, at most {MAX_SOURCE_CHARACTERS} may be")
        limits = LLParserLimits(
            max_grammar_size=_MAX_GRAMMAR_SIZE, max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
        )
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_brief(matcher.get_error()))
        return matcher


class Vocabularies:
    """Of one model: one for each set of end tokens, made when a grammar first has them. Used in one thread.

    Args:
        make: from end tokens, a vocabulary.
    """

    def __init__(self, make: Callable[[tuple[int, ...]], Vocabulary]) -> None:
        self._make = make
        self._made: dict[tuple[int, ...], Vocabulary] = {}

    def compile(self, grammar: Grammar) -> Guide:
        """As `Vocabulary.compile`.

        Raises:
            GrammarError: says what is wrong with the grammar.
            VocabularyError: as whatever makes vocabularies.
        """
        return self.of(grammar.end_token_ids).compile(grammar)

    def of(self, end_token_ids: tuple[int, ...]) -> Vocabulary:
        """That with these end tokens.

        Raises:
            VocabularyError: as whatever makes vocabularies.
        """
        vocabulary = self._made.get(end_token_ids)
        if vocabulary is None:
            vocabulary = self._made[end_token_ids] = self._make(end_token_ids)
        return vocabulary


@lru_cache(maxsize=8)
def read_vocabulary(folder: str, vocab_size: int, end_token_ids: tuple[int, ...]) -> Vocabulary:
    """Of the model in a folder; once in a process.

    That stops all threads of the process: 0.4 s for 49,152 tokens, 3.4 s for the 201,088 of gpt-oss, which take 0.43 GB
    (a shared Xeon, 2026-11-28). So engines do it before they have anything else to do.

    Raises:
        VocabularyError: it has no `tokenizer.json`, or one of a kind that llguidance does not know.
    """
    try:
        tokenizer_json = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    except OSError as error:
        raise VocabularyError(f"the model's folder has no tokenizer.json: {error}") from None
    return Vocabulary(tokenizer_json, vocab_size, end_token_ids)


class _PlainTokenizer:
    """How llguidance sees the tokens, and encodes text that a grammar forces: as text, control tokens in it too.

    llguidance's own way turns text like `<|im_end|>` in a schema into the control token, which then nothing may follow.
    """

    bos_token_id = None

    def __init__(self, tokenizer: "LLTokenizer", vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token
        self.tokens = [tokenizer.decode_bytes([token_id]) for token_id in range(vocab_size)]
        self.special_token_ids = [n for n in range(vocab_size) if tokenizer.is_special_token(n)]
        self._special = [self.tokens[token_id] for token_id in self.special_token_ids if self.tokens[token_id]]

    def __call__(self, text: bytes) -> list[int]:
        if any(special in text for special in self._special):
            return self._tokenizer.greedy_tokenize(text.decode("utf-8", "replace"))
        return self._tokenizer.tokenize_bytes(text)


def _build_tokenizer(tokenizer_json: str, vocab_size: int, end_token_ids: tuple[int, ...]) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    ends = list(end_token_ids)
    try:
        own = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends)
        return LLTokenizer(TokenizerWrapper(_PlainTokenizer(own, vocab_size)), n_vocab=vocab_size, eos_token=ends)
    except ValueError as error:
        raise VocabularyError(f"llguidance does not know such a tokenizer: {error}") from None


def _brief(message: str) -> str:
    """What llguidance says, without the state that it may add."""
    lines = message.partition("<state>")[0].strip().splitlines()
    return " ".join(line.strip() for line in lines if line.strip())[:_MAX_REASON_CHARACTERS]


def explain(grammar: Grammar, error: GrammarError | VocabularyError) -> InvalidRequestError:
    """The same for whoever asked for the grammar."""
    return InvalidRequestError(f"{grammar.field} cannot be followed: {error}", grammar.field)
