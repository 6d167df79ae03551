"""Rotary embeddings that depend on a sequence's length: every way through the engine gives what transformers gives.

Which is, for LongRoPE, a forward pass over all tokens so far (`generate` without a cache; Phi-3's with one as well);
for dynamic NTK, `generate` with a model that has seen no other prompt.
"""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.engine import Engine
from deployments.engine.model.rope import max_model_len, separate_lengths
from deployments.engine.scheduling.positions import FIXED
from tests.engine.driving import BLOCK_SIZE, build_engine, generate, greedy, hand_over
from tests.engine.families import build_model, load, random_prompt, small_model
from tests.engine.length_dependent import BORDER, LENGTH_DEPENDENT
from tests.tiny_models import small_config

NUM_TOKENS = 12
# Within, up to the border, across it while decoding, from one beyond it, and far beyond.
LENGTHS = (5, 21, 31, 32, 33, 70)
PROMPTS = tuple(random_prompt(length, seed=length) for length in LENGTHS)

FAMILIES = tuple(family for family in LENGTH_DEPENDENT if family != "llama_yarn")
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def reference(family: str, prompt: tuple[int, ...], num_tokens: int = NUM_TOKENS) -> tuple[int, ...]:
    model: Any = copy.deepcopy(build_model(family))  # dynamic NTK remembers the longest sequence it has seen
    output = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=num_tokens, use_cache="longrope" not in family
    )
    return tuple(output[0, len(prompt) :].tolist())


def expected(family: str, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> list[tuple[int, ...]]:
    return [reference(family, prompt) for prompt in prompts]


def outputs(engine: Engine, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> list[tuple[int, ...]]:
    return generate(engine, [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)])


@every_family
def test_what_is_compared_to_depends_on_the_length(family: str) -> None:
    unchanging: Any = copy.deepcopy(build_model(family))
    for module in unchanging.modules():
        if hasattr(module, "rope_type"):
            module.rope_type = "default"
            if family == "phimoe_longrope":
                module.config.rope_parameters["long_mscale"] = module.config.rope_parameters["short_mscale"]
    for prompt in PROMPTS[3:]:
        ids = torch.tensor([prompt])
        output = unchanging.generate(ids, do_sample=False, max_new_tokens=NUM_TOKENS, use_cache=True)
        assert tuple(output[0, len(prompt) :].tolist()) != reference(family, prompt)


@pytest.mark.parametrize("family", ["phi3_longrope", "phi4_mini_longrope"])
def test_phi3_generates_with_a_cache_what_it_does_without(family: str) -> None:
    model: Any = build_model(family)
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_TOKENS)
        assert tuple(output[0, len(prompt) :].tolist()) == reference(family, prompt)


@every_family
@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_sequences_of_all_lengths_run_together_as_alone(family: str, optimized: bool) -> None:
    assert outputs(build_engine(load(family, optimized=optimized))) == expected(family)


@every_family
def test_chunks_do_not_matter(family: str) -> None:
    assert outputs(build_engine(load(family), max_num_batched_tokens=13)) == expected(family)


@every_family
def test_a_pipelined_engine_gives_the_same_tokens(family: str) -> None:
    assert outputs(build_engine(load(family), is_pipelined=True)) == expected(family)


@every_family
def test_preempted_sequences_give_the_same_tokens(family: str) -> None:
    engine = build_engine(load(family), num_blocks=20, enable_prefix_caching=False)
    assert outputs(engine) == expected(family)
    assert engine.stats().preemptions > 0


@every_family
def test_a_cached_prefix_is_used_by_sequences_that_rotate_alike_and_by_no_others(family: str) -> None:
    stem = random_prompt(30, seed=99)
    prompts = tuple(stem + random_prompt(length, seed=100 + length) for length in (1, 9, 20, 1, 9, 20))
    engine = build_engine(load(family))
    for prompt in prompts * 2:  # one after the other, so that each finds what the ones before it left
        assert outputs(engine, (prompt,)) == expected(family, (prompt,))
    assert engine.stats().prefix_hit_tokens > 6 * (30 // BLOCK_SIZE * BLOCK_SIZE)


@every_family
def test_a_prompt_handed_over_continues_as_if_computed_here(family: str) -> None:
    prefill, decode = build_engine(load(family), max_num_batched_tokens=16), build_engine(load(family))
    assert hand_over(prefill, decode, PROMPTS, NUM_TOKENS) == expected(family)
    assert decode.num_free_blocks == decode.limits.num_blocks


def test_a_sequence_is_computed_anew_once_when_it_outgrows_the_short_factors() -> None:
    engine = build_engine(load("phi3_longrope"), enable_prefix_caching=False)
    (tokens,) = generate(engine, [greedy("r", PROMPTS[0], 60)])
    assert tokens == reference("phi3_longrope", PROMPTS[0], 60)
    assert engine.stats().prompt_tokens == len(PROMPTS[0]) * 2, "generated tokens count as generated"
    assert engine.stats().preemptions == 0, "it did not lack memory"


def test_a_sequence_that_ends_at_the_border_is_not_computed_anew() -> None:
    engine = build_engine(load("phi3_longrope"))
    (tokens,) = generate(engine, [greedy("r", PROMPTS[1], BORDER - len(PROMPTS[1]) + 1)])
    assert tokens == reference("phi3_longrope", PROMPTS[1], BORDER - len(PROMPTS[1]) + 1)
    assert engine.stats().prompt_tokens == len(PROMPTS[1])


@every_family
@settings(max_examples=4)
@given(st.data())
def test_a_resumed_request_goes_on_as_if_unbroken(family: str, data: st.DataObject) -> None:
    prompt = data.draw(st.sampled_from(PROMPTS))
    num_done = data.draw(st.integers(1, NUM_TOKENS - 1))
    whole = reference(family, prompt)
    resumed = replace(greedy("r", prompt, NUM_TOKENS), generated_token_ids=whole[:num_done])
    assert generate(build_engine(load(family)), [resumed]) == [whole]


@pytest.mark.parametrize("family", [*FAMILIES, "llama_yarn"])
def test_the_full_length_is_served(family: str) -> None:
    assert load(family).max_model_len == 256
    engine = build_engine(load(family))
    prompt = random_prompt(250, seed=1)
    assert generate(engine, [greedy("r", prompt, 6)]) == [reference(family, prompt, 6)]


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "dynamic", "factor": 2.5}, 2560),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "yarn", "factor": 4.0}, 4096),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 256},
            1024,
        ),
    ],
)
def test_the_length_is_what_the_embedding_stretches_to(rope: dict[str, Any], longest: int) -> None:
    assert max_model_len(small_config("LlamaConfig", rope_parameters=rope)) == longest


def test_an_embedding_of_one_kind_of_layer_that_depends_on_the_length_is_served_up_to_where_it_does() -> None:
    ropes = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    ropes["full_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
    model = small_model("Gemma3TextConfig", rope_parameters=ropes, max_position_embeddings=64)
    assert separate_lengths(model) == (FIXED, 64)
