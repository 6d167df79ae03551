"""Calls of tools in a model's text: however it is cut, the same is read of it, and what is no call stays text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.api.tools.families import HERMES, LLAMA_3, MISTRAL, Family
from deployments.api.tools.parser import CallArguments, CallBegin, Content, Delta, ToolParser

NAMES = ("f", "get_weather")
Read = tuple[str, list[tuple[str, str]]]


def gather(deltas: list[Delta]) -> Read:
    """All content, and each call's name and arguments."""
    content, calls = "", list[tuple[str, str]]()
    for delta in deltas:
        match delta:
            case Content(text):
                assert text
                content += text
            case CallBegin(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1 and text
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, calls


def read(family: Family, *pieces: str, max_calls: int | None = None) -> Read:
    parser = ToolParser(family, NAMES, max_calls)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.flush()
    content, calls = gather(deltas)
    assert parser.num_calls == len(calls)
    return content, calls


def written(family: Family, calls: list[tuple[str, Any]]) -> str:
    """As models of the family write calls."""
    objects = [json.dumps({"name": name, family.arguments: arguments}) for name, arguments in calls]
    if family is MISTRAL:
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    if family is LLAMA_3:
        return "; ".join(objects)
    return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)


# Those with markers around calls.
ALL = st.sampled_from([HERMES, LLAMA_3, MISTRAL])
PIECES = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    '{"name": "f", "arguments": {',
    '{"name": "f", "parameters": {}}',
    '{"arguments": {"a": "}"}, "name": "f"}',
    '"name": "get_weather"',
    '"a": "\\"}"',
    '"arguments": "{}"',
    *'{}[]",:;\\< \nx1',
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=12).map("".join)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8), st.sampled_from(PIECES)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=4), VALUES, max_size=3)), min_size=1
)


@given(ALL, TEXTS, st.lists(st.integers(0, 200), max_size=6))
def test_however_a_text_is_cut_the_same_is_read_of_it(family: Family, text: str, cuts: list[int]) -> None:
    whole = read(family, text)
    ends = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert read(family, *pieces) == read(family, *text) == whole
    if not whole[1]:
        assert whole[0] == text


@given(ALL, CALLS, st.sampled_from(["", "\n", " \n "]))
def test_what_a_family_writes_is_read_as_calls_and_nothing_else(
    family: Family, calls: list[tuple[str, Any]], around: str
) -> None:
    content, found = read(family, *(around + written(family, calls) + around))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@given(st.sampled_from([HERMES, MISTRAL]), CALLS)
def test_text_before_calls_is_content(family: Family, calls: list[tuple[str, Any]]) -> None:
    content, found = read(family, "Let me look. <x>\n" + written(family, calls))
    assert content == "Let me look. <x>" and len(found) == len(calls)


@given(ALL, CALLS, st.integers(1, 3))
def test_no_more_calls_are_read_than_are_wanted(family: Family, calls: list[tuple[str, Any]], most: int) -> None:
    text = written(family, calls)
    assert read(family, text, max_calls=most) == ("", read(family, text)[1][:most])


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        (HERMES, '<tool_call>{"name":"f","arguments":{}}</tool_call> Done.', ("Done.", [("f", "{}")])),
        (HERMES, '<tool_call>{"arguments":{"a":1},"name":"f"}</tool_call>', ("", [("f", '{"a":1}')])),
        (HERMES, '<tool_call>{"name":"f","arguments":"{\\"a\\":1}"}</tool_call>', ("", [("f", '{"a":1}')])),
        (HERMES, '<tool_call>{"id":1,"name":"f","arguments":{},"x":[{}]}</tool_call>', ("", [("f", "{}")])),
        (HERMES, '<tool_call>[{"name":"f","arguments":{}}]</tool_call>', ("", [("f", "{}")])),
        (HERMES, '<tool_call>{"name":"f","arguments":{"a": "x', ("", [("f", '{"a": "x')])),
        (HERMES, '<tool_call>{"name":"f","arguments":{}}</tool', ("", [("f", "{}")])),
        (HERMES, '<tool_call>{"name":"f","arguments":{}} and', ("and", [("f", "{}")])),
        (HERMES, '<tool_call><tool_call>{"name":"f","arguments":{}}', ("<tool_call>", [("f", "{}")])),
        (LLAMA_3, '<|python_tag|>{"name":"f","parameters":{}}', ("", [("f", "{}")])),
        (LLAMA_3, '{"type":"function","name":"f","parameters":{"a":[1]}}', ("", [("f", '{"a":[1]}')])),
        (LLAMA_3, '{"name":"f","parameters":{}}; {"name":"f","parameters":{}}', ("", [("f", "{}")] * 2)),
        (LLAMA_3, '{"name":"f","parameters":{}}\nwell', ("well", [("f", "{}")])),
        (MISTRAL, '[TOOL_CALLS] [{"name":"f","arguments":{}}]', ("", [("f", "{}")])),
        (MISTRAL, '[TOOL_CALLS]{"name":"f","arguments":{}}', ("", [("f", "{}")])),
    ],
)
def test_calls_are_read_leniently(family: Family, text: str, expected: Read) -> None:
    assert read(family, *text) == read(family, text) == expected


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (HERMES, '{"name":"f","arguments":{}}'),
        (HERMES, '<tool_call>{"name":"other","arguments":{}}</tool_call>'),
        (HERMES, '<tool_call>{"name":"f"}</tool_call>'),
        (HERMES, '<tool_call>{"name":"f","arguments":[]}</tool_call>'),
        (HERMES, "How do I write <tool_call> in Markdown?"),
        (LLAMA_3, '{"name":"Ada","parameters":{}}'),
        (LLAMA_3, 'Say: {"name":"f","parameters":{}}'),
        (MISTRAL, '[{"name":"f","arguments":{}}]'),
        (MISTRAL, "[TOOL_CALLS]"),
    ],
)
def test_what_is_no_call_is_content(family: Family, text: str) -> None:
    assert read(family, *text) == read(family, text) == (text, [])


def test_arguments_are_told_before_they_are_whole() -> None:
    parser = ToolParser(HERMES, NAMES)
    assert parser.feed('<tool_call>{"name": "f", "arguments": ') == []
    assert parser.feed('{"city": "Par') == [CallBegin(0, "f"), CallArguments(0, '{"city": "Par')]
    assert parser.feed('is"') == [CallArguments(0, 'is"')]
    assert parser.feed("}}") == [CallArguments(0, "}")]
    assert parser.feed("\n</tool_call>") == parser.flush() == []
