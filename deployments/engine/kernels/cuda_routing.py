"""Which experts each token goes to, and in which order their rows are computed, on a GPU, in Triton."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deployments.engine.kernels.cuda_overlap import OVERLAPPING, wait_for_earlier

_CHUNK = 4096
_CHUNKS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router chooses, from its logits.

    Attributes:
        top_k: experts for each token.
        is_sigmoid: scores are sigmoids of the logits; else softmax over all experts.
        renormalizes: the chosen scores are divided by their sum.
        scale: of the chosen scores, at last.
        num_groups: experts are chosen from the best groups only, by the sum of each group's best two.
        top_groups: how many groups those are.
    """

    top_k: int
    is_sigmoid: bool = False
    renormalizes: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Assignments of tokens to experts, those of one expert together, cut into blocks of rows.

    Attributes:
        order: (N,) int32, assignments by expert; assignment `t * top_k + j` is the jth of token t.
        blocks: (3, max_blocks) int32: each block's expert, its first row in `order`, and the first after it. Blocks
            that are not needed come last, with expert -1.
        rows: the most rows of a block.
    """

    order: Tensor
    blocks: Tensor
    rows: int


def route(logits: Tensor, routing: Routing, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose experts.

    Args:
        logits: (parts, T, num_experts), float32, contiguous; their sum is written into the first part.
        routing: how.
        correction: (num_experts,) float32, added to the scores for the choice alone.

    Returns:
        (T, top_k) float32 weights and int32 ids, the best first.
    """
    parts, num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, routing.top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_tokens, routing.top_k, dtype=torch.int32, device=logits.device)
    if num_tokens:
        experts = triton.next_power_of_2(num_experts)
        _route[(num_tokens,)](
            logits,
            correction,
            weights,
            ids,
            num_tokens,
            num_experts,
            routing.scale,
            PARTS=parts,
            EXPERTS=experts,
            TOP_K=routing.top_k,
            TOP_K_PADDED=triton.next_power_of_2(routing.top_k),
            SIGMOID=routing.is_sigmoid,
            CORRECTED=correction is not None,
            RENORMALIZE=routing.renormalizes,
            GROUPS=routing.num_groups,
            TOP_GROUPS=routing.top_groups,
            num_warps=1 if experts <= 256 else 4,
            **OVERLAPPING,
        )
    return weights, ids


def plan_blocks(ids: Tensor, num_experts: int, rows: int) -> Plan:
    """Bring together what goes to the same expert.

    Args:
        ids: (T, top_k) int32 below `num_experts`, contiguous, not empty.
        num_experts: of the layer.
        rows: the most rows of a block.
    """
    count = ids.numel()
    # As many experts as can be have one row; each further block of an expert takes `rows` more.
    max_blocks = count if count <= num_experts else num_experts + (count - num_experts) // rows
    order = torch.empty(count, dtype=torch.int32, device=ids.device)
    blocks = torch.empty(3, max_blocks, dtype=torch.int32, device=ids.device)
    experts = triton.next_power_of_2(num_experts)
    chunk = min(_CHUNK, max(128, triton.next_power_of_2(count)))
    num_chunks = triton.cdiv(count, chunk)
    counts = None
    if num_chunks > 1:
        counts = torch.empty(num_chunks, experts, dtype=torch.int32, device=ids.device)
        _count[(num_chunks,)](ids, counts, count, EXPERTS=experts, CHUNK=chunk, num_warps=8, **OVERLAPPING)
    _plan[(num_experts, num_chunks)](
        ids,
        counts,
        order,
        blocks,
        count,
        num_experts,
        max_blocks,
        num_chunks,
        ROWS=rows,
        EXPERTS=experts,
        CHUNK=chunk,
        CHUNKS=min(_CHUNKS_AT_ONCE, triton.next_power_of_2(num_chunks)),
        num_warps=4 if chunk <= 1024 else 8,
        **OVERLAPPING,
    )
    return Plan(order, blocks, rows)


@triton.jit(do_not_specialize=["num_tokens"])  # or every batch size would compile its own
def _route(
    logits,
    correction,
    weights,
    ids,
    num_tokens,
    num_experts,
    scale,
    PARTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
    SIGMOID: tl.constexpr,
    CORRECTED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_earlier(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, EXPERTS)
    inside = at < num_experts
    logit = tl.load(logits + token * num_experts + at, mask=inside, other=float("-inf"))
    for part in tl.static_range(1, PARTS):
        logit += tl.load(logits + (part * num_tokens + token) * num_experts + at, mask=inside, other=0.0)
    if PARTS > 1:
        tl.store(logits + token * num_experts + at, logit, mask=inside)
    if SIGMOID:
        score = tl.sigmoid(logit)
        choice = score
    else:
        score = tl.exp(logit - tl.max(logit, axis=0))
        score = score / tl.sum(score, axis=0)
        choice = logit
    if CORRECTED:
        choice += tl.load(correction + at, mask=inside, other=0.0)
    # Whatever the logits are, NaN too, experts that exist are chosen.
    choice = tl.where(inside, tl.where(choice > -1e38, choice, -1e38), float("-inf"))
    if GROUPS > 1:
        choice = _keep_best_groups(choice, at, num_experts // GROUPS, EXPERTS, GROUPS, TOP_GROUPS)
    place = tl.arange(0, TOP_K_PADDED)
    chosen, chosen_scores = tl.zeros((TOP_K_PADDED,), tl.int32), tl.zeros((TOP_K_PADDED,), tl.float32)
    for index in tl.static_range(TOP_K):
        best = tl.minimum(tl.argmax(choice, axis=0), num_experts - 1)
        chosen = tl.where(place == index, best, chosen)
        chosen_scores = tl.where(place == index, _sum_of(score, at == best), chosen_scores)
        choice = _without(choice, at == best)
    if RENORMALIZE:
        chosen_scores /= tl.sum(chosen_scores, axis=0) + 1e-20
    tl.store(weights + token * TOP_K + place, chosen_scores * scale, mask=place < TOP_K)
    tl.store(ids + token * TOP_K + place, chosen, mask=place < TOP_K)


@triton.jit
def _keep_best_groups(choice, at, group_size, EXPERTS: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """Put experts of all but the best groups last."""
    group = at // group_size
    group_score = tl.full((EXPERTS,), float("-inf"), tl.float32)  # of group i at i
    for index in tl.static_range(GROUPS):
        members = tl.where(group == index, choice, float("-inf"))
        best = tl.max(members, axis=0)
        second = tl.max(_without(members, at == tl.argmax(members, axis=0)), axis=0)
        group_score = tl.where(at == index, best + second, group_score)
    kept = tl.full((EXPERTS,), float("-inf"), tl.float32)
    for _ in tl.static_range(TOP_GROUPS):
        best_group = tl.argmax(group_score, axis=0)
        kept = tl.where(group == best_group, choice, kept)
        group_score = _without(group_score, at == best_group)
    return kept


@triton.jit
def _without(scores, excluded):
    """Scores of which some cannot be the best."""
    return tl.where(excluded, float("-inf"), scores)


@triton.jit
def _sum_of(values, included):
    return tl.sum(tl.where(included, values, 0), axis=0)


@triton.jit(do_not_specialize=["count"])  # or every batch size would compile its own
def _count(ids, counts, count, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, OVERLAPS: tl.constexpr):
    """How often each expert is chosen in one chunk."""
    wait_for_earlier(OVERLAPS)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    found = tl.histogram(tl.load(ids + at, mask=at < count, other=0), EXPERTS, mask=at < count)
    tl.store(counts + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), found)


@triton.jit(do_not_specialize=["count", "max_blocks", "num_chunks"])
def _plan(
    ids,
    counts,
    order,
    blocks,
    count,
    num_experts,
    max_blocks,
    num_chunks,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One expert's part of the order within one chunk of assignments, and its blocks."""
    wait_for_earlier(OVERLAPS)
    expert, chunk = tl.program_id(0), tl.program_id(1)
    in_chunk = tl.arange(0, CHUNK)
    at = chunk * CHUNK + in_chunk
    chosen = tl.load(ids + at, mask=at < count, other=-1)
    each = tl.arange(0, EXPERTS)
    if CHUNKS == 1:
        totals = tl.histogram(chosen, EXPERTS, mask=at < count)
        before = 0
    else:
        totals = tl.zeros((EXPERTS,), tl.int32)
        before = tl.zeros((), tl.int32)
        for start in range(0, num_chunks, CHUNKS):
            index = start + tl.arange(0, CHUNKS)[:, None]
            of_chunks = tl.load(counts + index * EXPERTS + each[None, :], mask=index < num_chunks, other=0)
            totals += tl.sum(of_chunks, axis=0)
            is_before = (index < chunk) & (each[None, :] == expert)
            before += tl.sum(tl.sum(tl.where(is_before, of_chunks, 0), axis=1), axis=0)
    first = _sum_of(totals, each < expert)
    mine = (chosen == expert).to(tl.int32)
    tl.store(order + first + before + tl.cumsum(mine, axis=0) - 1, at, mask=mine > 0)
    if chunk == 0:
        end = first + _sum_of(totals, each == expert)
        first_block = _sum_of((totals + ROWS - 1) // ROWS, each < expert)
        num_blocks = _write_blocks(blocks + first_block, max_blocks, expert, first, end, ROWS, CHUNK)
        if expert == num_experts - 1:
            for start in range(first_block + num_blocks, max_blocks, CHUNK):
                block = start + in_chunk
                tl.store(blocks + block, tl.full((CHUNK,), -1, tl.int32), mask=block < max_blocks)


@triton.jit
def _write_blocks(blocks, max_blocks, expert, first, end, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One expert's blocks, of its rows from `first` to `end` in the order; how many they are."""
    num_blocks = (end - first + ROWS - 1) // ROWS
    for start in range(0, num_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        place, inside = blocks + block, block < num_blocks
        tl.store(place, tl.zeros((CHUNK,), tl.int32) + expert, mask=inside)
        tl.store(place + max_blocks, first + block * ROWS, mask=inside)
        tl.store(place + 2 * max_blocks, tl.minimum(first + (block + 1) * ROWS, end), mask=inside)
    return num_blocks
