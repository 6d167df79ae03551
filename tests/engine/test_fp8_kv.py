"""An engine that keeps keys and values in FP8: its tokens are those of rounded KV, on whatever way they come."""

from functools import cache
from typing import Any

import pytest
import torch

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.kv.cache import KVShape
from deployments.engine.model.load import prepare_model
from deployments.errors import UnsupportedModelError
from deployments.kv_groups import KVGroup
from tests.engine.driving import BLOCK_SIZE, build_engine, generate, greedy, hand_over, prefill_all
from tests.engine.families import CPU, load, random_prompt, small_model
from tests.engine.rounded import rounded_logits

NUM_TOKENS = 12
# Shorter than a block, at its border and beside it, and beyond the sliding windows.
PROMPTS = tuple(random_prompt(length, seed=length) for length in (1, 5, 8, 23, 40, 57))
every_family = pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])


def build(family: str, *, optimized: bool = False, **overrides: Any) -> Engine:
    return build_engine(load(family, optimized=optimized), kv_dtype="fp8", **overrides)


def outputs(engine: Engine) -> list[tuple[int, ...]]:
    return generate(engine, [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)])


@cache
def expected(family: str) -> list[tuple[int, ...]]:
    """Tokens of an engine that are the likeliest where attention sees rounded keys and values, in plain torch."""
    answers = outputs(build(family))
    for prompt, tokens in zip(PROMPTS, answers, strict=True):
        logits = rounded_logits(load(family).model, (*prompt, *tokens))
        assert tuple(logits.argmax(-1).tolist()[len(prompt) - 1 : -1]) == tokens
    return answers


def test_rounding_changes_tokens() -> None:
    assert outputs(build_engine(load("llama"))) != expected("llama"), "these models would not notice"


@every_family
def test_faster_layers_give_the_same_tokens(family: str) -> None:
    assert outputs(build(family, optimized=True)) == expected(family)


@every_family
@pytest.mark.parametrize("budget", [8, 13])
def test_the_size_of_chunks_changes_nothing(family: str, budget: int) -> None:
    assert outputs(build(family, max_num_batched_tokens=budget)) == expected(family)


def test_layers_that_view_what_attention_gives_as_rows_are_served() -> None:
    experts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "sliding_window": 24,
    }
    loaded = prepare_model(small_model("AfmoeConfig", num_hidden_layers=2, **experts), "", CPU)
    answers = outputs(build_engine(loaded, kv_dtype="fp8"))
    for prompt, tokens in zip(PROMPTS, answers, strict=True):
        logits = rounded_logits(loaded.model, (*prompt, *tokens))
        assert tuple(logits.argmax(-1).tolist()[len(prompt) - 1 : -1]) == tokens
    assert outputs(build_engine(loaded, kv_dtype="fp8", max_num_batched_tokens=13)) == answers


def test_preemption_and_a_warm_cache_change_nothing() -> None:
    engine = build("llama", num_blocks=19)
    assert outputs(engine) == expected("llama")
    assert outputs(engine) == expected("llama")
    assert engine.stats().preemptions > 0 and engine.stats().prefix_hit_tokens > 0


@every_family
def test_a_prompt_handed_over_continues_as_if_computed_here(family: str) -> None:
    prefill, decode = build(family, max_num_batched_tokens=16), build(family)
    assert hand_over(prefill, decode, PROMPTS, NUM_TOKENS) == expected(family)


def test_a_chunk_is_made_of_codes_and_scales() -> None:
    (chunk, tensor), *_ = prefill_all(build("llama"), greedy("r", PROMPTS[-1], NUM_TOKENS))
    layers, heads, head_dim = 2, 2, 16
    assert tensor.dtype is torch.uint8
    assert tensor.nbytes == chunk.num_blocks * BLOCK_SIZE * layers * 2 * heads * (head_dim + 4)


def test_a_chunk_of_another_form_is_refused_and_changes_nothing() -> None:
    source, target = build_engine(load("llama")), build("llama")
    request = greedy("r", PROMPTS[-1], NUM_TOKENS)
    target.add(request, remote_threshold=0)
    target.step()
    (chunk, tensor), *_ = prefill_all(source, request)
    with pytest.raises(ValueError, match=r"float32, this pool takes .* torch.uint8"):
        target.import_chunk(chunk, tensor)
    target.abort("r")
    assert target.num_free_blocks == target.limits.num_blocks


def test_more_blocks_fit_into_as_many_bytes() -> None:
    def count(kv_dtype: str) -> int:
        config = EngineConfig.model_validate({"block_size": 8, "kv_cache_bytes": 1 << 20, "kv_dtype": kv_dtype})
        return Engine(load("llama"), config).limits.num_blocks

    assert (count("auto"), count("fp8")) == ((1 << 20) // (8 * 512), (1 << 20) // (8 * 160))


def test_heads_that_have_no_room_for_scales_are_refused() -> None:
    shape = KVShape((KVGroup((0,), 1, 6),), torch.float32)
    with pytest.raises(UnsupportedModelError, match="a multiple of 4 dimensions; these have 6"):
        shape.stored_as("fp8")
