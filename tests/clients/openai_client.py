"""OpenAI's own client: whole answers and streams, sync and async, answers of a form, tools, responses, errors."""

import asyncio
from typing import Any

import openai
from pydantic import BaseModel

from tests.clients.wanted import MAX_TOKENS, SEED, TEXT, Town, Word

QUESTION = f"Which town is it? {TEXT}"


class Population(BaseModel):
    """How many people live in a town."""

    town: Word


def talk(url: str, model: str) -> None:
    asked: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_completion_tokens": MAX_TOKENS,
        "seed": SEED,
    }
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        parse(client, asked)
        call_tools(client, asked)
        respond(client, model)
        be_refused(client, asked)
    asyncio.run(talk_asynchronously(url, asked))


def parse(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    parsed = client.chat.completions.parse(**asked, response_format=Town).choices[0].message.parsed
    assert isinstance(parsed, Town), parsed
    with client.chat.completions.stream(**asked, response_format=Town) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed, "the seed is the same"


def call_tools(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    forced = asked | {"tools": [openai.pydantic_function_tool(Population)], "tool_choice": "required"}
    forced["parallel_tool_calls"] = False  # else a weak model goes on until it is cut off
    called = client.chat.completions.parse(**forced).choices[0]
    assert called.finish_reason == "tool_calls"
    (call, *_) = [call.function for call in called.message.tool_calls or []]
    assert call.name == "Population" and isinstance(call.parsed_arguments, Population)
    with client.chat.completions.stream(**forced) as stream:
        (again, *_) = stream.get_final_completion().choices[0].message.tool_calls or []
        assert again.function.arguments == call.arguments


def respond(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "input": QUESTION, "temperature": 0}
    whole = client.responses.create(**asked, max_output_tokens=8)
    with client.responses.stream(**asked, max_output_tokens=8) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == whole.output_text != ""
    parsed = client.responses.parse(**asked, max_output_tokens=MAX_TOKENS, text_format=Town).output_parsed
    assert isinstance(parsed, Town), parsed


def be_refused(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "no way"}}
    refused = None
    try:
        client.chat.completions.create(**asked, response_format=form)
    except openai.BadRequestError as error:
        refused = error.param
    assert refused == "response_format.json_schema.name", refused


async def talk_asynchronously(url: str, asked: dict[str, Any]) -> None:
    short = asked | {"max_completion_tokens": 8}
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(**short)
        text = ""
        async for chunk in await client.chat.completions.create(**short, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content
        parsed = await client.chat.completions.parse(**asked, response_format=Town)
        assert isinstance(parsed.choices[0].message.parsed, Town)
        assert [model.id async for model in client.models.list()] == [asked["model"]]
