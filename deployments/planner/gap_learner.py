"""What steps that draw tokens cost, learned from those that ran: by how many sequences, and by how much KV is read.

Batches of today are alike, and tell nothing of others; so what was seen of each size is kept, apart, and forgotten by
the hour. Where that does not tell the parts apart, a sequence is taken to cost what a prompt token does, which is as
much to compute (0.026 ms against 0.025 ms: Llama-3.1-8B, one H100, docs/measured.md), and the rest is taken for the
step's own. So while steps have computed prompts alone, that much is known of batches. Pure: no clock.

Source: Bayesian linear regression (ridge), with errors in proportion to the gap.
"""

import math
from dataclasses import dataclass

from deployments.planner.observation import GapCurve

# Of one size, busy seconds after which what was seen counts half.
_HALF_LIFE_S = 20.0
# Seconds after which what was seen of a size and is not seen again counts half.
_MEMORY_S = 3600.0
# Sizes are told apart by this factor.
_SIZE = 1.3
# A measured gap is off by so much of itself; what is believed before, by so much of itself.
_NOISE, _DOUBT, _KV_DOUBT = 0.05, 1.0, 3.0
# A token's KV that is read, to a prompt token that is computed, before it is known: bytes by bandwidth to operations by
# speed, 52 ns to 24 us (Llama-3.1-8B, one H100).
_KV_TO_PROMPT = 1 / 460
# No batch is planned for that is so many times as large as the largest that was seen, but for small ones.
_BEYOND, _SMALL = 2.0, 8.0


@dataclass(slots=True)
class _Seen:
    """Of one size of batches: sums, all over the same weights."""

    weight: float = 0.0
    sequences: float = 0.0
    kv_tokens: float = 0.0
    gap_s: float = 0.0


class GapLearner:
    """See the module."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, int], _Seen] = {}

    def pass_time(self, seconds: float) -> None:
        """So much time has passed."""
        keep = 0.5 ** (seconds / _MEMORY_S)
        for key, seen in list(self._sizes.items()):
            seen.weight *= keep
            seen.sequences *= keep
            seen.kv_tokens *= keep
            seen.gap_s *= keep
            if seen.weight < 0.01:
                del self._sizes[key]

    def add(self, batch: float, kv_tokens: float, gap_s: float, seconds: float) -> None:
        """Steps with so many sequences, that had so much KV, took `gap_s` each, and `seconds` together."""
        if batch <= 0 or gap_s <= 0 or seconds <= 0:
            return
        key = round(math.log(max(1.0, batch), _SIZE)), round(math.log(max(1.0, kv_tokens), _SIZE))
        seen = self._sizes.setdefault(key, _Seen())
        keep = 0.5 ** (seconds / _HALF_LIFE_S)
        weight = min(seconds, _HALF_LIFE_S)
        seen.weight = keep * seen.weight + weight
        seen.sequences = keep * seen.sequences + weight * batch
        seen.kv_tokens = keep * seen.kv_tokens + weight * kv_tokens
        seen.gap_s = keep * seen.gap_s + weight * gap_s

    def curve(self, token_s: float, kv_per_sequence: float) -> GapCurve | None:
        """By sequences of so much KV each; None: no step was seen, and nothing is known of prompts.

        Args:
            token_s: that a prompt token takes; 0: not known.
            kv_per_sequence: tokens.
        """
        costs = self.costs(token_s)
        if costs is None:
            believed_s = token_s * (1.0 + _KV_TO_PROMPT * kv_per_sequence)
            return GapCurve(0.0, believed_s) if token_s else None
        step_s, sequence_s, kv_s = costs
        largest = max(_SMALL, _BEYOND * max(s.sequences / s.weight for s in self._sizes.values()))
        return GapCurve(step_s, sequence_s + kv_s * kv_per_sequence, largest)

    def costs(self, token_s: float) -> tuple[float, float, float] | None:
        """Seconds of each step, of each sequence in it, of each token of KV that it reads; None: no step was seen.

        Args:
            token_s: that a prompt token takes; 0: not known.
        """
        rows = [
            (s.weight, s.sequences / s.weight, s.kv_tokens / s.weight, s.gap_s / s.weight) for s in self._sizes.values()
        ]
        if not rows:
            return None
        least_s = min(gap for *_, gap in rows)
        most_kv = max(kv for _, _, kv, _ in rows)
        believed = least_s, token_s or 0.01 * least_s, token_s * _KV_TO_PROMPT
        # Where no prompt was measured: all of a gap may be for KV.
        kv_doubt_s = _KV_DOUBT * believed[2] or max(gap for *_, gap in rows) / max(1.0, most_kv)
        return _fit(rows, believed, (_DOUBT * believed[0], _DOUBT * believed[1], kv_doubt_s))


def _fit(
    rows: list[tuple[float, float, float, float]],
    believed: tuple[float, float, float],
    doubts: tuple[float, float, float],
) -> tuple[float, float, float]:
    """The three costs, none negative, that fit what was seen and what was believed."""
    free = [0, 1, 2]
    costs = list(believed)
    while free:
        costs = _least_squares(rows, believed, doubts, free)
        negative = [i for i in free if costs[i] < 0]
        if not negative:
            break
        free = [i for i in free if i not in negative]
        costs = [0.0 if i in negative else cost for i, cost in enumerate(costs)]
    return max(0.0, costs[0]), max(0.0, costs[1]), max(0.0, costs[2])


def _least_squares(
    rows: list[tuple[float, float, float, float]],
    believed: tuple[float, float, float],
    doubts: tuple[float, float, float],
    free: list[int],
) -> list[float]:
    """The costs of `free`, the others being 0."""
    size = len(free)
    matrix = [[0.0] * size for _ in range(size)]
    right = [0.0] * size
    for at, i in enumerate(free):
        matrix[at][at] = 1.0 / doubts[i] ** 2
        right[at] = believed[i] / doubts[i] ** 2
    for weight, batch, kv_tokens, gap_s in rows:
        trust = min(1.0, weight) / (_NOISE * gap_s) ** 2
        features = (1.0, batch, kv_tokens)
        for at, i in enumerate(free):
            right[at] += trust * features[i] * gap_s
            for to, j in enumerate(free):
                matrix[at][to] += trust * features[i] * features[j]
    solved = _solve(matrix, right)
    costs = [0.0, 0.0, 0.0]
    for at, i in enumerate(free):
        costs[i] = solved[at]
    return costs


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Of a positive definite matrix, by Cholesky's factor."""
    size = len(right)
    factor = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(factor[i][k] * factor[j][k] for k in range(j))
            factor[i][j] = math.sqrt(max(rest, 1e-300)) if i == j else rest / factor[j][j]
    forward = [0.0] * size
    for i in range(size):
        forward[i] = (right[i] - sum(factor[i][k] * forward[k] for k in range(i))) / factor[i][i]
    solved = [0.0] * size
    for i in reversed(range(size)):
        solved[i] = (forward[i] - sum(factor[k][i] * solved[k] for k in range(i + 1, size))) / factor[i][i]
    return solved
