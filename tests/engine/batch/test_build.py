"""The arrays of a step against the same, worked out token by token."""

from itertools import takewhile

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from deployments.engine.batch.build import build_arrays, order_for_batch, rows_of
from deployments.engine.execution.base import LaunchedStep
from deployments.engine.scheduling.block_tables import BlockTables
from deployments.engine.scheduling.ids import block_array, token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import GenerateRequest, SamplingParams

BLOCK_SIZE = 4
GROUPS = (0, 10_000)  # of layers: the first block of each

# Prompt and generated tokens, computed ones, tokens of the run, drafts; each cut to what is there.
runs = st.tuples(st.integers(1, 20), st.integers(0, 5), st.integers(0, 24), st.integers(1, 24), st.integers(0, 3))


def build(number: int, shape: tuple[int, int, int, int, int], is_pending: bool) -> ScheduledSequence:
    num_prompt, num_generated, num_computed, num_tokens, num_drafts = shape
    total = num_prompt + num_generated
    num_blocks = -(-(total + num_drafts) // BLOCK_SIZE)
    tokens = [1000 * number + i for i in range(total)]
    request = GenerateRequest(f"r{number}", tuple(tokens[:num_prompt]), SamplingParams(max_tokens=100))
    is_pending = is_pending and total > 1
    sequence = Sequence(
        request,
        Role.LOCAL,
        0.0,
        token_ids=token_array(tokens[: total - is_pending]),
        num_computed_tokens=total - 2 if is_pending else min(num_computed, total - 1),
        tables=BlockTables(*(block_array(first + 100 * number + i for i in range(num_blocks)) for first in GROUPS)),
        position_offset=500 * (number % 2),
    )
    if is_pending:
        sequence.begin(ScheduledSequence.of(sequence, 1))
    count = min(num_tokens, sequence.num_remaining_tokens)
    has_drafts = count == sequence.num_remaining_tokens and not is_pending
    return ScheduledSequence.of(sequence, count, tuple(range(num_drafts)) if has_drafts else ())


@given(st.lists(st.tuples(runs, st.booleans()), min_size=1, max_size=8))
def test_every_token_has_its_place(shapes: list[tuple[tuple[int, int, int, int, int], bool]]) -> None:
    items = order_for_batch([build(number, *shape) for number, shape in enumerate(shapes)])
    before = items[::-1]
    row_of = rows_of(before)
    arrays = build_arrays(items, BLOCK_SIZE, before, len(GROUPS))
    at = 0
    draw_rows, draw_positions = [], []
    for run, item in enumerate(items):
        sequence = item.sequence
        tokens = [*sequence.token_ids, *[0] * sequence.num_pending_tokens, *item.drafts]
        assert (arrays.starts[run], arrays.counts[run]) == (item.start, item.num_tokens)
        assert (item.num_tokens == item.num_draws == 1) is (run < arrays.num_singles)
        assert item.is_decode is (item.num_tokens == item.num_draws and item.num_prompt_tokens == 0)
        if run < arrays.num_singles:
            is_known = item.start < len(sequence.token_ids)
            assert arrays.sources[run] == (-1 if is_known else row_of[sequence.request_id])
        for position in range(item.start, item.start + item.num_tokens):
            assert arrays.token_ids[at] == tokens[position]
            assert arrays.positions[at] == position + sequence.position_offset
            for group, table in enumerate(sequence.tables.each):
                block = table[position // BLOCK_SIZE]
                assert arrays.slots[group, at] == block * BLOCK_SIZE + position % BLOCK_SIZE
                assert arrays.tables[group, run, position // BLOCK_SIZE] == block
            if position >= item.start + item.num_tokens - item.num_draws:
                draw_rows.append(at)
                draw_positions.append(position + 1)
            at += 1
    assert at == arrays.num_tokens
    assert (arrays.draw_rows.tolist(), arrays.draw_positions.tolist()) == (draw_rows, draw_positions)
    all_draw = takewhile(lambda item: item.num_tokens == item.num_draws, items)
    assert arrays.num_decode_tokens == sum(item.num_tokens for item in all_draw)
    firsts = np.cumsum([0, *(item.num_draws for item in items)]).tolist()
    assert rows_of(items) == {i.sequence.request_id: row for i, row in zip(items, firsts, strict=False) if i.num_draws}


@given(st.lists(st.tuples(runs, st.booleans()), min_size=1, max_size=8))
def test_prompt_tokens_count_wherever_their_runs_stand(
    shapes: list[tuple[tuple[int, int, int, int, int], bool]],
) -> None:
    items = order_for_batch([build(number, *shape) for number, shape in enumerate(shapes)])
    step = LaunchedStep(items, torch.empty(0, dtype=torch.int64), None)
    assert step.num_prompt_tokens == sum(item.num_prompt_tokens for item in items)


def test_the_longest_decode_is_first_and_prompts_stay_in_their_order() -> None:
    def named(number: int, num_computed: int, num_tokens: int) -> ScheduledSequence:
        return build(number, (num_computed + num_tokens, 0, num_computed, num_tokens, 0), is_pending=False)

    given = [named(0, 0, 3), named(1, 5, 1), named(2, 9, 1), named(3, 5, 1), named(4, 0, 2), named(5, 7, 1)]
    assert [item.sequence.request_id for item in order_for_batch(given)] == ["r2", "r5", "r1", "r3", "r0", "r4"]
