"""When a pipelined engine waits for the step in flight before it chooses the next one. Pure: no clock.

Behind a token that nobody knows yet nothing is guessed, and an engine that always waits leaves a GPU idle between two
steps. So it waits as long as that leads to drafts, and else now and then.
"""

from deployments.engine.scheduling.run import ScheduledSequence

# Steps between two waits in vain: one costs as much as the host takes for a step, 3 to 15% of what the GPU takes.
_LONGEST_PAUSE = 15


class Patience:
    """See the module; asked before each step."""

    def __init__(self) -> None:
        self._pause = self._num_passed = 0

    def waits_for(self, items: list[ScheduledSequence]) -> bool:
        """Whether to wait for a step with these; always where there are drafts, which may end anywhere."""
        if any(item.drafts for item in items):
            self._pause = self._num_passed = 0
            return True
        if not all(item.num_draws for item in items):
            return False  # a prompt goes on, and beside prompts nothing is guessed
        if self._num_passed < self._pause:
            self._num_passed += 1
            return False
        self._pause, self._num_passed = min(2 * self._pause + 1, _LONGEST_PAUSE), 0
        return True
