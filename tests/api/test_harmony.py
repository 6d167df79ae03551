"""Answers in the format of gpt-oss, over a scripted backend: read, shown in OpenAI's shapes, and held to grammars."""

import json
from functools import cache
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tokenizers import AddedToken

from deployments.api.harmony import MARKERS, HarmonyCount, HarmonyRules, read_tokens
from deployments.api.harmony_reader import HarmonyReader
from deployments.api.http import build_app
from deployments.api.openapi import describe_api
from deployments.api.reasoning.parser import Thought
from deployments.api.text import TextCodec
from deployments.api.tools.families import HARMONY
from deployments.api.tools.parser import CallArguments, CallBegin, Content
from deployments.api.tools.rules import ToolRules
from deployments.errors import UnsupportedModelError
from deployments.grammars import Vocabulary
from deployments.messages import FinishReason, Grammar, ModelInfo
from tests.api.fakes import CHAT, FakeBackend, Step, body_of, build_codec, build_tokenizer, client_of, playing, serving

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
RESPONSES = "/v1/responses"
IDS = {marker: 257 + number for number, marker in enumerate(MARKERS)}
ENDS = (IDS["<|return|>"], IDS["<|call|>"])
INFO = ModelInfo("fake/model", "", max_model_len=4096, vocab_size=264, eos_token_ids=ENDS)
# Reduced to what it does with a conversation; written for these tests.
TEMPLATE = (
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}<|end|>{% if tools %}<|start|>developer"
    "<|message|>{% for t in tools %}type {{ t.function.name }};{% endfor %}<|end|>{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}{% if m.content and m.thinking %}{{ raise_exception('not both') }}"
    "{% endif %}{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json"
    "<|message|>{{ f.arguments | tojson }}<|call|>{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final"
    "<|message|>{{ m.content }}{% if not loop.last or add_generation_prompt %}<|end|>{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
PARIS = '{"city": "Paris"}'
THOUGHT = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>Look: <|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{PARIS}"
CALL_BY_ROLE = f" to=functions.weather<|channel|>commentary json<|message|>{PARIS}"
API = json.loads(json.dumps(describe_api()["components"]))


@cache
def codec_of(template: str = TEMPLATE) -> TextCodec:
    tokenizer = build_tokenizer(template)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in MARKERS])
    codec = TextCodec(tokenizer)
    assert {marker: codec.backend.token_to_id(marker) for marker in MARKERS} == IDS
    return codec


def encode(text: str) -> list[int]:
    return codec_of().encode(text, add_special_tokens=False)


def saying(text: str, end: str = "<|return|>", step: int = 1) -> FakeBackend:
    """A backend whose outputs are of so many tokens."""
    ids = encode(text)
    steps: list[Step] = [ids[start : start + step] for start in range(0, len(ids), step)]
    return playing(*steps, [IDS[end]], STOP)


def rules() -> HarmonyRules:
    tokens = read_tokens(codec_of().backend)
    assert tokens is not None
    return HarmonyRules(tokens, tuple(b"analysis"))


def read(pieces: list[str], *, is_body: bool = False) -> dict[str, Any]:
    tools = ToolRules(HARMONY, frozenset({"weather"}), None, None, frozenset(), are_alone=False)
    reader = HarmonyReader(HarmonyRules(rules().tokens, (), is_body), tools)
    parts = [part for piece in pieces for part in reader.read(piece, is_last=False)] + [*reader.read("", is_last=True)]
    return {
        "thought": "".join(part.text for part in parts if isinstance(part, Thought)),
        "content": "".join(part.text for part in parts if isinstance(part, Content)),
        "calls": [part.name for part in parts if isinstance(part, CallBegin)],
        "arguments": "".join(part.text for part in parts if isinstance(part, CallArguments)),
    }


def expect(thought: str = "", content: str = "", calls: tuple[str, ...] = (), arguments: str = "") -> dict[str, Any]:
    return {"thought": thought, "content": content, "calls": list(calls), "arguments": arguments}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{THOUGHT}{FINAL}Hello.", expect("Let me see.", "Hello.")),
        (f"{THOUGHT}{THOUGHT}{FINAL}Hi", expect("Let me see.\nLet me see.", "Hi")),
        (f"{THOUGHT}{PREAMBLE}{CALL}", expect("Let me see.", "Look: ", ("weather",), PARIS)),
        (CALL_BY_ROLE, expect("", "", ("weather",), PARIS)),
        (f"{CALL}<|call|>", expect("", "", ("weather",), PARIS)),
        (CALL.replace(PARIS, ""), expect("", "", ("weather",), "{}")),
        (CALL.replace("weather", "other"), expect("", PARIS)),
        ("<|channel|>analysis to=python<|message|>x", expect("", "x")),
        (f"{FINAL}a < b <| c <|x|>", expect("", "a < b <| c <|x|>")),
        ("<|channel|>analysis<|message|>So", expect("So")),
        ("<|channel|>anal", expect()),
        ("Hello, I know no headers.", expect("", "Hello, I know no headers.")),
        ("<|", expect("", "<|")),
        ("to be", expect("", "to be")),
        ("", expect()),
    ],
)
def test_messages_are_told_apart_by_their_headers(text: str, expected: dict[str, Any]) -> None:
    assert read([text]) == expected == read([*text])


def test_an_answer_that_goes_on_with_a_message_begins_within_it() -> None:
    assert read(["lo.<|end|>"], is_body=True) == expect("", "lo.")


PIECES = st.lists(
    st.sampled_from(
        [*MARKERS, "analysis", "final", "commentary", " to=functions.weather", "assistant", "{", "<", "|", "a"]
    ),
    max_size=14,
)


@given(PIECES)
def test_it_does_not_matter_how_a_text_is_cut(pieces: list[str]) -> None:
    text = "".join(pieces)
    assert read([text]) == read(pieces) == read([*text])


@given(st.sampled_from([f"{THOUGHT}{FINAL}Hi", f"{THOUGHT}{PREAMBLE}{CALL}", FINAL, CALL]), st.integers(1, 9))
def test_thoughts_are_counted_by_token_however_outputs_are_cut(text: str, step: int) -> None:
    count, ids = HarmonyCount(rules()), encode(text)
    for start in range(0, len(ids), step):
        count.add(ids[start : start + step], "")
    thought = THOUGHT.removesuffix("<|start|>assistant")
    assert count.num_tokens == (len(encode(thought)) if text.startswith(THOUGHT) else 0)


async def post(backend: FakeBackend, path: str = CHAT, **fields: Any) -> Any:
    body = body_of(CHAT, **fields) if path == CHAT else {"input": "hi"} | fields
    async with client_of(build_app(backend, codec_of(), INFO)) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("step", [1, 7])
async def test_openais_client_gets_thoughts_text_and_calls_whole_and_streamed(step: int) -> None:
    backend = saying(f"{THOUGHT}{PREAMBLE}{CALL}", "<|call|>", step)
    asked: Any = {"model": INFO.name, "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, CLOCK]}
    async with (
        serving(build_app(backend, codec_of(), INFO)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        whole = (await client.chat.completions.create(**asked)).choices[0]
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        (call,) = whole.message.tool_calls or []
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
        await client.chat.completions.create(**asked | {"messages": [*asked["messages"], whole.message, result]})
    message: Any = whole.message
    assert (message.reasoning_content, message.content, whole.finish_reason) == ("Let me see.", "Look: ", "tool_calls")
    assert call.type == "function" and (call.function.name, call.function.arguments) == ("weather", PARIS)
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Let me see."
    assert "".join(delta.content or "" for delta in deltas) == "Look: "
    pieces = [piece.function for delta in deltas for piece in delta.tool_calls or []]
    assert pieces[0].name == "weather" and "".join(piece.arguments or "" for piece in pieces) == PARIS
    prompt = codec_of().backend.decode(list(backend.requests[-1].prompt_token_ids), skip_special_tokens=False)
    thinking = "<|start|>assistant<|channel|>analysis<|message|>Let me see.\nLook: <|end|>"
    assert f"{thinking}<|start|>assistant{CALL_BY_ROLE}<|call|>" in prompt and prompt.endswith("<|start|>assistant")


async def test_each_of_several_calls_of_a_turn_is_shown_and_what_it_gave_behind_it() -> None:
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in ("weather", "clock")
    ]
    results = [{"role": "tool", "tool_call_id": name, "content": f"of {name}"} for name in ("clock", "weather")]
    turn = [{"role": "assistant", "content": "Look:", "tool_calls": calls}, *results]
    messages = [{"role": "user", "content": "hi"}, *turn, {"role": "user", "content": "so?"}]
    backend = saying(f"{FINAL}x")
    assert (await post(backend, messages=messages, tools=[WEATHER, CLOCK])).status_code == 200
    prompt = codec_of().backend.decode(list(backend.requests[-1].prompt_token_ids), skip_special_tokens=False)
    places = [prompt.index(text) for text in ("to=functions.weather", "of weather", "to=functions.clock", "of clock")]
    assert places == sorted(places) and prompt.count("<|call|>") == 2


async def test_responses_have_items_of_thoughts_text_and_calls() -> None:
    answer = (await post(saying(f"{THOUGHT}{FINAL}Hello."), RESPONSES)).json()
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["output"][1]["content"][0]["text"] == "Hello."
    num_thought = len(encode(THOUGHT.removesuffix("<|start|>assistant")))
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == num_thought
    Draft202012Validator({"$ref": "#/components/schemas/Response", "components": API}).validate(answer)
    called = (await post(saying(CALL, "<|call|>"), RESPONSES, tools=[{"type": "function", "name": "weather"}])).json()
    assert [item["type"] for item in called["output"]] == ["function_call"]


async def test_an_effort_goes_to_the_template() -> None:
    backend = saying(f"{FINAL}x")
    assert (await post(backend, reasoning_effort="high")).status_code == 200
    assert "Reasoning: high" in codec_of().backend.decode(list(backend.requests[0].prompt_token_ids))


async def test_a_message_that_goes_on_is_read_as_its_body() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hel"}]
    answer = await post(saying("lo."), messages=messages, continue_final_message=True)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "lo."


def allowed(grammar: Grammar, text: str) -> bool:
    """Whether a text is a whole answer, by either end."""
    guide = vocabulary().compile(grammar)
    for token in [*encode(text), ENDS[0]]:
        mask = guide.mask()
        if not mask[token // 8] >> token % 8 & 1:
            return False
        if token not in ENDS:
            guide.take([token])
    return bool(mask[ENDS[1] // 8] >> ENDS[1] % 8 & 1)


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(codec_of().backend.to_str(), INFO.vocab_size, ENDS)


FORM: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
BAD = CALL.replace(PARIS, "{}")
ANY = CALL.replace("weather", "clock").replace(PARIS, '{"x": [1]}')


@pytest.mark.parametrize(
    ("fields", "good", "wrong"),
    [
        (
            {"tools": [WEATHER, CLOCK]},
            [f"{THOUGHT}{FINAL}Hi", f"{FINAL}", CALL, CALL_BY_ROLE, f"{THOUGHT}{PREAMBLE}{CALL}", ANY],
            [BAD, f"{THOUGHT}{BAD}", f"{CALL}<|end|><|start|>assistant{CALL}", CALL.replace("weather", "x"), "Hi"],
        ),
        (
            {"tools": [WEATHER, CLOCK], "tool_choice": "required"},
            [CALL, f"{THOUGHT}{PREAMBLE}{CALL}"],
            [f"{FINAL}Hi", f"{THOUGHT}{FINAL}Hi", BAD],
        ),
        ({"response_format": FORM}, [f"{FINAL}{PARIS}", f"{THOUGHT}{FINAL}{PARIS}"], [PARIS, f"{FINAL}x", CALL]),
        (
            {"response_format": FORM, "tools": [WEATHER]},
            [f"{THOUGHT}{FINAL}{PARIS}", f"{THOUGHT}{CALL}"],
            [f"{PREAMBLE}{CALL}", f"{FINAL}x", BAD],
        ),
    ],
)
async def test_grammars_hold_what_is_said_and_called_behind_the_thoughts(
    fields: dict[str, Any], good: list[str], wrong: list[str]
) -> None:
    backend = saying(f"{FINAL}x")
    answer = await post(backend, **fields)
    assert answer.status_code == 200, answer.text
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None
    assert [text for text in good if not allowed(grammar, text)] == []
    assert [text for text in wrong if allowed(grammar, text)] == []


async def test_a_marker_that_is_written_as_text_is_not_let_through() -> None:
    backend = saying(f"{FINAL}x")
    await post(backend, tools=[WEATHER])
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None
    guide = vocabulary().compile(grammar)
    guide.take([*encode(FINAL), *b"a<|end|"])
    assert not guide.mask()[ord(">") // 8] >> ord(">") % 8 & 1


def test_a_tokenizer_without_the_markers_cannot_be_told_to_write_harmony() -> None:
    with pytest.raises(UnsupportedModelError, match="harmony"):
        TextCodec(build_tokenizer(), tool_parser="harmony")
    assert build_codec().reasoning.rules([1]) is None
