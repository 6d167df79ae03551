"""An app whose model babbles: markers of calls and thoughts, whole and broken, broken characters, JSON, its end."""

import random

from starlette.applications import Starlette
from tokenizers import AddedToken

from deployments.api.http import build_app
from deployments.api.observer import Observer
from deployments.api.text import TextCodec
from deployments.messages import FinishReason, GenerateRequest, ModelInfo
from tests.api.fakes import END_ID, FakeBackend, Step, build_tokenizer
from tests.api.tools.chats import HERMES

MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
INFO = ModelInfo("fake/model", "", max_model_len=4096, vocab_size=END_ID + 1 + len(MARKERS), eos_token_ids=(END_ID,))
# Knows tools, and opens a thought if it is asked to.
TEMPLATE = HERMES + "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
PIECES: tuple[str | bytes, ...] = (
    *("<tool_call>", "</tool_call>", "<tool_", "call>", "<think>", "</think>", "\n", " ", "{", "}", '"', "\\", "\x00"),
    *('{"name": "f", "arguments": {"a": ', '{"name": "f", "arguments": {}}', '{"name": "g"}', "[[[[", "1e999", "null"),
    *("data: [DONE]\n\n", "é", "🌊", "\u2028", "<end>"),
    *(b"\xf0\x9f", b"\xff", b"\xed\xa0\x80"),
)


def build_codec() -> TextCodec:
    tokenizer = build_tokenizer(TEMPLATE)
    tokenizer.backend_tokenizer.add_tokens([AddedToken(marker) for marker in MARKERS])
    return TextCodec(tokenizer, reasoning_parser="think")


def steps_of(pieces: list[str | bytes], reason: FinishReason) -> list[Step]:
    """What a backend plays: each piece at once, a marker as its one token."""
    tokens = [
        [END_ID + 1 + MARKERS.index(piece)]
        if piece in MARKERS
        else [*(piece.encode() if isinstance(piece, str) else piece)]
        for piece in pieces
    ]
    return [*tokens, *([[END_ID]] if reason is FinishReason.STOP else []), reason]


def babble(request: GenerateRequest) -> list[Step]:
    """Another text for each request, the same for the same."""
    chance = random.Random(repr((request.prompt_token_ids, request.sampling.seed)))
    pieces = [chance.choice(PIECES) for _ in range(chance.randrange(12))] or ["x"]
    return steps_of(pieces, chance.choice([FinishReason.STOP, FinishReason.LENGTH]))


def build_babbling_app(observer: Observer | None = None) -> tuple[Starlette, FakeBackend]:
    backend = FakeBackend(babble)
    return build_app(backend, build_codec(), INFO, observer=observer), backend
