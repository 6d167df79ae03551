"""OpenAI's responses: whole ones and the chunks of a stream, as plain values ready for JSON.

One class per endpoint, with the same methods. Knows what the shapes are, not how they travel; `exchange.py` calls it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from deployments.api.call import Call
from deployments.api.choices import TextEvent
from deployments.api.failures import ErrorBody, Failure
from deployments.api.forms import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatFinishReason,
    ChatMessage,
    Completion,
    CompletionChoice,
    Delta,
    Usage,
)
from deployments.api.reasoning.count import build_count
from deployments.api.receipts import ReceiptKeeper
from deployments.api.responses.forms import Response
from deployments.api.scores import (
    CompletionLogprobs,
    CompletionScores,
    PromptScores,
    ScoredToken,
    shape_chat,
    shape_prompt,
)
from deployments.api.tools.shapes import MessageShaper
from deployments.messages import FinishReason


class Tally:
    """What a call has used so far, over all its samples; a prompt that is sampled several times counts once.

    Args:
        call: of which events come.
        receipts: what became of it; None: nobody wants to know.

    Attributes:
        finish_reasons: of the samples that are over.
    """

    def __init__(self, call: Call, receipts: ReceiptKeeper | None = None) -> None:
        self._call = call
        self._receipts = receipts
        self._num_prompt_tokens = call.num_prompt_tokens
        self._num_generated_tokens = 0
        self._num_cached_tokens: dict[int, int] = {}
        self.finish_reasons: list[str] = []
        thoughts = call.thoughts
        self._thoughts = [] if thoughts is None else [build_count(thoughts) for _ in call.requests]

    def add(self, event: TextEvent) -> None:
        self._num_generated_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self.finish_reasons.append(event.finish_reason.value)
        if self._thoughts:
            self._thoughts[event.choice].add(event.token_ids, event.text)
        # What one engine found another may have had to compute, after a death: the least is true.
        known = self._num_cached_tokens.get(event.choice)
        # What another than the first of the same prompt found is what that one has left.
        if (known is None or event.num_cached_tokens < known) and self._call.lead_of(event.choice) == event.choice:
            self._num_cached_tokens[event.choice] = event.num_cached_tokens

    def usage(self, num_untold: int = 0) -> Usage:
        """All that was added, less `num_untold` generated tokens that are to come in a later chunk."""
        num_generated = self._num_generated_tokens - num_untold
        usage: Usage = {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }
        if self._thoughts:
            num_thought = sum(thought.num_tokens for thought in self._thoughts)
            usage["completion_tokens_details"] = {"reasoning_tokens": num_thought}
        return usage

    def add_receipt(self, answer: Completion | ChatCompletion | ChatChunk | Response) -> None:
        """Put what became of the call into an answer, or its last chunk, where that is wanted."""
        if self._receipts is not None:
            answer["receipt"] = self._receipts.shape()


class Answer(Protocol):
    """How one call is answered, in one of OpenAI's shapes. Logprobs of a long prompt take it a while."""

    def chunks(self, event: TextEvent) -> Sequence[Mapping[str, object]]:
        """The chunks of a stream that this event makes; none while it has nothing to show."""
        ...

    def is_plain(self, event: TextEvent) -> bool:
        """Whether it makes one chunk, which differs from other plain ones of the same choice in the text alone."""
        ...

    def ending(self) -> Sequence[Mapping[str, object]]:
        """What a stream ends with, behind the chunks of all events."""
        ...

    def failing(self, failure: Failure) -> Sequence[Mapping[str, object]]:
        """What a stream ends with that fails."""
        ...

    def whole(self, choices: Sequence["ChoiceResult"]) -> Mapping[str, object]:
        """The response in one piece."""
        ...


@dataclass(slots=True)
class ChoiceResult:
    """A whole choice, put together from its events; they are kept where they have logprobs."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    scores: list[ScoredToken] = field(default_factory=list)
    prompt: PromptScores | None = None
    events: list[TextEvent] = field(default_factory=list)

    def add(self, event: TextEvent) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        self.finish_reason = event.finish_reason
        if event.scores:
            self.scores += event.scores
            self.events.append(event)
        self.prompt = self.prompt or event.prompt

    @property
    def mean_logprob(self) -> float:
        return sum(token.logprob or 0.0 for token in self.scores) / max(1, len(self.scores))


def choose_best(call: Call, samples: Sequence[ChoiceResult]) -> list[ChoiceResult]:
    """Of each prompt's samples those of the greatest mean logprob, as many as are asked for; all with the prompt's."""
    chosen: list[ChoiceResult] = []
    for lead in range(0, len(samples), call.num_samples):
        group = samples[lead : lead + call.num_samples]
        if call.num_choices < call.num_samples:
            group = sorted(group, key=lambda sample: sample.mean_logprob, reverse=True)[: call.num_choices]
        chosen += [replace(sample, prompt=samples[lead].prompt) for sample in group]
    return chosen


class _StreamedAnswer:
    """What completions and chats have in common: a choice is open once a chunk of it was made."""

    def __init__(self, call: Call, tally: Tally) -> None:
        self._call = call
        self._tally = tally
        self._tells_text_alone = call.tells_text_alone
        self._open: set[int] = set()

    def is_plain(self, event: TextEvent) -> bool:
        return (
            self._tells_text_alone and event.finish_reason is None and event.choice in self._open and event.text != ""
        )


class CompletionAnswer(_StreamedAnswer):
    """Shapes of `/v1/completions`. The last text of a choice and its finish reason share a chunk."""

    def __init__(self, call: Call, tally: Tally) -> None:
        super().__init__(call, tally)
        self._prompts: dict[int, PromptScores] = {}
        self._shapes: dict[int, CompletionScores] = {}

    def chunks(self, event: TextEvent) -> list[Completion]:
        call, is_first = self._call, event.choice not in self._open
        if event.prompt is not None:
            self._prompts[event.choice] = event.prompt
        prompt = self._prompts.get(call.lead_of(event.choice)) if is_first else None
        shows_more = call.return_token_ids or call.num_logprobs is not None
        if not event.text and event.finish_reason is None and not shows_more:
            return []
        self._open.add(event.choice)
        choice = self._choice(event.choice, event, prompt)
        if not is_first:
            choice.pop("prompt_token_ids", None)
        if call.wants_receipt:
            choice["pool"] = event.pool
        chunk = self._build([choice])
        if call.include_usage or call.continuous_usage:
            chunk["usage"] = self._tally.usage() if call.continuous_usage else None
        return [chunk]

    def ending(self) -> list[Completion]:
        if not self._call.tells_total:
            return []
        chunk = self._build([]) | {"usage": self._tally.usage()}
        self._tally.add_receipt(chunk)
        return [chunk]

    def failing(self, failure: Failure) -> list[ErrorBody]:
        return [failure.body()]

    def whole(self, choices: Sequence[ChoiceResult]) -> Completion:
        built = [self._choice(i, choice, choice.prompt) for i, choice in enumerate(choose_best(self._call, choices))]
        answer = self._build(built) | {"usage": self._tally.usage()}
        self._tally.add_receipt(answer)
        return answer

    def _choice(self, index: int, result: ChoiceResult | TextEvent, prompt: PromptScores | None) -> CompletionChoice:
        call = self._call
        choice: CompletionChoice = {
            "index": index,
            "text": result.text,
            "logprobs": None if call.num_logprobs is None else self._logprobs(index, result, prompt, call.num_logprobs),
            "finish_reason": result.finish_reason,
        }
        if call.return_token_ids:
            choice["token_ids"] = result.token_ids
            # All samples of a prompt have the same.
            choice["prompt_token_ids"] = call.requests[index // call.num_choices * call.num_samples].prompt_token_ids
        if call.num_prompt_logprobs is not None:
            choice["prompt_logprobs"] = shape_prompt(prompt, call.num_prompt_logprobs)
        return choice

    def _logprobs(
        self, index: int, result: ChoiceResult | TextEvent, prompt: PromptScores | None, num_likeliest: int
    ) -> CompletionLogprobs:
        shape = self._shapes.setdefault(index, CompletionScores(num_likeliest))
        echoed = [] if prompt is None or not self._call.echo else prompt.read(num_likeliest)
        return shape.shape([*echoed, *result.scores])

    def _build(self, choices: list[CompletionChoice]) -> Completion:
        completion: Completion = {
            "id": self._call.call_id,
            "object": "text_completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }
        if self._call.service_tier is not None:
            completion["service_tier"] = self._call.service_tier
        return completion


class ChatAnswer(_StreamedAnswer):
    """Shapes of `/v1/chat/completions`: each choice of a stream opens with the role and ends with an empty delta."""

    def __init__(self, call: Call, tally: Tally) -> None:
        super().__init__(call, tally)
        self._messages: dict[int, MessageShaper] = {}

    def chunks(self, event: TextEvent) -> list[ChatChunk]:
        chunks: list[ChatChunk] = []
        call = self._call
        if event.choice not in self._open:
            chunks.append(self._chunk(event.choice, {"role": "assistant", "content": ""}, None, event.num_tokens))
            if call.return_token_ids:
                chunks[0]["prompt_token_ids"] = call.requests[event.choice].prompt_token_ids
            self._open.add(event.choice)
        finish_reason: ChatFinishReason | None = event.finish_reason
        deltas: list[Delta] = [{"content": event.text}] if event.text else []
        if call.is_read:
            message = self._messages.setdefault(event.choice, MessageShaper(call.tools, call.thoughts))
            deltas = message.deltas(event.text, is_last=finish_reason is not None)
            finish_reason = message.finish_reason(event.finish_reason)
        if not deltas and (call.return_token_ids or call.num_logprobs is not None):
            deltas = [{"content": ""}]
        told = [self._chunk(event.choice, delta, None) for delta in deltas]
        if told:  # all of the event's tokens go with its first chunk
            choice = told[0]["choices"][0]
            choice["logprobs"] = None if call.num_logprobs is None else shape_chat(event.scores)
            if call.return_token_ids:
                choice["token_ids"] = event.token_ids
            if call.wants_receipt:
                choice["pool"] = event.pool
        chunks += told
        if event.finish_reason is not None:
            chunks.append(self._chunk(event.choice, {}, finish_reason))
        return chunks

    def ending(self) -> list[ChatChunk]:
        if not self._call.tells_total:
            return []
        chunk = self._build([]) | {"usage": self._tally.usage()}
        self._tally.add_receipt(chunk)
        return [chunk]

    def failing(self, failure: Failure) -> list[ErrorBody]:
        return [failure.body()]

    def whole(self, choices: Sequence[ChoiceResult]) -> ChatCompletion:
        call = self._call
        response: ChatCompletion = {
            "id": call.call_id,
            "object": "chat.completion",
            "created": call.created,
            "model": call.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self._tally.usage(),
        }
        if call.service_tier is not None:
            response["service_tier"] = call.service_tier
        self._tally.add_receipt(response)
        if call.return_token_ids:
            response["prompt_token_ids"] = call.requests[0].prompt_token_ids
        if call.num_prompt_logprobs is not None:
            response["prompt_logprobs"] = shape_prompt(choices[0].prompt, call.num_prompt_logprobs)
        return response

    def _choice(self, index: int, result: ChoiceResult) -> ChatChoice:
        message: ChatMessage = {"role": "assistant", "content": result.text, "refusal": None}
        finish_reason: ChatFinishReason | None = result.finish_reason
        if self._call.is_read:
            shaper = MessageShaper(self._call.tools, self._call.thoughts)
            message = shaper.whole(result.text)
            finish_reason = shaper.finish_reason(result.finish_reason)
        choice: ChatChoice = {
            "index": index,
            "message": message,
            "logprobs": None if self._call.num_logprobs is None else shape_chat(result.scores),
            "finish_reason": finish_reason,
        }
        if self._call.return_token_ids:
            choice["token_ids"] = result.token_ids
        return choice

    def _chunk(
        self, index: int, delta: Delta, finish_reason: ChatFinishReason | None, num_untold: int = 0
    ) -> ChatChunk:
        chunk = self._build([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])
        if self._call.include_usage or self._call.continuous_usage:
            chunk["usage"] = self._tally.usage(num_untold) if self._call.continuous_usage else None
        return chunk

    def _build(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        chunk: ChatChunk = {
            "id": self._call.call_id,
            "object": "chat.completion.chunk",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }
        if self._call.service_tier is not None:
            chunk["service_tier"] = self._call.service_tier
        return chunk
