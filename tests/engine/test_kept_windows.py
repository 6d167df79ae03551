"""Where every layer has a window, KV behind it is given back: more and longer sequences fit, and no token changes."""

from functools import cache
from typing import Any

import pytest

from deployments.engine.engine import Engine
from deployments.engine.model.load import prepare_model
from deployments.engine.scheduling.retention import Retention
from deployments.errors import RequestTooLargeError
from tests.engine.drafters import mixture, with_drafter
from tests.engine.driving import BLOCK_SIZE, FakeClock, Transcript, build_engine, generate, greedy, prefill_all, run
from tests.engine.families import CPU, WINDOW, load, random_prompt, reference, small_model
from tests.engine.insides import blocks_of, sequence_of

FAMILY = "mistral_windowed"
NUM_TOKENS = 40
LONG = random_prompt(200, seed=200)
# What a sequence needs at least, be it as long as it may, and what it needs with all of its KV.
LEAST, WHOLE = WINDOW // BLOCK_SIZE + 1, (len(LONG) + NUM_TOKENS) // BLOCK_SIZE

each_way = pytest.mark.parametrize("is_pipelined", [False, True], ids=["in order", "pipelined"])


def build(*, is_pipelined: bool = False, **overrides: Any) -> Engine:
    return build_engine(load(FAMILY), is_pipelined=is_pipelined, max_num_batched_tokens=16, **overrides)


@cache
def expected(prompt: tuple[int, ...]) -> tuple[int, ...]:
    return reference(FAMILY, prompt, NUM_TOKENS)


def outputs(engine: Engine, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return generate(engine, [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)])


def most_held(engine: Engine, request_id: str) -> int:
    """Run to the end; blocks that were held at most between two steps."""
    most, transcript = 0, Transcript()
    while engine.has_work:
        transcript.note(engine.step())
        engine.check_integrity()
        most = max(most, engine.limits.num_blocks - engine.num_free_blocks)
    assert transcript.finished == {request_id}
    assert tuple(transcript.tokens[request_id]) == expected(LONG)
    return most


@each_way
def test_a_sequence_of_many_times_the_pool_runs_in_what_its_window_needs(is_pipelined: bool) -> None:
    engine = build(is_pipelined=is_pipelined, num_blocks=LEAST)
    assert outputs(engine, [LONG]) == [expected(LONG)]


def test_a_sequence_holds_its_window_and_a_step() -> None:
    engine = build()
    engine.add(greedy("r", LONG, NUM_TOKENS))
    assert most_held(engine, "r") <= LEAST + 16 // BLOCK_SIZE < WHOLE // 3


@each_way
def test_as_many_sequences_run_at_once_as_windows_fit(is_pipelined: bool) -> None:
    prompts = [random_prompt(120, seed=seed) for seed in range(4)]
    engine = build(is_pipelined=is_pipelined, num_blocks=4 * (LEAST + 2) + 2)
    assert outputs(engine, prompts) == [expected(prompt) for prompt in prompts]
    assert engine.stats().preemptions == 0, "with all of its KV one of them takes two thirds of the pool"


def test_too_small_a_pool_for_a_window_refuses_with_the_numbers() -> None:
    with pytest.raises(RequestTooLargeError, match=f"need {LEAST} KV blocks, this engine has {LEAST - 1}"):
        build(num_blocks=LEAST - 1).add(greedy("r", LONG, NUM_TOKENS))


@each_way
def test_sequences_that_fight_for_blocks_give_the_same_tokens(is_pipelined: bool) -> None:
    prompts = [random_prompt(length, seed=length) for length in (10, 11, 12, 90, 13)]
    engine = build(is_pipelined=is_pipelined, num_blocks=2 * LEAST)
    assert outputs(engine, prompts) == [expected(prompt) for prompt in prompts]
    assert engine.stats().preemptions > 0


@each_way
def test_a_prefix_is_found_by_its_last_window_alone(is_pipelined: bool) -> None:
    engine = build(is_pipelined=is_pipelined, num_blocks=WHOLE // 2)  # what came first of the prompt is given up
    assert outputs(engine, [LONG]) == [expected(LONG)]
    follow_up = LONG + expected(LONG)[:-1] + random_prompt(9, seed=9)
    assert outputs(engine, [follow_up]) == [expected(follow_up)]
    assert engine.stats().prefix_hit_tokens == (len(LONG) + NUM_TOKENS - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_a_shared_prefix_longer_than_the_window_continues_into_different_prompts() -> None:
    stem = LONG[:64]
    prompts = [stem + random_prompt(length, seed=length) for length in (1, 30)]
    engine = build(num_blocks=64)
    assert outputs(engine, [stem]) == [expected(stem)]
    assert outputs(engine, prompts) == [expected(prompt) for prompt in prompts]
    assert engine.stats().prefix_hit_tokens == 64 * 2


@each_way
def test_only_what_is_read_behind_a_prompt_is_handed_over(is_pipelined: bool) -> None:
    prefill = build(is_pipelined=is_pipelined, num_blocks=2 * LEAST)
    decode = build(is_pipelined=is_pipelined, num_blocks=LEAST)
    decode.add(greedy("r", LONG, NUM_TOKENS), remote_threshold=0)
    (placed,) = decode.step()
    num_unread = Retention(BLOCK_SIZE, WINDOW, 16).num_passed(len(LONG))
    assert placed.remote and placed.num_cached_tokens == num_unread * BLOCK_SIZE  # type: ignore[union-attr]
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS), 0)
    assert sum(chunk.num_blocks for chunk, _ in chunks) == len(LONG) // BLOCK_SIZE - num_unread <= LEAST
    transcript = Transcript()
    for chunk, tensor in chunks:
        transcript.note(decode.import_chunk(chunk, tensor))
    assert tuple(run(decode, transcript).tokens["r"]) == expected(LONG)
    assert decode.stats().prefix_hit_tokens == decode.stats().prompt_tokens == 0
    assert decode.num_free_blocks == LEAST and prefill.num_free_blocks == 2 * LEAST


def test_a_decode_engine_that_has_the_last_window_is_sent_only_the_rest() -> None:
    prefill, decode = build(), build()
    stem = LONG[:190]
    outputs(decode, [stem])
    decode.add(greedy("r", LONG, NUM_TOKENS), remote_threshold=0)
    (placed,) = decode.step()
    first_block = placed.num_cached_tokens // BLOCK_SIZE  # type: ignore[union-attr]
    assert first_block == len(stem) // BLOCK_SIZE
    transcript = Transcript()
    for chunk, tensor in prefill_all(prefill, greedy("r", LONG, NUM_TOKENS), first_block):
        transcript.note(decode.import_chunk(chunk, tensor))
    assert tuple(run(decode, transcript).tokens["r"]) == expected(LONG)
    assert decode.stats().prefix_hit_tokens == first_block * BLOCK_SIZE


@pytest.mark.parametrize("num_arrived", [0, 1])
def test_a_prompt_whose_prefill_engine_died_is_computed_from_its_start(num_arrived: int) -> None:
    clock = FakeClock()
    prefill, decode = build(), build_engine(load(FAMILY), clock=clock, num_blocks=2 * LEAST, max_num_batched_tokens=16)
    decode.add(greedy("r", LONG, NUM_TOKENS), remote_threshold=0)
    decode.step()
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS))
    assert len(chunks) > 1
    for chunk, tensor in chunks[:num_arrived]:
        decode.import_chunk(chunk, tensor)
    clock.now_s += 1000
    assert tuple(run(decode).tokens["r"]) == expected(LONG)
    assert decode.stats().prompt_tokens == len(LONG)


def test_drafts_that_are_taken_back_find_their_window_there() -> None:
    engine = build(num_blocks=LEAST + 1, speculation={"method": "ngram"})
    engine = with_drafter(engine, lambda sequence: expected(LONG), mixture)
    assert outputs(engine, [LONG]) == [expected(LONG)]
    assert sum(engine.stats().drafted_tokens.counts)


def test_a_model_that_mixes_windows_with_full_attention_keeps_everything() -> None:
    assert load("gemma2").kv_shape.group.window is None
    engine = build_engine(load("gemma2"))
    engine.add(greedy("r", LONG, NUM_TOKENS))
    engine.step()
    engine.step()
    assert sequence_of(engine, "r").num_passed_blocks == 0
    assert blocks_of(engine).num_held_blocks == len(LONG) // BLOCK_SIZE + 1


def test_a_window_that_holds_whatever_the_model_takes_is_none() -> None:
    model = small_model("MistralConfig", sliding_window=1024)
    assert prepare_model(model, "", CPU).kv_shape.group.window is None
