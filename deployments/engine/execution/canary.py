"""Shows that a model and its device still run, where no step has shown it of late."""

import time

from deployments.engine.execution.base import Runner
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import GenerateRequest, SamplingParams

# Never enters the scheduler, so no request's id can meet it.
_REQUEST = GenerateRequest("canary", (0,), SamplingParams(max_tokens=1, temperature=0))


class Canary:
    """Runs one token through the model now and then. For the engine's thread.

    Args:
        runner: of the engine.
        blocks: of its pool.
    """

    def __init__(self, runner: Runner, blocks: BlockManager) -> None:
        self._runner = runner
        self._blocks = blocks
        self._num_steps = 0

    def run(self, num_steps: int, *, is_busy: bool) -> bool:
        """Run it, unless steps have run since the last call: they show as much.

        Args:
            num_steps: that the engine has run.
            is_busy: one of them has not ended.

        Returns:
            Whether it ran; it does not where every block is held.

        Raises:
            Whatever a broken model or device raises.
        """
        last, self._num_steps = self._num_steps, num_steps
        sequence = Sequence(_REQUEST, Role.LOCAL, time.monotonic())
        if last != num_steps or is_busy or not self._blocks.admit(sequence):
            return False
        try:
            self._runner.launch([ScheduledSequence.of(sequence, 1)]).collect()
        finally:
            self._blocks.free(sequence)
        return True
