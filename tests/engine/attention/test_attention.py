"""The step's attention against dense attention in float64: splits, merging, windows, softcaps, any block table."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from deployments.engine.attention import sdpa
from deployments.engine.attention.base import LayerAttention
from deployments.engine.attention.paged import PagedStep
from deployments.engine.attention.sdpa import plan_splits
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.kernels.arguments import Scores
from deployments.engine.kv.cache import KVCache, KVShape
from deployments.kv_groups import KVGroup
from tests.engine.families import CPU
from tests.engine.insides import scores_at_once

BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 6, 2, 16
SCALING = 0.31


class Pool:
    """A KV pool full of noise, in which sequences lie in scattered blocks."""

    def __init__(self, seed: int, num_blocks: int = 256) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        shape = KVShape((KVGroup((0,), NUM_KV_HEADS, HEAD_DIM),), torch.float32)
        self.cache = KVCache(shape, num_blocks, BLOCK_SIZE, CPU)
        # Whatever is read by mistake changes the result a lot.
        self.cache.blocks.copy_(100 * self.randn(*self.cache.blocks.shape))
        self._free = torch.randperm(num_blocks, generator=self.generator).tolist()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def take(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // BLOCK_SIZE)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def slots(self, table: list[int], start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        return torch.tensor(table)[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    context_len: int,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(heads, Q, head_dim) over (kv_heads, K, head_dim): (Q, heads, head_dim), all in float64."""
    group = NUM_HEADS // NUM_KV_HEADS
    keys, values = (part.double().repeat_interleave(group, dim=0) for part in (keys, values))
    scores = queries.double() @ keys.transpose(1, 2) * SCALING
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    distance = torch.arange(context_len, context_len + queries.shape[1])[:, None] - torch.arange(keys.shape[1])
    hidden = (distance < 0) | (distance >= (window or 1 << 30))
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)), -1)
    return (scores.softmax(-1)[..., : keys.shape[1]] @ values).transpose(0, 1)


def check(
    single_lens: list[int],
    chunks: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    seed: int,
    *,
    has_sinks: bool = False,
) -> None:
    """Attend one step and compare every token.

    Args:
        single_lens: tokens of each decode, the new one included.
        chunks: (context, new tokens) of each prompt chunk.
    """
    pool = Pool(seed)
    runs = [(length - 1, 1) for length in single_lens] + chunks
    total = sum(count for _, count in runs)
    sinks = pool.randn(NUM_HEADS) if has_sinks else None
    queries = pool.randn(NUM_HEADS, total, HEAD_DIM)
    keys, values = pool.randn(NUM_KV_HEADS, total, HEAD_DIM), pool.randn(NUM_KV_HEADS, total, HEAD_DIM)
    slots, tables, expected, start = [], [], [], 0
    for context, count in runs:
        table = pool.take(context + count)
        past = pool.randn(2, NUM_KV_HEADS, context, HEAD_DIM)
        pool.cache.write(0, pool.slots(table, 0, context), past[0].transpose(0, 1), past[1].transpose(0, 1))
        span = slice(start, start + count)
        all_keys, all_values = torch.cat([past[0], keys[:, span]], 1), torch.cat([past[1], values[:, span]], 1)
        expected.append(dense(queries[:, span], all_keys, all_values, context, window, softcap, sinks))
        slots.append(pool.slots(table, context, context + count))
        tables.append(table)
        start += count
    arrays = build_arrays(torch.cat(slots), single_lens, tables, chunks)
    for kernel in (True, False):  # without it as well, as for other dtypes
        with patch.object(sdpa, "can_attend", lambda *_, kernel=kernel: kernel and softcap is None and sinks is None):
            scores = Scores(SCALING, window, softcap, sinks)
            actual = sdpa.SdpaStep(pool.cache, arrays).attend(LayerAttention(0, queries, keys, values, scores, None))
        torch.testing.assert_close(actual.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)


def build_arrays(
    slots: Tensor,
    single_lens: list[int],
    tables: list[list[int]],
    chunks: list[tuple[int, int]],
    num_guessing: int = 0,
) -> StepArrays:
    """What attention reads of a step; the tokens themselves, and where those that are drawn will stand, it does not.

    So many of the first chunks are no prompts but decodes with drafts.
    """
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    starts, counts = zip(*[(length - 1, 1) for length in single_lens], *chunks, strict=True)
    unused = np.zeros(0, np.int64)
    runs = np.array(starts, np.int64), np.array(counts, np.int64), padded[None], len(single_lens)
    ends = np.cumsum(counts)
    num_decodes = len(single_lens) + num_guessing
    draw_rows = np.concatenate((np.arange(ends[num_decodes - 1] if num_decodes else 0), ends[num_decodes:] - 1))
    return StepArrays(unused, unused, unused, slots.numpy()[None], *runs, draw_rows, unused)


every_window = pytest.mark.parametrize("window", [None, 1, 7, 8, 24])
every_softcap = pytest.mark.parametrize("softcap", [None, 1.5])


@every_window
@every_softcap
@pytest.mark.parametrize(
    "single_lens", [[1], [8, 8, 8], [600, 5, 9, 17, 30], [3, 1, 300, 64, 2, 65, 299]], ids=lambda lens: f"{lens}"
)
def test_decodes_of_any_lengths_match_dense_attention(
    single_lens: list[int], window: int | None, softcap: float | None
) -> None:
    check(single_lens, [], window, softcap, seed=sum(single_lens))


@every_window
@every_softcap
@pytest.mark.parametrize("chunk", [(0, 2), (0, 40), (3, 5), (16, 33), (100, 2), (61, 64)], ids=lambda c: f"{c}")
def test_prompt_chunks_with_any_context_match_dense_attention(
    chunk: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    check([], [chunk], window, softcap, seed=sum(chunk))


@every_window
@every_softcap
def test_decodes_and_chunks_in_one_step_keep_apart(window: int | None, softcap: float | None) -> None:
    check([40, 3, 200], [(0, 17), (29, 4)], window, softcap, seed=5)


@pytest.mark.parametrize("seed", range(20))
def test_random_steps_match_dense_attention(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lens = [int(n) for n in rng.integers(1, rng.choice([10, 400]), size=rng.integers(1, 6))]
    chunks = [(int(rng.integers(0, 60)), int(rng.integers(2, 40))) for _ in range(rng.integers(0, 3))]
    window, softcap = rng.choice([0, 5, 50]), rng.choice([0.0, 3.0])
    check(lens, chunks, int(window) or None, float(softcap) or None, seed)


@every_window
@every_softcap
def test_sinks_take_their_share_of_every_softmax(window: int | None, softcap: float | None) -> None:
    check([40, 3, 200, 1], [(0, 17), (29, 4), (100, 40)], window, softcap, seed=6, has_sinks=True)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("window", [None, 60])
def test_no_more_is_computed_at_once_than_is_bounded(window: int | None, is_fused: bool) -> None:
    bound = 8 * NUM_HEADS * 400
    with (
        scores_at_once() as sizes,
        patch.object(sdpa, "_MAX_BYTES", 8 * bound),
        patch.object(sdpa, "_MAX_PART", 16),
        patch.object(sdpa, "_is_fused", lambda *_: is_fused),
        patch.object(sdpa, "can_attend", lambda *_: False),
    ):
        check([200] * 5, [(90, 300), (0, 100)], window, None if is_fused else 3.0, seed=7)
    if window is not None or not is_fused:
        assert max(sizes) <= bound


def test_one_long_decode_is_split_and_the_short_ones_are_not_padded_to_it() -> None:
    lens = [600, 5, 9, 17, 30]
    pool = Pool(0)
    tables = [pool.take(length) for length in lens]
    plan = plan_splits(
        build_arrays(torch.zeros(0, dtype=torch.int64), lens, tables, []), BLOCK_SIZE, None, pool.cache.blocks
    )
    assert plan.owner is not None
    assert plan.owner.tolist().count(0) > 1 and all(plan.owner.tolist().count(i) == 1 for i in range(1, 5))
    padded_to_longest = len(lens) * len(tables[0])
    assert plan.block_ids.numel() < padded_to_longest / 2


def test_decodes_of_one_length_that_fill_their_blocks_need_neither_mask_nor_merging() -> None:
    pool = Pool(0)
    lens = [16, 16]
    tables = [pool.take(length) for length in lens]
    plan = plan_splits(
        build_arrays(torch.zeros(0, dtype=torch.int64), lens, tables, []), BLOCK_SIZE, None, pool.cache.blocks
    )
    assert plan.mask is None and plan.owner is None
    assert plan.block_ids.tolist() == [tables[0] + tables[1]]


def test_a_window_gathers_only_the_blocks_it_reaches() -> None:
    pool = Pool(0)
    tables = [pool.take(600)]
    plan = plan_splits(
        build_arrays(torch.zeros(0, dtype=torch.int64), [600], tables, []), BLOCK_SIZE, 16, pool.cache.blocks
    )
    assert set(plan.block_ids[0].tolist()) == set(tables[0][-2:])


def test_a_decode_gives_the_same_bits_whatever_runs_beside_it() -> None:
    pool, lens = Pool(3), [700, 5, 300]
    tables = [pool.take(length) for length in lens]
    queries = pool.randn(len(lens), NUM_HEADS, HEAD_DIM)

    def attend(rows: slice) -> Tensor:
        arrays = build_arrays(torch.zeros(0, dtype=torch.int64), lens[rows], tables[rows], [])
        out = torch.empty_like(queries[rows])
        PagedStep(arrays, pool.cache, None).attend(0, queries[rows], SCALING, out)
        return out

    together = attend(slice(3))
    for i in range(len(lens)):
        assert torch.equal(attend(slice(i, i + 1))[0], together[i])


@pytest.mark.parametrize("window", [None, 7, 250])
def test_drafts_give_the_bits_that_they_give_one_by_one(window: int | None) -> None:
    pool, runs = Pool(5), [(699, 1), (500, 4), (3, 6), (255, 2), (40, 30)]  # the last one is a prompt's
    tables = [pool.take(start + count) for start, count in runs]
    queries = pool.randn(sum(count for _, count in runs), NUM_HEADS, HEAD_DIM)

    def attend(arrays: StepArrays, its_queries: Tensor) -> Tensor:
        out = torch.empty_like(its_queries)
        PagedStep(arrays, pool.cache, window).attend(0, its_queries, SCALING, out)
        return out

    no_slots = torch.zeros(0, dtype=torch.int64)
    together = attend(build_arrays(no_slots, [700], tables, runs[1:], num_guessing=3), queries)
    row = 0
    for (start, count), table in zip(runs[:-1], tables, strict=False):
        for token in range(count):
            alone = build_arrays(no_slots, [start + token + 1], [table], [])
            assert torch.equal(attend(alone, queries[row : row + 1])[0], together[row])
            row += 1
    prompt = build_arrays(no_slots, [], tables[-1:], runs[-1:])
    assert torch.equal(attend(prompt, queries[row:]), together[row:])


@pytest.mark.parametrize("window", [None, 7, 250])
def test_a_prompts_token_gives_the_same_bits_wherever_its_chunk_begins_and_ends(window: int | None) -> None:
    pool, length = Pool(4), 900
    table = pool.take(length)
    queries = pool.randn(length, NUM_HEADS, HEAD_DIM)

    def attend(start: int, end: int) -> Tensor:
        out = torch.empty(end - start, NUM_HEADS, HEAD_DIM)
        arrays = build_arrays(torch.zeros(0, dtype=torch.int64), [], [table], [(start, end - start)])
        PagedStep(arrays, pool.cache, window).attend(0, queries[start:end], SCALING, out)
        return out

    whole = attend(0, length)
    for start, end in ((0, 2), (1, 300), (500, 900), (191, 193), (898, 900)):
        assert torch.equal(attend(start, end), whole[start:end])
