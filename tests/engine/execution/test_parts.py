"""Which steps run as recorded parts, and what the graphs of these read."""

import numpy as np
import pytest

from deployments.engine.batch.arrays import StepArrays
from deployments.engine.batch.build import build_arrays, order_for_batch
from deployments.engine.execution.parts import (
    MAX_KV_BYTES,
    MAX_PROMPT_TOKENS,
    fill_decodes,
    fill_prompt,
    recorded_prompts,
)
from deployments.engine.scheduling.ids import block_array, token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import GenerateRequest, SamplingParams

BLOCK_SIZE = 4
KV_BYTES = 2


def run(num_computed: int, num_tokens: int, num_given: int, *, drafts: int = 0) -> ScheduledSequence:
    """The next tokens of a sequence of so many, whose tokens and blocks are numbered from 100 times their number on."""
    first = 100 * num_given
    tokens = range(first, first + num_given)
    sequence = Sequence(
        GenerateRequest(f"r{num_computed}-{num_given}", tuple(tokens), SamplingParams(max_tokens=100)),
        Role.LOCAL,
        0.0,
        token_ids=token_array(tokens),
        num_computed_tokens=num_computed,
        block_table=block_array(range(first, first + (num_given + drafts) // BLOCK_SIZE + 1)),
    )
    return ScheduledSequence.of(sequence, num_tokens, (0,) * drafts)


def arrays_of(*items: ScheduledSequence) -> StepArrays:
    return build_arrays(order_for_batch(list(items)), BLOCK_SIZE, {})


DECODE, PROMPT = run(5, 1, 6), run(0, 9, 9)


def test_whole_prompts_are_recorded_parts_beside_decodes() -> None:
    assert recorded_prompts(arrays_of(PROMPT, DECODE, run(0, 30, 30)), KV_BYTES) == [9, 30]
    assert recorded_prompts(arrays_of(PROMPT, run(0, 30, 30)), KV_BYTES) == [9, 30]
    assert recorded_prompts(arrays_of(DECODE), KV_BYTES) == []


@pytest.mark.parametrize(
    "other",
    [run(8, 4, 12), run(0, 4, 12), run(4, 4, 12), run(5, 1, 6, drafts=2)],
    ids=["end of a prompt", "its beginning", "its middle", "drafts"],
)
def test_steps_with_parts_of_prompts_or_drafts_are_launched_as_a_whole(other: ScheduledSequence) -> None:
    assert recorded_prompts(arrays_of(DECODE, PROMPT, other), KV_BYTES) == []
    assert recorded_prompts(arrays_of(other), KV_BYTES) == []


def test_steps_that_keep_the_gpu_at_work_are_launched_as_a_whole() -> None:
    longest = run(0, MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
    assert recorded_prompts(arrays_of(DECODE, longest), KV_BYTES) == [MAX_PROMPT_TOKENS]
    assert recorded_prompts(arrays_of(DECODE, longest, PROMPT), KV_BYTES) == [], "many tokens"
    assert recorded_prompts(arrays_of(DECODE, PROMPT, PROMPT, PROMPT), KV_BYTES) == [], "many prompts"
    assert recorded_prompts(arrays_of(DECODE, PROMPT), MAX_KV_BYTES) == [], "long contexts"
    longer = run(0, 2 * MAX_PROMPT_TOKENS, 2 * MAX_PROMPT_TOKENS)
    assert recorded_prompts(arrays_of(longer), KV_BYTES) == [2 * MAX_PROMPT_TOKENS], "one alone is always recorded"


def test_the_graph_of_decodes_reads_those_of_a_mixed_step_alone() -> None:
    arrays = arrays_of(PROMPT, DECODE, run(9, 1, 10))
    columns, tables = np.full((5, 6), 77), np.full((6, 5), 77)
    fill_decodes(columns, tables, arrays, 4)
    token_ids, sources, positions, slots, lens = columns.tolist()
    assert token_ids == [605, 1009, 0, 0, 77, 77]
    assert sources == [-1, -1, -1, -1, 77, 77]
    assert positions == [5, 9, 0, 0, 77, 77]
    assert slots == [601 * BLOCK_SIZE + 1, 1002 * BLOCK_SIZE + 1, -1, -1, 77, 77]
    assert lens == [6, 10, 0, 0, 77, 77]
    assert tables[:2, :3].tolist() == [[600, 601, 0], [1000, 1001, 1002]]
    assert (tables[2:] == 77).all()


def test_the_graph_of_a_prompt_reads_its_tokens_padded() -> None:
    arrays = arrays_of(DECODE, PROMPT, run(0, 3, 3))
    values = np.full(3 * 5 + 1, 77)
    fill_prompt(values, arrays, 2)
    token_ids, positions, slots = values[:-1].reshape(3, 5).tolist()
    assert token_ids == [300, 301, 302, 0, 0]
    assert positions == [0, 1, 2, 3, 4]
    assert slots == [300 * BLOCK_SIZE, 300 * BLOCK_SIZE + 1, 300 * BLOCK_SIZE + 2, -1, -1]
    assert values[-1] == 2
