"""What a body means: defaults, limits, and what reaches the engine of each field."""

from typing import Any

import orjson
import pytest

from deployments.api.call import Call
from deployments.api.calls import read_chat
from deployments.api.choices import TextRules
from deployments.api.text import TextCodec
from deployments.errors import InvalidRequestError
from deployments.messages import Adjustments, Priority
from tests.api.fakes import END_ID, INFO, build_tokenizer
from tests.api.reading import USER, chat, completion


def test_a_completion_has_openais_defaults():
    call = completion()
    (request,) = call.requests
    assert (request.request_id, request.prompt_token_ids) == ("cmpl-1-0", tuple(b"abc"))
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        16,
        1,
        1,
        0,
        0,
    )
    assert sampling.stop_token_ids == (END_ID,)
    assert (call.stream, call.include_usage, call.text) == (False, False, TextRules(continues_prompt=True))


def test_every_sampling_field_reaches_the_engine():
    call = completion(temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=-7, max_tokens=3, stop="x", ignore_eos=True)
    sampling = call.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.stop_token_ids) == (-7, 3, ())
    assert call.text.stops == ("x",)


@pytest.mark.parametrize("read", [completion, chat])
def test_what_changes_logits_reaches_the_engine_only_where_it_was_asked_for(read: Any):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {}}
    assert read(**neutral, min_tokens=0).requests[0].sampling.adjustments is None
    call = read(
        presence_penalty=0.5,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": 1, "9": -2.5},
        min_tokens=3,
        max_tokens=9,
    )
    wanted = Adjustments(((5, 1.0), (9, -2.5)), 1.1, 0.5, -1.0, 3)
    assert call.requests[0].sampling.adjustments == wanted and call.text.min_tokens == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop_token_ids": [5, 0]}, (END_ID, 5, 0)),
        ({"stop_token_ids": [5, END_ID, 5]}, (END_ID, 5)),
        ({"stop_token_ids": [5], "ignore_eos": True}, (5,)),
        ({"stop_token_ids": [END_ID], "ignore_eos": True}, (END_ID,)),
        ({"stop_token_ids": []}, (END_ID,)),
        ({"stop_token_ids": None}, (END_ID,)),
    ],
)
@pytest.mark.parametrize("read", [completion, chat])
def test_stop_ids_that_were_asked_for_stop_besides_the_models_own(
    read: Any, fields: dict[str, object], expected: tuple[int, ...]
):
    assert read(**fields).requests[0].sampling.stop_token_ids == expected


def test_how_tokens_become_text_is_part_of_the_call():
    fields = {"stop": ["x", "y"], "include_stop_str_in_output": True, "skip_special_tokens": False}
    for read, continues_prompt in ((completion, True), (chat, False)):
        assert read(**fields).text == TextRules(
            continues_prompt, ("x", "y"), include_stop=True, skip_special_tokens=False
        )


def test_top_k_minus_one_is_off():
    assert completion(top_k=-1).requests[0].sampling.top_k == 0


def test_without_a_seed_each_prompt_draws_its_own():
    seeds = {request.sampling.seed for request in completion(prompt=["a"] * 8).requests}
    assert len(seeds) == 8
    assert {request.sampling.seed for request in completion(prompt=["a"] * 8, seed=3).requests} == {3}


def test_a_chat_without_a_limit_may_use_what_is_left_of_the_context():
    (request,) = chat().requests
    assert bytes(request.prompt_token_ids) == b"u:hi;a:"
    assert request.sampling.max_tokens == INFO.max_model_len - len(b"u:hi;a:")


def test_a_completions_default_shrinks_to_what_is_left_of_the_context():
    assert completion(prompt="x" * 60).requests[0].sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98, 99]], [(97,), (98, 99)]),
    ],
)
def test_prompts_come_in_four_forms(prompt: object, expected: list[tuple[int, ...]]):
    assert [request.prompt_token_ids for request in completion(prompt=prompt).requests] == expected


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert bytes(chat(messages=[{"role": "user", "content": parts}]).requests[0].prompt_token_ids) == b"u:hi;a:"


def prompt_of(call: Call) -> bytes:
    return bytes(call.requests[0].prompt_token_ids)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}},
        {"type": "refusal", "refusal": "hi"},
        {"type": "input_text", "text": "hi"},
        {"type": "output_text", "text": "hi", "annotations": []},
    ],
)
def test_a_part_is_its_text_whatever_else_it_holds(part: dict[str, object]):
    assert prompt_of(chat(messages=[{"role": "user", "content": [part]}])) == b"u:hi;a:"


@pytest.mark.parametrize(
    ("fields", "text"),
    [({}, b""), ({"content": None}, b""), ({"content": None, "refusal": "no"}, b"no"), ({"content": []}, b"")],
)
def test_an_assistants_turn_may_be_empty_or_a_refusal(fields: dict[str, object], text: bytes):
    messages = [USER, {"role": "assistant"} | fields, USER]
    assert prompt_of(chat(messages=messages)) == b"u:hi;a:" + text + b";u:hi;a:"


def test_the_developer_speaks_as_the_system_to_a_template_that_knows_no_developer():
    assert prompt_of(chat(messages=[{"role": "developer", "content": "x"}])) == b"s:x;a:"


def test_the_caller_says_whether_the_last_message_goes_on():
    messages = [USER, {"role": "assistant", "content": "Well"}]
    assert prompt_of(chat(messages=messages)) == b"u:hi;a:Well;a:"
    assert prompt_of(chat(messages=messages, add_generation_prompt=False)) == b"u:hi;a:Well;"
    for fields in ({}, {"add_generation_prompt": False}):
        call = chat(messages=messages, continue_final_message=True, **fields)
        assert prompt_of(call) == b"u:hi;a:Well"
        assert call.text.continues_prompt, "what comes is read behind the message that it continues"


def test_a_top_p_of_zero_keeps_the_most_likely_token():
    sampling = completion(top_p=0, top_k=40).requests[0].sampling
    assert (sampling.top_k, sampling.top_p) == (1, 1)


@pytest.mark.parametrize("top_k", [INFO.vocab_size, 2**31, 2**53 + 1, 2**63 - 1, 2**64 - 1])
def test_a_top_k_of_the_whole_vocabulary_and_more_bounds_nothing(top_k: int):
    assert completion(top_k=top_k).requests[0].sampling.top_k == 0
    assert completion(top_k=INFO.vocab_size - 1).requests[0].sampling.top_k == INFO.vocab_size - 1


def test_more_stops_than_openais_four_are_taken():
    stops = [f"stop {number}" for number in range(32)]
    assert completion(stop=stops).text.stops == tuple(stops)


def test_either_name_limits_a_chat():
    for fields in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
        assert chat(**fields).requests[0].sampling.max_tokens == 5


def test_a_message_of_ours_can_be_sent_back():
    answer: dict[str, object] = {
        "role": "assistant",
        "content": "yo",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
    }
    assert bytes(chat(messages=[USER, answer, USER]).requests[0].prompt_token_ids) == b"u:hi;a:yo;u:hi;a:"


@pytest.mark.parametrize("read", [completion, chat])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Priority.HIGH),
        ({"service_tier": "auto"}, Priority.HIGH),
        ({"service_tier": "default"}, Priority.HIGH),
        ({"service_tier": "flex"}, Priority.LOW),
        ({"priority": 3}, Priority.LOW),
        ({"priority": 0}, Priority.NORMAL),
        ({"priority": -1, "service_tier": "auto"}, Priority.HIGH),
    ],
)
def test_a_body_says_how_urgent_it_is_else_the_header_does(read: Any, fields: dict[str, object], expected: Priority):
    assert read(**fields, header=Priority.HIGH).requests[0].priority is expected
    if not fields:
        assert read(service_tier="priority").requests[0].priority is Priority.HIGH


@pytest.mark.parametrize("read", [completion, chat])
def test_a_salt_and_a_cache_key_both_part_caches(read: Any):
    def salt(**fields: str) -> str:
        made: str = read(**fields).requests[0].cache_salt
        return made

    others = [
        {},
        {"cache_salt": "a"},
        {"prompt_cache_key": "a"},
        {"cache_salt": "a", "prompt_cache_key": "b"},
        {"cache_salt": "ab"},
        {"cache_salt": "a:b"},
        {"cache_salt": "1:ab"},
        {"prompt_cache_key": "ab"},
    ]
    assert len({salt(**fields) for fields in others}) == len(others)
    assert salt(prompt_cache_key="a") == salt(prompt_cache_key="a")
    assert salt() == salt(prompt_cache_key="") == ""


@pytest.mark.parametrize("read", [completion, chat])
def test_requests_of_one_cache_key_meet_and_those_of_a_salt_need_not(read: Any):
    assert all(request.gathers for request in read(prompt_cache_key="k", n=2).requests)
    assert not any(read(**fields).requests[0].gathers for fields in ({}, {"cache_salt": "k"}, {"prompt_cache_key": ""}))


@pytest.mark.parametrize("read", [completion, chat])
def test_what_callers_say_of_a_call_is_kept_for_the_log(read: Any):
    said = {"safety_identifier": "u1", "metadata": {"team": "a"}}
    assert read(**said, store=False).labels == said
    assert read(metadata=None).labels == {}


def test_a_prompt_is_truncated_to_its_last_tokens():
    assert completion(truncate_prompt_tokens=2).requests[0].prompt_token_ids == tuple(b"bc")
    assert completion(truncate_prompt_tokens=9).requests[0].prompt_token_ids == tuple(b"abc")
    assert bytes(chat(truncate_prompt_tokens=4).requests[0].prompt_token_ids) == b"i;a:"
    call = completion(prompt=["abcd", "x"], truncate_prompt_tokens=3, echo=True)
    assert call.prefixes == ("bcd", "x") and call.requests[0].prompt_token_ids == tuple(b"bcd")


def test_a_prompt_may_be_truncated_to_what_leaves_room_for_the_output():
    long = "x" * (INFO.max_model_len + 9)
    call = completion(prompt=long, truncate_prompt_tokens=-1, max_tokens=10)
    assert len(call.requests[0].prompt_token_ids) == INFO.max_model_len - 10
    assert (
        len(completion(prompt=long, truncate_prompt_tokens=-1).requests[0].prompt_token_ids) == INFO.max_model_len - 1
    )


def test_a_template_is_given_the_variables_that_it_reads():
    template = "{% if loud is defined and loud %}HEY {% endif %}{{ messages[0].content }}{{ bos_token }}"
    codec = TextCodec(build_tokenizer(template))
    body = {"model": INFO.name, "messages": [USER], "chat_template_kwargs": {"loud": True}}
    call = read_chat(orjson.dumps(body), "chatcmpl-1", codec, INFO)
    assert bytes(call.requests[0].prompt_token_ids) == b"HEY hi"
    wrong = orjson.dumps(body | {"chat_template_kwargs": {"quiet": True}})
    with pytest.raises(InvalidRequestError, match=r"does not read 'quiet'; it reads: bos_token, loud$"):
        read_chat(wrong, "chatcmpl-1", codec, INFO)
