"""Texts into token ids and back, for callers who want to see them: `/tokenize` and `/detokenize`, in vLLM's form.

Owns what their bodies hold and what is answered. Knows nothing of HTTP and runs no model; `pages.py` calls it.
"""

from typing import Annotated, Any, NotRequired, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from deployments.api.calls import check_length, max_characters, parse_body
from deployments.api.openai import Message, ModelBody
from deployments.api.text import TextCodec
from deployments.api.tools.fields import MAX_TOOLS, Tool
from deployments.errors import InvalidRequestError
from deployments.messages import ModelInfo

_NO_OPS: dict[str, tuple[object, ...]] = {
    "chat_template": (),
    "mm_processor_kwargs": ({},),
}


# Said to those who read the description; the check is `_check_text`.
_EITHER: dict[str, Any] = {
    "if": {"properties": {"messages": {"type": "array"}}, "required": ["messages"]},
    "then": {"properties": {"prompt": {"type": "null"}}},
    "else": {
        "properties": {
            "prompt": {"type": "string"},
            "add_generation_prompt": {"type": "null"},
            "continue_final_message": {"type": "null"},
            "chat_template_kwargs": {"type": "null"},
            "tools": {"enum": [None, []]},
        },
        "required": ["prompt"],
    },
}


class TokenizeBody(ModelBody):
    """`POST /tokenize`: a prompt as completions have it, or messages as chats have them.

    `add_special_tokens` adds those that the tokenizer adds by itself: by default to a prompt, and not to messages, for
    templates write them. `return_token_strs` asks for the tokens as the vocabulary writes them.
    """

    model_config = ConfigDict(json_schema_extra=_EITHER)
    no_ops = _NO_OPS

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, object] = Field(default_factory=dict)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "give either prompt or messages", {"field": "prompt"})
        for field in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if self.messages is None and field in self.model_fields_set:
                raise PydanticCustomError("messages", "only allowed with messages", {"field": field})
        if self.tools and self.messages is None:
            raise PydanticCustomError("messages", "only allowed with messages", {"field": "tools"})
        if self.continue_final_message and self.add_generation_prompt:
            message = "cannot go with add_generation_prompt: the last message goes on, or a new one begins"
            raise PydanticCustomError("messages", message, {"field": "continue_final_message"})
        return self


class Tokens(TypedDict):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class DetokenizeBody(ModelBody):
    """`POST /detokenize`: token ids as `/tokenize` gives them."""

    tokens: list[Annotated[int, Field(ge=0)]]


class Text(TypedDict):
    """Answer of `/detokenize`; special tokens are written out."""

    prompt: str


def tokenize(data: bytes, codec: TextCodec, info: ModelInfo) -> Tokens:
    """Encode what a body holds; one that is longer than the context, too.

    Raises:
        InvalidRequestError: names the field, its value and the bound.
    """
    body = parse_body(data, TokenizeBody, info)
    token_ids = _encode(body, codec, info)
    answer: Tokens = {"count": len(token_ids), "max_model_len": info.max_model_len, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [codec.backend.id_to_token(token_id) or "" for token_id in token_ids]
    return answer


def _encode(body: TokenizeBody, codec: TextCodec, info: ModelInfo) -> list[int]:
    if body.messages is None:
        assert body.prompt is not None, "one of both is there"
        check_length(len(body.prompt), "prompt", info)
        return codec.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    check_length(sum(message.num_characters for message in body.messages), "messages", info)
    opens_turn = body.add_generation_prompt
    return codec.encode_chat(
        [message.for_template() for message in body.messages],
        add_generation_prompt=not body.continue_final_message if opens_turn is None else opens_turn,
        continue_final_message=body.continue_final_message,
        add_special_tokens=body.add_special_tokens is True,
        max_characters=max_characters(info),
        variables=body.chat_template_kwargs,
        tools=[tool.for_template() for tool in body.tools],
    )


def detokenize(data: bytes, codec: TextCodec, info: ModelInfo) -> Text:
    """Decode the token ids of a body.

    Raises:
        InvalidRequestError: names the field, its value and the bound.
    """
    body = parse_body(data, DetokenizeBody, info)
    for token_id in body.tokens:
        if token_id >= info.vocab_size:
            raise InvalidRequestError(f"tokens must be 0 to {info.vocab_size - 1}, got {token_id}", "tokens")
    return {"prompt": codec.backend.decode(body.tokens, skip_special_tokens=False)}
