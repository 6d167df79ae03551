"""From a body's fields to how an engine draws: what each of them means, and which of its values no engine may be given.

`openai.py` has the fields and their bounds; what depends on the model is checked here. Called by `calls.py`.
"""

import secrets

from deployments.api.openai import GenerateBody
from deployments.api.structured import read_grammar
from deployments.errors import InvalidRequestError
from deployments.messages import Adjustments, Grammar, ModelInfo, SamplingParams


def read_sampling(body: GenerateBody, max_tokens: int, info: ModelInfo) -> SamplingParams:
    """How the first choice of a prompt is drawn; see `seed_of` for the others.

    Raises:
        InvalidRequestError: names the field, its value and the bound.
    """
    # More than there are tokens bounds nothing, and might be more than an engine's number holds.
    top_k, top_p = body.top_k if 0 < body.top_k < info.vocab_size else 0, body.top_p
    if top_p == 0:  # no mass is enough for no token: like the peers that take 0, keep the most likely one
        top_k, top_p = 1, 1.0
    grammar = read_grammar(body, info.eos_token_ids)
    check_ending(body, grammar)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=body.min_p,
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_token_ids=_read_stop_token_ids(body, info),
        adjustments=_read_adjustments(body, max_tokens, info),
        # The best of several are those of the greatest mean logprob.
        num_logprobs=0 if body.num_logprobs is None and body.num_samples > body.n else body.num_logprobs,
        grammar=grammar,
    )


def seed_of(seed: int, sample: int) -> int:
    """The seed of a prompt's choice of this number, so that a call by itself can draw it: the seed plus the number.

    Within 64 bits with a sign, as bodies have them.
    """
    return (seed + sample + 2**63) % 2**64 - 2**63


def _read_adjustments(body: GenerateBody, max_tokens: int, info: ModelInfo) -> Adjustments | None:
    """None for a body that leaves logits as they are, so that no engine looks for changes."""
    _check_ids([token_id for token_id, _ in body.logit_bias], "logit_bias", info)
    if body.min_tokens > max_tokens:
        message = f"min_tokens must be at most the {max_tokens} tokens to generate, got {body.min_tokens}"
        raise InvalidRequestError(message, "min_tokens")
    adjustments = Adjustments(
        logit_bias=body.logit_bias,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        min_tokens=body.min_tokens,
    )
    return None if adjustments == Adjustments() else adjustments


def check_ending(body: GenerateBody, grammar: Grammar | None) -> None:
    """Refuse what would keep an answer from ending where its grammar does.

    Raises:
        InvalidRequestError: names the field.
    """
    if grammar is not None and (body.ignore_eos or body.min_tokens):
        field = "ignore_eos" if body.ignore_eos else "min_tokens"
        message = f"{field} cannot go with {grammar.field}: the answer ends where its grammar does"
        raise InvalidRequestError(message, field)


def _read_stop_token_ids(body: GenerateBody, info: ModelInfo) -> tuple[int, ...]:
    """Ids that end each choice: the model's own unless they are ignored, and those asked for, which never are."""
    _check_ids(body.stop_token_ids, "stop_token_ids", info)
    own = () if body.ignore_eos else info.eos_token_ids
    return tuple(dict.fromkeys(own + body.stop_token_ids))


def _check_ids(token_ids: tuple[int, ...] | list[int], param: str, info: ModelInfo) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(f"{param} must be 0 to {info.vocab_size - 1}, got {token_id}", param)
