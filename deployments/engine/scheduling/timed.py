"""A sequence that notes when it moves, for a request that wants a receipt; all others are spared the clock."""

import time
from dataclasses import dataclass

from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.scheduling.span import Span
from deployments.messages import Draws, GenerateRequest
from deployments.receipts import EngineTimes


@dataclass(slots=True, eq=False)
class TimedSequence(Sequence):
    """See `Sequence`; the first time counts of what happens again after a preemption.

    Attributes:
        placed_s: monotonic time when it had blocks.
        ready_s: when they were filled by a prefill engine, or were to be filled here.
        first_token_s: when its first token was told.
        second_token_s: when its next one was.
        num_found_tokens: leading tokens whose KV was there when it had blocks.
        num_drafted_tokens: see `EngineTimes`.
        num_accepted_tokens: likewise.
    """

    placed_s: float | None = None
    ready_s: float | None = None
    first_token_s: float | None = None
    second_token_s: float | None = None
    num_found_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0

    def start(self) -> None:
        Sequence.start(self)
        self._note_placed()
        self.ready_s = self.ready_s or self.placed_s

    def reserve(self) -> None:
        Sequence.reserve(self)
        self._note_placed()

    def activate(self) -> None:
        Sequence.activate(self)
        self.ready_s = self.ready_s or time.monotonic()

    def conclude(self, run: Span, draws: Draws) -> Draws:
        if run.drafts:
            self.num_drafted_tokens += len(run.drafts)
            self.num_accepted_tokens += len(draws) - 1
        return Sequence.conclude(self, run, draws)

    def note_told(self, now_s: float) -> float | None:
        if self.first_token_s is None:
            self.first_token_s = now_s
        elif self.second_token_s is None:
            self.second_token_s = now_s
        return Sequence.note_told(self, now_s)

    def times(self) -> EngineTimes:
        """As far as it has come."""
        placed_s = self.placed_s or self.arrival_s
        ready_s = self.ready_s or placed_s
        first_token_s = self.first_token_s or ready_s
        next_token_s = None if self.second_token_s is None else self.second_token_s - first_token_s
        return EngineTimes(
            queued_s=placed_s - self.arrival_s,
            awaited_s=ready_s - placed_s,
            computing_s=first_token_s - ready_s,
            next_token_s=next_token_s,
            num_found_tokens=self.num_found_tokens,
            num_preemptions=self.num_preemptions,
            num_drafted_tokens=self.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
        )

    def _note_placed(self) -> None:
        if self.placed_s is None:
            self.placed_s = time.monotonic()
            is_found = self.num_published_blocks > self.tables.num_unread  # and not just passed
            self.num_found_tokens = self.num_computed_tokens if is_found else 0


def build_sequence(request: GenerateRequest, role: Role, remote_threshold: int | None = None) -> Sequence:
    """The sequence of a request that arrives now."""
    kind = TimedSequence if request.wants_receipt else Sequence
    return kind(request, role, time.monotonic(), remote_threshold=remote_threshold)
