"""Thoughts in chats and responses, over a scripted backend: told from answers, passed back, and asked for."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import AddedToken

from deployments.api.answer_grammar import build_grammar
from deployments.api.http import build_app
from deployments.api.openapi import describe_api
from deployments.api.reasoning.parser import Thought, ThoughtParser, ThoughtRules
from deployments.api.reasoning.support import ReasoningParserName
from deployments.api.text import TextCodec
from deployments.api.tools.parser import Content
from deployments.grammars import Vocabulary
from deployments.messages import FinishReason, Grammar, ModelInfo
from tests.api.fakes import (
    CHAT,
    END_ID,
    FakeBackend,
    Step,
    body_of,
    build_codec,
    build_tokenizer,
    client_of,
    events_of,
    playing,
    serving,
)

RESPONSES = "/v1/responses"
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
OPEN, CLOSE = 257, 258
INFO = ModelInfo("fake/model", "", max_model_len=4096, vocab_size=259, eos_token_ids=(END_ID,))
TURNS = (
    "{% for t in tools or [] %}{{ t.function.name }}<tool_call>{% endfor %}{% for m in messages %}{{ m.role[0] }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }};{% endfor %}a:"
)
# As Qwen 3's, DeepSeek R1's and one that reads an effort do.
QWEN = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
DEEPSEEK = TURNS + "<think>\n"
GRADED = TURNS + "{{ reasoning_effort }}:"
PLAIN = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
THINKING = "<think>\nLet me see.\n</think>\n\n"
WEATHER: Any = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
API = json.loads(json.dumps(describe_api()["components"]))


def codec_of(template: str, parser: ReasoningParserName = "auto") -> TextCodec:
    tokenizer = build_tokenizer(template)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return TextCodec(tokenizer, reasoning_parser=parser)


def saying(*steps: Step) -> FakeBackend:
    return playing(*steps, [END_ID], STOP)


def prompt_of(backend: FakeBackend, codec: TextCodec) -> str:
    return codec.backend.decode(list(backend.requests[-1].prompt_token_ids), skip_special_tokens=False)


async def post(codec: TextCodec, backend: FakeBackend, path: str = CHAT, **fields: Any) -> Any:
    body = body_of(CHAT, **fields) if path == CHAT else {"input": "hi"} | fields
    async with client_of(build_app(backend, codec, INFO)) as client:
        return await client.post(path, json=body)


@asynccontextmanager
async def client_for(codec: TextCodec, backend: FakeBackend) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(build_app(backend, codec, INFO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def read(pieces: list[str], rules: ThoughtRules) -> tuple[str, str]:
    parser = ThoughtParser(rules)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.flush()
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    return thought, "".join(part.text for part in parts if isinstance(part, Content))


PIECES = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", "th", "ink>", " ", "\n", "a", "b", ""]), max_size=12
)


@given(PIECES, st.booleans())
def test_it_does_not_matter_how_a_text_is_cut(pieces: list[str], is_open: bool) -> None:
    rules = ThoughtRules("<think>", "</think>", is_open)
    assert read(pieces, rules) == read(["".join(pieces)], rules) == read([*"".join(pieces)], rules)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nSo.\n</think>\n\nYes.", False, ("So.", "Yes.")),
        ("So.\n</think>\n\nYes.", True, ("So.", "Yes.")),
        ("Yes, <think>no</think>.", False, ("", "Yes, <think>no</think>.")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("<think>So </thin", False, ("So </thin", "")),
        ("  Yes.", False, ("", "  Yes.")),
        ("<think>a</think>b</think>c", False, ("a", "b</think>c")),
        ("<thi", False, ("", "<thi")),
    ],
)
def test_thoughts_stand_at_the_beginning_alone(text: str, is_open: bool, expected: tuple[str, str]) -> None:
    assert read([text], ThoughtRules("<think>", "</think>", is_open)) == expected


@pytest.mark.parametrize(
    ("template", "steps"),
    [
        (QWEN, [[OPEN], "\nLet me", " see.\n", [CLOSE], "\n\nHello."]),
        (DEEPSEEK, ["Let me", " see.\n", [CLOSE], "\n\nHello."]),
        (QWEN, [*f"{THINKING}Hello."]),
    ],
)
async def test_openais_client_gets_thoughts_apart_from_the_answer(template: str, steps: list[Any]) -> None:
    backend = saying(*steps)
    asked: Any = {"model": INFO.name, "messages": [{"role": "user", "content": "hi"}]}
    async with client_for(codec_of(template), backend) as client:
        whole = await client.chat.completions.create(**asked)
        options: Any = {"include_usage": True}
        chunks = [
            chunk async for chunk in await client.chat.completions.create(**asked, stream=True, stream_options=options)
        ]
        await client.chat.completions.create(**asked | {"messages": [whole.choices[0].message, *asked["messages"]]})
    message: Any = whole.choices[0].message
    assert (message.reasoning_content, message.content) == ("Let me see.", "Hello.")
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
    assert "".join(delta.content or "" for delta in deltas) == "Hello."
    assert whole.usage == chunks[-1].usage and whole.usage is not None
    if len(steps) < 10:  # markers are tokens: they are counted with the thought
        details = whole.usage.completion_tokens_details
        num_thought = len("Let me see.\n") + 1 + (2 if template is QWEN else 0)
        assert details is not None and details.reasoning_tokens == num_thought
    assert "a:<think>Let me see.</think>Hello.;" in prompt_of(backend, codec_of(template))


async def test_calls_follow_thoughts() -> None:
    answer = (await post(codec_of(QWEN), saying(*THINKING, "Look. ", *CALL), tools=[WEATHER])).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "Look.")
    assert message["tool_calls"][0]["function"]["name"] == "weather"
    Draft202012Validator({"$ref": "#/components/schemas/ChatCompletion", "components": API}).validate(answer)


OBJECT: Any = {"response_format": {"type": "json_object"}}
FORCED: Any = {"tools": [WEATHER], "tool_choice": "required"}
STRICT: Any = {"tools": [{"type": "function", "function": {"name": "weather", "strict": True}}]}


@pytest.mark.parametrize("fields", [OBJECT, FORCED, STRICT])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_form_or_a_forced_call_comes_behind_the_thoughts(fields: dict[str, Any], is_streamed: bool) -> None:
    text = "{}" if "response_format" in fields else CALL
    answer = await post(codec_of(DEEPSEEK), saying("So. {}", [CLOSE], f"\n\n{text}"), **fields, stream=is_streamed)
    if is_streamed:
        messages = [event["choices"][0]["delta"] for event in events_of(answer.content) if event != "[DONE]"]
    else:
        messages = [answer.json()["choices"][0]["message"]]
    assert "".join(message.get("reasoning_content", "") for message in messages) == "So. {}"
    assert "".join(message.get("content") or "" for message in messages) == ("{}" if text == "{}" else "")
    assert any("tool_calls" in message for message in messages) is (text == CALL)


THOUGHT: Any = [OPEN, *b"\nSo. {} <tool_call>\n", CLOSE]
NOT_THINKING: Any = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("fields", [OBJECT, FORCED, STRICT])
@pytest.mark.parametrize(
    ("template", "parser", "more", "good", "wrong"),
    [
        (
            QWEN,
            "auto",
            {},
            [[], THOUGHT, [OPEN, CLOSE], [*THOUGHT, *b"\n\n"]],
            [THOUGHT[1:], THOUGHT + THOUGHT, THOUGHT[:-1]],
        ),
        (QWEN, "auto", NOT_THINKING, [[]], [THOUGHT, THOUGHT[1:]]),
        (DEEPSEEK, "auto", {}, [THOUGHT[1:], [CLOSE]], [[], THOUGHT]),
        (PLAIN, "auto", {}, [[]], [THOUGHT]),
        (PLAIN, "none", {}, [[]], [THOUGHT]),
    ],
)
async def test_the_grammar_of_an_answer_begins_behind_its_thoughts(
    template: str,
    parser: ReasoningParserName,
    more: dict[str, Any],
    good: list[list[int]],
    wrong: list[list[int]],
    fields: dict[str, Any],
) -> None:
    codec, backend = codec_of(template, parser), saying("x")
    if template is PLAIN and fields is STRICT:
        return  # a model that knows no tools is forced to call alone
    assert (await post(codec, backend, **fields, **more)).status_code == 200
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None
    said, bad = ([*b"{}"], [*b"[]"]) if fields is OBJECT else ([*CALL.encode()], [*CALL.replace("{}", "[]").encode()])
    assert [lead for lead in good if not allowed(codec, grammar, [*lead, *said])] == []
    assert [lead for lead in good if allowed(codec, grammar, [*lead, *bad])] == []
    assert [lead for lead in wrong if allowed(codec, grammar, [*lead, *said])] == []


def allowed(codec: TextCodec, grammar: Grammar, tokens: list[int]) -> bool:
    """Whether tokens are a whole answer."""
    guide = vocabulary_of(codec.backend.to_str()).compile(grammar)
    for token in [*tokens, END_ID]:
        if not guide.mask()[token // 8] >> token % 8 & 1:
            return False
        if token != END_ID:
            guide.take([token])
    return True


@cache
def vocabulary_of(tokenizer: str) -> Vocabulary:
    return Vocabulary(tokenizer, INFO.vocab_size, INFO.eos_token_ids)


@pytest.mark.parametrize("is_open", [False, True])
def test_thoughts_whose_markers_are_no_tokens_end_with_their_text(is_open: bool) -> None:
    form = Grammar("start: /[0-9]+/", (END_ID,), "regex")
    grammar = build_grammar(form, None, ThoughtRules("<think>", "</think>", is_open), (END_ID,))
    codec, opening = build_codec(), "" if is_open else "<think>"
    assert grammar is not None
    assert allowed(codec, grammar, [*f"{opening} 1 <think> </think>\n12".encode()])
    assert allowed(codec, grammar, [*b"12"]) is not is_open
    assert not allowed(codec, grammar, [*f"{opening}</think>a".encode()])


@pytest.mark.parametrize(
    ("template", "parser", "is_told"),
    [(QWEN, "auto", True), (QWEN, "none", False), (PLAIN, "auto", False), (PLAIN, "think", True)],
)
async def test_the_template_says_whether_a_model_thinks_or_the_operator_does(
    template: str, parser: ReasoningParserName, is_told: bool
) -> None:
    answer = (await post(codec_of(template, parser), saying(f"{THINKING}Hello."))).json()
    message = answer["choices"][0]["message"]
    assert ("reasoning_content" in message) is is_told
    assert message["content"] == ("Hello." if is_told else f"{THINKING}Hello.")
    assert ("completion_tokens_details" in answer["usage"]) is is_told


@pytest.mark.parametrize(
    ("template", "effort", "end"),
    [
        (QWEN, "none", "a:<think>\n\n</think>\n\n"),
        (QWEN, None, "a:"),
        (GRADED, "high", "a:high:"),
        (GRADED, "none", "a:none:"),
    ],
)
async def test_an_effort_goes_to_a_template_that_reads_it(template: str, effort: str | None, end: str) -> None:
    codec = codec_of(template)
    for path, fields in ((CHAT, {"reasoning_effort": effort}), (RESPONSES, {"reasoning": {"effort": effort}})):
        backend = saying("Hello.")
        answer = await post(codec, backend, path, **fields)
        assert answer.status_code == 200, answer.text
        assert prompt_of(backend, codec).endswith(f"hi;{end}")


@pytest.mark.parametrize(
    ("template", "fields", "param", "said"),
    [
        (PLAIN, {"reasoning_effort": "low"}, "reasoning_effort", "does not read it"),
        (QWEN, {"reasoning_effort": "high"}, "reasoning_effort", "but 'none'"),
        (QWEN, {"reasoning_effort": "much"}, "reasoning_effort", "'none'"),
        (
            QWEN,
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            "reasoning_effort",
            "'enable_thinking'",
        ),
        (
            QWEN,
            {"messages": [{"role": "user", "content": "a", "reasoning_content": "b"}]},
            "messages.0.reasoning_content",
            "only",
        ),
    ],
)
async def test_what_cannot_be_done_is_a_400_that_says_why(
    template: str, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = await post(codec_of(template), saying("x"), **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and said in answer.json()["error"]["message"]


async def test_errors_of_responses_name_their_own_field() -> None:
    answer = await post(codec_of(PLAIN), saying("x"), RESPONSES, reasoning={"effort": "low"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "reasoning.effort"
    item = {"type": "reasoning", "summary": [], "encrypted_content": "?"}
    answer = await post(codec_of(QWEN), saying("x"), RESPONSES, input=[item, {"role": "user", "content": "x"}])
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "input.0.encrypted_content"


@pytest.mark.parametrize("keeps", ["content", "encrypted_content"])
async def test_thoughts_are_items_of_responses_and_come_back_as_such(keeps: str) -> None:
    codec, backend = codec_of(QWEN), saying([OPEN], "\nLet me", " see.\n", [CLOSE], "\n\nHello.")
    async with client_for(codec, backend) as client:
        asked: Any = {"model": INFO.name, "input": "hi", "include": ["reasoning.encrypted_content"]}
        async with client.responses.stream(**asked) as stream:
            events = [event.type async for event in stream]
            answer = await stream.get_final_response()
        thought = answer.output[0].to_dict()
        other = "encrypted_content" if keeps == "content" else "content"
        kept: Any = {**thought, other: None}
        again: Any = [{"role": "user", "content": "hi"}, kept, answer.output[1], {"role": "user", "content": "go on"}]
        await client.responses.create(model=INFO.name, input=again)
    assert answer.output_text == "Hello." and thought["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
    assert events.count("response.reasoning_text.delta") == 2 and events.count("response.reasoning_text.done") == 1
    assert answer.usage is not None and answer.usage.output_tokens_details.reasoning_tokens == 15
    assert "u:hi;a:<think>Let me see.</think>Hello.;u:go on;" in prompt_of(backend, codec)


async def test_a_thought_that_was_cut_off_is_an_incomplete_item() -> None:
    answer = (await post(codec_of(QWEN), playing("<think>Let me", LENGTH), RESPONSES)).json()
    (item,) = answer["output"]
    assert (item["type"], item["status"], answer["status"]) == ("reasoning", "incomplete", "incomplete")
    Draft202012Validator({"$ref": "#/components/schemas/Response", "components": API}).validate(answer)
