"""The forms of answers, as OpenAI and vLLM have them. The description of the API is made of them (`openapi.py`)."""

from collections.abc import Sequence
from typing import Literal, NotRequired

# Before Python 3.12 pydantic describes these alone (openapi.py).
from typing_extensions import TypedDict

from deployments.api.choices import TokenPool
from deployments.api.common_fields import ServiceTier
from deployments.api.receipts import CallReceipt
from deployments.api.scores import ChatLogprobs, CompletionLogprobs, PromptLogprobs
from deployments.messages import FinishReason

# A choice that ends with calls of tools has a reason of its own.
ChatFinishReason = FinishReason | Literal["tool_calls"]


class PromptTokensDetails(TypedDict):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    """`usage.completion_tokens_details`, of a model that thinks."""

    reasoning_tokens: int


class Usage(TypedDict):
    """Tokens of the whole call, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class CompletionChoice(TypedDict):
    """One of `choices` of a completion, whole or chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[Sequence[int]]
    prompt_token_ids: NotRequired[Sequence[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]
    pool: NotRequired[TokenPool]


class Completion(TypedDict):
    """Whole response and chunk alike; a chunk has usage only where it was asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    receipt: NotRequired[CallReceipt]
    service_tier: NotRequired[ServiceTier]


class CalledFunction(TypedDict):
    """The arguments are JSON as the model wrote it, which may be incomplete at the end of an answer."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """One of `tool_calls` of a message."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(TypedDict):
    """`choices[].message`. The content is null where a message is calls of tools alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]
    reasoning_content: NotRequired[str]


class ChatChoice(TypedDict):
    """One of `choices` of a whole chat response."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: NotRequired[Sequence[int]]


class ChatCompletion(TypedDict):
    """The whole response of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    receipt: NotRequired[CallReceipt]
    service_tier: NotRequired[ServiceTier]
    prompt_token_ids: NotRequired[Sequence[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class FunctionDelta(TypedDict, total=False):
    """The name comes once; arguments come in pieces."""

    name: str
    arguments: str


class ToolCallDelta(TypedDict):
    """What a chunk adds to the call of this index; its first one brings the id, the type and the name."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class Delta(TypedDict, total=False):
    """What a chunk adds to the message; the first one brings the role, the last one is empty."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[ToolCallDelta]
    reasoning_content: str


class ChatChunkChoice(TypedDict):
    """One of `choices` of a chat chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    token_ids: NotRequired[Sequence[int]]
    pool: NotRequired[TokenPool]


class ChatChunk(TypedDict):
    """One event of a chat stream; it has usage only where it was asked for."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    receipt: NotRequired[CallReceipt]
    service_tier: NotRequired[ServiceTier]
    prompt_token_ids: NotRequired[Sequence[int]]


class Model(TypedDict):
    """One entry of `/v1/models`; `root`, `parent` and `max_model_len` are extensions, named as in vLLM."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class Models(TypedDict):
    """Answer of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """Answer of `/health`; the reason is there where the service cannot serve."""

    status: Literal["ok", "unavailable"]
    reason: NotRequired[str]


class Version(TypedDict):
    """Answer of `/version`."""

    version: str
