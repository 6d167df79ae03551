"""What a body may not hold: a refusal names the field, its value and the bound; what asks for nothing is accepted."""

from typing import Any

import orjson
import pytest

from deployments.api.calls import ModelNotFoundError, read_chat, read_completion
from deployments.api.text import TextCodec
from deployments.errors import InvalidRequestError, RequestTooLargeError
from tests.api.fakes import INFO, build_tokenizer
from tests.api.reading import CODEC, USER, chat, completion

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
    ("store", True),
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
        (chat, {"metadata": {"a": 1}}, "metadata.a", "valid string, got 1"),
        (chat, {"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16 items"),
        (completion, {"metadata": {"a": "x" * 513}}, "metadata.a", "at most 512 characters"),
        (completion, {"cache_salt": ""}, "cache_salt", "at least 1 character"),
        (completion, {"service_tier": "scale"}, "service_tier", "'flex' or 'priority', got 'scale'"),
        (completion, {"priority": 1, "service_tier": "flex"}, "priority", "give one of them"),
        (completion, {"priority": 0.5}, "priority", "valid integer"),
        (completion, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1 for as many"),
        (completion, {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than or equal to -1"),
        (completion, {"chat_template_kwargs": {}}, "chat_template_kwargs", "unknown field"),
        (chat, {"chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs", "does not read 'mood'; it reads: none"),
        (chat, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must not set 'messages'"),
        (completion, {"suffix": "x"}, "suffix", "suffix is not supported yet"),
        (completion, {"n": 0}, "n", "greater than or equal to 1, got 0"),
        (chat, {"n": 129}, "n", "less than or equal to 128, got 129"),
        (chat, {"n": True}, "n", "got true"),
        (completion, {"n": 100, "prompt": ["a"] * 11}, "n", "11 prompts times 100 are more than 1024 choices"),
        (completion, {"n": 3, "best_of": 2}, "best_of", "must be at least n, which is 3, got 2"),
        (completion, {"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        (chat, {"best_of": 2}, "best_of", "unknown field"),
        (completion, {"logprobs": 21}, "logprobs", "less than or equal to 20, got 21"),
        (completion, {"logprobs": True}, "logprobs", "got true"),
        (chat, {"logprobs": 1}, "logprobs", "valid boolean, got 1"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20, got 21"),
        (chat, {"top_logprobs": 1}, "top_logprobs", "only allowed with logprobs"),
        (chat, {"prompt_logprobs": -1}, "prompt_logprobs", "greater than or equal to 0, got -1"),
        (completion, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not with stream"),
        (completion, {"max_tokens": 0}, "max_tokens", "at least 1, or 0 with echo or prompt_logprobs"),
        (chat, {"functions": [{"name": "f"}]}, "functions", "not supported yet"),
        (chat, {"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        (chat, {"tool_choice": "auto"}, "tool_choice", "without tools"),
        (chat, {"messages": [USER | {"tool_calls": [{}]}]}, "messages.0.tool_calls.0.id", "required"),
        (completion, {"tempreature": 1}, "tempreature", "unknown field 'tempreature'"),
        (completion, {"tempreature": None}, "tempreature", "unknown field"),
        (completion, {"messages": [USER]}, "messages", "unknown field"),
        (chat, {"messages": [USER | {"colour": 1}]}, "messages.0.colour", "unknown field"),
        (completion, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        (completion, {"temperature": 2.5}, "temperature", "less than or equal to 2, got 2.5"),
        (completion, {"temperature": "hot"}, "temperature", "valid number, got 'hot'"),
        (completion, {"temperature": True}, "temperature", "got true"),
        (completion, {"top_p": -0.1}, "top_p", "greater than or equal to 0, got -0.1"),
        (completion, {"top_k": -2}, "top_k", "greater than or equal to -1, got -2"),
        (completion, {"min_p": 1.5}, "min_p", "less than or equal to 1, got 1.5"),
        (chat, {"presence_penalty": 2.1}, "presence_penalty", "less than or equal to 2, got 2.1"),
        (completion, {"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2, got -3"),
        (completion, {"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.1, got 0"),
        (completion, {"repetition_penalty": 11.0}, "repetition_penalty", "less than or equal to 10, got 11.0"),
        (completion, {"min_tokens": -1}, "min_tokens", "greater than or equal to 0, got -1"),
        (completion, {"min_tokens": 4, "max_tokens": 3}, "min_tokens", "at most the 3 tokens to generate, got 4"),
        (completion, {"logit_bias": {"257": 1}}, "logit_bias", "must be 0 to 256, got 257"),
        (completion, {"logit_bias": {"-1": 1}}, "logit_bias", "must have token ids for keys"),
        (completion, {"logit_bias": {"1": 100.5}}, "logit_bias", "must be numbers from -100 to 100"),
        (completion, {"logit_bias": {"1": "2"}}, "logit_bias", "must be numbers from -100 to 100"),
        (completion, {"logit_bias": [1]}, "logit_bias", "from token ids to numbers"),
        (chat, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024 token ids"),
        (chat, {"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
        (completion, {"max_tokens": -1}, "max_tokens", "greater than or equal to 0, got -1"),
        (completion, {"max_tokens": "9"}, "max_tokens", "valid integer, got '9'"),
        (completion, {"max_tokens": 2.0**64}, "max_tokens", "valid integer, got 1.8446744073709552e+19"),
        (completion, {"stop": [1, None]}, "stop", "got [1, null]"),
        (completion, {"seed": 2**63}, "seed", "got 9223372036854775808"),
        (completion, {"stream": "yes"}, "stream", "valid boolean, got 'yes'"),
        (completion, {"stop": ""}, "stop", "1 to 1024 characters, got ''"),
        (completion, {"stop": ["a", ""]}, "stop", "1 to 1024 characters"),
        (completion, {"stop": ["x"] * 33}, "stop", "at most 32"),
        (completion, {"stop": [1]}, "stop", "list of strings"),
        (completion, {"stop_token_ids": 5}, "stop_token_ids", "must be a list of token ids, got 5"),
        (completion, {"stop_token_ids": [True]}, "stop_token_ids", "must be a list of token ids"),
        (completion, {"stop_token_ids": ["5"]}, "stop_token_ids", "must be a list of token ids"),
        (completion, {"stop_token_ids": [5, 257]}, "stop_token_ids", "must be 0 to 256, got 257"),
        (completion, {"stop_token_ids": [-1]}, "stop_token_ids", "must be 0 to 256, got -1"),
        (completion, {"stop_token_ids": [5] * 129}, "stop_token_ids", "at most 128 token ids"),
        (chat, {"skip_special_tokens": "no"}, "skip_special_tokens", "valid boolean, got 'no'"),
        (completion, {"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream"),
        (completion, {"stream": True, "stream_options": 3}, "stream_options", "must be a JSON object, got 3"),
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
        (completion, {"model": 3}, "model", "valid string, got 3"),
        (chat, {"messages": []}, "messages", "at least 1 item"),
        (chat, {"messages": "hi"}, "messages", "valid list, got 'hi'"),
        (chat, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "got 'robot'"),
        (chat, {"messages": [{"role": "user"}]}, "messages.0.content", "messages.0.content is required"),
        (chat, {"messages": [{"role": "tool", "content": None}]}, "messages.0.content", "is required"),
        (chat, {"messages": [3]}, "messages.0", "must be a JSON object, got 3"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content", "string 'text'"),
        (chat, {"messages": [USER | {"refusal": "no"}]}, "messages.0.refusal", "in place of an assistant's content"),
        (
            chat,
            {"messages": [{"role": "assistant", "content": "yes", "refusal": "no"}]},
            "messages.0.refusal",
            "in place of an assistant's content",
        ),
        (
            chat,
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "cannot go with add_generation_prompt",
        ),
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
    with pytest.raises(RequestTooLargeError, match=r"60 prompt tokens and 5 to generate are 65.*64 tokens.*leaves 4"):
        completion(prompt="x" * 60, max_tokens=5)
    with pytest.raises(RequestTooLargeError, match=r"has 64 tokens.*64 tokens"):
        completion(prompt="x" * 64)
    with pytest.raises(RequestTooLargeError) as caught:
        chat(messages=[{"role": "user", "content": "x" * 70}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("read", "fields", "param"),
    [
        (completion, {"prompt": ["a", "x" * 70_000]}, "prompt"),
        (chat, {"messages": [USER, {"role": "user", "content": "x" * 65_535}]}, "messages"),
        (chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 70_000}]}]}, "messages"),
    ],
)
def test_a_text_that_fits_no_context_is_refused_before_it_is_encoded(
    read: Any, fields: dict[str, object], param: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TextCodec, "encode_chat", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(RequestTooLargeError, match=r"characters are too long.*64 tokens holds 65536") as caught:
        read(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("read", "field"), [(completion, "max_tokens"), (chat, "max_tokens"), (chat, "max_completion_tokens")]
)
def test_a_limit_that_is_too_large_is_blamed_and_not_the_prompt(read: Any, field: str):
    with pytest.raises(RequestTooLargeError, match=f"for {field}") as caught:
        read(**{field: 1000})
    assert caught.value.param == field


def test_a_template_that_writes_too_much_for_the_context_is_ended_before_it_is_encoded():
    codec = TextCodec(build_tokenizer("{{ messages[0].content * 20000 }}"))
    body = orjson.dumps({"model": INFO.name, "messages": [{"role": "user", "content": "long"}]})
    with pytest.raises(RequestTooLargeError, match="more than 65536 characters"):
        read_chat(body, "chatcmpl-1", codec, INFO)


def test_another_model_is_not_found():
    with pytest.raises(ModelNotFoundError, match="'gpt-9' does not exist"):
        completion(model="gpt-9")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a": NaN}', b'"\\ud800"', b"[1]", b"null", b"[" * 5000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes):
    with pytest.raises(InvalidRequestError, match="the body"):
        read_completion(body, "cmpl-1", CODEC, INFO)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", r"^the body: must be a JSON object, got \[\]$"),
        (b"null", r"^the body: must be a JSON object, got null$"),
        (b"false", r"^the body: must be a JSON object, got false$"),
        (b"\x1f\x8b\x08\x00", "^the body is not UTF-8 text: byte 0x8b at 1$"),
        (
            b'{"temperature": ' + b"1" * 400 + b"}",
            r"^the body holds a number that is out of range: '1+\.\.\.1+' at 16$",
        ),
        ('{"é": -1e999}'.encode(), r"^the body holds a number that is out of range: '-1e999' at 6$"),
    ],
)
def test_a_body_that_is_refused_whole_says_what_is_wrong_with_it(body: bytes, message: str):
    with pytest.raises(InvalidRequestError, match=message):
        read_completion(body, "cmpl-1", CODEC, INFO)
