"""`/v1/responses` over a scripted backend: OpenAI's own client reads it, and its events tell one answer in order."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel

from deployments.api.http import build_app
from deployments.api.openapi import describe_api
from deployments.api.text import TextCodec
from deployments.errors import EngineDeadError, OverloadedError
from deployments.messages import FinishReason, ModelInfo
from tests.api.fakes import END_ID, FakeBackend, Hang, Step, build_tokenizer, client_of, playing, serving

RESPONSES = "/v1/responses"
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
INFO = ModelInfo("fake/model", "", max_model_len=4096, vocab_size=257, eos_token_ids=(END_ID,))
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% if 0 %}<tool_call>{% endif %}{% for m in messages %}"
    "{{ m.role[0] }}:{{ m.content }}{% for c in m.tool_calls or [] %}<{{ c.id }} {{ c.function.name }}>{% endfor %}"
    "{{ m.tool_call_id }};{% endfor %}a:"
)
CODEC = TextCodec(build_tokenizer(TEMPLATE))
WEATHER: Any = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
CLOCK: Any = {"type": "function", "name": "clock"}
NAMED: Any = {"type": "function", "name": "clock"}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
LOGPROBS: Any = ["message.output_text.logprobs"]
API = json.loads(json.dumps(describe_api()["components"]))


def shape(name: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": API})


def saying(*steps: Step) -> FakeBackend:
    """A backend that says this, and ends."""
    return playing(*steps, [END_ID], STOP)


@asynccontextmanager
async def client_for(backend: FakeBackend) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(build_app(backend, CODEC, INFO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


async def post(backend: FakeBackend, **fields: Any) -> httpx.Response:
    async with client_of(build_app(backend, CODEC, INFO)) as client:
        return await client.post(RESPONSES, json={"input": "hi"} | fields)


async def stream(backend: FakeBackend, **fields: Any) -> list[Any]:
    """The events of a stream, each under its own name."""
    answer = await post(backend, stream=True, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *frames, last = answer.text.removesuffix("\n\n").split("\n\n")
    events = []
    for frame in [*frames, *([] if last == "data: [DONE]" else [last])]:
        name, data = frame.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        shape("ResponseEvent").validate(event)
    return events


def prompt_of(backend: FakeBackend) -> str:
    return bytes(token for token in backend.requests[-1].prompt_token_ids if token < 256).decode()


def kinds(events: Sequence[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def without_ids(value: Any) -> Any:
    """With what differs between two answers left out."""
    if isinstance(value, list):
        return [without_ids(one) for one in value]
    differing = ("id", "call_id", "created_at", "completed_at")
    return {k: without_ids(v) for k, v in value.items() if k not in differing} if isinstance(value, dict) else value


BEGIN = ["created", "in_progress"]
MESSAGE_BEGIN = ["output_item.added", "content_part.added"]
MESSAGE_END = ["output_text.done", "content_part.done", "output_item.done"]
CALL_END = ["function_call_arguments.done", "output_item.done"]


async def test_openais_client_reads_a_whole_answer() -> None:
    backend = saying("Hel", "lo 👋")
    async with client_for(backend) as client:
        answer = await client.responses.create(
            model=INFO.name,
            input="hi",
            instructions="Be brief.",
            metadata={"a": "b"},
            store=False,
            user="me",
            temperature=0,
            top_p=0.5,
            max_output_tokens=50,
            truncation="disabled",
        )
    assert answer.output_text == "Hello 👋" and answer.status == "completed" and answer.error is None
    assert answer.id == f"resp_{answer._request_id}" and answer.metadata == {"a": "b"} and answer.user == "me"
    assert answer.usage is not None and (answer.usage.input_tokens, answer.usage.output_tokens) == (19, 11)
    assert answer.instructions == "Be brief." and answer.max_output_tokens == 50 and answer.temperature == 0
    Response.model_validate(answer.to_dict())
    shape("Response").validate(answer.to_dict())
    assert prompt_of(backend) == "s:Be brief.;u:hi;a:"
    sampling = backend.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (50, 0, 0.5)


async def test_the_events_of_a_text_tell_it_in_order_and_end_with_the_whole_answer() -> None:
    events = await stream(saying("Hel", "lo"))
    deltas = ["output_text.delta"] * 2
    assert kinds(events) == [*BEGIN, *MESSAGE_BEGIN, *deltas, *MESSAGE_END, "completed"]
    assert [event["response"]["status"] for event in events[:2]] == ["in_progress"] * 2
    assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None
    assert "".join(event["delta"] for event in events[4:6]) == events[6]["text"] == "Hello"
    assert events[2]["item"]["content"] == [] and events[2]["item"]["status"] == "in_progress"
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    whole = (await post(saying("Hel", "lo"))).json()
    assert without_ids(events[-1]["response"]) == without_ids(whole)


async def test_openais_client_puts_a_stream_together() -> None:
    async with client_for(saying("Let me look. ", *CALL)) as client:
        asked: Any = {"model": INFO.name, "input": "hi", "tools": [WEATHER]}
        async with client.responses.stream(**asked) as events:
            seen = [event.type async for event in events]
            answer = await events.get_final_response()
        whole = await client.responses.create(**asked)
    assert seen[-1] == "response.completed" and seen.count("response.function_call_arguments.delta") > 1
    message, call = answer.output
    assert answer.output_text == "Let me look." and message.type == "message"
    assert call.type == "function_call" and (call.name, call.arguments) == ("weather", PARIS)
    assert call.call_id.startswith("call_") and call.id is not None and call.id.startswith("fc_")
    assert [item.type for item in whole.output] == ["message", "function_call"]
    assert whole.output_text == answer.output_text and isinstance(whole.output[1], ResponseFunctionToolCall)
    assert whole.output[1].arguments == PARIS


async def test_the_events_of_calls_follow_those_of_the_text_before_them() -> None:
    events = await stream(saying("Look. ", CALL, "\n", CALL), tools=[WEATHER])
    call = ["output_item.added", "function_call_arguments.delta", *CALL_END]
    assert kinds(events) == [
        *[*BEGIN, *MESSAGE_BEGIN, "output_text.delta", *MESSAGE_END],
        *[*call, *call, "completed"],
    ]
    assert [event["output_index"] for event in events if "item" in event] == [0, 0, 1, 1, 2, 2]
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [(event["name"], event["arguments"]) for event in done] == [("weather", PARIS)] * 2
    ids = {event["item_id"] for event in done} | {event["item"]["id"] for event in events if "item" in event}
    assert len(ids) == 3


async def test_an_answer_is_continued_with_its_own_items() -> None:
    backend = saying("Look. ", CALL)
    async with client_for(backend) as client:
        tools: Any = {"model": INFO.name, "tools": [WEATHER]}
        items: list[Any] = [{"role": "user", "content": "How is it?"}]
        first = await client.responses.create(input=items, **tools)
        call = first.output[-1]
        assert isinstance(call, ResponseFunctionToolCall)
        items += [*first.output, {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
        await client.responses.create(input=items, **tools)
    told = prompt_of(backend).partition("u:")[2]
    assert told == f"How is it?;a:Look.<{call.call_id} weather>;t:rain{call.call_id};a:"


class City(BaseModel):
    """What is asked for."""

    name: str
    population: int


async def test_openais_client_parses_an_answer_of_a_form() -> None:
    backend = saying('{"name": "Paris", ', '"population": 2}')
    async with client_for(backend) as client:
        answer = await client.responses.parse(model=INFO.name, input="hi", text_format=City)
        async with client.responses.stream(model=INFO.name, input="hi", text_format=City) as events:
            streamed = await events.get_final_response()
    assert answer.output_parsed == streamed.output_parsed == City(name="Paris", population=2)
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None and grammar.field == "text.format.schema" and "population" in grammar.source


async def test_any_json_object_may_be_asked_for() -> None:
    backend = saying("{}")
    assert (await post(backend, text={"format": {"type": "json_object"}})).status_code == 200
    assert backend.requests[0].sampling.grammar is not None


@pytest.mark.parametrize("with_tools", [False, True])
async def test_logprobs_are_those_of_the_text_whole_and_streamed(with_tools: bool) -> None:
    tools: dict[str, Any] = {"tools": [WEATHER]} if with_tools else {}
    fields: dict[str, Any] = {"include": LOGPROBS, "top_logprobs": 2, **tools}
    script = ["He", "llo", *(f"\n{CALL}" if with_tools else "")]
    whole = (await post(saying(*script), **fields)).json()
    events = await stream(saying(*script), **fields)
    (part,) = whole["output"][0]["content"]
    assert without_ids(events[-1]["response"]["output"]) == without_ids(whole["output"])
    shown = bytes(byte for token in part["logprobs"] for byte in token["bytes"])
    assert shown == b"Hello" if with_tools else shown.startswith(b"Hello")
    assert len(part["logprobs"][0]["top_logprobs"]) == 2
    told = [token for event in events for token in event.get("logprobs", []) if "delta" in event]
    assert told == part["logprobs"][:5]


@pytest.mark.parametrize("is_call", [False, True])
async def test_an_answer_that_was_cut_off_is_incomplete_and_so_is_its_last_item(is_call: bool) -> None:
    script = ["Hello. ", CALL[:-20]] if is_call else ["Hello."]
    events = await stream(playing(*script, LENGTH), tools=[WEATHER])
    answer = events[-1]["response"]
    assert kinds(events)[-1] == answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"} and answer["completed_at"] is None
    assert [item["status"] for item in answer["output"]] == [*["completed"] * is_call, "incomplete"]


async def test_an_answer_without_text_is_an_empty_message() -> None:
    answer = (await post(saying())).json()
    assert [item["content"][0]["text"] for item in answer["output"]] == [""]


async def test_an_error_amid_a_stream_is_told_and_raised_by_openais_client() -> None:
    events = await stream(playing("a", EngineDeadError("dead")))
    assert kinds(events)[-2:] == ["error", "failed"]
    failed = events[-1]["response"]
    assert failed["status"] == "failed" and failed["error"] == {"code": "engine_unavailable", "message": "dead"}
    assert failed["output"][0]["status"] == "incomplete" and failed["output"][0]["content"][0]["text"] == "a"
    async with client_for(playing("a", EngineDeadError("dead"))) as client:
        with pytest.raises(openai.APIError, match="dead"):
            _ = [event async for event in await client.responses.create(model=INFO.name, input="x", stream=True)]


async def test_an_error_before_the_first_token_has_its_status() -> None:
    async with client_for(playing(OverloadedError("full"))) as client:
        with pytest.raises(openai.RateLimitError, match="full"):
            await client.responses.create(model=INFO.name, input="x", stream=True)


async def test_closing_a_stream_ends_the_request() -> None:
    backend = playing("a", Hang())
    async with client_for(backend) as client:
        events = await client.responses.create(model=INFO.name, input="x", stream=True)
        await anext(events)
        await events.close()
        await backend.until(lambda: not backend.running)
    assert all(ticket.is_closed for ticket in backend.tickets)


@pytest.mark.parametrize(
    ("choice", "names", "is_forced"),
    [
        (None, {"weather", "clock"}, False),
        ("required", {"weather", "clock"}, True),
        ("none", set(), False),
        (NAMED, {"weather", "clock"}, True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [NAMED]}, {"clock"}, False),
        ({"type": "allowed_tools", "mode": "required", "tools": [NAMED]}, {"clock"}, True),
    ],
)
async def test_the_choice_says_which_tools_are_shown_and_whether_one_is_called(
    choice: Any, names: set[str], is_forced: bool
) -> None:
    backend = saying("x")
    answer = (await post(backend, tools=[WEATHER | {"strict": False}, CLOCK], tool_choice=choice)).json()
    shown = prompt_of(backend).partition("u:")[0]
    assert {name for name in ("weather", "clock") if name in shown} == names
    assert (backend.requests[0].sampling.grammar is not None) is is_forced
    assert answer["tool_choice"] == (choice or "auto")
    assert [tool["name"] for tool in answer["tools"]] == ["weather", "clock"]


@pytest.mark.parametrize("said", [CALL, '{"a": 1}'])
async def test_an_answer_is_a_call_or_of_the_form_where_both_are_asked_for(said: str) -> None:
    backend = saying(said)
    form = {"type": "json_schema", "name": "a", "schema": {"properties": {"a": {"const": 1}}}}
    answer = (await post(backend, tools=[WEATHER, CLOCK], text={"format": form})).json()
    assert [item["type"] for item in answer["output"]] == ["function_call" if said is CALL else "message"]
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None and grammar.field == "text.format.schema"


def conversation(*sizes: int) -> list[Any]:
    """Instructions, then turns of a user and the assistant of so many characters, numbered by letter."""
    items: list[Any] = [{"role": "system", "content": "S"}]
    for number, size in enumerate(sizes):
        letter = chr(ord("A") + number)
        items += [{"role": "user", "content": letter * size}, {"role": "assistant", "content": letter.lower()}]
    return items[:-1]


@pytest.mark.parametrize(
    ("sizes", "output", "kept"),
    [
        ((10, 10, 10), 100, "ABC"),
        ((3000, 1000, 10), 100, "BC"),
        ((10, 4000, 10, 10), 100, "CD"),
        ((10, 10, 10), 4070, "C"),
        (tuple([100] * 60), 100, "".join(chr(ord("A") + n) for n in range(23, 60))),
        ((10, 10, 4030), 50, "C"),
    ],
)
async def test_a_conversation_that_does_not_fit_loses_its_first_turns_where_that_is_wanted(
    sizes: tuple[int, ...], output: int, kept: str
) -> None:
    backend, asked = saying("x"), {"input": conversation(*sizes), "max_output_tokens": output}
    if len(kept) < len(sizes):
        assert (await post(backend, **asked)).status_code == 400
    answer = await post(backend, **asked, truncation="auto", max_tool_calls=2)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["truncation"], answer.json()["max_tool_calls"]) == ("auto", 2)
    said = [turn for turn in prompt_of(backend).split(";") if turn.startswith("u:")]
    assert "".join(turn[2] for turn in said) == kept and prompt_of(backend).startswith("s:S")
    assert not prompt_of(backend).startswith("s:S;a:"), "an answer goes with its question"


@pytest.mark.parametrize("items", [[], [{"role": "user", "content": "x" * 5000}]])
async def test_a_last_turn_that_does_not_fit_is_refused(items: list[Any]) -> None:
    last = {"role": "user", "content": "y" * 5000}
    answer = await post(saying("x"), input=[*conversation(10), *items, last], truncation="auto")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


USER: Any = {"role": "user", "content": "u1"}
SYSTEM: Any = {"role": "system", "content": "s1"}
PARTS: Any = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u2"}]}
SAID: Any = {
    "type": "message",
    "id": "msg_1",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "a1", "annotations": []}],
}
CALLED: Any = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
FOUND: Any = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "o1"}]}
THOUGHT: Any = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]}


@pytest.mark.parametrize(
    ("instructions", "items", "prompt"),
    [
        (None, [USER, SAID, PARTS], "u:u1;a:a1;u:u2;"),
        ("i", [SYSTEM, USER], "s:i\n\ns1;u:u1;"),
        ("i", [PARTS], "s:i;u:u2;"),
        (None, [USER, SAID, CALLED, {**CALLED, "call_id": "c2"}, FOUND], "u:u1;a:a1<c1 f><c2 f>;t:o1c1;"),
        (None, [USER, CALLED, FOUND, SAID], "u:u1;a:<c1 f>;t:o1c1;a:a1;"),
        (None, [USER, SAID, SAID], "u:u1;a:a1;a:a1;"),
        (None, [USER, CALLED, SAID], "u:u1;a:<c1 f>;a:a1;"),
        (None, [USER, THOUGHT, SAID, USER], "u:u1;a:a1;u:u1;"),
    ],
)
async def test_items_become_the_messages_of_a_chat(instructions: str | None, items: list[Any], prompt: str) -> None:
    backend = saying("x")
    answer = await post(backend, instructions=instructions, input=items)
    assert answer.status_code == 200, answer.text
    assert prompt_of(backend) == f"{prompt}a:"


SCHEMA: Any = {"type": "json_schema", "name": "a", "schema": {"not": {}}}


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": None}, "input", "required"),
        ({"input": ""}, "input", "at least 1"),
        ({"input": []}, "input", "at least 1"),
        ({"input": 3}, "input", "a text or a list"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "nothing is stored"),
        ({"input": [USER, {"type": "web_search_call"}]}, "input.1", "one of message"),
        ({"input": [USER, 3]}, "input.1", "one of message"),
        ({"input": [{"role": "user"}]}, "input.0.content", "required"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "'user'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content", "'input_image'"),
        ({"input": [{**USER, "colour": 1}]}, "input.0.colour", "unknown field"),
        ({"input": [{**CALLED, "arguments": "["}]}, "input.0.arguments", "JSON object"),
        ({"input": [{**FOUND, "output": [{"type": "input_file"}]}]}, "input.0.output", "'input_file'"),
        ({"input": "x" * 5000}, "input", "5005 tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "leaves"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"conversation": "conv_1"}, "conversation", "nothing is stored"),
        ({"background": True}, "background", "nothing is stored"),
        ({"store": True}, "store", "nothing is stored"),
        ({"prompt": {"id": "x"}}, "prompt", "no prompts are stored"),
        ({"include": ["file_search_call.results"]}, "include.0", "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "include must hold"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [CLOCK, CLOCK]}, "tools.1.name", "two tools"),
        ({"tool_choice": "auto"}, "tool_choice", "without tools"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "none of them"),
        ({"tools": [CLOCK], "tool_choice": {"type": "mcp"}}, "tool_choice", "allowed_tools"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "required"),
        ({"text": {"format": {"type": "text", "name": "a"}}}, "text.format.name", "json_schema"),
        ({"text": {"format": SCHEMA}}, "text.format.schema", "not"),
        ({"text": {"format": SCHEMA | {"schema": {}}}, "ignore_eos": True}, "ignore_eos", "text.format.schema"),
        ({"stream_options": {}}, "stream_options", "only allowed with stream"),
        ({"max_tool_calls": 0}, "max_tool_calls", "greater"),
        ({"truncation": "left"}, "truncation", "'disabled'"),
        ({"truncation": "auto", "input": "x" * 5000}, "input", "5005 tokens"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported yet"),
        ({"nothing": 1}, "nothing", "unknown field"),
    ],
)
async def test_what_cannot_be_done_is_a_400_that_says_why(fields: dict[str, Any], param: str, said: str) -> None:
    backend = saying("x")
    answer = await post(backend, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"], error
    assert not backend.requests


@pytest.mark.parametrize("template", ["{{ raise_exception('not these') }}"])
async def test_a_template_that_refuses_is_told_of_the_input(template: str) -> None:
    async with client_of(build_app(saying("x"), TextCodec(build_tokenizer(template)), INFO)) as client:
        answer = await client.post(RESPONSES, json={"input": "hi"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input"
    assert "refused these messages: not these" in answer.json()["error"]["message"]


CALLS: Any = [{**CALLED, "call_id": one} for one in "ab"]
ANSWERS: Any = [{**FOUND, "call_id": one} for one in "ab"]
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
FIRST_SYSTEM = "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "fields", "param"),
    [
        (NO_SYSTEM, {"instructions": "Be brief."}, "instructions"),
        (NO_SYSTEM, {"input": [SYSTEM, USER], "instructions": "Be kind."}, "input.0"),
        (FIRST_SYSTEM, {"input": [USER, SYSTEM]}, "input.1"),
        (FIRST_SYSTEM, {"input": [USER, SYSTEM], "instructions": "Be kind."}, "input.1"),
        (FIRST_SYSTEM, {"input": [USER, *CALLS, *ANSWERS, SYSTEM]}, "input.5"),
        (FIRST_SYSTEM, {"input": [{**USER, "content": "x" * 5000}, USER, SYSTEM], "truncation": "auto"}, "input.2"),
    ],
)
async def test_what_a_template_leaves_out_is_named_as_the_caller_wrote_it(
    template: str, fields: dict[str, Any], param: str
) -> None:
    async with client_of(build_app(saying("x"), TextCodec(build_tokenizer(template)), INFO)) as client:
        answer = await client.post(RESPONSES, json={"input": "hi"} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert error["message"].startswith(f"{param}: the model's chat template leaves out a system message")
