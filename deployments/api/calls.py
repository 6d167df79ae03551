"""From a request's body to a call: prompts as token ids that fit the model, and how to answer.

Owns what OpenAI's fields mean to the engines. Knows nothing of HTTP; `exchange.py` calls `read_completion` and
`read_chat`, in a thread where the body is long.
"""

import json
import re
import reprlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

import orjson
from pydantic import ValidationError

from deployments.api.answer_grammar import build_grammar
from deployments.api.call import Call
from deployments.api.choices import TextRules
from deployments.api.common_fields import TIERS
from deployments.api.json_bounds import check_containers
from deployments.api.openai import ChatBody, CompletionBody, GenerateBody, ModelBody
from deployments.api.sampling import check_ending, read_sampling, seed_of
from deployments.api.strict import explain
from deployments.api.text import TextCodec
from deployments.api.tools.rules import read_tools
from deployments.errors import InvalidRequestError, RequestTooLargeError
from deployments.messages import MAX_PROMPT_SCORES, GenerateRequest, ModelInfo, Priority

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
# The longest tokens of common vocabularies (Llama 3's, Qwen's) are runs of up to 128 spaces: a longer text fits no
# context and is not worth encoding. The smallest bound leaves room for the words of a chat template.
MAX_CHARACTERS_PER_TOKEN = 128
MIN_CHARACTERS = 2**16
# Logprobs of prompts: some megabytes of JSON, made in a second.
MAX_CALL_SCORES = 4 * MAX_PROMPT_SCORES
# What a caller may say of a call that changes nothing.
_LABELS = "safety_identifier", "metadata"
_LONG_NUMBER = re.compile(rb"\d{19}")
_TOO_LARGE_NUMBER = re.compile(r"-?\d[\d.eE+-]*")


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served here."""


B = TypeVar("B", bound=ModelBody)


def read_completion(
    data: bytes, call_id: str, codec: TextCodec, info: ModelInfo, priority: Priority = Priority.NORMAL
) -> Call:
    """Read the body of a completion request and encode its prompts; all are of this priority, unless it says another.

    Raises:
        InvalidRequestError: names the field, its value and the bound.
    """
    body = parse_body(data, CompletionBody, info)
    requests: list[GenerateRequest] = []
    prefixes: list[str] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            check_length(len(prompt), "prompt", info)
        given = codec.encode(prompt) if isinstance(prompt, str) else prompt
        token_ids = _truncate(given, body, body.max_tokens, info)
        num_left = _check_prompt(token_ids, "prompt", info)
        max_tokens = min(DEFAULT_COMPLETION_TOKENS, num_left) if body.max_tokens is None else body.max_tokens
        request = _build_request(
            f"{call_id}-{len(requests)}", token_ids, max(1, max_tokens), body, "max_tokens", info, priority
        )
        if body.echo and body.logprobs is not None:
            request = replace(request, num_prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
        requests += _build_samples(request, call_id, len(requests), body.num_samples)
        prefix = _prompt_text(prompt if len(token_ids) == len(given) else token_ids, codec, body) if body.echo else ""
        prefixes += [prefix] * body.num_samples
    return _build_call(call_id, requests, body, info, tuple(prefixes))


def read_chat(
    data: bytes, call_id: str, codec: TextCodec, info: ModelInfo, priority: Priority = Priority.NORMAL
) -> Call:
    """Read the body of a chat request, apply the template and encode the result.

    Raises:
        InvalidRequestError: names the field, its value and the bound.
        TemplateLimitError: with `codec.brief`: the template takes longer than an event loop may wait.
    """
    return build_chat(parse_body(data, ChatBody, info), call_id, codec, info, priority)


def build_chat(body: ChatBody, call_id: str, codec: TextCodec, info: ModelInfo, priority: Priority) -> Call:
    """What `read_chat` makes of a body."""
    check_length(sum(message.num_characters for message in body.messages), "messages", info)
    rules = read_tools(body, codec.tools)
    encoded = codec.encode_chat(
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.opens_turn,
        continue_final_message=body.continue_final_message,
        max_characters=max_characters(info),
        variables=_variables(body, codec),
        tools=[tool.for_template() for tool in body.offered_tools],
    )
    token_ids = _truncate(encoded, body, body.max_completion_tokens or body.max_tokens, info)
    num_left = _check_prompt(token_ids, "messages", info)
    max_tokens = body.max_completion_tokens or body.max_tokens or num_left
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    request = _build_request(f"{call_id}-0", token_ids, max_tokens, body, limit, info, priority)
    thoughts = codec.reasoning.rules(token_ids)
    form, calls = request.sampling.grammar, None if rules is None else rules.grammar
    grammar = build_grammar(form, calls, thoughts, info.eos_token_ids)
    if grammar is not form:
        check_ending(body, grammar)
        request = replace(request, sampling=replace(request.sampling, grammar=grammar))
    call = _build_call(call_id, _build_samples(request, call_id, 0, body.num_samples), body, info)
    if thoughts is not None:
        call = replace(call, thoughts=thoughts, text=replace(call.text, shown_specials=thoughts.marker_ids))
    if rules is None:
        return call
    return replace(
        call, tools=rules, text=replace(call.text, shown_specials=call.text.shown_specials | rules.marker_ids)
    )


def _variables(body: ChatBody, codec: TextCodec) -> Mapping[str, object]:
    """For the chat template."""
    ours = codec.reasoning.variables(body.reasoning_effort)
    for name in ours:
        if name in body.chat_template_kwargs:
            message = f"reasoning_effort cannot go with {name!r} in chat_template_kwargs"
            raise InvalidRequestError(message, "reasoning_effort")
    return body.chat_template_kwargs | ours


def parse_body(data: bytes, kind: type[B], info: ModelInfo) -> B:
    """Read a body's JSON and check its fields.

    Raises:
        InvalidRequestError: names the field, its value and the bound.
    """
    check_containers(data)
    try:
        fields = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(_explain_json(data, error)) from None
    try:
        body = _check_fields(fields, data, kind)
    except ValidationError as error:
        raise explain(error) from None
    if body.model not in (None, info.name):
        raise ModelNotFoundError(f"the model {reprlib.repr(body.model)} does not exist; {info.name!r} does", "model")
    return body


def _check_fields(fields: object, data: bytes, kind: type[B]) -> B:
    try:
        return kind.model_validate(fields)
    except ValidationError:
        # orjson makes a float of an integer of more than 64 bits: not what was written, and no integer to pydantic.
        if not _LONG_NUMBER.search(data):
            raise
        with suppress(RecursionError):  # of what is nested too deep for this reader
            fields = json.loads(data)
        return kind.model_validate(fields)


def _explain_json(data: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        data.decode()
    except UnicodeDecodeError as fault:
        return f"the body is not UTF-8 text: byte 0x{data[fault.start]:02x} at {fault.start}"
    if number := _TOO_LARGE_NUMBER.match(error.doc, error.pos):
        return f"the body holds a number that is out of range: {reprlib.repr(number[0])} at {error.pos}"
    return f"the body is not valid JSON: {error}"


def max_characters(info: ModelInfo) -> int:
    """Of a text that is worth encoding."""
    return max(MIN_CHARACTERS, info.max_model_len * MAX_CHARACTERS_PER_TOKEN)


def check_length(num_characters: int, param: str, info: ModelInfo) -> None:
    """Refuse a text before seconds are spent on encoding it."""
    if num_characters > max_characters(info):
        raise RequestTooLargeError(
            f"{param} of {num_characters} characters are too long: the model's context of {info.max_model_len} tokens "
            f"holds {max_characters(info)} at most",
            param,
        )


def _check_prompt(token_ids: Sequence[int], param: str, info: ModelInfo) -> int:
    """Return how many tokens may follow the prompt, at least 1."""
    if not token_ids:
        raise InvalidRequestError(f"{param} must not be empty", param)
    for bad in (min(token_ids), max(token_ids)):
        if not 0 <= bad < info.vocab_size:
            raise InvalidRequestError(f"token ids must be 0 to {info.vocab_size - 1}, got {bad}", param)
    num_left = info.max_model_len - len(token_ids)
    if num_left < 1:
        raise RequestTooLargeError(
            f"the prompt has {len(token_ids)} tokens; the model's context is {info.max_model_len} tokens, prompt and "
            "output together",
            param,
        )
    return num_left


def _truncate(token_ids: Sequence[int], body: GenerateBody, max_tokens: int | None, info: ModelInfo) -> Sequence[int]:
    """The last tokens of a prompt, as many as are asked for; -1: as many as leave room for the output."""
    num_kept = body.truncate_prompt_tokens
    if num_kept is None:
        return token_ids
    if num_kept == -1:
        num_kept = max(1, info.max_model_len - max(1, max_tokens or 1))
    return token_ids[-num_kept:]


def _priority_of(body: GenerateBody, otherwise: Priority) -> Priority:
    """What the body says, else what the header says."""
    if body.priority is not None:
        # vLLM's: the lower, the sooner.
        return Priority.HIGH if body.priority < 0 else Priority.LOW if body.priority > 0 else Priority.NORMAL
    return {"flex": Priority.LOW, "priority": Priority.HIGH}.get(body.service_tier or "", otherwise)


def _build_request(
    request_id: str,
    token_ids: Sequence[int],
    max_tokens: int,
    body: GenerateBody,
    limit: str,
    info: ModelInfo,
    priority: Priority,
) -> GenerateRequest:
    num_total = len(token_ids) + max_tokens
    if num_total > info.max_model_len:
        raise RequestTooLargeError(
            f"{len(token_ids)} prompt tokens and {max_tokens} to generate are {num_total}; the model's context is "
            f"{info.max_model_len} tokens, which leaves {info.max_model_len - len(token_ids)} for {limit}",
            limit,
        )
    return GenerateRequest(
        request_id,
        tuple(token_ids),
        read_sampling(body, max_tokens, info),
        _priority_of(body, priority),
        cache_salt=body.salt,
        gathers=bool(body.prompt_cache_key),
        num_prompt_logprobs=body.prompt_logprobs,
    )


def _build_samples(request: GenerateRequest, call_id: str, first: int, num_samples: int) -> list[GenerateRequest]:
    """A prompt as often as it is sampled, the first as it is; `first`: its number in the call."""
    others = [
        replace(
            request,
            request_id=f"{call_id}-{first + sample}",
            sampling=replace(request.sampling, seed=seed_of(request.sampling.seed, sample)),
            num_prompt_logprobs=None,  # the first has told them
        )
        for sample in range(1, num_samples)
    ]
    return [request, *others]


def _prompt_text(prompt: str | Sequence[int], codec: TextCodec, body: CompletionBody) -> str:
    """What the text of an answer begins with; a character that ids leave unfinished comes with what follows."""
    if isinstance(prompt, str):
        return prompt
    if body.max_tokens != 0:
        return codec.detokenizers.read_prompt(prompt, skip_special_tokens=body.skip_special_tokens)
    detokenizer = codec.detokenizers.build(skip_special_tokens=body.skip_special_tokens)
    return detokenizer.push(prompt) + detokenizer.flush()


def _build_call(
    call_id: str,
    requests: Sequence[GenerateRequest],
    body: CompletionBody | ChatBody,
    info: ModelInfo,
    prefixes: tuple[str, ...] = (),
) -> Call:
    echo = isinstance(body, CompletionBody) and body.echo
    num_scores = sum(request.num_prompt_scores for request in requests)
    if num_scores > MAX_CALL_SCORES or max(request.num_prompt_scores for request in requests) > MAX_PROMPT_SCORES:
        raise InvalidRequestError(
            f"{num_scores} logprobs of prompts are asked for, at most {MAX_PROMPT_SCORES} may be of one prompt and "
            f"{MAX_CALL_SCORES} of a call",
            "logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
        )
    return Call(
        call_id=call_id,
        created=int(time.time()),
        model=info.name,
        requests=tuple(requests),
        num_samples=body.num_samples,
        num_choices=body.n,
        prefixes=prefixes or ("",) * len(requests),
        text=TextRules(
            continues_prompt=isinstance(body, CompletionBody) or body.continue_final_message,
            stops=body.stop,
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            min_tokens=body.min_tokens,
            shows_output=body.max_tokens != 0,
        ),
        stream=body.stream,
        include_usage=body.stream_options.include_usage,
        continuous_usage=body.stream_options.continuous_usage_stats,
        return_token_ids=body.return_token_ids,
        num_logprobs=body.num_logprobs,
        echo=echo,
        num_prompt_logprobs=body.prompt_logprobs,
        user=body.user,
        labels={name: getattr(body, name) for name in _LABELS if name in body.model_fields_set},
        wants_receipt=body.stream_options.include_receipt,
        service_tier=None if body.service_tier is None else TIERS[requests[0].priority],
    )
