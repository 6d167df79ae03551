"""Attention of decodes with several queries each, where a GPU is on it and else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from deployments.engine.kernels.arguments import PagedKV, Scores
from deployments.engine.kv.cache import KVCache, KVShape
from deployments.kv_groups import KVGroup
from tests.engine.interpreted import DEVICE  # before the kernels
from tests.gpu.expected import expected_attention

from deployments.engine.kernels.cuda_verification import (  # isort: skip
    Runs,
    plan_verification,
    verification_attention,
)

BLOCK_SIZE, NUM_BLOCKS = 128, 9
# Tokens of each sequence, and how many of them are new; the last one is padding.
LENS, COUNTS = [1, 5, 130, 700, 64, 0], [1, 4, 2, 7, 3, 0]
NUM_TOKENS = sum(COUNTS) + 2  # two are nobody's

every_score = pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [(None, None, False), (100, None, True), (3, None, False), (300, 2.0, False), (None, 2.0, True)],
    ids=str,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.float16)


def as_int32(values: list[int]) -> Tensor:
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


def runs_of(counts: list[int], max_queries: int) -> Runs:
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    owners += [-1] * (NUM_TOKENS - len(owners))
    starts = [sum(counts[:row]) for row in range(len(counts) + 1)]
    return Runs(as_int32(LENS), as_int32(starts), as_int32(owners), max_queries)


def attend(queries: Tensor, kv: PagedKV, tables: Tensor, scores: Scores, *, is_cut: bool) -> Tensor:
    runs, out = runs_of(COUNTS, max(COUNTS)), torch.zeros_like(queries)
    splits = plan_verification(runs, queries.shape[1], kv, tables.shape[1] * BLOCK_SIZE, scores.window)
    assert splits.is_cut
    splits = splits._replace(is_cut=is_cut)  # merged by a kernel of its own, or by whoever ends last
    for _ in range(2):  # counters are as they were
        verification_attention(queries, kv, tables, runs, splits, scores, out)
        assert not splits.finished.any()
    return out


def check(out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, tables: Tensor, scores: Scores) -> None:
    """`keys` and `values`: (all slots, H_kv, head_dim)."""
    at = 0
    for table, length, count in zip(tables, LENS, COUNTS, strict=True):
        if count:
            slots = (table[:, None].long() * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=DEVICE)).flatten()[:length]
            expected = expected_attention(queries[at : at + count], keys[slots], values[slots], scores)
            torch.testing.assert_close(out[at : at + count].float(), expected, rtol=0.02, atol=6e-3)
        at += count
    assert not out[at:].any(), "tokens of nobody were written"


def tables_for(lens: list[int]) -> Tensor:
    return torch.stack([torch.randperm(NUM_BLOCKS, device=DEVICE)[:6] for _ in lens]).to(torch.int32)


@every_score
@pytest.mark.parametrize("is_cut", [True, False])
@pytest.mark.parametrize("heads", [(8, 2, 64), (3, 1, 80), (4, 4, 16)], ids=str)
def test_each_query_sees_what_stands_before_it(
    heads: tuple[int, int, int], is_cut: bool, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    keys, values = randn(2, NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, head_dim)
    scores = Scores(head_dim**-0.5, window, softcap, randn(num_heads) if has_sinks else None)
    queries, tables = randn(NUM_TOKENS, num_heads, head_dim), tables_for(LENS)
    out = attend(queries, PagedKV(keys, values), tables, scores, is_cut=is_cut)
    check(out, queries, keys.flatten(0, 1), values.flatten(0, 1), tables, scores)


@every_score
def test_what_they_see_may_be_codes(window: int | None, softcap: float | None, has_sinks: bool) -> None:
    num_heads, num_kv_heads, head_dim = 4, 2, 16
    shape = KVShape((KVGroup((0,), num_kv_heads, head_dim),), torch.float16, is_fp8=True)
    cache = KVCache(shape, NUM_BLOCKS, BLOCK_SIZE, DEVICE)
    slots = torch.arange(NUM_BLOCKS * BLOCK_SIZE, device=DEVICE)
    keys, values = cache.write(0, slots, *randn(2, len(slots), num_kv_heads, head_dim))
    scores = Scores(head_dim**-0.5, window, softcap, randn(num_heads) if has_sinks else None)
    queries, tables = randn(NUM_TOKENS, num_heads, head_dim), tables_for(LENS)
    check(attend(queries, cache.paged(0), tables, scores, is_cut=True), queries, keys, values, tables, scores)


def test_one_query_each_sees_what_it_sees_without_drafts() -> None:
    from deployments.engine.kernels.cuda_attention import decode_attention, decode_tile
    from deployments.engine.kernels.cuda_splits import plan_splits

    keys, values = randn(2, NUM_BLOCKS, BLOCK_SIZE, 2, 64)
    queries, tables, scores = randn(len(LENS), 8, 64), tables_for(LENS), Scores(0.125)
    lens, tile = as_int32(LENS), decode_tile(64, len(LENS) * 2)
    plan = plan_splits(lens, 2, tile, 6 * BLOCK_SIZE, None)
    expected = decode_attention(queries, PagedKV(keys, values), tables, plan, scores)
    runs = Runs(lens, as_int32([*range(len(LENS) + 1)]), as_int32([*range(len(LENS))]), 4)
    splits, out = plan_verification(runs, 8, PagedKV(keys, values), 6 * BLOCK_SIZE, None), torch.zeros_like(queries)
    verification_attention(queries, PagedKV(keys, values), tables, runs, splits, scores, out)
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.0)


def test_tables_may_be_those_of_one_group_of_layers_among_others() -> None:
    from deployments.engine.kernels.cuda_attention import decode_attention, decode_tile
    from deployments.engine.kernels.cuda_splits import plan_splits

    keys, values = randn(2, NUM_BLOCKS, BLOCK_SIZE, 2, 16)
    tables, scores = tables_for(LENS), Scores(0.25)
    _, among = torch.stack((tables_for(LENS), tables), dim=1).unbind(1)
    assert not among.is_contiguous()
    queries = randn(NUM_TOKENS, 4, 16)
    check(
        attend(queries, PagedKV(keys, values), among, scores, is_cut=True),
        queries,
        keys.flatten(0, 1),
        values.flatten(0, 1),
        tables,
        scores,
    )
    plan = plan_splits(as_int32(LENS), 2, decode_tile(16, len(LENS) * 2), 6 * BLOCK_SIZE, None)
    out, expected = (
        decode_attention(queries[: len(LENS)], PagedKV(keys, values), given, plan, scores) for given in (among, tables)
    )
    torch.testing.assert_close(out, expected, rtol=0.0, atol=0.0)
