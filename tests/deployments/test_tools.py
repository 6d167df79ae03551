"""OpenAI's own client has real engines call tools by grammars: they must, or they may and have begun to.

Disaggregated, colocated, and gone on with by another decode engine after the death of the first.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import openai
import pytest
from jsonschema import validate

from deployments.api.http import build_app
from deployments.api.text import TextCodec
from deployments.messages import ModelInfo
from tests.api.fakes import build_tokenizer, serving
from tests.deployments.conftest import StartPools
from tests.engine.families import VOCAB_SIZE
from tests.engine.grammars import END
from tests.engine.insides import hold_sequences_at

# A model that knows no text writes what it may: bounds make that short.
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[a-z]{20,30}$"}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TEMPLATE = (
    "{% for t in tools %}{{ t.function.name }}{% endfor %}<tool_call>{% for m in messages %}{{ m.content }}{% endfor %}"
)
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
INFO = ModelInfo("tiny", "", max_model_len=512, vocab_size=VOCAB_SIZE, eos_token_ids=(END,))
ASKED: Any = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "How is it in Paris?"}],
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "seed": 1,
}
AS_RESPONSE: Any = {
    "model": "tiny",
    "input": "How is it in Paris?",
    "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "extra_body": {"seed": 1},
}
# It may call, and with this bias begins to: in Llama's way, with a bracket.
MAY: Any = ASKED | {
    "tools": [{"type": "function", "function": TOOL["function"] | {"strict": True}}],
    "tool_choice": "auto",
    "extra_body": {"logit_bias": {str(ord("{")): 100}},
}

# Some letters of a city are drawn behind so many tokens, of about 90.
AMID_ARGUMENTS = 64


async def stream_call(
    client: openai.AsyncOpenAI, asked: Any, watch: Callable[[str], None]
) -> tuple[str, str, str | None]:
    """Name, arguments and reason of an answer with one call; `watch` sees the arguments grow."""
    name, arguments, reason = "", "", None
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        reason = chunk.choices[0].finish_reason or reason
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.function is not None and piece.index == 0
            name += piece.function.name or ""
            arguments += piece.function.arguments or ""
            watch(arguments)
    return name, arguments, reason


@pytest.mark.parametrize("way", ["disaggregated", "colocated", "resumed"])
async def test_a_call_is_the_same_however_it_is_served(start: StartPools, way: str) -> None:
    pools = await start(min_tokens=10_000 if way == "colocated" else 16, num_decode=2)
    if way == "resumed":
        # The call that is amid its arguments first is there still when the other one is.
        await pools.decode.engine.run(partial(hold_sequences_at, num_generated=AMID_ARGUMENTS))
    grown: dict[str, int] = {}

    def watch(choice: str, arguments: str) -> None:
        grown[choice] = len(arguments)
        if way == "resumed" and len(grown) == 2 and min(grown.values()) > 12 and pools.decode.engine.death is None:
            pools.decode.engine.die()

    async with AsyncExitStack() as stack:
        clients: list[openai.AsyncOpenAI] = []
        for parser in ("hermes", "llama3"):
            codec = TextCodec(build_tokenizer(TEMPLATE), tool_parser=parser)
            url = await stack.enter_async_context(serving(build_app(pools.backend, codec, INFO)))
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            clients.append(await stack.enter_async_context(client))
        asked = [(clients[0], ASKED), (clients[1], MAY)]
        streamed = await asyncio.gather(
            *(stream_call(client, body, partial(watch, body["tool_choice"])) for client, body in asked)
        )
        wholes = [(await client.chat.completions.create(**body)).choices[0] for client, body in asked]
        response = await clients[0].responses.create(**AS_RESPONSE)
    for (name, arguments, reason), whole in zip(streamed, wholes, strict=True):
        assert (name, reason) == ("weather", "tool_calls") and whole.finish_reason == reason
        validate(json.loads(arguments), SCHEMA)
        (call,) = whole.message.tool_calls or []
        assert call.type == "function" and (call.function.name, call.function.arguments) == (name, arguments)
        assert whole.message.content is None
    assert [item.type for item in response.output] == ["function_call"] and response.status == "completed"
    assert response.output[0].to_dict()["arguments"] == streamed[0][1]
    resumed = pools.backend.clients.stats.num_resumed
    assert (resumed or 0) == (2 if way == "resumed" else 0)
