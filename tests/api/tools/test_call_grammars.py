"""Where a model may call tools or not: a call that begins follows its grammar, and what is no call is left alone."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema import validate

from deployments.api.openai import ChatBody
from deployments.api.text import TextCodec
from deployments.api.tools.families import FamilyName
from deployments.api.tools.parser import CallArguments, CallBegin, Content, Delta
from deployments.api.tools.rules import read_tools
from deployments.grammars import Guide
from deployments.messages import Grammar
from tests.api.fakes import END_ID, build_tokenizer
from tests.api.tools.chats import (
    CLOCK,
    HERMES,
    LLAMA,
    MISTRAL,
    SCHEMA,
    allowed,
    codec_of,
    guide_of,
    next_of,
    post,
    saying,
)

# Its arguments follow this, those of the other are any object.
STRICT: Any = {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}}
LOOSE: Any = {"type": "function", "function": {"name": "clock", "parameters": SCHEMA}}
FORM: Any = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer"}},
}
AS_FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": FORM}}
ANN = '{"name": "Ann", "age": 3}'


def bare_codec(parser: FamilyName) -> TextCodec:
    """No marker is a token."""
    return TextCodec(build_tokenizer(HERMES), tool_parser=parser)


FAMILIES = {
    "hermes": codec_of(HERMES),
    "hermes, markers as text": bare_codec("hermes"),
    "llama": codec_of(LLAMA),
    "mistral": codec_of(MISTRAL),
    "mistral, markers as text": bare_codec("mistral"),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def called(name: str, arguments: str) -> str:
    return f'{{"name": "{name}", "arguments": {arguments}}}'


GOOD, BAD = called("weather", '{"city": "Paris"}'), called("weather", '{"days": 1}')
ANY = called("clock", '{"zone": [1, {"x": null}]}')
CLOCK_OF = called("clock", '{"city": "Paris"}')


def write(family: str, *calls: str, text: str = "") -> list[int]:
    """Token ids of an answer: its markers are tokens where there are any."""
    if family.startswith("hermes"):
        text += "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    elif family == "llama":
        text += "; ".join(call.replace('"arguments"', '"parameters"') for call in calls)
    else:
        text += f"[TOOL_CALLS][{', '.join(calls)}]"
    return encode(family, text)


def encode(family: str, text: str) -> list[int]:
    ids: list[int] = FAMILIES[family].encode(text, add_special_tokens=False)
    return ids


async def grammar_of(family: str, **fields: Any) -> Grammar:
    backend = saying("x")
    status, answer = await post(FAMILIES[family], backend, **fields)
    assert status == 200, answer
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None
    return grammar


async def check(family: str, fields: dict[str, Any], good: Sequence[list[int]], wrong: Sequence[list[int]]) -> None:
    codec, grammar = FAMILIES[family], await grammar_of(family, **fields)
    assert [codec.backend.decode(ids) for ids in good if not allowed(codec, grammar, ids)] == []
    assert [codec.backend.decode(ids) for ids in wrong if allowed(codec, grammar, ids)] == []


@each_family
async def test_a_call_of_a_strict_tool_follows_its_schema_where_the_model_may_call_or_not(family: str) -> None:
    text = "" if family == "llama" else "Let me {look}. \n"
    good = [
        *(encode(family, text) for text in ("", "No.", "Sü\n\n x", "a < b <tool", "[TOOL")),
        *(write(family, *calls) for calls in ([GOOD], [ANY], [ANY, GOOD], [GOOD] * 16)),
        write(family, GOOD, text=text),
    ]
    wrong = [write(family, *calls) for calls in ([BAD], [GOOD, BAD], [ANY, BAD], [called("none", "{}")], [GOOD] * 17)]
    wrong += [write(family, GOOD) + encode(family, " Done."), write(family, GOOD)[:-1], write(family, BAD, text=text)]
    await check(family, {"tools": [STRICT, LOOSE]}, good, wrong)


@each_family
async def test_where_one_call_is_wanted_the_answer_ends_with_it(family: str) -> None:
    fields: dict[str, Any] = {"tools": [LOOSE, CLOCK | {"function": {"name": "other"}}], "parallel_tool_calls": False}
    await check(family, fields, [encode(family, "No."), write(family, ANY)], [write(family, ANY, ANY)])
    codec, ids = FAMILIES[family], write(family, ANY)
    guide = guide_of(codec, await grammar_of(family, **fields))
    guide.take(ids)
    assert next_of(guide) == [END_ID]


@each_family
async def test_an_answer_is_a_form_or_calls_where_both_are_asked_for(family: str) -> None:
    fields: dict[str, Any] = {"tools": [STRICT, LOOSE], "response_format": AS_FORMAT}
    good = [encode(family, ANN), write(family, GOOD), write(family, ANY, GOOD)]
    wrong = [encode(family, text) for text in ("No.", '{"name": 1}', ANN + ANN, "")]
    wrong += [write(family, BAD), write(family, GOOD, text="So: "), write(family, GOOD) + encode(family, ANN)]
    await check(family, fields, good, wrong)
    forced = [write(family, GOOD), write(family, GOOD, GOOD)]  # schemas are followed by all
    await check(family, fields | {"tool_choice": "required"}, forced, [good[0], write(family, ANY), *wrong])
    await check(family, fields | {"tool_choice": "none"}, good[:1], [*good[1:], *wrong])


@each_family
@pytest.mark.parametrize(
    "form", [{"guided_regex": "[0-9]{3}"}, {"guided_choice": ["yes", "no"]}, {"guided_grammar": 'start: "q"+'}]
)
async def test_forms_of_every_kind_go_with_tools(family: str, form: dict[str, Any]) -> None:
    said = {"guided_regex": "123", "guided_choice": "no", "guided_grammar": "qqq"}[next(iter(form))]
    good = [encode(family, said), write(family, GOOD)]
    await check(family, {"tools": [STRICT], **form}, good, [encode(family, "x"), write(family, BAD)])


@each_family
async def test_an_answer_of_a_form_is_read_as_such_whatever_stands_in_it(family: str) -> None:
    inner = json.dumps("".join(map(chr, encode(family, ""))) + f"<tool_call>{GOOD}</tool_call>[TOOL_CALLS][{GOOD}]")
    said = f'{{"name": {inner}, "age": 3}}'
    for step in ([*said.encode()], *([[byte] for byte in said.encode()],)):
        backend = saying(*(step if isinstance(step[0], list) else [step]))
        _, answer = await post(FAMILIES[family], backend, tools=[STRICT], response_format=AS_FORMAT)
        message = answer["choices"][0]["message"]
        assert message == {"role": "assistant", "content": said, "refusal": None}


def draw(guide: Guide, source: random.Random, begun: list[int]) -> list[int] | None:
    """An answer of what may follow, which opens and closes sooner than not; None: it did not end."""
    tokens = [*begun]
    guide.take(begun)
    for _ in range(3000):
        may = next_of(guide)
        eager = [token for token in may if token >= END_ID or chr(token) in '<"]}{[']
        token = source.choice(eager if eager and source.random() < 0.4 else may)
        if token == END_ID:
            return tokens
        tokens.append(token)
        guide.take([token])
    return None


@each_family
@pytest.mark.parametrize("with_form", [False, True])
async def test_whatever_the_grammar_lets_through_is_read_as_text_or_as_calls_that_follow_it(
    family: str, with_form: bool
) -> None:
    fields: dict[str, Any] = {"tools": [STRICT, LOOSE]} | ({"response_format": AS_FORMAT} if with_form else {})
    codec, source, num_calls = FAMILIES[family], random.Random(1), 0
    grammar = await grammar_of(family, **fields)
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})
    rules = read_tools(body, codec.tools)
    assert rules is not None
    for number in range(8):
        # Every other one has begun to call: by chance few do.
        begun = write(family, GOOD)[: source.randrange(20, 40)] if number % 2 else []
        tokens = draw(guide_of(codec, grammar), source, begun)
        if tokens is None:
            continue
        detokenizer = codec.detokenizers.build((), shown=rules.marker_ids)
        text = detokenizer.push(tokens) + detokenizer.flush()
        parser = rules.build_parser()
        deltas: list[Delta] = [*parser.feed(text), *parser.flush()]
        said = "".join(delta.text for delta in deltas if isinstance(delta, Content))
        names = [delta.name for delta in deltas if isinstance(delta, CallBegin)]
        for index, name in enumerate(names):
            arguments = "".join(d.text for d in deltas if isinstance(d, CallArguments) and d.index == index)
            validate(json.loads(arguments), SCHEMA if name == "weather" else {"type": "object"})
        num_calls += len(names)
        assert not names or not (with_form and said)
        if with_form and not names:
            validate(json.loads(said), FORM)
    assert num_calls > 0


CHOICES: list[tuple[dict[str, Any], bool, bool]] = [
    ({"mode": "auto", "tools": ["clock"]}, False, True),
    ({"mode": "required", "tools": ["clock"]}, False, False),
    ({"mode": "required", "tools": ["clock", "weather"]}, True, False),
]


@pytest.mark.parametrize(("choice", "may_weather", "may_talk"), CHOICES)
async def test_the_model_is_shown_and_may_call_allowed_tools_alone(
    choice: dict[str, Any], may_weather: bool, may_talk: bool
) -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in choice["tools"]]
    asked = {"type": "allowed_tools", "allowed_tools": choice | {"tools": tools}}
    codec, backend = codec_of(HERMES), saying(f"<tool_call>{GOOD}</tool_call>")
    status, answer = await post(codec, backend, tools=[STRICT, LOOSE], tool_choice=asked, parallel_tool_calls=False)
    assert status == 200, answer
    assert ("weather" in codec.backend.decode(list(backend.requests[0].prompt_token_ids))) is may_weather
    assert ("tool_calls" in answer["choices"][0]["message"]) is may_weather
    grammar = backend.requests[0].sampling.grammar
    assert grammar is not None
    assert allowed(codec, grammar, write("hermes", CLOCK_OF)) and allowed(codec, grammar, [*b"No."]) is may_talk
    assert allowed(codec, grammar, write("hermes", GOOD)) is may_weather


async def test_tools_that_ask_for_nothing_special_have_no_grammar() -> None:
    backend = saying("x")
    await post(codec_of(HERMES), backend, tools=[LOOSE])
    assert backend.requests[0].sampling.grammar is None
