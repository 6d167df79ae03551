"""OpenAI's responses: whole ones and the chunks of a stream, as plain values ready for JSON.

One class per endpoint, with the same methods. Knows what the shapes are, not how they travel; `exchange.py` calls it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, Protocol, TypedDict

from deployments.api.calls import Call
from deployments.api.choices import TextEvent
from deployments.messages import FinishReason, ModelInfo


class PromptTokensDetails(TypedDict):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens of the whole call, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(TypedDict):
    """One of `choices` of a completion, whole or chunk."""

    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None
    token_ids: NotRequired[Sequence[int]]
    prompt_token_ids: NotRequired[Sequence[int]]


class Completion(TypedDict):
    """Whole response and chunk alike; a chunk has usage only where it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class ChatMessage(TypedDict):
    """`choices[].message`."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One of `choices` of a whole chat response."""

    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: FinishReason | None
    token_ids: NotRequired[Sequence[int]]


class ChatCompletion(TypedDict):
    """The whole response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[Sequence[int]]


class Delta(TypedDict, total=False):
    """What a chunk adds to the message; the first one brings the role, the last one is empty."""

    role: Literal["assistant"]
    content: str


class ChatChunkChoice(TypedDict):
    """One of `choices` of a chat chunk."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None
    token_ids: NotRequired[Sequence[int]]


class ChatChunk(TypedDict):
    """One event of a chat stream; it has usage only where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[Sequence[int]]


class Model(TypedDict):
    """One entry of `/v1/models`."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Tally:
    """What a call has used so far, over all its choices."""

    def __init__(self, call: Call) -> None:
        self._num_prompt_tokens = sum(len(request.prompt_token_ids) for request in call.requests)
        self._num_generated_tokens = 0
        self._num_cached_tokens: dict[int, int] = {}

    def add(self, event: TextEvent) -> None:
        self._num_generated_tokens += event.num_tokens
        # What one engine found another may have had to compute, after a death: the least is true.
        known = self._num_cached_tokens.get(event.choice, event.num_cached_tokens)
        self._num_cached_tokens[event.choice] = min(known, event.num_cached_tokens)

    def usage(self, num_untold: int = 0) -> Usage:
        """All that was added, less `num_untold` generated tokens that are to come in a later chunk."""
        num_generated = self._num_generated_tokens - num_untold
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": self._num_prompt_tokens + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }


class Answer(Protocol):
    """How one call is answered, in one of OpenAI's two shapes."""

    def chunks(self, event: TextEvent) -> Sequence[Mapping[str, object]]:
        """The chunks of a stream that this event makes; none while it has nothing to show."""
        ...

    def usage_chunk(self) -> Mapping[str, object]:
        """The last chunk of a stream, where usage was asked for."""
        ...

    def whole(self, choices: Sequence["ChoiceResult"]) -> Mapping[str, object]:
        """The response in one piece."""
        ...


@dataclass(slots=True)
class ChoiceResult:
    """A whole choice, put together from its events."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, event: TextEvent) -> None:
        self.text += event.text
        self.token_ids += event.token_ids
        self.finish_reason = event.finish_reason


class CompletionAnswer:
    """Shapes of `/v1/completions`. The last text of a choice and its finish reason share a chunk."""

    def __init__(self, call: Call, tally: Tally) -> None:
        self._call = call
        self._tally = tally
        self._open: set[int] = set()

    def chunks(self, event: TextEvent) -> list[Completion]:
        if not event.text and event.finish_reason is None and not self._call.return_token_ids:
            return []
        choice = self._choice(event.choice, event.text, event.finish_reason, event.token_ids)
        if event.choice in self._open:
            choice.pop("prompt_token_ids", None)
        self._open.add(event.choice)
        chunk = self._build([choice])
        if self._call.include_usage or self._call.continuous_usage:
            chunk["usage"] = self._tally.usage() if self._call.continuous_usage else None
        return [chunk]

    def usage_chunk(self) -> Completion:
        return self._build([]) | {"usage": self._tally.usage()}

    def whole(self, choices: Sequence[ChoiceResult]) -> Completion:
        built = [self._choice(i, c.text, c.finish_reason, c.token_ids) for i, c in enumerate(choices)]
        return self._build(built) | {"usage": self._tally.usage()}

    def _choice(
        self, index: int, text: str, finish_reason: FinishReason | None, token_ids: Sequence[int]
    ) -> CompletionChoice:
        choice: CompletionChoice = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if self._call.return_token_ids:
            choice["token_ids"] = token_ids
            choice["prompt_token_ids"] = self._call.requests[index].prompt_token_ids
        return choice

    def _build(self, choices: list[CompletionChoice]) -> Completion:
        return {
            "id": self._call.call_id,
            "object": "text_completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }


class ChatAnswer:
    """Shapes of `/v1/chat/completions`: a stream opens with the role and ends with an empty delta."""

    def __init__(self, call: Call, tally: Tally) -> None:
        self._call = call
        self._tally = tally
        self._is_open = False

    def chunks(self, event: TextEvent) -> list[ChatChunk]:
        chunks: list[ChatChunk] = []
        if not self._is_open:
            chunks.append(self._chunk(event.choice, {"role": "assistant", "content": ""}, None, event.num_tokens))
            if self._call.return_token_ids:
                chunks[0]["prompt_token_ids"] = self._call.requests[event.choice].prompt_token_ids
            self._is_open = True
        if event.text or self._call.return_token_ids:
            chunks.append(self._chunk(event.choice, {"content": event.text}, None))
            if self._call.return_token_ids:
                chunks[-1]["choices"][0]["token_ids"] = event.token_ids
        if event.finish_reason is not None:
            chunks.append(self._chunk(event.choice, {}, event.finish_reason))
        return chunks

    def usage_chunk(self) -> ChatChunk:
        return self._build([]) | {"usage": self._tally.usage()}

    def whole(self, choices: Sequence[ChoiceResult]) -> ChatCompletion:
        response: ChatCompletion = {
            "id": self._call.call_id,
            "object": "chat.completion",
            "created": self._call.created,
            "model": self._call.model,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": self._tally.usage(),
        }
        if self._call.return_token_ids:
            (request,), (choice,) = self._call.requests, choices
            response["prompt_token_ids"] = request.prompt_token_ids
            response["choices"][0]["token_ids"] = choice.token_ids
        return response

    def _chunk(self, index: int, delta: Delta, finish_reason: FinishReason | None, num_untold: int = 0) -> ChatChunk:
        chunk = self._build([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])
        if self._call.include_usage or self._call.continuous_usage:
            chunk["usage"] = self._tally.usage(num_untold) if self._call.continuous_usage else None
        return chunk

    def _build(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return {
            "id": self._call.call_id,
            "object": "chat.completion.chunk",
            "created": self._call.created,
            "model": self._call.model,
            "choices": choices,
        }


def describe_model(info: ModelInfo, created: int) -> Model:
    """The model's entry in `/v1/models`; `max_model_len` is an extension that clients use to size prompts."""
    return {
        "id": info.name,
        "object": "model",
        "created": created,
        "owned_by": "kvrelay",
        "max_model_len": info.max_model_len,
    }
