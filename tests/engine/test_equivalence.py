"""Every way through the engine gives the tokens that transformers' own `generate` gives, token for token."""

from itertools import groupby
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.execution.base import LaunchedStep
from deployments.engine.handoff.outgoing import End, Part
from deployments.messages import EngineEvent, Placed
from tests.engine.driving import (
    BLOCK_SIZE,
    Taken,
    Transcript,
    build_engine,
    generate,
    greedy,
    hand_over,
    prefill_all,
    run,
)
from tests.engine.families import FAMILIES, build_model, load, random_prompt, reference
from tests.engine.insides import runner_of

NUM_TOKENS = 12
# Shorter than a block, at its border and beside it, and beyond the sliding windows.
LENGTHS = (1, 5, 8, 23, 40, 57)
PROMPTS = tuple(random_prompt(length, seed=length) for length in LENGTHS)

every_family = pytest.mark.parametrize("family", FAMILIES)


def expected(family: str, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> list[tuple[int, ...]]:
    return [reference(family, prompt, NUM_TOKENS) for prompt in prompts]


def outputs(engine: Engine, prompts: tuple[tuple[int, ...], ...] = PROMPTS) -> list[tuple[int, ...]]:
    return generate(engine, [greedy(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(prompts)])


@every_family
def test_the_model_does_not_depend_on_what_was_drawn_before(family: str) -> None:
    one, other = (fresh_parameters(family, seed) for seed in (1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def fresh_parameters(family: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return dict(build_model.__wrapped__(family).named_parameters())


@every_family
def test_the_reference_does_not_repeat_itself(family: str) -> None:
    tokens = expected(family)
    num_distinct = [len(set(row)) for row in tokens]
    assert min(num_distinct) > 3 and sum(num_distinct) > len(tokens) * NUM_TOKENS // 2, "it would agree with anything"
    assert len(set(tokens)) == len(tokens)


@every_family
@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_prompts_of_different_lengths_run_together_as_alone(family: str, optimized: bool) -> None:
    assert outputs(build_engine(load(family, optimized=optimized))) == expected(family)


@every_family
@pytest.mark.parametrize("budget", [8, 13])
def test_prompts_computed_in_chunks_give_the_same_tokens(family: str, budget: int) -> None:
    engine = build_engine(load(family), max_num_batched_tokens=budget)
    assert outputs(engine) == expected(family)
    assert engine.stats().steps > sum(LENGTHS) // budget


@every_family
def test_preempted_sequences_give_the_same_tokens(family: str) -> None:
    windows = load(family).kv_shape.windows
    num_blocks = sum(9 if window else 19 for window in windows)  # what is behind windows makes room
    engine = build_engine(load(family), num_blocks=num_blocks, enable_prefix_caching=False)
    assert outputs(engine) == expected(family)
    assert engine.stats().preemptions > 0


@every_family
def test_a_warm_prefix_cache_gives_the_same_tokens(family: str) -> None:
    engine = build_engine(load(family))
    assert outputs(engine) == expected(family)
    assert engine.stats().prefix_hit_tokens == 0
    assert outputs(engine) == expected(family)
    whole_blocks = sum((length - 1) // BLOCK_SIZE * BLOCK_SIZE for length in LENGTHS)
    assert engine.stats().prefix_hit_tokens == whole_blocks


@every_family
def test_a_shared_prefix_continues_into_different_prompts(family: str) -> None:
    stem = random_prompt(30, seed=99)
    prompts = tuple(stem + random_prompt(length, seed=100 + length) for length in (1, 9, 20))
    engine = build_engine(load(family))
    for prompt in prompts:  # one after the other, so that each finds what the ones before it left
        assert outputs(engine, (prompt,)) == expected(family, (prompt,))
    assert engine.stats().prefix_hit_tokens == 2 * (30 // BLOCK_SIZE * BLOCK_SIZE)


@every_family
def test_a_prompt_handed_over_continues_as_if_computed_here(family: str) -> None:
    prefill, decode = build_engine(load(family), max_num_batched_tokens=16), build_engine(load(family))
    assert hand_over(prefill, decode, PROMPTS, NUM_TOKENS) == expected(family)
    assert decode.stats().prompt_tokens == 0, "the decode engine computed a prompt"
    assert decode.num_free_blocks == decode.limits.num_blocks
    assert prefill.num_free_blocks == prefill.limits.num_blocks


@pytest.mark.parametrize("family", ["llama", "mistral_windowed", "gemma2"])
def test_one_long_decode_beside_short_ones_gives_the_same_tokens(family: str) -> None:
    prompts = tuple(random_prompt(length, seed=length) for length in (600, 5, 9, 17, 24, 30))
    assert outputs(build_engine(load(family)), prompts) == expected(family, prompts)


LONG = random_prompt(57, seed=57)


def reserve(decode: Engine, request_id: str = "r", prompt: tuple[int, ...] = LONG) -> int:
    """Queue a request for a remote prefill; blocks that are already there."""
    decode.add(greedy(request_id, prompt, NUM_TOKENS), remote_threshold=0)
    (placed,) = decode.step()
    assert isinstance(placed, Placed) and placed.remote
    return placed.num_cached_tokens // BLOCK_SIZE


def test_a_decode_engine_that_holds_part_of_the_prefix_is_sent_only_the_rest() -> None:
    prefill, decode = build_engine(load("llama"), max_num_batched_tokens=16), build_engine(load("llama"))
    generate(decode, [greedy("earlier", LONG[:30], 1)])
    first_block = reserve(decode)
    assert first_block == 3
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS), first_block)
    assert sum(chunk.num_blocks for chunk, _ in chunks) == 8 - first_block
    assert chunks[0][0].start_block == first_block
    transcript = Transcript()
    for chunk, tensor in chunks:
        transcript.note(decode.import_chunk(chunk, tensor))
    run(decode, transcript)
    assert tuple(transcript.tokens["r"]) == reference("llama", LONG, NUM_TOKENS)


def test_chunks_go_where_they_are_told_to_as_far_as_there_is_room() -> None:
    prefill, decode = build_engine(load("llama"), max_num_batched_tokens=16), build_engine(load("llama"))
    given: list[Tensor] = []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        assert prod(shape) * dtype.itemsize <= prefill.export_room.max_bytes
        if len(given) == 2:
            return None
        given.append(torch.full(shape, torch.nan, dtype=dtype))
        return given[-1]

    prefill.export_into(allocate)
    reserve(decode)
    transcript = Transcript()
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS))
    assert [tensor.data_ptr() for _, tensor in chunks[:2]] == [tensor.data_ptr() for tensor in given]
    assert len(chunks) == 4
    for chunk, tensor in chunks:
        transcript.note(decode.import_chunk(chunk, tensor))
    assert tuple(run(decode, transcript).tokens["r"]) == reference("llama", LONG, NUM_TOKENS)


def test_a_prefill_engine_that_holds_part_of_the_prefix_still_sends_all() -> None:
    prefill, decode = build_engine(load("llama")), build_engine(load("llama"))
    prefill_all(prefill, greedy("earlier", LONG[:40], NUM_TOKENS))
    reserve(decode)
    transcript = Transcript()
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS))
    assert prefill.stats().prefix_hit_tokens == 40
    for chunk, tensor in chunks:
        transcript.note(decode.import_chunk(chunk, tensor))
    assert tuple(run(decode, transcript).tokens["r"]) == reference("llama", LONG, NUM_TOKENS)


def import_parts(decode: Engine, parts: list[Part]) -> list[EngineEvent]:
    """Each part of a chunk by itself, the last one first."""
    events: list[EngineEvent] = []
    for part in reversed(parts):
        events += decode.import_chunk(part.chunk, part.kv)
        decode.check_integrity()
    return events


@every_family
@pytest.mark.parametrize("budget", [16, 256], ids=["in chunks", "in one step"])
@pytest.mark.parametrize("is_pipelined", [False, True], ids=["in turn", "pipelined"])
def test_what_the_last_step_of_a_prompt_computes_goes_in_parts_of_layers(
    family: str, budget: int, is_pipelined: bool
) -> None:
    loaded = load(family, optimized=True)
    prefill = build_engine(loaded, is_pipelined=is_pipelined, max_num_batched_tokens=budget, handoff_layer_parts=2)
    decode = build_engine(loaded)
    reserve(decode)
    notes: list[str] = []
    launch = runner_of(prefill).launch

    def launch_and_note(*arguments: Any) -> LaunchedStep:
        launched: LaunchedStep = launch(*arguments)
        notes.append("launched")
        return launched

    runner_of(prefill).launch = launch_and_note
    prefill.prefill(greedy("r", LONG, NUM_TOKENS), 0)
    taken = Taken(prefill, "r")
    taken.handoff.watch(lambda word: notes.append("part" if isinstance(word, Part) and word.num_parts > 1 else "word"))
    while prefill.has_work:
        prefill.step()
        prefill.check_integrity()
    assert taken.end is End.WHOLE
    chunks = [list(parts) for _, parts in groupby(taken.parts, lambda part: part.chunk.index)]
    num_parts = min(2, prefill.kv_shape.group.num_layers)  # where groups of layers share blocks, these may have one
    assert [len(parts) for parts in chunks] == [1] * (len(chunks) - 1) + [num_parts], "only the last step's"
    assert all(part.num_parts == len(parts) for parts in chunks for part in parts)
    last_launch = len(notes) - 1 - notes[::-1].index("launched")
    assert num_parts == 1 or notes.index("part") < last_launch, "while the step is computed"
    told = Transcript()
    for parts in chunks:
        told.note(import_parts(decode, parts))
        taken.handoff.release(parts[0].chunk.index)
    assert tuple(run(decode, told).tokens["r"]) == reference(family, LONG, NUM_TOKENS)
    prefill.check_integrity()
    assert prefill.stats().num_used_blocks == 0


def test_a_prompt_of_which_some_layers_have_come_is_finished_locally() -> None:
    prefill, decode = build_engine(load("llama"), handoff_layer_parts=2), build_engine(load("llama"))
    reserve(decode)
    prefill.prefill(greedy("r", LONG, NUM_TOKENS), 0)
    taken = Taken(prefill, "r")
    prefill.step()
    part = taken.parts[0]
    assert decode.import_chunk(part.chunk, part.kv) == []
    assert decode.prefill_locally("r")
    assert tuple(run(decode).tokens["r"]) == reference("llama", LONG, NUM_TOKENS)
    assert decode.stats().prompt_tokens == len(LONG), "what has come of its blocks is of no use"


def test_chunks_may_arrive_in_any_order() -> None:
    prefill, decode = build_engine(load("llama"), max_num_batched_tokens=16), build_engine(load("llama"))
    reserve(decode)
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS))
    assert len(chunks) == 4
    transcript = Transcript()
    for i in (3, 0, 2, 1):  # the last one, with the first token, comes first
        assert not transcript.tokens["r"]
        transcript.note(decode.import_chunk(*chunks[i]))
    assert tuple(run(decode, transcript).tokens["r"]) == reference("llama", LONG, NUM_TOKENS)


@pytest.mark.parametrize("arrived", [(), (0,), (0, 1), (1, 2), (0, 1, 2), (3,)])
def test_a_prompt_whose_prefill_engine_died_is_finished_locally(arrived: tuple[int, ...]) -> None:
    prefill, decode = build_engine(load("llama"), max_num_batched_tokens=16), build_engine(load("llama"))
    reserve(decode)
    chunks = prefill_all(prefill, greedy("r", LONG, NUM_TOKENS))
    for i in arrived:
        assert decode.import_chunk(*chunks[i]) == []
    assert decode.prefill_locally("r")
    late = next(i for i in range(4) if i not in arrived)
    assert decode.import_chunk(*chunks[late]) == [], "a late chunk must not touch a running sequence"
    assert tuple(run(decode).tokens["r"]) == reference("llama", LONG, NUM_TOKENS)
    num_leading = next((i for i in range(4) if i not in arrived), 4)  # chunks of 16 tokens before the first gap
    assert decode.stats().prompt_tokens == len(LONG) - 16 * num_leading


def test_a_handed_over_sequence_survives_preemption() -> None:
    prefill, decode = build_engine(load("llama")), build_engine(load("llama"), num_blocks=16)
    transcript = Transcript()
    prompts = [random_prompt(55, seed=1), random_prompt(56, seed=2)]
    for i, prompt in enumerate(prompts):
        decode.add(greedy(f"r{i}", prompt, NUM_TOKENS), remote_threshold=0)
        transcript.note(decode.step())
        for chunk, tensor in prefill_all(prefill, greedy(f"r{i}", prompt, NUM_TOKENS)):
            transcript.note(decode.import_chunk(chunk, tensor))
    run(decode, transcript)
    assert decode.stats().preemptions > 0
    expected_tokens = [reference("llama", prompt, NUM_TOKENS) for prompt in prompts]
    assert [tuple(transcript.tokens[f"r{i}"]) for i in range(2)] == expected_tokens


def test_a_prefill_preempted_by_decodes_exports_each_block_once() -> None:
    mixed = build_engine(load("llama"), num_blocks=12, max_num_batched_tokens=16, enable_prefix_caching=False)
    local = random_prompt(30, seed=3)
    transcript = Transcript()
    mixed.add(greedy("local", local, NUM_TOKENS))
    transcript.note(mixed.step())
    mixed.prefill(greedy("r", LONG, NUM_TOKENS), 0)
    taken = Taken(mixed, "r")
    run(mixed, transcript)
    assert mixed.stats().preemptions > 0
    blocks = [i for c in taken.chunks for i in range(c.start_block, c.start_block + c.num_blocks)]
    assert blocks == list(range(8))
    assert tuple(transcript.tokens["local"]) == reference("llama", local, NUM_TOKENS)

    decode = build_engine(load("llama"))
    reserve(decode)
    continued = Transcript()
    for part in taken.parts:
        continued.note(decode.import_chunk(part.chunk, part.kv))
    assert tuple(run(decode, continued).tokens["r"]) == reference("llama", LONG, NUM_TOKENS)
