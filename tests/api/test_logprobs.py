"""Logprobs, `echo` and prompts that are scored, in both endpoints' shapes, whole and streamed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
import pytest

from deployments.api import calls
from deployments.api.text import TextCodec
from deployments.messages import FinishReason
from tests.api.fakes import CHAT, COMPLETIONS, END_ID, FakeBackend, events_of, logprob_of, playing, post
from tests.api.tokenizer_kinds import build_byte_level, build_gemma, build_llama, build_unigram

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP


async def whole(path: str, backend: FakeBackend, **fields: Any) -> Any:
    answer = await post(backend, path, **fields)
    assert answer.status_code == 200, answer.text
    return orjson.loads(answer.content)


async def streamed(path: str, backend: FakeBackend, **fields: Any) -> list[Any]:
    answer = await post(backend, path, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    return [event for event in events_of(answer.content) if event != "[DONE]"]


async def test_a_chat_has_a_logprob_per_token_with_the_likeliest_beside_it() -> None:
    answer = await whole(CHAT, playing("ab", LENGTH), logprobs=True, top_logprobs=2)
    first = {
        "token": "a",
        "logprob": logprob_of(97),
        "bytes": [97],
        "top_logprobs": [
            {"token": "\x00", "logprob": logprob_of(0), "bytes": [0]},
            {"token": "\x01", "logprob": logprob_of(1), "bytes": [1]},
        ],
    }
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["content"][0] == first and logprobs["refusal"] is None
    assert [token["token"] for token in logprobs["content"]] == ["a", "b"]


async def test_a_chat_without_top_logprobs_has_those_of_its_tokens_alone() -> None:
    answer = await whole(CHAT, playing("ab", LENGTH), logprobs=True)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [(t["token"], t["top_logprobs"]) for t in content] == [("a", []), ("b", [])]
    assert (await whole(CHAT, playing("ab", LENGTH)))["choices"][0]["logprobs"] is None


async def test_tokens_that_are_part_of_a_character_are_told_as_bytes() -> None:
    steps = playing([0xF0, 0x9F], [0x91, 0x8B], LENGTH)
    chat = (await whole(CHAT, steps, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in chat for byte in token["bytes"]).decode() == "👋"
    completion = (await whole(COMPLETIONS, steps, logprobs=0))["choices"][0]["logprobs"]
    assert completion["tokens"] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x91", "bytes:\\x8b"]
    assert completion["text_offset"] == [0, 0, 0, 0]


async def test_a_completion_has_lists_of_them() -> None:
    answer = await whole(COMPLETIONS, playing("ab", LENGTH), logprobs=1)
    assert answer["choices"][0]["logprobs"] == {
        "text_offset": [0, 1],
        "tokens": ["a", "b"],
        "token_logprobs": [logprob_of(97), logprob_of(98)],
        "top_logprobs": [
            {"\x00": logprob_of(0), "a": logprob_of(97)},
            {"\x00": logprob_of(0), "b": logprob_of(98)},
        ],
    }
    assert (await whole(COMPLETIONS, playing("ab", LENGTH), logprobs=0))["choices"][0]["logprobs"][
        "top_logprobs"
    ] is None
    assert (await whole(COMPLETIONS, playing("ab", LENGTH)))["choices"][0]["logprobs"] is None


async def test_chunks_bring_each_token_once_also_while_there_is_no_text() -> None:
    steps = playing([0xF0, 0x9F], [0x91, 0x8B], [ord("a")], LENGTH)
    chunks = await streamed(CHAT, steps, logprobs=True)
    content = [token for chunk in chunks for token in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [byte for token in content for byte in token["bytes"]] == [*"👋a".encode()]
    completions = [chunk["choices"][0]["logprobs"] for chunk in await streamed(COMPLETIONS, steps, logprobs=1)]
    assert [len(part["tokens"]) for part in completions] == [2, 2, 1]
    assert [offset for part in completions for offset in part["text_offset"]] == [0, 0, 0, 0, 1]


async def test_tokens_behind_a_stop_string_have_no_logprobs() -> None:
    answer = await whole(CHAT, playing("abcd", LENGTH), logprobs=True, stop="c")
    assert [t["token"] for t in answer["choices"][0]["logprobs"]["content"]] == ["a", "b", "c"]
    answer = await whole(CHAT, playing("ab", [END_ID], STOP), logprobs=True)
    assert [t["token"] for t in answer["choices"][0]["logprobs"]["content"]] == ["a", "b", "<end>"]


async def test_echo_puts_the_prompt_before_the_text() -> None:
    answer = await whole(COMPLETIONS, playing("de", LENGTH), prompt=["abc", "xé"], echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["abcde", "xéde"]
    answer = await whole(COMPLETIONS, playing("de", LENGTH), prompt=[97, 98, END_ID], echo=True, stop="c")
    assert answer["choices"][0]["text"] == "abde" and answer["usage"]["completion_tokens"] == 2
    chunks = await streamed(COMPLETIONS, playing("d", "e", LENGTH), echo=True)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["abcd", "e"]


@pytest.mark.parametrize("stops", [[], ["z"]], ids=["no stop", "a stop"])
async def test_a_character_that_an_echoed_prompt_leaves_unfinished_comes_once_and_whole(stops: list[str]) -> None:
    *prompt, last = "né".encode()
    fields = {"prompt": prompt, "echo": True, "stop": stops}
    answer = await whole(COMPLETIONS, playing([last, ord("e")], LENGTH), **fields)
    assert answer["choices"][0]["text"] == "née"
    chunks = await streamed(COMPLETIONS, playing([last], "e", LENGTH), **fields)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "née"
    answer = await whole(COMPLETIONS, playing("e", LENGTH), **fields)
    assert answer["choices"][0]["text"] == "n\N{REPLACEMENT CHARACTER}e", "it is never finished"
    answer = await whole(COMPLETIONS, playing("e", LENGTH), **fields, max_tokens=0)
    assert answer["choices"][0]["text"] == "n\N{REPLACEMENT CHARACTER}"


async def test_a_stop_string_is_not_looked_for_in_an_echoed_prompt() -> None:
    answer = await whole(COMPLETIONS, playing("de", LENGTH), prompt="abc", echo=True, stop=["b", "cd"])
    assert answer["choices"][0]["text"] == "abcde"


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_echo_with_logprobs_scores_the_prompt_as_well(is_streamed: bool) -> None:
    backend = playing("de", LENGTH)
    if is_streamed:
        (chunk,) = await streamed(COMPLETIONS, backend, prompt="abc", echo=True, logprobs=1)
        logprobs = chunk["choices"][0]["logprobs"]
    else:
        logprobs = (await whole(COMPLETIONS, backend, prompt="abc", echo=True, logprobs=1))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "d", "e"] and logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"] == [None, *map(logprob_of, b"bcde")]
    assert logprobs["top_logprobs"][:2] == [None, {"\x00": logprob_of(0), "b": logprob_of(98)}]


async def test_a_prompt_alone_is_scored_with_max_tokens_0() -> None:
    """As lm-eval asks for likelihoods, but that it generates one token, which it then drops."""
    backend = playing("d", LENGTH)
    answer = await whole(COMPLETIONS, backend, prompt=[[97, 98], [97]], echo=True, logprobs=1, max_tokens=0)
    assert [request.sampling.max_tokens for request in backend.requests] == [1, 1]
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "a"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]] == [[None, logprob_of(98)], [None]]
    assert answer["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_have_vllms_form() -> None:
    expected = [
        None,
        {
            "98": {"logprob": logprob_of(98), "rank": 99, "decoded_token": "b"},
            "0": {"logprob": logprob_of(0), "rank": 1, "decoded_token": "\x00"},
        },
    ]
    answer = await whole(COMPLETIONS, playing("d", LENGTH), prompt="ab", prompt_logprobs=1)
    choice = answer["choices"][0]
    assert choice["prompt_logprobs"] == expected and (choice["text"], choice["logprobs"]) == ("d", None)
    answer = await whole(COMPLETIONS, playing("d", LENGTH), prompt="ab", prompt_logprobs=1, max_tokens=0)
    assert answer["choices"][0]["prompt_logprobs"] == expected and answer["choices"][0]["text"] == ""
    answer = await whole(CHAT, playing("d", LENGTH), prompt_logprobs=0)
    assert len(answer["prompt_logprobs"]) == len("u:hi;a:")
    assert "prompt_logprobs" not in await whole(CHAT, playing("d", LENGTH))


async def test_a_prompts_logprobs_are_as_many_as_each_field_asks_for() -> None:
    fields = {"prompt": "ab", "echo": True, "logprobs": 1, "prompt_logprobs": 3}
    choice = (await whole(COMPLETIONS, playing("d", LENGTH), **fields))["choices"][0]
    assert [len(place) for place in choice["logprobs"]["top_logprobs"][1:]] == [2, 2]
    assert len(choice["prompt_logprobs"][1]) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": True, "logprobs": 1, "prompt": "abcd"}, "logprobs"),
        ({"prompt_logprobs": 1, "prompt": "abcd"}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "prompt": ["abc"] * 4}, "prompt_logprobs"),
    ],
)
async def test_more_logprobs_of_prompts_than_are_sent_are_a_400(
    fields: dict[str, Any], param: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MAX_PROMPT_SCORES", 6)
    monkeypatch.setattr(calls, "MAX_CALL_SCORES", 18)
    answer = await post(playing("d", LENGTH), COMPLETIONS, **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert "at most 6 may be of one prompt and 18 of a call" in answer.json()["error"]["message"]
    await whole(COMPLETIONS, playing("d", LENGTH), prompt=["abc"] * 3, prompt_logprobs=1)


KINDS: dict[str, Callable[[], TextCodec]] = {
    "byte level": build_byte_level,
    "llama": partial(build_llama, legacy=False),
    "gemma": build_gemma,
    "unigram": partial(build_unigram, "always"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_texts_of_tokens_alone_make_the_text(kind: str) -> None:
    codec, text = KINDS[kind](), "hello a cat and \u00e9 \U0001f44b"
    token_ids = codec.encode(text)
    added = codec.backend.get_added_tokens_decoder()
    shown = [codec.detokenizers.text_of(token_id) for token_id in token_ids if token_id not in added]
    detokenizer = codec.detokenizers.build()
    assert b"".join(shown).decode().strip() == (detokenizer.push(token_ids) + detokenizer.flush()).strip()
