"""Draws the next token of every sequence at once.

A token is a pure function of (seed, position, logits): a prefill engine, a decode engine and a resumed request draw the
same one. It is the greatest of the scaled logits with noise of their own (Gumbel-max), hashed from seed, position and
token, so that logits which differ by rounding give another token only where the best two are as near to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from deployments.engine.upload import upload
from deployments.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of S sequences, as float64 or int64 arrays of shape (S,); `keys` make their noise."""

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    keys: np.ndarray

    @property
    def is_greedy(self) -> bool:
        return not self.temperature.any()

    @property
    def is_bounded(self) -> bool:
        """Whether some sequence may not draw every token."""
        return bool(self.top_k.any() or (self.top_p < 1).any() or self.min_p.any())

    def of(self, rows: np.ndarray) -> "SamplingBatch":
        """Those of some sequences."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.keys)
        return SamplingBatch(*(column[rows] for column in columns))


def build_sampling_batch(params: list[SamplingParams], positions: Sequence[int] | np.ndarray) -> SamplingBatch:
    """Gather the parameters of a step.

    Args:
        params: of each draw's sequence.
        positions: where the drawn token will stand in its sequence, prompt included.
    """
    seeds = np.array([p.seed & 0xFFFFFFFFFFFFFFFF for p in params], dtype=np.uint64)
    return SamplingBatch(
        temperature=np.array([p.temperature for p in params], dtype=np.float64),
        top_k=np.array([p.top_k for p in params], dtype=np.int64),
        top_p=np.array([p.top_p for p in params], dtype=np.float64),
        min_p=np.array([p.min_p for p in params], dtype=np.float64),
        keys=_hash(seeds, np.array(positions, dtype=np.uint64)).view(np.int64),
    )


def _hash(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Map (seed, position), uint64 of shape (S,) each, to 64 bits, evenly and without state.

    Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), its finalizer applied to the seed and again to the sum.
    """
    return _mix(_mix(seeds) + positions * np.uint64(0x9E3779B97F4A7C15))


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
    columns = np.stack([bounds.temperature, bounds.top_k, bounds.top_p, bounds.min_p])
    rows, limits, keys = (upload(values, logits.device) for values in (drawing, columns, bounds.keys))
    kernels = _kernels(logits.device)
    chosen = logits[rows] if logits.is_cuda else logits[rows].float()
    best = chosen.amax(dim=-1)
    scores = kernels.gumbel_scores(chosen, best, limits[0], keys)
    tokens = kernels.best_within(scores, chosen, best, limits) if bounds.is_bounded else scores.argmax(dim=-1)
    return greedy.index_copy(0, rows, tokens)


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from deployments.engine.kernels import cuda_sampling  # Triton is there only where a GPU is

        return cuda_sampling
    from deployments.engine.kernels import cpu_sampling

    return cpu_sampling


def compile_draws(vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile the kernels for such logits, or fetch them from their compilers' caches, before a request needs them."""
    logits = torch.zeros(1, vocab_size, dtype=dtype, device=device)
    for top_p in (1.0, 0.5):
        sample(logits, build_sampling_batch([SamplingParams(max_tokens=1, top_p=top_p)], [0]))
