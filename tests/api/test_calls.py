"""What a body means: defaults, limits, and a refusal that names the field for everything else."""

from typing import Any

import orjson
import pytest

from deployments.api.calls import Call, ModelNotFoundError, read_chat, read_completion
from deployments.api.choices import TextRules
from deployments.errors import InvalidRequestError, RequestTooLargeError
from tests.api.fakes import END_ID, INFO, build_codec

CODEC = build_codec()
USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> Call:
    body = {"model": INFO.name, "prompt": "abc"} | fields
    return read_completion(orjson.dumps(body), "cmpl-1", CODEC, INFO)


def chat(**fields: Any) -> Call:
    body = {"model": INFO.name, "messages": [USER]} | fields
    return read_chat(orjson.dumps(body), "chatcmpl-1", CODEC, INFO)


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


NO_OPS = {
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "logprobs": False,
    "response_format": {"type": "text"},
    "stop": None,
    "temperature": None,
    "seed": None,
    "stream_options": None,
    "user": "someone",
}


@pytest.mark.parametrize("field", NO_OPS)
def test_a_value_that_asks_for_nothing_is_accepted(field: str):
    assert len(completion(**{field: NO_OPS[field]}).requests) == 1
    assert len(chat(**{field: NO_OPS[field]}).requests) == 1


def test_the_endpoints_own_no_ops_are_accepted():
    completion(echo=False, best_of=1, suffix=None, logprobs=None)
    chat(tools=[], tool_choice="none", top_logprobs=None, parallel_tool_calls=True, logprobs=False)


UNSUPPORTED: list[tuple[str, object]] = [
    ("n", 2),
    ("n", True),
    ("presence_penalty", 0.5),
    ("frequency_penalty", -1),
    ("logit_bias", {"5": 1}),
    ("logprobs", True),
    ("response_format", {"type": "json_object"}),
    ("metadata", {"a": "b"}),
    ("min_tokens", 3),
]


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED)
@pytest.mark.parametrize("read", [completion, chat])
def test_an_unsupported_field_is_refused_by_name(read: Any, field: str, value: object):
    with pytest.raises(InvalidRequestError, match=f"^{field} is not supported yet$") as caught:
        read(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("read", "fields", "param", "message"),
    [
        (completion, {"echo": True}, "echo", "echo is not supported yet"),
        (completion, {"logprobs": 0}, "logprobs", "not supported yet"),
        (completion, {"best_of": 2}, "best_of", "not supported yet"),
        (chat, {"tools": [{"type": "function"}]}, "tools", "not supported yet"),
        (chat, {"tool_choice": "auto"}, "tool_choice", "not supported yet"),
        (chat, {"messages": [USER | {"tool_calls": [{}]}]}, "messages.0.tool_calls", "not supported yet"),
        (completion, {"tempreature": 1}, "tempreature", "unknown field 'tempreature'"),
        (completion, {"tempreature": None}, "tempreature", "unknown field"),
        (completion, {"messages": [USER]}, "messages", "unknown field"),
        (chat, {"messages": [USER | {"colour": 1}]}, "messages.0.colour", "unknown field"),
        (completion, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        (completion, {"temperature": 2.5}, "temperature", "less than or equal to 2, got 2.5"),
        (completion, {"temperature": "hot"}, "temperature", "valid number, got 'hot'"),
        (completion, {"temperature": True}, "temperature", "got True"),
        (completion, {"top_p": 0}, "top_p", "greater than 0, got 0"),
        (completion, {"top_k": -2}, "top_k", "greater than or equal to -1, got -2"),
        (completion, {"min_p": 1.5}, "min_p", "less than or equal to 1, got 1.5"),
        (completion, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
        (completion, {"max_tokens": "9"}, "max_tokens", "valid integer, got '9'"),
        (completion, {"seed": 2**63}, "seed", "got 9223372036854775808"),
        (completion, {"stream": "yes"}, "stream", "valid boolean, got 'yes'"),
        (completion, {"stop": ""}, "stop", "1 to 1024 characters, got ''"),
        (completion, {"stop": ["a", ""]}, "stop", "1 to 1024 characters"),
        (completion, {"stop": list("abcde")}, "stop", "at most 4"),
        (completion, {"stop": [1]}, "stop", "list of strings"),
        (completion, {"stop_token_ids": 5}, "stop_token_ids", "must be a list of token ids, got 5"),
        (completion, {"stop_token_ids": [True]}, "stop_token_ids", "must be a list of token ids"),
        (completion, {"stop_token_ids": ["5"]}, "stop_token_ids", "must be a list of token ids"),
        (completion, {"stop_token_ids": [5, 257]}, "stop_token_ids", "must be 0 to 256, got 257"),
        (completion, {"stop_token_ids": [-1]}, "stop_token_ids", "must be 0 to 256, got -1"),
        (completion, {"stop_token_ids": [5] * 129}, "stop_token_ids", "at most 128 token ids"),
        (chat, {"skip_special_tokens": "no"}, "skip_special_tokens", "valid boolean, got 'no'"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream"),
        (
            completion,
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options",
            "needs include_usage",
        ),
        (completion, {"prompt": ""}, "prompt", "must not be empty"),
        (completion, {"prompt": []}, "prompt", "must not be empty"),
        (completion, {"prompt": ["a", ""]}, "prompt", "must not be empty"),
        (completion, {"prompt": [[97], []]}, "prompt", "must not be empty"),
        (completion, {"prompt": None}, "prompt", "prompt is required"),
        (completion, {"prompt": {"a": 1}}, "prompt", "must be a string"),
        (completion, {"prompt": ["a", 1]}, "prompt", "must be a string"),
        (completion, {"prompt": [True]}, "prompt", "must be a string"),
        (completion, {"prompt": [257]}, "prompt", "must be 0 to 256, got 257"),
        (completion, {"prompt": [-1]}, "prompt", "must be 0 to 256, got -1"),
        (completion, {"prompt": ["a"] * 1025}, "prompt", "at most 1024 prompts"),
        (completion, {"model": None}, "model", "model is required"),
        (chat, {"messages": []}, "messages", "at least 1 item"),
        (chat, {"messages": "hi"}, "messages", "valid list, got 'hi'"),
        (chat, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "got 'robot'"),
        (chat, {"messages": [{"role": "user"}]}, "messages.0.content", "is required"),
        (chat, {"messages": [USER, {"role": "user", "content": 3}]}, "messages.1.content", "valid string, got 3"),
        (
            chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "'image_url' is not supported",
        ),
        (chat, {"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content", "without a type"),
        (chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools here"),
        (chat, {"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one of them"),
    ],
)
def test_a_faulty_field_is_refused_with_its_name_its_value_and_the_bound(
    read: Any, fields: dict[str, object], param: str, message: str
):
    with pytest.raises(InvalidRequestError) as caught:
        read(**fields)
    assert caught.value.param == param
    assert message in str(caught.value)


def test_a_huge_faulty_value_is_not_repeated_whole():
    with pytest.raises(InvalidRequestError) as caught:
        completion(temperature="x" * 100_000)
    assert len(str(caught.value)) < 200


def test_what_does_not_fit_the_context_is_refused_with_the_numbers():
    with pytest.raises(RequestTooLargeError, match=r"60 prompt tokens and 5 to generate are 65.*64 tokens"):
        completion(prompt="x" * 60, max_tokens=5)
    with pytest.raises(RequestTooLargeError, match=r"has 64 tokens.*64 tokens"):
        completion(prompt="x" * 64)
    with pytest.raises(RequestTooLargeError) as caught:
        chat(messages=[{"role": "user", "content": "x" * 70}])
    assert caught.value.param == "messages"


def test_another_model_is_not_found():
    with pytest.raises(ModelNotFoundError, match="'gpt-9' does not exist"):
        completion(model="gpt-9")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a": NaN}', b'"\\ud800"', b"[1]", b"null", b"[" * 5000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes):
    with pytest.raises(InvalidRequestError, match="the body"):
        read_completion(body, "cmpl-1", CODEC, INFO)
