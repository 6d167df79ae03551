"""How decode attention cuts sequences, and what comes of it, where a GPU is on it and else in Triton's interpreter."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels.arguments import PagedKV, Scores  # isort: skip
from deployments.engine.kernels.cuda_attention import decode_attention, decode_tile  # isort: skip
from deployments.engine.kernels import cuda_prefill, cuda_splits  # isort: skip
from deployments.engine.kernels.cuda_splits import MAX_SPLITS, DecodeTile, Splits, plan_splits  # isort: skip

TILE = DecodeTile(32, 2, 4)
BLOCK_SIZE = 64


def plan(lens: list[int], num_kv_heads: int = 8, window: int | None = None, max_tokens: int = 1 << 17) -> Splits:
    return plan_splits(torch.tensor(lens, dtype=torch.int32, device=DEVICE), num_kv_heads, TILE, max_tokens, window)


def parts_of(splits: Splits, num_seqs: int) -> list[list[tuple[int, int, int]]]:
    """Of each sequence, first visible key, and first and end of the keys of each part."""
    parts: list[list[tuple[int, int, int]]] = [[] for _ in range(num_seqs)]
    spans = splits.spans.tolist()
    for number, (sequence, begin, start, end) in enumerate(splits.items.tolist()):
        if sequence >= 0:
            assert spans[sequence][0] + len(parts[sequence]) == number
            parts[sequence].append((begin, start, end))
    assert [count for _, count in spans] == list(map(len, parts))
    return parts


@pytest.mark.parametrize("window", [None, 100, 1000])
@pytest.mark.parametrize("num_kv_heads", [1, 8])
@pytest.mark.parametrize("lens", [[1], [0, 0], [0, 33, 31, 2000], [320] * 40, [*range(300, 660, 10), 9000, 0]], ids=len)
def test_parts_cover_each_sequence_once(lens: list[int], num_kv_heads: int, window: int | None) -> None:
    splits = plan(lens, num_kv_heads, window)
    for length, parts in zip(lens, parts_of(splits, len(lens)), strict=True):
        visible = max(0, length - (window or length))
        assert 1 <= len(parts) <= MAX_SPLITS
        assert {begin for begin, _, _ in parts} == {visible}
        assert parts[0][1] == visible // TILE.num_tokens * TILE.num_tokens
        assert max(end for _, _, end in parts) == length
        for (_, _, end), (_, start, _) in pairwise(parts):
            assert start >= length or end == start
    assert not splits.finished.any()


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("num_seqs", [16, 17, 150])
def test_more_sequences_than_are_looked_at_at_once_are_cut_the_same(
    num_seqs: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = [length * 37 % 301 * (1 + 9 * (length % 11 == 3)) for length in range(num_seqs)]
    at_once = plan(lens, 2, window)
    monkeypatch.setattr(cuda_splits, "_SEQS_AT_ONCE", 16)
    for found, expected in zip(plan(lens, 2, window)[:3], at_once[:3], strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_short", [10, 32, 80])
def test_a_long_sequence_among_short_ones_is_cut_into_parts_of_what_a_program_gets_on_average(num_short: int) -> None:
    lens = [*range(300, 300 + num_short), 8000]
    parts = parts_of(plan(lens), len(lens))
    num_programs_of_a_head = 66 if num_short > 66 else len(lens)
    assert (
        max(end - start for own in parts for _, start, end in own)
        < sum(lens) / num_programs_of_a_head + 2 * TILE.num_tokens
    )
    assert len(parts[-1]) > 10


def test_sequences_of_equal_length_are_cut_into_equal_parts_only_as_long_as_programs_are_few() -> None:
    assert [len(parts) for parts in parts_of(plan([640] * 4), 4)] == [10] * 4
    assert [len(parts) for parts in parts_of(plan([640] * 50), 50)] == [1] * 50


def test_a_window_bounds_how_many_parts_there_may_be() -> None:
    assert len(plan([5000], window=100).items) == 3


def attend_plainly(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    group = query.shape[0] // key.shape[1]
    key, value = (part.float().repeat_interleave(group, dim=1) for part in (key, value))
    weights = torch.einsum("hd,thd->ht", query.float(), key) * scores.scaling
    if scores.softcap is not None:
        weights = scores.softcap * torch.tanh(weights / scores.softcap)
    if scores.window is not None:
        weights[:, : max(0, len(key) - scores.window)] = -torch.inf
    if scores.sinks is not None:
        weights = torch.cat([weights, scores.sinks.float()[:, None]], dim=1)
    return torch.einsum("ht,thd->hd", weights.softmax(-1)[:, : len(key)], value)


@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"), [(None, None, False), (100, None, True), (300, 2.0, False)]
)
@pytest.mark.parametrize("is_cut", [True, False])
@pytest.mark.parametrize("heads", [(8, 2, 64), (3, 1, 80)], ids=str)
def test_attention_by_parts(
    heads: tuple[int, int, int], is_cut: bool, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    lens = [0, 1, 64, 65, 700]
    pool = torch.randn(2, 24, BLOCK_SIZE, num_kv_heads, head_dim, device=DEVICE, dtype=torch.float16)
    tables = torch.randperm(24, device=DEVICE)[:18].to(torch.int32).repeat(len(lens), 1)
    queries = torch.randn(len(lens), num_heads, head_dim, device=DEVICE, dtype=torch.float16)
    sinks = torch.randn(num_heads, device=DEVICE, dtype=torch.float16) if has_sinks else None
    scores = Scores(head_dim**-0.5, window, softcap, sinks)
    given = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
    tile = decode_tile(head_dim, len(lens) * num_kv_heads)
    splits = plan_splits(given, num_kv_heads, tile, 18 * BLOCK_SIZE, window)
    assert splits.is_cut
    splits = splits._replace(is_cut=is_cut)  # merged by a kernel of its own, or by whoever ends last
    for _ in range(2):  # counters are as they were
        out = decode_attention(queries, PagedKV(pool[0], pool[1]), tables, splits, scores)
        assert not out[0].any()
        for query, table, length, result in zip(queries[1:], tables, lens[1:], out[1:], strict=False):
            key, value = (part[table.long()].flatten(0, 1)[:length] for part in pool)
            torch.testing.assert_close(result.float(), attend_plainly(query, key, value, scores), rtol=0.01, atol=4e-3)


@pytest.mark.parametrize("num_splits", [2, 3, 16])
@pytest.mark.parametrize(("window", "softcap", "has_sinks"), [(None, None, False), (50, None, True), (90, 2.0, False)])
def test_prompts_whose_keys_are_cut_into_parts_attend_the_same(
    num_splits: int, window: int | None, softcap: float | None, has_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    keys, values, queries, sinks = (
        torch.randn(shape, dtype=torch.float16, device=DEVICE)
        for shape in ((4, 256, 2, 16), (4, 256, 2, 16), (44, 6, 16), (6,))
    )
    scores = Scores(0.25, window, softcap, sinks if has_sinks else None)
    starts, lens, tables = (
        torch.tensor(given, dtype=torch.int32, device=DEVICE) for given in ([0, 7, 40], [500, 130], [[3, 1], [0, 2]])
    )

    def attend(count: int) -> Tensor:
        monkeypatch.setattr(cuda_prefill, "split_count", lambda _: count)
        given = (PagedKV(keys, values), starts, 33, scores)
        return cuda_prefill.prefill_attention(
            queries, *given, lens=lens, tables=tables, is_padded=True, is_recorded=True
        )

    whole, cut = attend(1), attend(num_splits)
    assert (cut.float() - whole.float()).norm() <= 1e-3 * whole.float().norm()
    assert not cut[40:].any(), "nobody has asked for these"


def test_few_queries_behind_many_keys_keep_the_multiprocessors_busy() -> None:
    # 32 queries of Llama-3.1-8B are two tiles of rows for each of 8 KV heads, 512 are 32.
    assert cuda_prefill.split_count(2 * 8) == 16
    assert cuda_prefill.split_count(32 * 8) == 1
    assert cuda_prefill.split_count(1) == MAX_SPLITS // 2


@pytest.mark.parametrize(("is_recorded", "num_splits"), [(True, 11), (False, 8)])
def test_keys_are_cut_into_powers_of_two_where_no_graph_is_recorded(
    is_recorded: bool, num_splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number is compiled by itself."""
    seen: list[int] = []
    monkeypatch.setattr(cuda_prefill, "split_count", lambda _: 11)
    monkeypatch.setattr(cuda_prefill, "merge_queries", lambda *given: seen.append(given[-1]))
    blocks, queries = torch.randn(2, 256, 2, 16, device=DEVICE).half(), torch.randn(3, 4, 16, device=DEVICE).half()
    starts, lens, tables = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0, 3], [400], [[1, 0]]))
    given = queries, PagedKV(blocks, blocks), starts, 3, Scores(0.25)
    cuda_prefill.prefill_attention(*given, lens=lens, tables=tables, is_recorded=is_recorded)
    assert seen == [num_splits]
