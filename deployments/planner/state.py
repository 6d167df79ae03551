"""What a plan begins with: the bounds of both deployments, and what is remembered of the plans before."""

import math
from dataclasses import dataclass, field, replace

from deployments.planner.budget import Lean

# For so long decode has needed no replica that it lends, at first and at most.
_LEND_S, _MOST_LEND_S = 10.0, 320.0
# One that is called back within so many times that was lent too soon; after so many without it that is forgotten.
_REGRET_LENDS, _FORGET_LENDS = 3.0, 20.0

# When how many were needed; falling, for an earlier lower one makes no difference.
Needs = tuple[tuple[float, int], ...]


def remember(needs: Needs, at_s: float, need: int, hold_s: float) -> Needs:
    """Add what is needed now; what is too old, and what is lower than a later one, goes."""
    return (*((then, count) for then, count in needs if count > need and at_s - then < hold_s), (at_s, need))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one pool, as they are set now.

    Attributes:
        least: replicas.
        most: replicas.
        target: what it has or is getting, whoever asked for it.
    """

    least: int
    most: int
    target: int

    def shifted(self, count: int) -> "Bounds":
        """Of those that do a pool's work, where so many more do than its deployment has; one decode replica remains."""
        return Bounds(max(self.least + count, min(self.least, 1)), self.most + count, self.target + count)

    def by_way_of_one(self, count: int) -> int:
        """As Ray Serve goes to none: first to one."""
        return max(count, min(1, self.target - 1))

    def clamp(self, count: int) -> int:
        """The nearest that is allowed."""
        return min(max(count, self.least), self.most)


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What is remembered of a pool.

    Attributes:
        target: what was last decided; None: nothing was.
        needs: when how many were needed, careful.
        patience: times the hold is longer than it is set.
        factor: times need is raised.
        at_s: of all this.
        removed_s: when a replica was last removed.
        raised_s: when need was last raised for a bound.
        changed_s: when the target last changed.
    """

    target: int | None = None
    needs: Needs = ()
    patience: float = 1.0
    factor: float = 1.0
    at_s: float = -math.inf
    removed_s: float = -math.inf
    raised_s: float = -math.inf
    changed_s: float = -math.inf


@dataclass(frozen=True, slots=True)
class Lent:
    """What decode remembers of lending replicas. They are back at once, so it need not be as careful as with removing.

    Attributes:
        needs: when how many were needed for what came, without what chance may have hidden.
        hold_s: for so long it has not needed what it lends: twice as long each time that it called one back soon.
        since_s: when it lent one last.
        changed_s: when the hold last changed.
    """

    needs: Needs = ()
    hold_s: float = _LEND_S
    since_s: float = -math.inf
    changed_s: float = -math.inf

    @property
    def needed(self) -> int:
        """The most that was needed within the hold."""
        return self.needs[0][1]

    def noted(self, need: int, ready: int, at_s: float) -> "Lent":
        """So many are needed now. At first those that are there count as needed."""
        needs = remember(self.needs, at_s, need if self.needs else max(need, ready), self.hold_s)
        if self.hold_s > _LEND_S and at_s - self.changed_s > _FORGET_LENDS * self.hold_s:
            return replace(self, needs=needs, hold_s=max(self.hold_s / 2, _LEND_S), changed_s=at_s)
        return replace(self, needs=needs)

    def after(self, before: int, count: int, at_s: float, *, is_called_back: bool) -> "Lent":
        """So many are lent now, where so many were; `is_called_back`: fewer, since decode needs them."""
        if count > before:
            return replace(self, since_s=at_s)
        is_soon = self.changed_s < self.since_s and at_s - self.since_s < _REGRET_LENDS * self.hold_s
        if count == before or not is_called_back or not is_soon:
            return self
        return replace(self, hold_s=min(2.0 * self.hold_s, _MOST_LEND_S), changed_s=at_s)


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered of both.

    Attributes:
        num_flipped: as was decided last.
        short_since_s: since when prefill has had fewer replicas than it needs, or did a while ago; None: it has enough.
        lean: how the budget would be shared out otherwise; None: it would not.
        lent: what decode has learned of lending replicas.
    """

    decode: PoolMemory = field(default_factory=PoolMemory)
    prefill: PoolMemory = field(default_factory=PoolMemory)
    num_flipped: int = 0
    short_since_s: float | None = None
    lean: Lean | None = None
    lent: Lent = field(default_factory=Lent)

    def with_roles(self, num_flipped: int) -> "Memory":
        """Where flipped replicas are gone: what that changes, nobody has set."""
        num_gone = self.num_flipped - num_flipped
        if not num_gone or self.decode.target is None or self.prefill.target is None:
            return self
        return replace(
            self,
            decode=replace(self.decode, target=self.decode.target + num_gone),
            prefill=replace(self.prefill, target=self.prefill.target - num_gone),
        )
