"""Draws from logits on a GPU, in Triton; see `cpu_sampling`. Nothing waits for the GPU."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
# Of the one program that a row has.
_ROW_BLOCK = 4096
# Halvings of the range of logits in which the k-th likeliest lies; it ends at the last bit of a float32.
_HALVINGS = tl.constexpr(40)


def gumbel_scores(logits: Tensor, best: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """(logits - best) / temperature + noise; see `cpu_sampling.gumbel_scores`. Logits may be of any float dtype."""
    num_rows, size = logits.shape
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    grid = num_rows, triton.cdiv(size, _BLOCK)
    _gumbel_scores[grid](logits, best, temperature, keys, out, size, BLOCK=_BLOCK, num_warps=4)
    return out


def best_within(scores: Tensor, logits: Tensor, best: Tensor, bounds: Tensor) -> Tensor:
    """The token of the greatest score within bounds; see `cpu_sampling.best_within`. Logits of any float dtype."""
    num_rows, size = scores.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    _best_within[(num_rows,)](scores, logits, best, bounds, out, num_rows, size, BLOCK=_ROW_BLOCK, num_warps=16)
    return out


@triton.jit
def _gumbel_scores(logits, best, temperature, keys, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < size
    x = tl.load(keys + row).to(tl.uint64, bitcast=True) + (token + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    # Uniform in (0, 1), never an end of it.
    uniform = ((x >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    value = tl.load(logits + row * size + token, mask=inside, other=0.0).to(tl.float64)
    score = (value - tl.load(best + row).to(tl.float64)) / tl.load(temperature + row) - tl.log(-tl.log(uniform))
    tl.store(out + row * size + token, score.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])  # or steps of other sizes would compile their own
def _best_within(scores, logits, best, bounds, out, num_rows, size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    scores += row.to(tl.int64) * size
    logits += row.to(tl.int64) * size
    peak = tl.load(best + row).to(tl.float32)
    temperature = tl.load(bounds + row)
    top_k = tl.load(bounds + num_rows + row).to(tl.int32)
    top_p = tl.load(bounds + 2 * num_rows + row)
    least = peak + temperature * tl.log(tl.load(bounds + 3 * num_rows + row))
    wanted = tl.full((), float("inf"), tl.float64)
    if top_p < 1:
        wanted = top_p * _sum_of_first(logits, peak, temperature, top_k, size, BLOCK)
    pivot = tl.full((), float("-inf"), tl.float32)
    winner = tl.full((), 0, tl.int32)
    is_open = tl.full((), 1, tl.int32)
    while is_open != 0:
        winner = _winner(scores, logits, pivot, least, size, BLOCK)
        last_pivot = pivot
        pivot = tl.load(logits + winner).to(tl.float32)
        is_open = tl.full((), 0, tl.int32)
        if (top_k > 0) | (top_p < 1):
            mass, count = _sum_above(logits, peak, temperature, pivot, size, BLOCK)
            is_kept = (count == 0) | (((top_k == 0) | (count < top_k)) & (mass < wanted))
            # Where logits are no numbers, or infinite, the pivot may not rise.
            is_open = tl.where(is_kept | (pivot <= last_pivot) | (pivot != pivot), 0, 1)
    tl.store(out + row, winner.to(tl.int64))


@triton.jit
def _winner(scores, logits, pivot, least, size, BLOCK: tl.constexpr):
    """The token of the greatest score among those above the pivot and not below the least."""
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(logits + token, mask=token < size, other=float("-inf")).to(tl.float32)
        score = tl.load(scores + token, mask=token < size, other=float("-inf"))
        takes = (value > pivot) & (value >= least) & (score > greatest)
        greatest = tl.where(takes, score, greatest)
        where = tl.where(takes, token, where)
    # Of equal scores the first token, as `argmax` has it.
    return tl.min(tl.where(greatest == tl.max(greatest, axis=0), where, size), axis=0)


@triton.jit
def _sum_above(logits, peak, temperature, pivot, size, BLOCK: tl.constexpr):
    """Sum of the weights, exp((logit - peak) / temperature), of logits above the pivot, and their number."""
    total = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(logits + token, mask=token < size, other=float("-inf")).to(tl.float32)
        is_above = value > pivot
        weight = tl.exp((value - peak) / temperature.to(tl.float32))
        total += tl.where(is_above, weight, 0.0).to(tl.float64)
        count += is_above.to(tl.int32)
    return tl.sum(total, axis=0), tl.sum(count, axis=0)


@triton.jit
def _sum_of_first(logits, peak, temperature, top_k, size, BLOCK: tl.constexpr):
    """Sum of the greatest weights, so many, or all."""
    mass, count = _sum_above(logits, peak, temperature, float("-inf"), size, BLOCK)
    if (top_k > 0) & (top_k < count):
        # Fewer than k logits lie above `high`; above `low` there are k.
        high = peak
        low = _least(logits, size, BLOCK) - 1
        for _ in range(_HALVINGS):
            middle = low + (high - low) / 2
            num_above = _count_above(logits, middle, size, BLOCK)
            is_few = num_above < top_k
            high = tl.where(is_few, middle, high)
            low = tl.where(is_few, low, middle)
        mass, count = _sum_above(logits, peak, temperature, high, size, BLOCK)
        mass += (top_k - count).to(tl.float64) * tl.exp((high - peak) / temperature.to(tl.float32)).to(tl.float64)
    return mass


@triton.jit
def _least(logits, size, BLOCK: tl.constexpr):
    """The smallest finite logit."""
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(logits + token, mask=token < size, other=float("-inf")).to(tl.float32)
        least = tl.where(value > float("-inf"), tl.minimum(least, value), least)
    return tl.min(least, axis=0)


@triton.jit
def _count_above(logits, pivot, size, BLOCK: tl.constexpr):
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(logits + token, mask=token < size, other=float("-inf")).to(tl.float32)
        count += (value > pivot).to(tl.int32)
    return tl.sum(count, axis=0)
