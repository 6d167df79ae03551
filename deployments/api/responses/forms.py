"""The forms of answers of `/v1/responses` and of the events of their streams, as Open Responses has them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired

# Before Python 3.12 pydantic describes these alone (openapi.py).
from typing_extensions import TypeAliasType, TypedDict

from deployments.api.common_fields import ServiceTier
from deployments.api.failures import ErrorDetails
from deployments.api.receipts import CallReceipt
from deployments.api.scores import TokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(TypedDict):
    """A part of a message; logprobs are there where they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(TypedDict):
    """What the assistant says."""

    type: Literal["message"]
    id: str
    status: ItemStatus
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(TypedDict):
    """The assistant calls a function. Its arguments may be incomplete where its status is."""

    type: Literal["function_call"]
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ReasoningPart(TypedDict):
    """A part of a thought."""

    type: Literal["reasoning_text"]
    text: str


class OutputThought(TypedDict):
    """What the assistant thought before. `encrypted_content`, if it is asked for, says the same in an opaque form."""

    type: Literal["reasoning"]
    id: str
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningPart]
    encrypted_content: NotRequired[str]


OutputItem = OutputMessage | OutputCall | OutputThought


class InputTokensDetails(TypedDict):
    """`usage.input_tokens_details`. Clients want to read what was written to the cache; here it is not counted."""

    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(TypedDict):
    """`usage.output_tokens_details`."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens of the call."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why an answer is not whole."""

    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    """What went wrong."""

    code: str
    message: str


class Repeated(TypedDict):
    """What an answer says of its request: with defaults, and null for what was left out."""

    instructions: str | None
    tools: list[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    text: Mapping[str, Any]
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    max_output_tokens: int | None
    max_tool_calls: int | None
    truncation: Literal["auto", "disabled"]
    service_tier: ServiceTier
    metadata: Mapping[str, str]
    user: str | None
    safety_identifier: str | None
    prompt_cache_key: str | None
    reasoning: Mapping[str, Any] | None


class Response(Repeated):
    """An answer, or what there is of one while it is streamed."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    incomplete_details: IncompleteDetails | None
    error: ResponseError | None
    model: str
    output: Sequence[OutputItem]
    usage: ResponseUsage | None
    store: Literal[False]
    background: Literal[False]
    previous_response_id: None
    receipt: NotRequired[CallReceipt]


class Event(TypedDict):
    """One event of a stream; numbered from 0."""

    sequence_number: int


class ResponseSnapshot(Event):
    """The answer as it stands, at the beginning and the end of a stream."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: Response


class ItemEvent(Event):
    """An item begins or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class WithinItem(Event):
    """About the item of this index."""

    item_id: str
    output_index: int


class PartEvent(WithinItem):
    """A part of a message or a thought begins or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: int
    part: OutputText | ReasoningPart


class TextDelta(WithinItem):
    """More text of a part."""

    type: Literal["response.output_text.delta"]
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(WithinItem):
    """The whole text of a part."""

    type: Literal["response.output_text.done"]
    content_index: int
    text: str
    logprobs: list[TokenLogprob]


class ThoughtDelta(WithinItem):
    """More of a thought."""

    type: Literal["response.reasoning_text.delta"]
    content_index: int
    delta: str


class ThoughtDone(WithinItem):
    """The whole of a thought."""

    type: Literal["response.reasoning_text.done"]
    content_index: int
    text: str


class ArgumentsDelta(WithinItem):
    """More of the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDone(WithinItem):
    """The whole arguments of a call."""

    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(Event):
    """Why a stream ends without an answer; `response.failed` follows."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None
    error: ErrorDetails


ResponseEvent = TypeAliasType(
    "ResponseEvent",
    ResponseSnapshot
    | ItemEvent
    | PartEvent
    | TextDelta
    | TextDone
    | ThoughtDelta
    | ThoughtDone
    | ArgumentsDelta
    | ArgumentsDone
    | ErrorEvent,
)
