"""A window as two causal attentions, one of them backwards: beside plain attention with a mask, in float64."""

import pytest
import torch
from torch import Tensor

from deployments.engine.attention.windows import Pieces, attend_window, first_key, plan_window
from tests.engine.families import CPU

NUM_HEADS, HEAD_DIM = 2, 8


def attend(queries: Tensor, keys: Tensor, values: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """What FlashAttention does: causal, the queries being the last tokens of each piece."""
    starts, key_starts = pieces.starts, pieces.key_starts
    outs, normalisers = [], []
    for i in range(len(starts) - 1):
        query = queries[starts[i] : starts[i + 1]]
        key, value = (part[key_starts[i] : key_starts[i + 1]] for part in (keys, values))
        assert len(query) <= pieces.max_queries and len(key) <= pieces.max_keys
        scores = torch.einsum("qhd,khd->hqk", query, key)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(key) - len(query))
        scores = scores.masked_fill(~seen, float("-inf"))
        normalisers.append(scores.logsumexp(-1))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(), value))
    return torch.cat(outs), torch.cat(normalisers, -1)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, rows: Tensor) -> None:
    share = torch.sigmoid(other_lse - lse[:, rows]).T.unsqueeze(-1)
    out[rows] = torch.lerp(out[rows], other, share)
    lse[:, rows] = torch.logaddexp(lse[:, rows], other_lse)


def masked(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    context = len(keys) - len(queries)
    distance = torch.arange(context, len(keys))[:, None] - torch.arange(len(keys))
    scores = torch.einsum("qhd,khd->hqk", queries, keys)
    scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)


def check(sequences: list[tuple[int, int]], window: int) -> None:
    torch.manual_seed(0)
    first = first_key(sequences[0][0], window) if len(sequences) == 1 else 0
    queries, keys, values, expected, normalisers = [], [], [], [], []
    for context, count in sequences:
        query, *rest = torch.randn(3, context + count, NUM_HEADS, HEAD_DIM, dtype=torch.float64)
        queries.append(query[context:])
        keys.append(rest[0][first:])
        values.append(rest[1][first:])
        out, lse = masked(queries[-1], rest[0], rest[1], window)
        expected.append(out)
        normalisers.append(lse)
    spare = torch.full((5, NUM_HEADS, HEAD_DIM), torch.nan, dtype=torch.float64)  # a block's end
    given = torch.cat(queries), torch.cat([*keys, spare]), torch.cat([*values, spare])
    out, lse = attend_window(*given, plan_window(sequences, window, CPU), attend, merge)
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(lse, torch.cat(normalisers, -1))


@pytest.mark.parametrize("window", [2, 7, 8, 16, 31])
@pytest.mark.parametrize("count", [32, 33, 40, 64, 65])
def test_a_whole_prompt(count: int, window: int) -> None:
    check([(0, count)], window)


@pytest.mark.parametrize("window", [2, 7, 8, 16, 31])
@pytest.mark.parametrize("chunk", [(1, 40), (6, 40), (7, 40), (8, 25), (30, 3), (31, 30), (100, 1), (100, 64)], ids=str)
def test_a_chunk_behind_a_context(chunk: tuple[int, int], window: int) -> None:
    check([chunk], window)


@pytest.mark.parametrize("window", [2, 7, 16])
def test_whole_prompts_together_longer_and_shorter_than_the_window(window: int) -> None:
    check([(0, 3), (0, 20), (0, 7), (0, 16), (0, 50), (0, 1)], window)
