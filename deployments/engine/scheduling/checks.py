"""What an engine refuses at once, since it could never run it."""

import math

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.retention import Retention
from deployments.errors import InvalidRequestError, RequestTooLargeError
from deployments.messages import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_PROMPT_SCORES,
    REPETITION_PENALTIES,
    Adjustments,
    GenerateRequest,
    SamplingParams,
)


def check_request(request: GenerateRequest, limits: EngineLimits, vocab_size: int) -> None:
    """Refuse a request that the engine with these limits can never run.

    Raises:
        RequestTooLargeError: prompt and output together exceed the model or the pool; gives the numbers.
        InvalidRequestError: an empty prompt, no token to generate, a token id outside the vocabulary, or a parameter
            of sampling out of bounds.
    """
    _check_sampling(request.sampling, vocab_size)
    if request.num_prompt_logprobs is not None:
        _check_bounds("prompt_logprobs", request.num_prompt_logprobs, 0, MAX_LOGPROBS)
        if request.num_prompt_scores > MAX_PROMPT_SCORES:
            message = (
                f"{request.num_prompt_scores} logprobs of a prompt are asked for, at most {MAX_PROMPT_SCORES} may be"
            )
            raise InvalidRequestError(message, "prompt_logprobs")
    prompt, given, max_tokens = request.prompt_token_ids, request.given_token_ids, request.sampling.max_tokens
    if not prompt:
        raise InvalidRequestError("the prompt is empty; it needs at least 1 token", "prompt")
    if max_tokens < 1:
        raise InvalidRequestError(f"max_tokens is {max_tokens}, must be at least 1", "max_tokens")
    if request.max_new_tokens < 1:
        num_generated = len(request.generated_token_ids)
        raise InvalidRequestError(f"{num_generated} tokens are generated of max_tokens {max_tokens}", "max_tokens")
    if min(given) < 0 or max(given) >= vocab_size:
        bad = next(t for t in given if not 0 <= t < vocab_size)
        raise InvalidRequestError(f"token id {bad} is not in the vocabulary (0 to {vocab_size - 1})", "prompt")
    total = len(prompt) + max_tokens
    if total > limits.max_model_len:
        raise RequestTooLargeError(
            f"{len(prompt)} prompt tokens + {max_tokens} to generate = {total}, the model takes {limits.max_model_len}"
        )
    num_blocks = Retention.of(limits).least_blocks(total)
    if num_blocks > limits.num_blocks:
        raise RequestTooLargeError(
            f"{len(prompt)} prompt tokens + {max_tokens} to generate need {num_blocks} KV blocks, this engine has "
            f"{limits.num_blocks} of {limits.block_size} tokens"
        )


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Whatever passes can be drawn by any kernel: a number that it cannot hold would end the engine's loop."""
    bounds = {
        "temperature": (0, math.inf),
        "top_k": (0, vocab_size),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "seed": (-(2**63), 2**64 - 1),
    }
    for name, (least, most) in bounds.items():
        _check_bounds(name, getattr(sampling, name), least, most)
    if sampling.num_logprobs is not None:
        _check_bounds("logprobs", sampling.num_logprobs, 0, MAX_LOGPROBS)
    if sampling.adjustments is not None:
        _check_adjustments(sampling.adjustments, sampling.max_tokens, vocab_size)


def check_first_block(first_block: int, num_tokens: int, block_size: int) -> None:
    """Of a prompt for another engine: what it holds already ends before the block of the last token.

    Raises:
        InvalidRequestError: it does not.
    """
    _check_bounds("first_block", first_block, 0, (num_tokens - 1) // block_size)


def _check_adjustments(adjustments: Adjustments, max_tokens: int, vocab_size: int) -> None:
    least, most = REPETITION_PENALTIES
    _check_bounds("repetition_penalty", adjustments.repetition_penalty, least, most)
    for name in ("presence_penalty", "frequency_penalty"):
        _check_bounds(name, getattr(adjustments, name), -MAX_PENALTY, MAX_PENALTY)
    _check_bounds("min_tokens", adjustments.min_tokens, 0, max_tokens)
    for token_id, bias in adjustments.logit_bias:
        _check_bounds("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if not 0 <= token_id < vocab_size:
            message = f"logit_bias: token id {token_id} is not in the vocabulary (0 to {vocab_size - 1})"
            raise InvalidRequestError(message, "logit_bias")


def _check_bounds(name: str, value: float, least: float, most: float) -> None:
    if not (least <= value <= most and value < math.inf):
        raise InvalidRequestError(f"{name} is {value}, must be from {least} to {most}", name)
