"""Items of `input`: what was said, called and found so far. Owns which items there are; `reading.py` reads them."""

import base64
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.fields import RequiredContent
from deployments.api.strict import UNNAMED, NoOps, Strict
from deployments.api.tools.fields import CalledFunction

_MAX_ID_CHARACTERS = 256

ItemId = Annotated[str, Field(max_length=_MAX_ID_CHARACTERS)]
CallId = Annotated[str, Field(min_length=1, max_length=_MAX_ID_CHARACTERS)]
Status = Literal["in_progress", "completed", "incomplete"]


class Item(Strict):
    """Of any kind. Its own id and its status change nothing."""

    id: ItemId | None = None
    status: Status | None = None


class InputMessage(Item):
    """One turn, with its text or parts of text; the type may be left out."""

    no_ops: ClassVar[NoOps] = {"phase": ()}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: RequiredContent


class FunctionCall(Item, CalledFunction):
    """The assistant called a function; `arguments` is a JSON object as text."""

    no_ops: ClassVar[NoOps] = {"namespace": (), "caller": ({"type": "direct"},), "async": (False,)}

    type: Literal["function_call"]
    call_id: CallId


class FunctionCallOutput(Item):
    """What a function that was called has answered: a text, or parts of text."""

    no_ops: ClassVar[NoOps] = {"caller": ({"type": "direct"},)}

    type: Literal["function_call_output"]
    call_id: CallId
    output: RequiredContent


class SummaryText(Strict):
    """Of a thought."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(Strict):
    """A thought."""

    type: Literal["reasoning_text", "text"]
    text: str


class Reasoning(Item):
    """What the assistant thought before it spoke or called: its `content`, or what `encrypted_content` says of it."""

    type: Literal["reasoning"]
    summary: list[SummaryText] = Field(default_factory=list)
    content: list[ReasoningText] = Field(default_factory=list)
    encrypted_content: str | None = None

    @property
    def thought(self) -> str:
        if self.content or not self.encrypted_content:
            return "".join(part.text for part in self.content)
        return unpack_thought(self.encrypted_content)

    @model_validator(mode="after")
    def _check_packed(self) -> Self:
        try:
            unpack_thought(self.encrypted_content or "")
        except ValueError:
            message = "must be as an answer of this service had it"
            raise PydanticCustomError("packed", message, {"field": "encrypted_content"}) from None
        return self


def pack_thought(text: str) -> str:
    """In the opaque form in which clients send thoughts back that keep nothing else of them; no secret."""
    return base64.b64encode(text.encode()).decode()


def unpack_thought(packed: str) -> str:
    """What was packed; raises `ValueError` for anything else."""
    return base64.b64decode(packed, validate=True).decode()


_KINDS = {kind: UNNAMED + kind for kind in ("message", "function_call", "function_call_output", "reasoning")}
_UNKNOWN = (
    f"must be an object whose type is one of {', '.join(_KINDS)}; nothing is stored that could be referred to, and "
    "clients send the items themselves with store: false"
)


def _kind_of(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    return _KINDS.get(kind if isinstance(kind, str) else "message" if kind is None else "")


AnyItem = InputMessage | FunctionCall | FunctionCallOutput | Reasoning
_Item = Annotated[
    Annotated[InputMessage, Tag(_KINDS["message"])]
    | Annotated[FunctionCall, Tag(_KINDS["function_call"])]
    | Annotated[FunctionCallOutput, Tag(_KINDS["function_call_output"])]
    | Annotated[Reasoning, Tag(_KINDS["reasoning"])],
    Discriminator(_kind_of, custom_error_type="item", custom_error_message=_UNKNOWN),
]


def _form_of(value: Any) -> str | None:
    return f"{UNNAMED}{type(value).__name__}" if isinstance(value, str | list) else None


Input = Annotated[
    Annotated[str, Field(min_length=1), Tag(f"{UNNAMED}str")]
    | Annotated[list[_Item], Field(min_length=1), Tag(f"{UNNAMED}list")],
    Discriminator(_form_of, custom_error_type="input", custom_error_message="must be a text or a list of items"),
]
