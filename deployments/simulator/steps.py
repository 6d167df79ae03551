"""Steps that run one after the other without anything between them, and how long each takes. Knows no engine."""

import math
from dataclasses import dataclass

# Of a step: what is left of it then is rounding.
SAME_STEP = 1e-6


@dataclass(slots=True)
class Steps:
    """They began at a time; each is longer than the one before by as much.

    Attributes:
        at_s: when the first one began.
        before: steps that had run by then.
        first_s: that the first one takes.
        growth_s: that each takes longer than the one before.
    """

    at_s: float
    before: float = 0.0
    first_s: float = 0.0
    growth_s: float = 0.0

    def lasting(self, steps: float) -> float:
        """Seconds of the first so many, a whole number."""
        return steps * (self.first_s + 0.5 * self.growth_s * (steps - 1.0))

    def passed(self, seconds: float) -> float:
        """How many have passed after so long; the other way round."""
        if not self.growth_s:
            return seconds / self.first_s
        half_s = self.first_s - 0.5 * self.growth_s
        whole = math.floor(2.0 * seconds / (half_s + math.sqrt(half_s * half_s + 2.0 * self.growth_s * seconds)))
        return whole + (seconds - self.lasting(whole)) / (self.first_s + self.growth_s * whole)

    def stretched(self, at_s: float, times: float) -> "Steps":
        """The one that runs at a time, alone: what is left of it takes so many times as long."""
        whole = math.floor(self.passed(at_s - self.at_s) + SAME_STEP)
        begun_s = self.at_s + self.lasting(whole)
        left_s = max(0.0, begun_s + self.first_s + self.growth_s * whole - at_s)
        return Steps(begun_s, self.before + whole, at_s - begun_s + times * left_s)
