"""Guessing changes when tokens come, and nothing else."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deployments.engine.engine import Engine
from deployments.engine.grammar.guides import Guides
from deployments.errors import InvalidRequestError
from deployments.messages import Adjustments, GenerateRequest, GivenUp, SamplingParams, TokenOutput
from deployments.receipts import Timed
from tests.engine.drafters import Knowing, lies, mixture, truth, with_drafter
from tests.engine.driving import Transcript, build_engine, generate, greedy, hand_over_all, run
from tests.engine.families import load, random_prompt
from tests.engine.insides import speculate_by

NUM_TOKENS = 24
LOOPING = (3, 4, 5, 6) * 6  # what a lookup finds something in
SAMPLINGS = [
    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=3, num_logprobs=1),
    SamplingParams(
        max_tokens=NUM_TOKENS, temperature=1.0, seed=4, adjustments=Adjustments(((5, 2.0),), 1.2, 0.5, 0.5, 4)
    ),
]


def requests() -> list[GenerateRequest]:
    prompts = [random_prompt(13, seed=1), LOOPING, (*LOOPING, 3)]
    return [
        GenerateRequest(f"r{number}", prompt, sampling)
        for number, (prompt, sampling) in enumerate(itertools.product(prompts, SAMPLINGS))
    ]


def guessing(**overrides: Any) -> Engine:
    return build_engine(load("llama"), speculation={"method": "ngram"}, **overrides)


def plain() -> list[tuple[int, ...]]:
    return generate(build_engine(load("llama")), requests())


def knowing(engine: Engine, lies: Callable[[int], bool]) -> Engine:
    answers = dict(zip([request.request_id for request in requests()], plain(), strict=True))
    return with_drafter(engine, lambda sequence: answers[sequence.request_id], lies)


@pytest.mark.parametrize("when", [truth, lies, mixture])
def test_answers_are_the_same_whatever_is_guessed(when: Callable[[int], bool]) -> None:
    engine = knowing(guessing(), when)
    assert generate(engine, requests()) == plain()
    stats = engine.stats()
    num_right, num_drafted = stats.accepted_tokens.total, stats.drafted_tokens.total
    assert num_drafted > 0
    if when is not mixture:
        assert num_right == (num_drafted if when is truth else 0)
    assert stats.generated_tokens == len(requests()) * NUM_TOKENS


@pytest.mark.parametrize("when", [truth, lies, mixture])
def test_who_wants_to_know_is_told_how_much_was_guessed_and_right(when: Callable[[int], bool]) -> None:
    engine, told = knowing(guessing(), when), []
    for request in requests():
        engine.add(replace(request, wants_receipt=True))
    while engine.has_work:
        told += [event for event in engine.step() if isinstance(event, Timed)]
    assert {event.request_id for event in told} == {request.request_id for request in requests()}
    stats = engine.stats()
    assert sum(event.times.num_drafted_tokens for event in told) == stats.drafted_tokens.total > 0
    assert sum(event.times.num_accepted_tokens for event in told) == stats.accepted_tokens.total


def test_what_is_given_up_between_two_steps_takes_no_blocks_from_drafts_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = knowing(guessing(is_pipelined=True, block_size=4), lies)
    gone = [GivenUp("gone", InvalidRequestError("it cannot be followed", "regex"))]
    monkeypatch.setattr(Guides, "collect", lambda self, *, is_idle: gone)  # before each step is launched
    assert generate(engine, requests()) == plain()
    assert engine.stats().drafted_tokens.total > 0


def test_right_guesses_save_steps() -> None:
    engine = knowing(guessing(max_num_seqs=16), truth)
    generate(engine, requests())
    assert engine.stats().steps <= 3 + NUM_TOKENS / 9 + 1, "eight drafts and the token behind them each"


def test_answers_are_the_same_by_lookup_alone_and_beside_others() -> None:
    assert generate(guessing(), requests()) == plain()
    assert [generate(guessing(), [request])[0] for request in requests()] == plain()
    tight = guessing(num_blocks=14, max_num_seqs=3)
    assert generate(tight, requests()) == plain()
    assert tight.stats().preemptions > 0


def test_answers_are_the_same_behind_a_hand_off_and_when_they_are_resumed() -> None:
    prefill = build_engine(load("llama"))
    decode = knowing(guessing(enable_prefix_caching=False), mixture)
    assert hand_over_all(prefill, decode, requests()) == plain()
    resumed = [
        replace(request, generated_token_ids=tokens[:7]) for request, tokens in zip(requests(), plain(), strict=True)
    ]
    assert generate(knowing(guessing(), mixture), resumed) == plain()


def test_nothing_is_remembered_of_a_sequence_that_is_over() -> None:
    engine, drafter = guessing(), Knowing(lambda sequence: (1,) * NUM_TOKENS, truth)
    speculate_by(engine, drafter)
    engine.add(greedy("aborted", LOOPING, NUM_TOKENS))
    engine.add(greedy("done", LOOPING, 4))
    transcript = Transcript()
    while "done" not in transcript.finished:
        transcript.note(engine.step())
    assert drafter.known == {"aborted"}
    engine.abort("aborted")
    assert drafter.known == set() and engine.num_free_blocks == engine.limits.num_blocks


def test_nothing_is_guessed_beside_prompts_and_each_step_still_continues_every_sequence() -> None:
    engine = with_drafter(guessing(max_num_batched_tokens=8), lambda sequence: (1,) * NUM_TOKENS, truth)
    engine.add(greedy("first", LOOPING, NUM_TOKENS))
    transcript = Transcript()
    while not transcript.tokens["first"]:
        transcript.note(engine.step())
    engine.add(greedy("long", random_prompt(60, seed=2), 1))
    before = engine.stats().drafted_tokens.copy()
    while "long" not in transcript.finished:
        events = engine.step()
        assert "first" in {event.request_id for event in events if isinstance(event, TokenOutput)}
        transcript.note(events)
    assert engine.stats().drafted_tokens == before
    run(engine, transcript)
    assert engine.stats().drafted_tokens != before


def test_drafts_take_no_block_that_the_newest_token_of_another_needs() -> None:
    engine = with_drafter(guessing(num_blocks=5), lambda sequence: (1,) * NUM_TOKENS, truth)
    engine.add(greedy("wants drafts", random_prompt(15, seed=6), NUM_TOKENS))
    engine.add(greedy("wants a block", random_prompt(16, seed=7), NUM_TOKENS))
    transcript = Transcript()
    while not transcript.tokens["wants a block"]:
        transcript.note(engine.step())
    engine.step()
    assert engine.stats().preemptions == 0 and engine.num_free_blocks == 0
