"""From the token outputs of a call's prompts to text events: detokenizing, stop strings, several prompts at once.

Owns when a choice ends and that its request is then closed at the backend. Knows neither HTTP nor OpenAI's shapes;
`exchange.py` consumes the events.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import msgspec

from deployments.api.scores import PromptScores, ScoredToken, score
from deployments.api.stop import StopChecker
from deployments.api.text import TextCodec
from deployments.errors import EngineDeadError
from deployments.messages import FinishReason, GenerateRequest, TokenOutput

T = TypeVar("T")
TokenPool = Literal["prefill", "decode"]


class TokenOutputs(Protocol):
    """The tokens of one request as they come; an asynchronous generator is one."""

    def __aiter__(self) -> AsyncIterator[TokenOutput]: ...

    def __anext__(self) -> Awaitable[TokenOutput]: ...

    def aclose(self) -> Awaitable[None]:
        """End the request, if it has not ended."""
        ...


Generate = Callable[[GenerateRequest], TokenOutputs]


# A Struct, for one is made for every token: 0.09 instead of 0.87 us for a frozen dataclass (2026-11-25).
class TextEvent(msgspec.Struct, frozen=True, gc=False):
    """What one token output adds to one choice.

    Attributes:
        choice: index of the choice in the call.
        text: new text; empty while a character or a stop string is incomplete.
        token_ids: generated for it, at least 1 where any are shown; those after a stop string do not count.
        finish_reason: set on the last event of a choice.
        num_cached_tokens: see `TokenOutput`.
        by_prefill: see `TokenOutput`.
        scores: of the generated tokens, where logprobs were asked for.
        prompt: in the first event, where logprobs of the prompt were asked for.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_cached_tokens: int
    by_prefill: bool = False
    scores: tuple[ScoredToken, ...] = ()
    prompt: PromptScores | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def pool(self) -> TokenPool:
        """Which one drew the tokens."""
        return "prefill" if self.by_prefill else "decode"


@dataclass(frozen=True, slots=True)
class TextRules:
    """How the tokens of a call's choices become text.

    Attributes:
        continues_prompt: the text is read behind that of the prompt, as a completion is; else it stands alone, as a
            message does.
        stops: strings that end a choice, and are not part of its text.
        include_stop: what ended a choice, string or token, is part of its text.
        skip_special_tokens: special tokens are not shown. A stop string that names one finds it all the same.
        min_tokens: no stop string is looked for in the text of so many tokens.
        shown_specials: special tokens that are shown all the same.
        shows_output: what is generated is part of the answer; else the answer is about the prompt alone.
    """

    continues_prompt: bool
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    shown_specials: frozenset[int] = frozenset()
    shows_output: bool = True


class ChoiceText:
    """The text of one choice, as far as its tokens have come.

    Args:
        choice: index of the choice in the call.
        codec: of the model.
        prompt_token_ids: what the tokens follow.
        rules: of the call.
        prefix: what its text begins with.
        scores_prompt: the prompt's logprobs come with the first output.
    """

    def __init__(
        self,
        choice: int,
        codec: TextCodec,
        prompt_token_ids: Sequence[int],
        rules: TextRules,
        prefix: str = "",
        scores_prompt: bool = False,
    ) -> None:
        self._choice = choice
        self._prefix = prefix
        self._shows_output = rules.shows_output
        self._scores_prompt = scores_prompt
        self._prompt_token_ids = prompt_token_ids
        self._text_of = codec.detokenizers.text_of
        self._include_stop = rules.include_stop
        self._detokenizer = codec.detokenizers.build(
            prompt_token_ids if rules.continues_prompt else (),
            skip_special_tokens=rules.skip_special_tokens,
            shown=rules.shown_specials,
        )
        # Special tokens that are not shown and yet looked for.
        self._hidden = codec.detokenizers.special_texts(rules.stops) if rules.skip_special_tokens else {}
        self._checker = (
            StopChecker(rules.stops, self._hidden.values(), include_stop=rules.include_stop) if rules.stops else None
        )
        self._num_tokens = 0
        self._num_unchecked = rules.min_tokens

    def push(self, output: TokenOutput) -> TextEvent:
        """Take the next output; after an event with a finish reason there is no other."""
        assert output.index == self._num_tokens, (output, self._num_tokens)
        self._num_tokens += len(output.token_ids)
        if not self._shows_output:
            return self._event(output, "", (), FinishReason.LENGTH)
        # The id that ended the sequence is a signal, not text, even where it is no special token.
        is_cut = output.finish_reason is FinishReason.STOP and not self._include_stop
        visible = output.token_ids[:-1] if is_cut else output.token_ids
        if self._checker is not None:
            return self._push_checked(output, visible, self._checker)
        text = self._detokenizer.push(visible)
        if output.finish_reason is not None:
            text += self._detokenizer.flush()
        return self._event(output, text, output.token_ids, output.finish_reason)

    def _push_checked(self, output: TokenOutput, visible: Sequence[int], checker: StopChecker) -> TextEvent:
        """Token by token, because the tokens after a stop string do not count."""
        num_unchecked = min(self._num_unchecked, len(visible))
        self._num_unchecked -= num_unchecked
        text = self._detokenizer.push(visible[:num_unchecked])
        for num_tokens, token_id in enumerate(output.token_ids[num_unchecked:], start=num_unchecked + 1):
            piece, is_hit = checker.push(self._detokenizer.push((token_id,)) if num_tokens <= len(visible) else "")
            text += piece
            if not is_hit and token_id in self._hidden:
                piece, is_hit = self._push_hidden(self._hidden[token_id], checker)
                text += piece
            if is_hit:
                return self._event(output, text, output.token_ids[:num_tokens], FinishReason.STOP)
        finish_reason = output.finish_reason
        if finish_reason is not None:
            piece, is_hit = self._flush_checked(checker)
            text += piece
            finish_reason = FinishReason.STOP if is_hit else finish_reason
        return self._event(output, text, output.token_ids, finish_reason)

    def _flush_checked(self, checker: StopChecker) -> tuple[str, bool]:
        """What was held back, up to a stop string, and whether there was one."""
        piece, is_hit = checker.push(self._detokenizer.flush())
        return (piece if is_hit else piece + checker.flush()), is_hit

    def _push_hidden(self, special: str, checker: StopChecker) -> tuple[str, bool]:
        """Take a special token that a stop string names; what stands before it must be known by then."""
        before, is_hit = checker.push(self._detokenizer.flush())
        if is_hit:
            return before, True
        text, is_hit = checker.push_hidden(special)
        return before + text, is_hit

    def _event(
        self, output: TokenOutput, text: str, token_ids: tuple[int, ...], finish_reason: FinishReason | None
    ) -> TextEvent:
        if self._prefix:
            text, self._prefix = self._prefix + text, ""
        event = TextEvent(self._choice, text, token_ids, finish_reason, output.num_cached_tokens, output.by_prefill)
        if not output.draws and not (self._scores_prompt and output.index == 0):
            return event
        scores = tuple([score(draw, self._text_of) for draw in output.draws[: len(token_ids)]])
        prompt = None
        if self._scores_prompt and output.index == 0:
            prompt = PromptScores(self._prompt_token_ids[0], output.prompt, self._text_of)
        return msgspec.structs.replace(event, scores=scores, prompt=prompt)


async def stream_choice(
    generate: Generate, request: GenerateRequest, text: ChoiceText
) -> AsyncGenerator[TextEvent, None]:
    """Run one request; its backend generator is closed before the last event goes out, and whenever this one closes.

    Raises:
        EngineDeadError: the backend ended the stream without a finish reason.
        KvRelayError: whatever the backend raises.
    """
    async with aclosing(generate(request)) as outputs:
        async for output in outputs:
            event = text.push(output)
            if event.finish_reason is not None:
                break
            yield event
        else:
            raise EngineDeadError(f"the tokens of {request.request_id} ended without a finish reason")
    yield event


async def lead(stream: AsyncGenerator[TextEvent, None], is_ahead: asyncio.Event) -> AsyncGenerator[TextEvent, None]:
    """Say when others with the same prompt find its KV: behind the second token, or the end.

    The first token may come from the engine that computed the prompt, before the one that decodes has its KV.
    """
    num_tokens = 0
    try:
        async with aclosing(stream):
            async for event in stream:
                num_tokens += event.num_tokens
                if num_tokens > 1:
                    is_ahead.set()
                yield event
    finally:
        is_ahead.set()


async def follow(stream: AsyncGenerator[TextEvent, None], is_ahead: asyncio.Event) -> AsyncGenerator[TextEvent, None]:
    """Begin once the first sample of the same prompt is ahead."""
    async with aclosing(stream):
        await is_ahead.wait()
        async for event in stream:
            yield event


def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Run all streams at once and yield their items as they come; the first error ends all of them.

    Every stream is closed when what comes back is.
    """
    # The usual call has one choice: no task and no queue between the backend and the client.
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    ready: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, ready)) for stream in streams]
    for task in tasks:
        task.add_done_callback(ready.put_nowait)
    try:
        num_running = len(tasks)
        while num_running:
            entry = await ready.get()
            if isinstance(entry, asyncio.Task):
                entry.result()
                num_running -= 1
            else:
                yield entry
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T, None], ready: "asyncio.Queue[T | asyncio.Task[None]]") -> None:
    async with aclosing(stream):
        async for item in stream:
            ready.put_nowait(item)
