"""How long steps with prompts took: known for a step at a time and for steps that overlap, and for no other steps."""

import math
import time

import pytest

from tests.engine.driving import Transcript, build_engine, generate, greedy, run
from tests.engine.families import load, random_prompt
from tests.engine.insides import pretend_idle


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_only_steps_with_prompt_tokens_count_and_no_moment_counts_twice(is_pipelined: bool) -> None:
    engine = build_engine(load("llama"), is_pipelined=is_pipelined, max_num_batched_tokens=16)
    assert engine.stats().prefill_s == 0
    assert 0 <= engine.stats().uptime_s < engine.stats().uptime_s < math.inf
    engine.add(greedy("r", random_prompt(60, seed=1), 20))
    begun_s = time.monotonic()
    transcript = Transcript()
    while engine.stats().generated_tokens == 0:
        transcript.note(engine.step())
    computed = engine.stats()
    assert 0 < computed.prefill_s <= time.monotonic() - begun_s
    assert (computed.prefill_steps, computed.prompt_tokens) == (4, 60)
    run(engine, transcript)
    assert engine.stats().prefill_s == computed.prefill_s, "the rest were decodes"
    assert (engine.stats().max_num_seqs, engine.stats().finished) == (8, 1)


@pytest.mark.parametrize("method", ["off", "ngram"])
@pytest.mark.parametrize("is_pipelined", [False, True])
def test_the_last_token_of_a_cached_prompt_is_a_prompt_beside_a_shorter_decode(is_pipelined: bool, method: str) -> None:
    engine = build_engine(load("llama"), is_pipelined=is_pipelined, speculation={"method": method})
    prompt = random_prompt(33, seed=3)  # of its 4 blocks of 8 and a token all but that are found
    generate(engine, [greedy("first", prompt, 1)])
    engine.add(greedy("short", random_prompt(9, seed=4), 40))
    transcript = Transcript()
    while len(transcript.tokens["short"]) < 4:
        transcript.note(engine.step())
    before = engine.stats()
    assert (before.prompt_tokens, before.prefill_steps) == (33 + 9, 2)
    engine.add(greedy("again", prompt, 2))
    run(engine, transcript)
    after = engine.stats()
    assert transcript.cached["again"] == 32
    assert (after.prompt_tokens, after.prefill_steps) == (33 + 9 + 1, 3)
    assert after.prefill_s > before.prefill_s
    assert (before.prefill_gaps, after.prefill_gaps) == (0, 1)
    assert 0 < after.prefill_gap_s < after.itl_s.total


def test_time_without_work_does_not_count() -> None:
    engine = build_engine(load("llama"), is_pipelined=True)
    run_one_prompt_s = []
    for name in "ab":
        engine.add(greedy(name, random_prompt(40, seed=2), 1))
        begun_s, before_s = time.monotonic(), engine.stats().prefill_s
        run(engine)
        run_one_prompt_s.append((engine.stats().prefill_s - before_s, time.monotonic() - begun_s))
        pretend_idle(engine, 100.0)
    assert all(counted_s <= elapsed_s for counted_s, elapsed_s in run_one_prompt_s)
