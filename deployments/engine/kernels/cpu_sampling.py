"""Draws from logits on a CPU, float32: scores whose maximum is the draw, and that maximum within bounds."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import numpy as np
import torch
from torch import Tensor

from deployments.engine.compiled import njit, prange
from deployments.engine.kernels.cpu import PARALLEL, exp_of_negative

_PIECE = 8192  # tokens that a thread takes at a time
_FLOAT = np.float32


def gumbel_scores(logits: Tensor, best: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
    """(logits - best) / temperature + Gumbel noise, which a hash gives each token.

    Args:
        logits: (S, vocab_size) float32, contiguous.
        best: (S,) float32, the greatest of each row: what is near it keeps its digits at any temperature.
        temperature: (S,) float64 above 0.
        keys: (S,) int64, the bits of each row's noise.

    Returns:
        (S, vocab_size) float32.

    Source: Gumbel-max trick (Maddison, Tarlow, Minka, 2014); SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), of which a
    token's bits are the number that many steps after the key.
    """
    out = torch.empty_like(logits)
    _gumbel_scores(logits.numpy(), best.numpy(), temperature.numpy(), keys.numpy().view(np.uint64), _PIECE, out.numpy())
    return out


def best_within(scores: Tensor, logits: Tensor, best: Tensor, bounds: Tensor) -> Tensor:
    """The token of the greatest score among those that top-k, then top-p of what is left, and min-p keep.

    Nothing is sorted: a token is kept if what is likelier than it is less than the bounds; a winner that is not kept
    takes all that are not likelier out of the race with it.

    Args:
        scores: (S, vocab_size) float32.
        logits: (S, vocab_size) float32, contiguous. Equal ones are kept or dropped together.
        best: (S,) float32, the greatest of each row.
        bounds: (4, S) float64: temperature; top-k, 0 is off; top-p, 1 is off; min-p, 0 is off.

    Returns:
        (S,) int64.

    Source: rejection by a rising pivot from FlashInfer's sampling kernels (Ye et al., 2025).
    """
    out = torch.empty(len(scores), dtype=torch.int64)
    _best_within(scores.numpy(), logits.numpy(), best.numpy(), bounds.numpy(), out.numpy())
    return out


@njit(fastmath={"contract"}, inline="always")
def _log(x):
    """The logarithm of a normal float64 above 0, to 1e-8 (Cephes' logf); calls of the C library's do not vectorize."""
    bits = np.float64(x).view(np.int64)
    exponent = (bits >> np.int64(52)) - np.int64(1023)
    mantissa = np.int64((bits & np.int64(0xFFFFFFFFFFFFF)) | np.int64(0x3FF0000000000000)).view(np.float64)
    is_high = mantissa > 1.4142135623730951
    r = (mantissa * 0.5 if is_high else mantissa) - 1.0
    n = np.float64(exponent + np.int64(1) if is_high else exponent)
    p = 7.0376836292e-2
    p = p * r - 1.1514610310e-1
    p = p * r + 1.1676998740e-1
    p = p * r - 1.2420140846e-1
    p = p * r + 1.4249322787e-1
    p = p * r - 1.6668057665e-1
    p = p * r + 2.0000714765e-1
    p = p * r - 2.4999993993e-1
    p = p * r + 3.3333331174e-1
    return r - 0.5 * r * r + r * r * r * p + n * 0.6931471805599453


@njit(fastmath={"contract"}, parallel=PARALLEL, cache=PARALLEL, nogil=True)
def _gumbel_scores(logits, best, temperature, keys, piece, out):
    size = logits.shape[1]
    num_pieces = (size + piece - 1) // piece
    for part in prange(logits.shape[0] * num_pieces):
        row, start = np.int64(part) // num_pieces, np.int64(part) % num_pieces * piece
        end = min(start + piece, size)
        values, result = logits[row, start:end], out[row, start:end]
        peak, scale = np.float64(best[row]), temperature[row]
        first = keys[row] + np.uint64(start + 1) * np.uint64(0x9E3779B97F4A7C15)
        for j in range(values.shape[0]):
            x = first + np.uint64(j) * np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
            # Uniform in (0, 1), never an end of it.
            uniform = (np.float64(np.int64(x >> np.uint64(12))) + 0.5) * 2.220446049250313e-16
            result[j] = np.float32((np.float64(values[j]) - peak) / scale - _log(-_log(uniform)))


@njit(fastmath={"contract"}, parallel=PARALLEL, cache=PARALLEL, nogil=True)
def _best_within(scores, logits, best, bounds, out):
    for row in prange(scores.shape[0]):
        weights = np.empty(logits.shape[1], np.float32)
        _weigh(logits[row], best[row], bounds[0, row], weights)
        out[row] = _race(scores[row], weights, np.int64(bounds[1, row]), bounds[2, row], _FLOAT(bounds[3, row]))


@njit(fastmath={"contract"}, inline="never")
def _weigh(logits, best, temperature, weights):
    for j in range(logits.shape[0]):
        weights[j] = exp_of_negative(_FLOAT((np.float64(logits[j]) - best) / temperature))


@njit(inline="never")
def _race(scores, weights, top_k, top_p, min_p):
    wanted = np.inf
    if top_p < 1.0:
        wanted = top_p * (_sum_above(weights, _FLOAT(-1))[0] if top_k == 0 else _sum_of_first(weights, top_k))
    pivot = _FLOAT(-1)
    while True:
        winner = _winner(scores, weights, pivot, min_p)
        mass, count = _sum_above(weights, weights[winner])
        is_kept = count == 0 or ((top_k == 0 or count < top_k) and mass < wanted)
        if is_kept or not weights[winner] > pivot:  # the latter where logits are no numbers, or infinite
            return winner
        pivot = weights[winner]


@njit(inline="never")
def _winner(scores, weights, pivot, min_p):
    winner, greatest = 0, _FLOAT(-np.inf)
    for j in range(scores.shape[0]):
        if scores[j] > greatest and weights[j] > pivot and weights[j] >= min_p:
            winner, greatest = j, scores[j]
    return winner


@njit(fastmath={"reassoc", "contract"}, inline="never")
def _sum_above(weights, pivot):
    """Sum and number of the weights above the pivot."""
    total, count = 0.0, 0
    for j in range(weights.shape[0]):
        is_above = weights[j] > pivot
        total += np.float64(weights[j]) if is_above else 0.0
        count += 1 if is_above else 0
    return total, count


@njit(inline="never")
def _sum_of_first(weights, count):
    """Sum of the greatest weights, so many."""
    if count >= weights.shape[0]:
        return _sum_above(weights, _FLOAT(-1))[0]
    least = _greatest(weights, count)
    total, num_above = _sum_above(weights, least)
    return total + (count - num_above) * least


@njit(inline="never")
def _greatest(weights, number):
    """The weight that is greatest but for so many less one. As fast as `np.partition`, which takes 11 s to compile."""
    # Bisected among the bits: those of floats from 0 on are in their order. No weight is 2.
    low, high = np.int32(0), np.int32(0x40000000)
    while low < high:
        middle = (low + high) // np.int32(2)
        if _num_above(weights, np.int32(middle).view(np.float32)) < number:
            high = np.int32(middle)
        else:
            low = np.int32(middle + 1)
    return np.int32(low).view(np.float32)


@njit(inline="never")
def _num_above(weights, pivot):
    count = np.int32(0)
    for j in range(weights.shape[0]):
        count += np.int32(weights[j] > pivot)
    return count
