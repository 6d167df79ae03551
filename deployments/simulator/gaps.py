"""How long gaps between tokens were, to a hundredth: a day of traffic has billions. Knows no time."""

import math

_RATIO = math.log(1.01)
_LEAST_S = 1e-6


class Gaps:
    """Counts gaps."""

    def __init__(self) -> None:
        self._counts: dict[int, float] = {}

    def add(self, seconds: float, times: float) -> None:
        """So many more were so long; a negative number takes back what was added wrongly."""
        key = round(math.log(max(seconds, _LEAST_S)) / _RATIO)
        self._counts[key] = self._counts.get(key, 0.0) + times

    def quantiles(self, shares: tuple[float, ...]) -> tuple[float, ...]:
        """Seconds that so great shares of them did not exceed; nan: there were none."""
        rows = sorted((key, count) for key, count in self._counts.items() if count > 0)
        total = sum(count for _, count in rows)
        return tuple(self._quantile(rows, share * total) for share in shares)

    @staticmethod
    def _quantile(rows: list[tuple[int, float]], rank: float) -> float:
        seen = 0.0
        for key, count in rows:
            seen += count
            if seen >= rank:
                return math.exp(key * _RATIO)
        return math.nan
