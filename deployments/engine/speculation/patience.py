"""When a pipelined engine waits for the step in flight before it chooses the next one, and when nothing is tried. Pure.

Behind a token that nobody knows yet nothing is guessed, and an engine that always waits leaves a GPU idle between two
steps. So it waits as long as that leads to drafts, and else now and then: the more seldom, the more a wait costs.

What drafts bring is estimated, and estimates of what is chosen are more often too high than too low. So an account is
kept, in steps without drafts, of what they really won or lost, and what waits in vain took. While it is overdrawn
nothing is tried. It grows a little with each step, so that now and then it is found out whether things have changed.
"""

from deployments.engine.scheduling.run import ScheduledSequence

# Steps between two waits in vain: at first, and at most.
_PAUSE, _LONGEST_PAUSE = 15, 255
# Of the time, that waits in vain may take, and drafts may lose. A wait is what the host takes for a step: of 2% with
# one sequence to 25% with 128 of what the GPU takes.
_LOST = 0.002
_FIRST, _LEAST, _MOST = 1.0, -0.25, 2.0  # steps that are in the account: at first, at least, at most
_WEIGHT = 0.2  # of the cost of one more wait
# What one wait costs, and one step with drafts wins or loses, at most: else something else held it up.
_DEAREST_WAIT, _MOST_WON = 0.5, 1.0


class Patience:
    """See the module; asked before each step, told of each afterwards."""

    def __init__(self) -> None:
        self._pause = self._num_passed = 0
        self._cost: float | None = None
        self._account = _FIRST

    @property
    def is_overdrawn(self) -> bool:
        return self._account <= 0.0

    def waits_for(self, items: list[ScheduledSequence]) -> bool:
        """Whether to wait for a step with these; always where there are drafts, which may end anywhere."""
        if any(item.drafts for item in items):
            self._pause = self._num_passed = 0
            return True
        if not all(item.num_draws for item in items):
            return False  # a prompt goes on, and beside prompts nothing is guessed
        if self._num_passed < self._pause or self.is_overdrawn:
            self._num_passed += 1
            return False
        self._pause, self._num_passed = min(2 * self._pause + 1, self._longest()), 0
        return True

    def note_plain(self) -> None:
        """A step without drafts has ended, and nobody waited for the one before."""
        self._pay_in(_LOST)

    def note_vain(self, cost: float) -> None:
        """A wait led to no drafts: a step behind it took longer, by this share of one that overlaps."""
        if self.is_overdrawn:  # nobody waits: something else kept the step from overlapping
            self.note_plain()
            return
        cost = min(cost, _DEAREST_WAIT)
        self._cost = cost if self._cost is None else self._cost + _WEIGHT * (cost - self._cost)
        self._pay_in(-max(0.0, cost))

    def note_drafts(self, won: float) -> None:
        """A step with drafts made as many tokens as so many more steps without would have made in its time."""
        self._pay_in(max(-_MOST_WON, min(won, _MOST_WON)))

    def _pay_in(self, steps: float) -> None:
        self._account = max(_LEAST, min(self._account + steps, _MOST))

    def _longest(self) -> int:
        return _PAUSE if self._cost is None else max(_PAUSE, min(int(self._cost / _LOST), _LONGEST_PAUSE))
