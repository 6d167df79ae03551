"""Answers with a grammar are guessed as well: a draft that the grammar does not allow is not tried, and none counts."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from deployments.engine.engine import Engine
from deployments.messages import Adjustments, GenerateRequest, SamplingParams
from tests.engine.drafters import lies, mixture, truth, with_drafter
from tests.engine.driving import Transcript, build_engine, generate, greedy, hand_over_all, run
from tests.engine.families import load, random_prompt, reference
from tests.engine.grammars import END, load_with_tokenizer, regex, text_of
from tests.engine.insides import preempt, sequence_of

PATTERN = r"[a-c]{1,3}(-[0-9]{2,4}){2,6}"
GRAMMAR = regex(PATTERN)
PROMPT = random_prompt(21, seed=5)
EAGER = Adjustments(logit_bias=((ord("-"), 2.0),), frequency_penalty=0.3)

each = pytest.mark.parametrize("when", [truth, lies, mixture])


def requests() -> list[GenerateRequest]:
    """With a grammar, drawn and greedy, with penalties and logprobs; and one without."""
    drawn = SamplingParams(64, stop_token_ids=(END,), grammar=GRAMMAR)
    samplings = [
        *(replace(drawn, seed=seed) for seed in range(4)),
        replace(drawn, temperature=0.0),
        replace(drawn, seed=5, adjustments=EAGER, num_logprobs=2),
    ]
    guided = [GenerateRequest(f"g{number}", PROMPT, sampling) for number, sampling in enumerate(samplings)]
    return [*guided, greedy("plain", PROMPT[:7], 30)]


def build(**overrides: Any) -> Engine:
    return build_engine(load_with_tokenizer("llama"), **overrides)


def guessing(**overrides: Any) -> Engine:
    return build(speculation={"method": "ngram", "is_adaptive": False}, **overrides)


@cache
def plain() -> list[tuple[int, ...]]:
    return generate(build(), requests())


def knowing(when: Callable[[int], bool], **overrides: Any) -> Engine:
    answers = dict(zip([request.request_id for request in requests()], plain(), strict=True))
    return with_drafter(guessing(**overrides), lambda sequence: answers[sequence.request_id], when)


@each
def test_answers_with_grammars_are_the_same_whatever_is_guessed(when: Callable[[int], bool]) -> None:
    engine = knowing(when)
    assert generate(engine, requests()) == plain()
    assert all(re.fullmatch(PATTERN, text_of(tokens)) for tokens in plain()[:-1])
    assert plain()[-1] == reference("llama", PROMPT[:7], 30)
    stats = engine.stats()
    assert stats.drafted_tokens.total > 0
    if when is truth:
        assert stats.accepted_tokens.total == stats.drafted_tokens.total


def test_right_guesses_of_an_answer_with_a_grammar_save_steps() -> None:
    longest = max(requests()[:-1], key=lambda request: len(plain()[int(request.request_id[1:])]))
    num_tokens = len(plain()[int(longest.request_id[1:])])
    engine = knowing(truth)
    generate(engine, [longest])
    assert engine.stats().steps <= 2 + num_tokens // 9 + 1 < num_tokens


@each
def test_hand_offs_preemptions_and_resumed_answers_change_nothing(when: Callable[[int], bool]) -> None:
    assert hand_over_all(build(), knowing(when), requests()) == plain()
    resumed = [
        replace(request, generated_token_ids=tokens[:3]) for request, tokens in zip(requests(), plain(), strict=True)
    ]
    assert generate(knowing(when), resumed) == plain()
    tight = knowing(when, num_blocks=14, max_num_seqs=3)
    assert generate(tight, requests()) == plain()


def test_an_answer_that_loses_its_blocks_between_two_guesses_goes_on() -> None:
    engine, transcript = knowing(mixture), Transcript()
    engine.add(requests()[1])
    while len(transcript.tokens["g1"]) < 4:
        transcript.note(engine.step())
    preempt(engine, sequence_of(engine, "g1"))
    run(engine, transcript)
    assert tuple(transcript.tokens["g1"]) == plain()[1]


def test_lookup_and_a_smaller_model_guess_answers_with_grammars() -> None:
    assert generate(guessing(), requests()) == plain()
    loaded = load_with_tokenizer("llama")
    for family, is_right in (("llama", True), ("qwen3", False)):
        speculation = {"method": "draft_model", "model": "beside", "is_adaptive": False}
        engine = build_engine(replace(loaded, drafter=load(family)), speculation=speculation)
        assert generate(engine, requests()) == plain()
        stats = engine.stats()
        assert stats.drafted_tokens.total > 0
        if is_right:  # its first guess is drawn by the grammar, as the answer is
            assert sum(stats.accepted_tokens.counts[1:]) > 0.5 * sum(stats.accepted_tokens.counts)
