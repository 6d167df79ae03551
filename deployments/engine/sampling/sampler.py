"""Draws the next token of every sequence at once.

A token is a pure function of (seed, position, logits): a prefill engine, a decode engine and a resumed request draw the
same one. It is the greatest of the scaled logits with noise of their own (Gumbel-max), hashed from seed, position and
token, so that logits which differ by rounding give another token only where the best two are as near to each other.
"""

from dataclasses import dataclass
from operator import is_
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from deployments.engine.upload import upload
from deployments.messages import SamplingParams


class SamplingColumns:
    """The sampling parameters of S draws as arrays: what stays the same while the same sequences decode.

    Args:
        params: of each draw's sequence.

    Attributes:
        is_adjusted: some of them have logits changed before the draw; see `adjusting.py`.
        is_guided: some of them have a grammar; see `masking.py`.
        is_scored: some of them are told with logprobs; see `scoring.py`.
    """

    def __init__(self, params: list[SamplingParams]) -> None:
        self.is_adjusted = any(p.adjustments is not None for p in params)
        self.is_guided = any(p.grammar is not None for p in params)
        self.is_scored = any(p.num_logprobs is not None for p in params)
        temperature = np.array([p.temperature for p in params], dtype=np.float64)
        self.drawing = np.flatnonzero(temperature)
        self.is_greedy = not len(self.drawing)
        drawing = [params[row] for row in self.drawing.tolist()]
        self.is_bounded = any(p.top_k or p.top_p < 1 or p.min_p for p in drawing)
        limits = zip(*[(p.temperature, p.top_k, p.top_p, p.min_p) for p in drawing], strict=True)
        self._limits = np.array(list(limits), dtype=np.float64)
        self._mixed_seeds = _mix(np.array([p.seed & 0xFFFFFFFFFFFFFFFF for p in drawing], dtype=np.uint64))
        self._uploaded: tuple[Tensor, Tensor] | None = None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(D,) int64 which draws are not greedy, and (4, D) float64 their temperature, top_k, top_p and min_p.

        Always asked for the same device, to which they go once.
        """
        if self._uploaded is None:
            self._uploaded = upload(self.drawing, device), upload(self._limits, device)
        return self._uploaded

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """(D,) int64 what makes the noise of these: seed and position, hashed evenly and without state.

        Args:
            positions: (S,) where each drawn token will stand in its sequence, prompt included.

        Source: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), its finalizer applied to the seed and again to the sum.
        """
        steps = positions[self.drawing].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mix(self._mixed_seeds + steps).view(np.int64)


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the S draws of one step are made.

    Attributes:
        columns: of their sequences.
        positions: (S,) where each drawn token will stand in its sequence, prompt included.
    """

    columns: SamplingColumns
    positions: np.ndarray

    @property
    def is_greedy(self) -> bool:
        return self.columns.is_greedy


def _is_plain(params: SamplingParams) -> bool:
    """Whether a sequence takes the likeliest token as the model has it, and no more is asked of it."""
    return (
        params.temperature == 0
        and params.adjustments is None
        and params.grammar is None
        and params.num_logprobs is None
    )


class SamplingPreparation:
    """Gathers the parameters of steps one after the other; from step to step they are mostly the same."""

    def __init__(self) -> None:
        self._params: list[SamplingParams] = []
        self._plain = self._columns = SamplingColumns([])  # of any number of draws

    def prepare(
        self, params: list[SamplingParams], positions: np.ndarray, num_draws: list[int] | None = None
    ) -> SamplingBatch:
        """Of one step.

        Args:
            params: of sequences that draw.
            positions: (S,) where each drawn token will stand in its sequence, prompt included.
            num_draws: of each of these sequences; None: one.
        """
        if all(map(_is_plain, params)):
            return SamplingBatch(self._plain, positions)
        if num_draws is not None:
            params = [one for one, count in zip(params, num_draws, strict=True) for _ in range(count)]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            self._params, self._columns = params, SamplingColumns(params)
        return SamplingBatch(self._columns, positions)


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
    columns = batch.columns
    rows, limits = columns.on(logits.device)
    keys = upload(columns.keys(batch.positions), logits.device)
    kernels = _kernels(logits.device)
    chosen = logits[rows] if logits.is_cuda else logits[rows].float()
    best = chosen.amax(dim=-1)
    scores = kernels.gumbel_scores(chosen, best, limits[0], keys)
    tokens = kernels.best_within(scores, chosen, best, limits) if columns.is_bounded else scores.argmax(dim=-1)
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
        columns = SamplingColumns([SamplingParams(max_tokens=1, top_p=top_p)])
        sample(logits, SamplingBatch(columns, np.zeros(1, np.int64)))
