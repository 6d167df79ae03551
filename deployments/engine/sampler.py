"""Draws the next token of every sequence at once.

A token is a pure function of (seed, position, logits): a prefill engine, a decode engine and a resumed request draw the
same one. One uniform number per token comes from hashing seed and position, and is looked up in the cumulative
distribution, so that nearly equal logits give the same token nearly always.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.messages import SamplingParams

# How many of the likeliest tokens are sorted first when only top-p bounds them; a flat distribution takes a full sort.
_NUM_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of S sequences, as float64 or int64 arrays of shape (S,)."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    uniform: np.ndarray

    @property
    def is_greedy(self) -> bool:
        return not self.temperature.any()

    def of(self, rows: np.ndarray) -> "SamplingBatch":
        """Those of some sequences."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.uniform)
        return SamplingBatch(*(column[rows] for column in columns))


def build_sampling_batch(params: list[SamplingParams], positions: list[int]) -> SamplingBatch:
    """Gather the parameters of a step.

    Args:
        params: of each sequence.
        positions: where the drawn token will stand in its sequence, prompt included.
    """
    seeds = np.array([p.seed & 0xFFFFFFFFFFFFFFFF for p in params], dtype=np.uint64)
    return SamplingBatch(
        temperature=np.array([p.temperature for p in params], dtype=np.float64),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float64),
        min_p=np.array([p.min_p for p in params], dtype=np.float64),
        uniform=hash_to_uniform(seeds, np.array(positions, dtype=np.uint64)),
    )


def hash_to_uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Map (seed, position) to [0, 1), evenly and without state.

    Args:
        seeds: (S,) uint64.
        positions: (S,) uint64.

    Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), its finalizer applied to the seed and again to the sum.
    """
    mixed = _mix(_mix(seeds) + positions * np.uint64(0x9E3779B97F4A7C15))
    return np.ldexp((mixed >> np.uint64(11)).astype(np.float64), -53)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Draw one token per row.

    Args:
        logits: (S, vocab_size), any float dtype.
        batch: parameters of the S sequences.

    Returns:
        (S,) int64 token ids.
    """
    greedy = logits.argmax(dim=-1)
    if batch.is_greedy:
        return greedy
    drawing = np.flatnonzero(batch.temperature)
    bounds = batch.of(drawing)
    rows = _upload(drawing, logits.device)
    columns = np.stack([bounds.temperature, bounds.top_k, bounds.top_p, bounds.min_p, bounds.uniform])
    temperature, top_k, top_p, min_p, uniform = _upload(columns, logits.device).unsqueeze(-1)
    # float64: the cumulative sum of a large vocabulary must not depend on how it was summed.
    probs = torch.softmax(logits[rows].double() / temperature, dim=-1)
    threshold = _threshold(probs, bounds, top_k, top_p, min_p)
    kept = torch.where(probs >= threshold, probs, 0.0)
    cumulative = kept.cumsum(dim=-1)
    target = uniform * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the target: never one of probability zero.
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)
    return greedy.index_copy(0, rows, drawn)


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device, on a GPU without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _threshold(probs: Tensor, bounds: SamplingBatch, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Least probability that top-k, then top-p of what is left, and min-p keep: (S, 1). Ties at it are all kept.

    Args:
        probs: (S, vocab_size).
        bounds: of the S sequences; the tensors are its columns, (S, 1) each.
    """
    threshold = min_p * probs.amax(dim=-1, keepdim=True)
    has_top_p = bounds.top_p < 1
    if not (bounds.top_k.any() or has_top_p.any()):
        return threshold
    vocab_size = probs.shape[-1]
    num_sorted = min(vocab_size, max(_NUM_CANDIDATES, int(bounds.top_k.max())))
    best = probs.topk(num_sorted).values
    limit = torch.where(top_k > 0, top_k, vocab_size)
    mass_of_k = torch.where(top_k > 0, _first(best, limit).sum(dim=-1, keepdim=True), 1.0)
    wanted = top_p * mass_of_k
    # Only where top-p alone bounds can the candidates be too few. The question waits for a GPU.
    if (has_top_p & (bounds.top_k == 0)).any() and ((best.sum(dim=-1, keepdim=True) < wanted) & (top_p < 1)).any():
        best = probs.sort(descending=True).values
    best = _first(best, limit)
    before = best.cumsum(dim=-1) - best
    kept = (before < wanted) | (top_p >= 1)
    kept[:, 0] = True
    kept &= best > 0
    least = torch.where(kept, best, 1.0).amin(dim=-1, keepdim=True)
    unbounded = (top_k == 0) & (top_p >= 1)
    return torch.where(unbounded, threshold, torch.maximum(threshold, least))


def _first(best: Tensor, limit: Tensor) -> Tensor:
    """Zero what lies behind the first `limit` entries of each row."""
    return torch.where(torch.arange(best.shape[-1], device=best.device) < limit, best, 0.0)
