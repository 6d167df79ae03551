"""What becomes of a step that has ended: at once what the next step depends on, the rest once that one is launched.

Behind a step with drafts a GPU waits until the next one is chosen and launched. So draws join their sequences first;
blocks that are full, and what is told of tokens and counted, can wait until the GPU has work again.
"""

import time
from collections.abc import Callable, Iterable

from deployments.engine.grammar.guides import Guides
from deployments.engine.handoff.outbox import Outbox
from deployments.engine.outputs import Outputs
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence, Status
from deployments.engine.stats import EngineStats
from deployments.messages import Draws, EngineEvent, TokenOutput

_EXPORT, _RUNNING, _FINISHED = Role.EXPORT, Status.RUNNING, Status.FINISHED  # asked in every step; see `sequence.py`


class Endings:
    """See the module; one step at a time.

    Args:
        blocks: of all sequences.
        outbox: of those that are handed over.
        guides: of those with a grammar.
        outputs: tells.
        stats: where counts go.
    """

    def __init__(
        self,
        blocks: BlockManager,
        outbox: Outbox,
        guides: Guides,
        outputs: Outputs,
        stats: EngineStats,
    ) -> None:
        self._blocks = blocks
        self._outbox = outbox
        self._guides = guides
        self._outputs = outputs
        self._stats = stats
        self._untold: list[tuple[ScheduledSequence, Draws]] = []
        self._ended_s = 0.0
        self._is_beside_prompts = False

    def join(
        self,
        collected: Iterable[tuple[ScheduledSequence, Draws]],
        ended_s: float,
        end: Callable[[str], None],
        *,
        is_beside_prompts: bool,
    ) -> None:
        """What was drawn joins its sequences; whoever drew the last token is over.

        Args:
            collected: what ran, each with those of its draws that count.
            ended_s: when the step ended; monotonic.
            end: ends a request.
            is_beside_prompts: there were prompt tokens in it.
        """
        assert not self._untold, "the step before was not told of"
        self._ended_s, self._is_beside_prompts = ended_s, is_beside_prompts
        for run, draws in collected:
            sequence = run.sequence
            if sequence.status is _FINISHED:
                continue  # aborted, or ended by the token before, while this one was in flight
            draws = sequence.conclude(run, draws)
            self._stats.generated_tokens += len(draws)
            if draws and sequence.role is _EXPORT and not self._outbox.set_first_token(sequence.request_id, draws[0]):
                draws = ()  # nobody wants it any more
            self._untold.append((run, draws))
            if draws and sequence.finish_reason is not None:
                self._keep(sequence)
                end(sequence.request_id)  # in a prefill engine too: nobody decodes it, so nobody wants its KV
        if self._guides:
            self._guides.advance(run.sequence for run, draws in self._untold if draws)

    def tell(self) -> list[EngineEvent]:
        """Of the step that has ended last, once: one `TokenOutput` per sequence that drew a token."""
        if not self._untold:
            return []
        outputs: list[EngineEvent] = []
        for run, draws in self._untold:
            sequence = run.sequence
            self._keep(sequence)
            if draws:
                outputs.append(self._tell(sequence, run.first_draw, draws, self._ended_s, sequence.role is _EXPORT))
        self._untold = []
        self._outputs.end(self._ended_s, beside_prompts=self._is_beside_prompts)
        return outputs

    def tell_first(self, sequence: Sequence, draws: Draws, end: Callable[[str], None]) -> list[EngineEvent]:
        """Of the token behind a prompt, which came with its KV; at a moment of its own. `end`: ends a request."""
        now_s = time.monotonic()
        if sequence.finish_reason is not None:
            end(sequence.request_id)
        output = self._tell(sequence, sequence.num_prompt_tokens, draws, now_s, True)
        self._outputs.end(now_s)
        return [output]

    def _keep(self, sequence: Sequence) -> None:
        """Its full blocks can be found from now on; those that were for drafts are free."""
        if sequence.status is _RUNNING:  # and not preempted since
            self._blocks.publish(sequence)
            self._blocks.trim(sequence)

    def _tell(self, sequence: Sequence, place: int, draws: Draws, now_s: float, by_prefill: bool) -> TokenOutput:
        """Of new tokens, the first of them in this place in the sequence."""
        if sequence.finish_reason is not None:
            self._outputs.note_last(sequence)
        return self._outputs.tell(sequence, place, draws, now_s, by_prefill)
