"""Logprobs of drawn tokens and of prompts are transformers' log-softmax, however a request is served."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.scheduling import checks, scheduler
from deployments.errors import InvalidRequestError
from deployments.messages import Adjustments, DrawnToken, EngineEvent, GenerateRequest, SamplingParams, TokenOutput
from tests.engine.driving import BLOCK_SIZE, build_engine, generate, greedy, prefill_all, run
from tests.engine.families import build_model, load, random_prompt, reference
from tests.engine.insides import sequence_of

NUM_TOKENS, NUM_TOP = 10, 5
PROMPTS = tuple(random_prompt(length, seed=length) for length in (1, 2, 5, 8, 23, 40))
# The bound, in float32.
TOLERANCE = 1e-3

either = pytest.mark.parametrize("is_pipelined", [False, True])


@cache
def log_softmax(tokens: tuple[int, ...]) -> Tensor:
    """(T, vocab_size) by transformers, behind each token."""
    model: Any = build_model("llama")
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits.log_softmax(-1)


def request(prompt: tuple[int, ...], name: str = "r", num_prompt: int | None = None, **fields: Any) -> GenerateRequest:
    params = SamplingParams(**({"max_tokens": NUM_TOKENS, "temperature": 0.0, "num_logprobs": NUM_TOP} | fields))
    return GenerateRequest(name, prompt, params, num_prompt_logprobs=num_prompt)


class Told:
    """What an engine said of one request."""

    def __init__(self, events: Iterable[EngineEvent] = ()) -> None:
        self.draws: list[DrawnToken] = []
        self.prompt: tuple[DrawnToken, ...] = ()
        self.note(events)

    def note(self, events: Iterable[EngineEvent]) -> None:
        for output in events:
            if isinstance(output, TokenOutput) and output.request_id == "r":
                assert tuple(draw.token_id for draw in output.draws) == output.token_ids
                assert not output.prompt or not self.draws, "it comes with the first"
                self.draws += output.draws
                self.prompt = self.prompt or output.prompt

    def all_of(self, engine: Engine) -> "Told":
        while engine.has_work:
            self.note(engine.step())
            engine.check_integrity()
        return self


def check(scored: Sequence[DrawnToken], before: tuple[int, ...], num_top: int) -> None:
    """Each of these, behind `before` and those before it, is scored as transformers would."""
    whole = before + tuple(token.token_id for token in scored)
    for place, token in enumerate(scored, len(before)):
        expected = log_softmax(whole[:-1])[place - 1]
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=TOLERANCE)
        top = expected.topk(num_top)
        assert [logprob for _, logprob in token.top] == pytest.approx(top.values.tolist(), abs=TOLERANCE)
        for token_id, logprob in token.top:
            assert logprob == pytest.approx(float(expected[token_id]), abs=TOLERANCE)
        assert token.rank == int((expected > expected[token.token_id]).sum()) + 1


@either
@pytest.mark.parametrize("num_top", [0, NUM_TOP])
def test_drawn_tokens_come_with_the_models_own_logprobs(is_pipelined: bool, num_top: int) -> None:
    engine = build_engine(load("llama"), is_pipelined=is_pipelined)
    engine.add(greedy("beside", PROMPTS[3], NUM_TOKENS))
    engine.add(request(PROMPTS[4], num_logprobs=num_top))
    engine.add(request(PROMPTS[5], "more", num_logprobs=9))
    told = Told().all_of(engine)
    assert tuple(token.token_id for token in told.draws) == reference("llama", PROMPTS[4], NUM_TOKENS)
    check(told.draws, PROMPTS[4], num_top)


def test_who_asks_for_no_logprobs_gets_none_beside_one_who_does() -> None:
    engine = build_engine(load("llama"))
    engine.add(request(PROMPTS[4], "other"))
    engine.add(request(PROMPTS[4], num_logprobs=None))
    outputs = [e for e in _all_events(engine) if isinstance(e, TokenOutput) and e.request_id == "r"]
    assert outputs and all(output.draws == () == output.prompt for output in outputs)


def test_adjustments_and_temperature_do_not_change_the_logprobs() -> None:
    engine = build_engine(load("llama"))
    wanted = Adjustments(((3, 5.0),), 1.3, 1.0, 0.5)
    engine.add(request(PROMPTS[4], adjustments=wanted, temperature=1.7, top_k=20, seed=5))
    told = Told().all_of(engine)
    assert tuple(token.token_id for token in told.draws) != reference("llama", PROMPTS[4], NUM_TOKENS)
    check(told.draws, PROMPTS[4], NUM_TOP)


def test_a_first_token_that_was_handed_over_comes_with_all_that_is_known_of_it() -> None:
    prefill, decode = build_engine(load("llama"), max_num_batched_tokens=16), build_engine(load("llama"))
    decode.add(request(PROMPTS[5]), remote_threshold=0)
    told = Told(decode.step())
    for chunk, tensor in prefill_all(prefill, request(PROMPTS[5])):
        told.note(decode.import_chunk(chunk, tensor))
    assert len(told.draws) == 1
    check(told.all_of(decode).draws, PROMPTS[5], NUM_TOP)


def test_a_resumed_request_goes_on_with_logprobs() -> None:
    whole = reference("llama", PROMPTS[4], NUM_TOKENS)
    engine = build_engine(load("llama"))
    engine.add(replace(request(PROMPTS[4], num_prompt=2), generated_token_ids=whole[:4]))
    told = Told().all_of(engine)
    assert tuple(token.token_id for token in told.draws) == whole[4:]
    check(told.draws, PROMPTS[4] + whole[:4], NUM_TOP)
    assert told.prompt == (), "it was told with the first token"


def test_drafts_come_out_with_logprobs_of_their_own() -> None:
    whole = reference("llama", PROMPTS[4], NUM_TOKENS)
    engine = build_engine(load("llama"))
    engine.add(request(PROMPTS[4]))
    told = Told()
    while engine.has_work:
        if told.draws:
            right = whole[len(told.draws) :][:2]
            sequence_of(engine, "r").propose((*right, 0))
        told.note(engine.step())
    assert engine.stats().steps < NUM_TOKENS
    assert tuple(token.token_id for token in told.draws) == whole
    check(told.draws, PROMPTS[4], NUM_TOP)


@pytest.mark.parametrize("is_optimized", [False, True], ids=["plain", "optimized"])
@either
@pytest.mark.parametrize("budget", [8, 13, 256])
@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: str(len(prompt)))
def test_every_token_of_a_prompt_but_the_first_is_scored(
    is_optimized: bool, is_pipelined: bool, budget: int, prompt: tuple[int, ...]
) -> None:
    loaded = load("llama", optimized=is_optimized)
    engine = build_engine(loaded, is_pipelined=is_pipelined, max_num_batched_tokens=budget)
    engine.add(greedy("beside", PROMPTS[4], NUM_TOKENS))
    engine.step()
    engine.add(request(prompt, num_prompt=3))
    told = Told().all_of(engine)
    assert tuple(token.token_id for token in told.prompt) == prompt[1:]
    check(told.prompt, prompt[:1], 3)
    check(told.draws, prompt, NUM_TOP)


def test_a_prompt_that_is_scored_is_computed_whole_and_leaves_its_kv_to_others() -> None:
    engine, prompt = build_engine(load("llama")), PROMPTS[5]
    generate(engine, [greedy("earlier", prompt, NUM_TOKENS)])
    engine.add(request(prompt, num_prompt=0))
    told = Told().all_of(engine)
    assert len(told.prompt) == len(prompt) - 1 and engine.stats().prefix_hit_tokens == 0
    other = build_engine(load("llama"))
    other.add(request(prompt, num_prompt=0))
    run(other)
    generate(other, [greedy("later", prompt, NUM_TOKENS)])
    assert other.stats().prefix_hit_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_a_decode_engine_computes_a_prompt_that_is_scored_by_itself() -> None:
    engine = build_engine(load("llama"))
    engine.add(request(PROMPTS[5], num_prompt=1), remote_threshold=0)
    check(Told().all_of(engine).prompt, PROMPTS[5][:1], 1)


@either
def test_prompts_that_are_preempted_are_scored_all_the_same(is_pipelined: bool) -> None:
    engine = build_engine(
        load("llama"), is_pipelined=is_pipelined, num_blocks=13, max_num_batched_tokens=12, max_num_seqs=4
    )
    for number in range(3):
        engine.add(greedy(f"r{number}", PROMPTS[4], 24))
    for _ in range(7):
        engine.step()
    engine.add(request(PROMPTS[5], num_prompt=2))
    told = Told().all_of(engine)
    assert engine.stats().preemptions > 0
    check(told.prompt, PROMPTS[5][:1], 2)
    check(told.draws, PROMPTS[5], NUM_TOP)


def test_a_step_scores_a_bounded_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", 10)
    engine = build_engine(load("llama"))
    engine.add(request(PROMPTS[5], num_prompt=2))
    engine.add(request(PROMPTS[5], "other", num_prompt=2))
    engine.add(greedy("beside", PROMPTS[4], 2))
    told = Told(engine.step())
    assert engine.stats().prompt_tokens == 10 + len(PROMPTS[4]), "who scores nothing is not held up"
    check(told.all_of(engine).prompt, PROMPTS[5][:1], 2)


@pytest.mark.parametrize("number", [-1, 21])
def test_a_number_of_logprobs_out_of_bounds_is_refused(number: int) -> None:
    engine = build_engine(load("llama"))
    with pytest.raises(InvalidRequestError, match=f"^logprobs is {number}, must be from 0 to 20$"):
        engine.add(request(PROMPTS[0], num_logprobs=number))
    with pytest.raises(InvalidRequestError, match=f"^prompt_logprobs is {number}, must be from 0 to 20$"):
        engine.add(request(PROMPTS[0], num_prompt=number))


def test_more_logprobs_of_a_prompt_than_a_frame_should_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_PROMPT_SCORES", 3 * len(PROMPTS[4]))
    engine = build_engine(load("llama"))
    engine.add(request(PROMPTS[4], num_prompt=2))
    with pytest.raises(InvalidRequestError, match=r"^92 logprobs of a prompt are asked for, at most 69 may be$"):
        engine.add(request(PROMPTS[4], "more", num_prompt=3))


def _all_events(engine: Engine) -> list[EngineEvent]:
    events: list[EngineEvent] = []
    while engine.has_work:
        events += engine.step()
    return events
