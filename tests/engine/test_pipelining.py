"""An engine that starts a step before it has seen the last one's tokens gives the same tokens, and loses nothing."""

from typing import Any

import pytest

from deployments.engine.engine import Engine
from deployments.messages import SamplingParams
from tests.engine.driving import Transcript, build_engine, generate, greedy, prefill_all, run
from tests.engine.families import load, random_prompt, reference

NUM_TOKENS = 12
PROMPTS = tuple(random_prompt(length, seed=length) for length in (1, 5, 8, 23, 40, 57))

some_families = pytest.mark.parametrize("family", ["llama", "mistral_windowed", "gemma2", "mixtral"])


def build(family: str, **overrides: Any) -> Engine:
    return build_engine(load(family), is_pipelined=True, **overrides)


def expected(family: str) -> list[tuple[int, ...]]:
    return [reference(family, prompt, NUM_TOKENS) for prompt in PROMPTS]


def outputs(engine: Engine) -> list[tuple[int, ...]]:
    return generate(engine, [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)])


@some_families
@pytest.mark.parametrize("budget", [8, 13, 256])
def test_chunks_and_batches(family: str, budget: int) -> None:
    assert outputs(build(family, max_num_batched_tokens=budget)) == expected(family)


@some_families
def test_preemption_while_a_token_is_in_flight(family: str) -> None:
    num_blocks = 11 if family == "mistral_windowed" else 19  # its sequences give blocks back
    engine = build(family, num_blocks=num_blocks, enable_prefix_caching=False)
    assert outputs(engine) == expected(family)
    assert engine.stats().preemptions > 0


@some_families
def test_a_prefix_that_was_published_under_way(family: str) -> None:
    engine = build(family)
    assert outputs(engine) == outputs(engine) == expected(family)
    assert engine.stats().prefix_hit_tokens > 0


@some_families
@pytest.mark.parametrize("budget", [8, 16, 256])
def test_a_prompt_handed_over(family: str, budget: int) -> None:
    prefill, decode = build(family, max_num_batched_tokens=budget), build(family)
    transcript = Transcript()
    # Of 16 and 32 tokens too: whole blocks, the last of which must wait for the first token.
    prompts = [*PROMPTS, random_prompt(16, seed=16), random_prompt(32, seed=32)]
    for i, prompt in enumerate(prompts):
        decode.add(greedy(f"r{i}", prompt, NUM_TOKENS), remote_threshold=0)
        transcript.note(decode.step())
        for chunk, tensor in prefill_all(prefill, greedy(f"r{i}", prompt, NUM_TOKENS)):
            transcript.note(decode.import_chunk(chunk, tensor))
            decode.check_integrity()
    run(decode, transcript)
    assert [tuple(transcript.tokens[f"r{i}"]) for i in range(len(prompts))] == [
        reference(family, prompt, NUM_TOKENS) for prompt in prompts
    ]


def test_a_token_after_the_stop_token_is_computed_and_never_told() -> None:
    tokens = reference("llama", PROMPTS[4], NUM_TOKENS)
    stop = tokens[3]
    engine = build("llama")
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, stop_token_ids=(stop,))
    engine.add(type(greedy("r", PROMPTS[4], 1))("r", PROMPTS[4], sampling))
    told = tuple(run(engine).tokens["r"])
    assert told == tokens[: tokens.index(stop) + 1]
    assert engine.num_free_blocks == engine.limits.num_blocks


def test_no_step_is_started_for_a_sequence_whose_last_token_is_in_flight() -> None:
    engine = build("llama")
    engine.add(greedy("r", PROMPTS[1], 3))
    run(engine)
    assert engine.stats().steps == 3


def test_a_request_aborted_in_flight_is_not_told_of_and_its_id_may_come_back() -> None:
    engine = build("llama")
    engine.add(greedy("r", PROMPTS[1], NUM_TOKENS))
    engine.step()
    engine.abort("r")
    assert engine.has_work, "the step in flight is still to be concluded"
    engine.add(greedy("r", PROMPTS[2], NUM_TOKENS))
    assert tuple(run(engine).tokens["r"]) == reference("llama", PROMPTS[2], NUM_TOKENS)
    assert engine.num_free_blocks == engine.limits.num_blocks
