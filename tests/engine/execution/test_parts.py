"""Which steps run as recorded parts, and what the graphs of these read."""

from dataclasses import replace

import numpy as np
import pytest

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.batch.build import build_arrays, order_for_batch
from deployments.engine.execution.costs import StepCosts, bytes_per_ms
from deployments.engine.execution.parts import (
    MAX_CHUNK,
    MAX_CONTEXT,
    chunk_values,
    fill_chunk,
    fill_prompt,
    fill_runs,
    fill_singles,
    fill_tokens,
    recorded_prompts,
)
from deployments.engine.layers.base import Weights
from deployments.engine.scheduling.block_tables import BlockTables
from deployments.engine.scheduling.ids import block_array, token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import GenerateRequest, SamplingParams

BLOCK_SIZE = 4
OTHER_GROUP = 100_000  # between blocks of one group of layers and those of the other
# Llama-3.1-8B in bfloat16, and Qwen3-0.6B.
LARGE, SMALL = StepCosts(32, Weights(15 << 30), 131_072), StepCosts(28, Weights(1 << 30), 114_688)
# Qwen3-30B-A3B: a token goes through 8 of 128 experts.
EXPERTS = StepCosts(48, Weights(3 << 30, 54 << 30, 27 << 30, 8 / 128), 98_304)


def run(num_computed: int, num_tokens: int, num_given: int, *, drafts: int = 0) -> ScheduledSequence:
    """The next tokens of a sequence of so many, whose tokens and blocks are numbered from 100 times their number on."""
    first = 100 * num_given
    tokens, num_blocks = range(first, first + num_given), (num_given + drafts) // BLOCK_SIZE + 1
    sequence = Sequence(
        GenerateRequest(f"r{num_computed}-{num_given}", tuple(tokens), SamplingParams(max_tokens=100)),
        Role.LOCAL,
        0.0,
        token_ids=token_array(tokens),
        num_computed_tokens=num_computed,
        tables=BlockTables(*(block_array(range(n, n + num_blocks)) for n in (first, first + OTHER_GROUP))),
    )
    return ScheduledSequence.of(sequence, num_tokens, (0,) * drafts)


def arrays_of(*items: ScheduledSequence, num_groups: int = 1) -> StepArrays:
    return build_arrays(order_for_batch(list(items)), BLOCK_SIZE, [], num_groups)


DECODE, PROMPT, CHUNK = run(5, 1, 6), run(0, 9, 9), run(8, 4, 12)


def test_whole_prompts_and_chunks_are_recorded_parts_beside_decodes() -> None:
    assert recorded_prompts(arrays_of(PROMPT, DECODE, run(0, 30, 30)), SMALL) == [9, 30]
    assert recorded_prompts(arrays_of(PROMPT, run(0, 30, 30)), SMALL) == [9, 30]
    assert recorded_prompts(arrays_of(DECODE, PROMPT, CHUNK), SMALL) == [9, 4]
    assert recorded_prompts(arrays_of(CHUNK), SMALL) == [4]
    assert recorded_prompts(arrays_of(DECODE), SMALL) == []


@pytest.mark.parametrize("part", [run(0, 4, 12), run(4, 4, 12)], ids=["beginning", "middle"])
def test_parts_of_prompts_that_draw_nothing_are_recorded_too(part: ScheduledSequence) -> None:
    assert recorded_prompts(arrays_of(DECODE, part), SMALL) == [4]


def test_steps_with_drafts_are_launched_as_a_whole() -> None:
    drafted = run(5, 1, 6, drafts=2)
    assert recorded_prompts(arrays_of(DECODE, PROMPT, drafted), SMALL) == []
    assert recorded_prompts(arrays_of(drafted), SMALL) == []


@pytest.mark.parametrize(
    ("costs", "counts", "is_recorded"),
    [
        (LARGE, [512], True),
        (LARGE, [1024], True),
        (LARGE, [2048], False),
        (LARGE, [256] * 4, True),  # 5 ms to read the weights, 6 to multiply 256 tokens with them
        (LARGE, [256] * 5, False),
        (LARGE, [64] * 4, True),
        (LARGE, [64] * 5, False),  # each reads the weights again
        (SMALL, [64] * 4, True),
        (SMALL, [2048], True),
        (SMALL, [2048] * 4, True),
        (SMALL, [2048] * 5, False),
        (EXPERTS, [256], True),
        (EXPERTS, [256] * 3, False),  # each reads nearly all experts again
    ],
)
def test_what_keeps_the_gpu_at_work_for_longer_than_a_launch_is_launched_as_a_whole(
    costs: StepCosts, counts: list[int], is_recorded: bool
) -> None:
    prompts = [run(0, count, count) for count in counts]
    assert recorded_prompts(arrays_of(DECODE, *prompts), costs) == (counts if is_recorded else [])


def test_faster_memory_lets_more_parts_read_the_experts_again() -> None:
    """An H200 says 3,201,000 kHz and 6,016 lines; an H100 80GB 2,619,000 and 5,120."""
    h100, h200 = bytes_per_ms(2_619_000, 5_120), bytes_per_ms(3_201_000, 6_016)
    assert h100 == pytest.approx(EXPERTS.bytes_per_ms, rel=0.01) == bytes_per_ms(0, 0)
    prompts = arrays_of(DECODE, *[run(0, 256, 256)] * 3)
    assert recorded_prompts(prompts, EXPERTS) == []
    assert recorded_prompts(prompts, replace(EXPERTS, bytes_per_ms=h200)) == [256] * 3


def test_the_kv_of_many_decodes_keeps_the_gpu_at_work() -> None:
    with_much_kv = StepCosts(28, Weights(1 << 30), 1 << 34)
    assert recorded_prompts(arrays_of(DECODE, PROMPT), with_much_kv) == []


def test_one_whole_prompt_alone_is_always_recorded() -> None:
    assert recorded_prompts(arrays_of(run(0, 2048, 2048)), LARGE) == [2048]


def test_long_chunks_and_long_contexts_have_kernels_of_their_own() -> None:
    for start, count, is_recorded in (
        (8, MAX_CHUNK, True),
        (8, MAX_CHUNK + 1, False),
        (MAX_CONTEXT, 4, True),
        (MAX_CONTEXT + 1, 4, False),
    ):
        arrays = arrays_of(run(start, count, start + count))
        assert recorded_prompts(arrays, LARGE) == ([count] if is_recorded else []), (start, count)


def test_the_graph_of_decodes_reads_those_of_a_mixed_step_alone() -> None:
    arrays = arrays_of(PROMPT, DECODE, run(9, 1, 10))
    columns, tables = np.full((5, 6), 77), np.full((6, 1, 5), 77)
    fill_singles(columns, tables, arrays, 4)
    token_ids, sources, positions, slots, lens = columns.tolist()
    assert token_ids == [1009, 605, 0, 0, 77, 77], "the longest first"
    assert sources == [-1, -1, -1, -1, 77, 77]
    assert positions == [9, 5, 0, 0, 77, 77]
    assert slots == [1002 * BLOCK_SIZE + 1, 601 * BLOCK_SIZE + 1, -1, -1, 77, 77]
    assert lens == [10, 6, 0, 0, 77, 77]
    assert tables[:2, 0, :3].tolist() == [[1000, 1001, 1002], [600, 601, 0]]
    assert (tables[2:] == 77).all()


def test_each_group_of_layers_has_slots_and_tables_of_its_own() -> None:
    arrays = arrays_of(DECODE, CHUNK, num_groups=2)
    columns, tables = np.full((6, 2), 77), np.full((3, 2, 4), 77)
    fill_singles(columns, tables, arrays, 2)
    slots = np.array([601 * BLOCK_SIZE + 1, -1])
    assert columns[3:].tolist() == [slots.tolist(), [(OTHER_GROUP + 601) * BLOCK_SIZE + 1, -1], [6, 0]]
    assert tables[0, :, :2].tolist() == [[600, 601], [OTHER_GROUP + 600, OTHER_GROUP + 601]]
    values = np.full(chunk_values(4, 5, 2), 77)
    fill_chunk(values, arrays, 1, 4)
    first, other = values[8:16].reshape(2, 4).tolist()
    assert first == [1202 * BLOCK_SIZE + i for i in range(4)]
    assert other == [OTHER_GROUP * BLOCK_SIZE + slot for slot in first]
    assert values[16:20].tolist() == [3, 0, 4, 12]
    blocks = [1200, 1201, 1202]
    assert values[20:].tolist() == [*blocks, 0, 0, *(OTHER_GROUP + block for block in blocks), 0, 0]


def test_the_graph_of_a_prompt_reads_its_tokens_padded() -> None:
    arrays = arrays_of(DECODE, PROMPT, run(0, 3, 3))
    values = np.full(3 * 5 + 1, 77)
    fill_prompt(values, arrays, 2)
    token_ids, positions, slots = values[:-1].reshape(3, 5).tolist()
    assert token_ids == [300, 301, 302, 0, 0]
    assert positions == [0, 1, 2, 2, 2]
    assert slots == [300 * BLOCK_SIZE, 300 * BLOCK_SIZE + 1, 300 * BLOCK_SIZE + 2, -1, -1]
    assert values[-1] == 2


def test_the_graph_of_a_chunk_reads_where_its_context_is() -> None:
    arrays = arrays_of(DECODE, CHUNK)
    values = np.full(chunk_values(5, 6, 1), 77)
    fill_chunk(values, arrays, 1, 5)
    token_ids, positions, slots = values[:15].reshape(3, 5).tolist()
    assert token_ids == [1208, 1209, 1210, 1211, 0]
    assert positions == [8, 9, 10, 11, 11]
    assert slots == [1202 * BLOCK_SIZE + i for i in range(4)] + [-1]
    last, *starts, length = values[15:19].tolist()
    assert (last, starts, length) == (3, [0, 4], 12)
    assert values[19:].tolist() == [1200, 1201, 1202, 0, 0, 0]


def test_the_graph_of_decodes_with_drafts_reads_whose_each_token_is() -> None:
    arrays = arrays_of(run(6, 1, 7, drafts=2), DECODE)
    columns, lens, starts, tables = np.full((5, 8), 77), np.full(4, 77), np.full(5, 77), np.full((4, 1, 6), 77)
    fill_tokens(columns, arrays, 6)
    fill_runs(lens, starts, tables, arrays, 3)
    token_ids, sources, positions, slots, owners = columns[:, :6].tolist()
    assert token_ids == [605, 706, 0, 0, 0, 0]
    assert sources == [-1] * 6
    assert positions == [5, 6, 7, 8, 0, 0]
    assert slots == [601 * BLOCK_SIZE + 1, 701 * BLOCK_SIZE + 2, 701 * BLOCK_SIZE + 3, 702 * BLOCK_SIZE, -1, -1]
    assert owners == [0, 1, 1, 1, -1, -1]
    assert (columns[:, 6:] == 77).all(), "what is behind its room is not read"
    assert lens.tolist() == [6, 9, 0, 77]
    assert starts.tolist() == [0, 1, 4, 4, 77]
    assert tables[:2, 0, :3].tolist() == [[600, 601, 0], [700, 701, 702]]
