"""A run may draw several tokens: drafts behind the newest one are tried, and what was guessed wrong leaves no trace."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.engine.batch.build import order_for_batch
from deployments.engine.engine import Engine
from deployments.engine.execution.base import LaunchedStep
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Sequence
from deployments.messages import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from tests.engine.driving import BLOCK_SIZE, Transcript, build_engine, greedy, run
from tests.engine.families import load, random_prompt, reference
from tests.engine.insides import blocks_of, preempt, replace_runner, runner_of, scheduler_of, sequence_of

PROMPT = random_prompt(13, seed=13)
NUM_TOKENS = 20

either = pytest.mark.parametrize("is_pipelined", [False, True])


class CountingRunner:
    """Draws, of each sequence, the number of the place in which the token will stand."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.num_tokens = 0  # of the last step

    def launch(self, scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        items = order_for_batch(scheduled)
        self.num_tokens = sum(item.num_tokens for item in items)
        drawn = [item.first_draw + i for item in items for i in range(item.num_draws)]
        return LaunchedStep(items, torch.tensor(drawn, dtype=torch.int64), None)


def counting(is_pipelined: bool = False, **overrides: Any) -> Engine:
    engine = build_engine(load("llama"), is_pipelined=is_pipelined, **overrides)
    replace_runner(engine, CountingRunner(runner_of(engine).cache))
    return engine


def add(engine: Engine, max_tokens: int = NUM_TOKENS, stops: tuple[int, ...] = ()) -> Sequence:
    """A request whose first token is there; the next ones are 14, 15, 16, ..."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, stop_token_ids=stops)
    engine.add(GenerateRequest("r", PROMPT, sampling))
    while len(sequence_of(engine, "r").token_ids) == len(PROMPT):
        engine.step()
    sequence_of(engine, "r").hold()
    while engine.has_work:
        engine.step()
    return sequence_of(engine, "r")


def try_drafts(engine: Engine, *drafts: int) -> TokenOutput:
    """Let the sequence run once with these drafts."""
    sequence = sequence_of(engine, "r")
    sequence.propose(drafts)
    sequence.release()
    outputs: list[TokenOutput] = []
    while not outputs:
        outputs = [e for e in engine.step() if isinstance(e, TokenOutput) and e.request_id == "r"]
        sequence.hold()
        engine.check_integrity()
    return outputs[0]


@either
def test_drafts_that_are_right_come_out_together_with_the_token_behind_them(is_pipelined: bool) -> None:
    engine = counting(is_pipelined)
    sequence = add(engine)
    next_token = len(sequence.token_ids)
    output = try_drafts(engine, next_token, next_token + 1)
    assert output.token_ids == (next_token, next_token + 1, next_token + 2)
    assert tuple(sequence.token_ids[-3:]) == output.token_ids
    assert sequence.num_computed_tokens == len(sequence.token_ids) - 1
    assert engine.stats().generated_tokens == sequence.num_generated_tokens
    assert sum(engine.stats().itl_s.counts) == sequence.num_generated_tokens - 1


@either
def test_behind_a_wrong_draft_nothing_counts(is_pipelined: bool) -> None:
    engine = counting(is_pipelined)
    sequence = add(engine)
    next_token = len(sequence.token_ids)
    output = try_drafts(engine, next_token, 99, next_token + 2, *range(BLOCK_SIZE))
    assert output.token_ids == (next_token, next_token + 1)
    assert sequence.num_computed_tokens == len(sequence.token_ids) - 1
    assert len(sequence.block_table) == -(-len(sequence.token_ids) // BLOCK_SIZE), "blocks of drafts are free again"
    assert try_drafts(engine, 99).token_ids == (next_token + 2,)


def test_kv_of_wrong_drafts_is_never_found_by_others() -> None:
    engine = counting()
    sequence = add(engine)
    assert BLOCK_SIZE < len(sequence.token_ids) < 2 * BLOCK_SIZE
    right = len(sequence.token_ids)
    try_drafts(engine, right, *[99] * BLOCK_SIZE)
    assert sequence.num_published_blocks == 1 + (sequence.num_computed_tokens >= 2 * BLOCK_SIZE)
    engine.abort("r")
    other = GenerateRequest("other", (*sequence.token_ids[: right + 1], *[99] * BLOCK_SIZE), sequence.request.sampling)
    engine.add(other)
    engine.step()
    assert engine.stats().prefix_hit_tokens == (right + 1) // BLOCK_SIZE * BLOCK_SIZE


@either
@pytest.mark.parametrize("ends_by", FinishReason)
def test_a_request_ends_in_the_middle_of_its_draws(is_pipelined: bool, ends_by: FinishReason) -> None:
    engine = counting(is_pipelined)
    first = len(PROMPT)
    sequence = add(engine, stops=(first + 3,)) if ends_by is FinishReason.STOP else add(engine)
    if ends_by is FinishReason.LENGTH:
        while sequence.num_generated_tokens < NUM_TOKENS - 2:
            try_drafts(engine)
    next_token = len(sequence.token_ids)
    output = try_drafts(engine, *range(next_token, next_token + 6))
    last = first + 3 if ends_by is FinishReason.STOP else first + NUM_TOKENS - 1
    assert output.token_ids == tuple(range(next_token, last + 1))
    assert output.finish_reason is ends_by
    assert engine.num_sequences == 0 and engine.num_free_blocks == engine.limits.num_blocks


def test_drafts_never_take_blocks_or_budget_from_others() -> None:
    engine = counting(max_num_seqs=2, max_num_batched_tokens=4)
    sequence = add(engine)
    try_drafts(engine, *range(50))
    assert runner_of(engine).num_tokens == 4, "the budget of a step"
    engine = counting(num_blocks=5, max_num_seqs=2)
    sequence = add(engine)
    engine.add(greedy("other", range(20), 4))
    engine.step()
    assert engine.num_free_blocks == 0
    assert len(try_drafts(engine, *range(50)).token_ids) == 1, "no block is free"
    assert sequence.num_preemptions == engine.stats().preemptions == 0


def test_a_request_that_loses_its_blocks_while_drafts_are_in_flight_keeps_what_they_drew() -> None:
    engine = counting()
    sequence = add(engine)
    next_token = len(sequence.token_ids)
    sequence.release()
    item = ScheduledSequence.of(sequence, 1, (next_token, 99))
    assert blocks_of(engine).append(sequence, 2)
    sequence.begin(item)
    preempt(engine, sequence)
    (_, draws), *_ = runner_of(engine).launch([item]).collect()
    assert len(sequence.conclude(item, draws)) == 2
    assert sequence.num_computed_tokens == 0
    transcript = Transcript()
    transcript.tokens["r"] = sequence.token_ids[len(PROMPT) :].tolist()
    run(engine, transcript)
    assert transcript.tokens["r"] == list(range(len(PROMPT), len(PROMPT) + NUM_TOKENS))


class Guessing:
    """Proposes drafts before each step, as a drafter will."""

    def __init__(self, engine: Engine, guess: Callable[[int], tuple[int, ...]]) -> None:
        self.engine = engine
        self.guess = guess

    def run(self, transcript: Transcript) -> None:
        while self.engine.has_work:
            for sequence in scheduler_of(self.engine).running:
                if sequence.num_generated_tokens:
                    sequence.propose(self.guess(sequence.num_generated_tokens))
            transcript.note(self.engine.step())
            self.engine.check_integrity()


@pytest.mark.parametrize("family", ["llama", "mistral_windowed", "gemma2"])
@pytest.mark.parametrize("num_right", [0, 1, 5])
def test_a_model_gives_the_same_tokens_with_drafts_and_in_fewer_steps(family: str, num_right: int) -> None:
    whole = reference(family, PROMPT, NUM_TOKENS)
    engine = build_engine(load(family))

    def guess(num_generated: int) -> tuple[int, ...]:
        right = whole[num_generated : num_generated + num_right]
        return (*right, *[0] * (5 - len(right)))

    engine.add(greedy("r", PROMPT, NUM_TOKENS))
    engine.add(greedy("beside", PROMPT, 3))
    transcript = Transcript()
    Guessing(engine, guess).run(transcript)
    assert tuple(transcript.tokens["r"]) == whole
    assert tuple(transcript.tokens["beside"]) == whole[:3]
    if num_right:
        assert engine.stats().steps <= 2 + NUM_TOKENS // (num_right + 1)
