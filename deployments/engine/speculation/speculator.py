"""Proposes drafts before each step, and learns from what became of them. Called by the engine, in its thread.

An answer is the same with and without: what is drawn depends on seed, place and logits alone, and a draft counts only
where it is what was drawn. So all that is decided here is time.
"""

from deployments.engine.config import SpeculationConfig
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.scheduler import MAX_VERIFIED_TOKENS, Scheduler
from deployments.engine.scheduling.sequence import Sequence
from deployments.engine.speculation.acceptance import Acceptance
from deployments.engine.speculation.base import Draft, Drafter
from deployments.engine.speculation.curve import StepCurve
from deployments.engine.speculation.lengths import Guess, choose_lengths
from deployments.engine.speculation.lookup import LookupDrafter
from deployments.engine.speculation.patience import Patience
from deployments.engine.stats import EngineStats
from deployments.messages import Draws


class Speculator:
    """See the module.

    Args:
        drafter: what guesses; None: nothing does.
        config: how far.
        stats: where counts go.
    """

    def __init__(self, drafter: Drafter | None, config: SpeculationConfig, stats: EngineStats) -> None:
        self._drafter = drafter
        self._config = config
        self._stats = stats
        self._acceptance = Acceptance(0 if drafter is None else drafter.num_kinds)
        self._curve = StepCurve(MAX_VERIFIED_TOKENS)
        self._patience = Patience()
        self._kinds: dict[str, int] = {}  # of the drafts that were proposed last

    @property
    def is_on(self) -> bool:
        """Whether anything is ever guessed."""
        return self._drafter is not None

    def waits_for(self, items: list[ScheduledSequence]) -> bool:
        """Whether a step with these is to be concluded before the next one is chosen, so that this may guess."""
        return self.is_on and self._patience.waits_for(items)

    def propose(self, scheduler: Scheduler) -> None:
        """Guess for the sequences that the next step continues, where that is expected to pay.

        Beside prompts nothing is tried: there each token costs what a prompt's does, and is taken from them.
        """
        if self._drafter is None or scheduler.can_admit:
            return
        going = [sequence for sequence in scheduler.running if sequence.has_work]
        if not all(sequence.is_decoding for sequence in going):
            return
        drafted = [
            (sequence, draft) for sequence in going if (draft := self._draft(self._drafter, sequence)) is not None
        ]
        if not drafted:
            return
        for (sequence, draft), length in zip(drafted, self._lengths(drafted, len(going)), strict=True):
            if length:
                self._kinds[sequence.request_id] = draft.kind
                sequence.propose(draft.token_ids[:length])

    def note_draws(self, collected: list[tuple[ScheduledSequence, Draws]]) -> None:
        """A step has ended with these runs; of each those draws that count, one more than drafts that were right."""
        if not self._kinds:
            return
        for run, draws in collected:
            if run.drafts:
                request_id, num_right = run.sequence.request_id, len(draws) - 1
                self._stats.drafted_tokens.observe(len(run.drafts))
                self._stats.accepted_tokens.observe(num_right)
                self._acceptance.add(request_id, self._kinds[request_id], num_right, len(run.drafts))
        self._kinds.clear()

    def note_step(self, items: list[ScheduledSequence], seconds: float) -> None:
        """A step with these has ended and took so long."""
        if self.is_on and all(item.is_decode for item in items):
            self._curve.add(sum(item.num_tokens for item in items), seconds)

    def drop(self, request_id: str) -> None:
        """The sequence is over; unknown ids are no error."""
        if self._drafter is None:
            return
        self._drafter.drop(request_id)
        self._acceptance.drop(request_id)

    def _draft(self, drafter: Drafter, sequence: Sequence) -> Draft | None:
        # A grammar has the mask of the next draw alone; and who has one token left to draw needs no drafts.
        num_left = sequence.max_num_tokens - sequence.num_tokens - 1
        if sequence.mask is not None or sequence.num_pending_tokens or num_left <= 0:
            return None
        return drafter.draft(sequence, min(num_left, self._config.max_drafts))

    def _lengths(self, drafted: list[tuple[Sequence, Draft]], num_sequences: int) -> list[int]:
        if not self._config.is_adaptive:
            return [len(draft.token_ids) for _, draft in drafted]
        if not self._curve.is_known(num_sequences):
            return [0] * len(drafted)  # until a step without drafts says what one takes
        guesses = [
            Guess(self._acceptance.rate(sequence.request_id, draft.kind), len(draft.token_ids))
            for sequence, draft in drafted
        ]
        return choose_lengths(guesses, num_sequences, self._curve.seconds, self._config.max_step_s)


def build_speculator(config: SpeculationConfig, stats: EngineStats) -> Speculator:
    """As the settings say."""
    return Speculator(None if config.method == "off" else LookupDrafter(), config, stats)
