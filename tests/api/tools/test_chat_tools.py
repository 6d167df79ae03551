"""Chats with tools, over a scripted backend: what the model is told, what is read of its text, what must be called."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from jsonschema import Draft202012Validator

from deployments.api.http import build_app
from deployments.api.openapi import describe_api
from deployments.messages import FinishReason
from tests.api.fakes import CHAT, END_ID, body_of, client_of, events_of, playing, serving
from tests.api.tools.chats import (
    CALL,
    CALLED,
    CLOCK,
    HERMES,
    INFO,
    LENGTH,
    LLAMA,
    MARKER_IDS,
    MISTRAL,
    NAMED,
    OTHER,
    PARIS,
    PLAIN,
    STOP,
    TOOLS,
    USER,
    allowed,
    as_hermes,
    as_llama,
    as_mistral,
    codec_of,
    post,
    prompt_of,
    saying,
)


@pytest.mark.parametrize(
    ("template", "steps"),
    [
        (HERMES, ["Let me", " look.\n", *CALL]),
        (HERMES, ["Let me look.", [MARKER_IDS["<tool_call>"]], *CALL[11:-12], [MARKER_IDS["</tool_call>"]]]),
        (LLAMA, [f'{{"name": "weather", "parameters": {PARIS}}}']),
        (MISTRAL, [[MARKER_IDS["[TOOL_CALLS]"]], f' [{{"name": "weather", "arguments": {PARIS}}}]']),
    ],
)
async def test_openais_client_reads_the_calls_of_each_family_whole_and_streamed(
    template: str, steps: list[Any]
) -> None:
    content = "Let me look." if template is HERMES else None
    asked: Any = {"model": INFO.name, "messages": [USER], "tools": TOOLS}
    async with (
        serving(build_app(saying(*steps), codec_of(template), INFO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = (await client.chat.completions.create(**asked)).choices[0]
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        (call,) = whole.message.tool_calls or []
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        await client.chat.completions.create(**asked | {"messages": [USER, whole.message, result]})
    assert whole.finish_reason == "tool_calls" and whole.message.content == content
    assert call.type == "function" and (call.function.name, call.function.arguments) == ("weather", PARIS)
    assert len(call.id) == (9 if template is MISTRAL else 29)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    first, *others = [piece for delta in deltas for piece in delta.tool_calls or []]
    assert first.id and first.type == "function" and first.function is not None and first.function.name == "weather"
    assert {(piece.index, piece.id, piece.type) for piece in others} == {(0, None, None)}
    assert "".join(piece.function.arguments or "" for piece in others if piece.function) == PARIS
    assert "".join(delta.content or "" for delta in deltas) == (content or "")
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [("No.", STOP, "stop"), (CALL, LENGTH, "length"), (CALL[:40], LENGTH, "length"), (CALL, STOP, "tool_calls")],
)
async def test_the_reason_says_whether_an_answer_calls_or_was_cut_off(
    text: str, reason: FinishReason, expected: str
) -> None:
    _, answer = await post(codec_of(HERMES), playing(text, [END_ID], reason), tools=TOOLS)
    assert answer["choices"][0]["finish_reason"] == expected


async def test_without_tools_or_with_the_choice_none_no_call_is_looked_for() -> None:
    without: list[dict[str, Any]] = [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}]
    for fields in without:
        backend = saying(CALL)
        status, answer = await post(codec_of(HERMES), backend, **fields)
        message = answer["choices"][0]["message"]
        assert status == 200 and message == {"role": "assistant", "content": CALL, "refusal": None}
        assert prompt_of(backend, codec_of(HERMES)) == "u:hi;a:"


async def test_one_call_is_told_where_several_are_not_wanted() -> None:
    for parallel, num_calls in ((False, 1), (True, 2)):
        backend = saying(CALL + "\n" + CALL)
        _, answer = await post(codec_of(HERMES), backend, tools=TOOLS, parallel_tool_calls=parallel)
        assert len(answer["choices"][0]["message"]["tool_calls"]) == num_calls


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_answers_with_calls_have_the_described_shape(is_streamed: bool) -> None:
    described = json.loads(json.dumps(describe_api()["components"]))
    shape = {"$ref": f"#/components/schemas/{'ChatChunk' if is_streamed else 'ChatCompletion'}"}
    validator = Draft202012Validator(shape | {"components": described})
    async with client_of(build_app(saying("Look: ", *CALL), codec_of(HERMES), INFO)) as client:
        answer = await client.post(CHAT, json=body_of(CHAT, tools=TOOLS, stream=is_streamed))
    events = [event for event in events_of(answer.content) if event != "[DONE]"] if is_streamed else [answer.json()]
    for event in events:
        validator.validate(event)
    assert "tool_calls" in answer.text


async def test_logprobs_and_ids_of_held_back_text_are_told_all_the_same() -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "stream": True, "logprobs": True, "return_token_ids": True}
    async with client_of(build_app(saying(*CALL), codec_of(HERMES), INFO)) as client:
        answer = await client.post(CHAT, json=body_of(CHAT, **fields))
    choices = [event["choices"][0] for event in events_of(answer.content) if event != "[DONE]"]
    assert bytes(i for choice in choices for i in choice.get("token_ids", []) if i != END_ID) == CALL.encode()
    assert sum(len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]) == len(CALL) + 1


async def test_a_template_that_knows_tools_is_given_them_and_earlier_calls() -> None:
    codec, backend = codec_of(HERMES), saying("x")
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {**CALLED}}]}
    messages = [USER, turn, {"role": "tool", "tool_call_id": "1", "content": "rain"}]
    status, _ = await post(codec, backend, tools=[CLOCK], messages=messages)
    assert status == 200
    told = '{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}'
    assert prompt_of(backend, codec) == f"{told}<tool_call>u:hi;a:<tool_call>{PARIS};t:rain;a:"
    async with client_of(build_app(backend, codec, INFO)) as client:
        tokens = (await client.post("/tokenize", json={"messages": messages, "tools": [CLOCK]})).json()["tokens"]
    assert tuple(tokens) == backend.requests[0].prompt_token_ids


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
async def test_a_template_that_knows_no_tools_is_given_them_as_text(system: list[Any]) -> None:
    codec, backend = codec_of(PLAIN), saying(CALL)
    turn = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {**CALLED}}]}
    status, answer = await post(
        codec, backend, tools=TOOLS, tool_choice="required", messages=[*system, USER, turn, USER]
    )
    prompt = prompt_of(backend, codec)
    assert status == 200 and prompt.startswith("s:Be brief.\n\nYou may call" if system else "s:You may call")
    assert '"name": "weather", "description": "Look"' in prompt and f"a:{CALL};u:hi;a:" in prompt
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == CALLED


@pytest.mark.parametrize(
    ("template", "write"), [(HERMES, as_hermes), (PLAIN, as_hermes), (LLAMA, as_llama), (MISTRAL, as_mistral)]
)
async def test_a_forced_call_follows_its_schema_in_the_familys_syntax(
    template: str, write: Callable[..., list[int]]
) -> None:
    paris, clock = f'{{"name": "weather", "arguments": {PARIS}}}', '{"name": "clock", "arguments": {}}'
    bad = '{"name": "weather", "arguments": {"days": 1}}'
    many: list[tuple[dict[str, Any], list[list[str]], list[list[str]]]] = [
        ({"tool_choice": "required"}, [[paris], [clock], [paris, clock]], [[bad], [paris, bad]]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [[paris], [clock]], [[paris, clock]]),
        ({"tool_choice": NAMED}, [[paris]], [[clock], [paris, paris]]),
    ]
    codec = codec_of(template)
    for fields, good, wrong in many:
        backend = saying(write(paris))
        status, answer = await post(codec, backend, tools=TOOLS, **fields)
        assert status == 200, answer
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"] == CALLED
        grammar = backend.requests[0].sampling.grammar
        assert grammar is not None
        assert [calls for calls in good if not allowed(codec, grammar, write(*calls))] == []
        assert [calls for calls in wrong if allowed(codec, grammar, write(*calls))] == []
        assert not allowed(codec, grammar, list(b"No."))


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | function}]}


def turn(**call: Any) -> dict[str, Any]:
    calls = [{"id": "1", "type": "function", "function": CALLED} | call]
    return {"messages": [USER, {"role": "assistant", "tool_calls": calls}]}


BRIEF = HERMES.replace("{{ t | tojson }}", "{{ t.function.name }}")
FORCED: Any = {"tools": TOOLS, "tool_choice": "required"}
SYSTEM: Any = {"role": "system", "content": "Be brief."}
NO_SYSTEM = PLAIN.replace("in messages", "in messages if m.role != 'system'")
FIRST_SYSTEM = PLAIN.replace("{{ m.role[0] }}", "{% if m.role != 'system' or loop.first %}{{ m.role[0] }}").replace(
    ";{% endfor %}", ";{% endif %}{% endfor %}"
)
SOME: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
NESTED = '{"a":' * 1000 + "1" + "}" * 1000


@pytest.mark.parametrize(
    ("template", "fields", "param", "said"),
    [
        (PLAIN, {"tools": TOOLS}, "tools", "knows no tools"),
        (NO_SYSTEM, FORCED, "tools", "shows neither tools nor a system message"),
        (NO_SYSTEM, FORCED | {"messages": [SYSTEM | {"content": ""}, USER]}, "tools", "shows neither"),
        (NO_SYSTEM, FORCED | {"messages": [SYSTEM, USER]}, "messages.0", "leaves out a system message"),
        (FIRST_SYSTEM, FORCED | {"messages": [USER, SYSTEM]}, "messages.1", "leaves out a system message"),
        (OTHER, {"tools": TOOLS}, "tools", "ingress.tool_parser"),
        (OTHER, {"tools": TOOLS, "tool_choice": "required"}, "tools", "ingress.tool_parser"),
        (HERMES, {"tool_choice": "auto"}, "tool_choice", "without tools"),
        (HERMES, {"tool_choice": NAMED, "tools": [CLOCK]}, "tool_choice.function.name", "none of them is 'weather'"),
        (HERMES, {"tool_choice": "any", "tools": TOOLS}, "tool_choice", "'required'"),
        (HERMES, {"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice", "'required'"),
        (HERMES, {"tools": [CLOCK, CLOCK]}, "tools.1.function.name", "two tools"),
        (HERMES, {"tools": [CLOCK] * 129}, "tools", "at most 128"),
        (HERMES, {"tools": [{"type": "custom"}]}, "tools.0.type", "function"),
        (HERMES, tool(name="a b"), "tools.0.function.name", "pattern"),
        (HERMES, tool(name="a" * 65), "tools.0.function.name", "pattern"),
        (HERMES, tool(colour=1), "tools.0.function.colour", "unknown field"),
        (HERMES, {"tools": TOOLS, "tool_choice": SOME | {"mode": "auto"}}, "tool_choice", "'required'"),
        (
            HERMES,
            {"tools": [CLOCK], "tool_choice": SOME},
            "tool_choice.allowed_tools.tools",
            "none of them is 'weather'",
        ),
        (HERMES, {"tools": TOOLS, "min_tokens": 3}, "min_tokens", "tools"),
        (HERMES, tool(parameters={"not": {}}, strict=True), "tools", "not"),
        (HERMES, tool(parameters={"type": "array"}) | {"tool_choice": "required"}, "tools", "'object'"),
        (HERMES, tool(parameters={"not": {}}) | {"tool_choice": "required"}, "tools", "not"),
        (HERMES, tool(parameters={"$ref": "file:///x"}) | {"tool_choice": "required"}, "tools", "not fetch"),
        (BRIEF, tool(parameters={"enum": ["x" * 70_000]}) | {"tool_choice": "required"}, "tools", "65536"),
        (HERMES, {"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "ignore_eos", "tools"),
        (HERMES, turn(function={"name": "f", "arguments": "["}), "messages.1.tool_calls.0.function.arguments", "JSON"),
        (HERMES, turn(function={"name": "f", "arguments": NESTED}), "messages", "recursion"),
        (PLAIN, turn(function={"name": "f", "arguments": NESTED}), "tools", "nested"),
        (HERMES, turn(id=None), "messages.1.tool_calls.0.id", "required"),
        (HERMES, {"messages": [{**USER, **turn()["messages"][1], "role": "user"}]}, "messages.0.tool_calls", "only"),
    ],
)
async def test_what_cannot_be_done_is_a_400_that_says_why(
    template: str, fields: dict[str, Any], param: str, said: str
) -> None:
    backend = saying("x")
    status, answer = await post(codec_of(template), backend, **fields)
    assert status == 400, answer
    assert answer["error"]["param"] == param and said in answer["error"]["message"], answer
    assert not backend.requests


@pytest.mark.parametrize("template", [HERMES, PLAIN])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_nest_of_parameters_is_refused(template: str, choice: str) -> None:
    body = json.dumps(body_of(CHAT, **tool(parameters={"x": "NEST"}), tool_choice=choice)).replace('"NEST"', NESTED)
    async with client_of(build_app(saying("x"), codec_of(template), INFO)) as client:
        answer = await client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text


async def test_the_operator_may_say_how_a_model_calls() -> None:
    for template in (PLAIN, OTHER):
        backend = saying(f'[TOOL_CALLS][{{"name": "weather", "arguments": {PARIS}}}]')
        status, answer = await post(codec_of(template, "mistral"), backend, tools=TOOLS)
        assert status == 200, answer
        assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == CALLED


@pytest.mark.parametrize("template", [HERMES, PLAIN])
async def test_control_tokens_in_tools_are_treated_as_those_in_messages(template: str) -> None:
    fields = tool(description="<end>") | {"tool_choice": "required"}
    status, answer = await post(codec_of(template, control="refuse"), **fields)
    assert status == 400 and answer["error"]["param"] == "tools" and "<end>" in answer["error"]["message"]
    backend = saying(CALL)
    status, _ = await post(codec_of(template, control="text"), backend, **fields)
    assert status == 200 and 256 not in backend.requests[0].prompt_token_ids
