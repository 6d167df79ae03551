"""What guesses tokens, and what is asked of it. Knows no model."""

from typing import NamedTuple, Protocol

from torch import Tensor

from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Sequence
from deployments.messages import Draws


class Wish(NamedTuple):
    """Guesses that are wanted.

    Attributes:
        sequence: of the tokens behind its newest one; all its tokens are known.
        num_tokens: at most so many.
    """

    sequence: Sequence
    num_tokens: int


class Prospect(NamedTuple):
    """What could be guessed.

    Attributes:
        num_tokens: at least one, at most as many as were wished.
        kind: guesses of one kind are about as often right; small numbers from 0 on.
    """

    num_tokens: int
    kind: int = 0


class Drafter(Protocol):
    """Guesses the tokens behind the newest ones of sequences: first tells how many it could, then is told how many."""

    num_kinds: int

    def look(self, wish: Wish) -> Prospect | None:
        """Say what could be guessed, without taking long; None: there is nothing to go by."""
        ...

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        """Guess, all at once, no more than was said just before.

        Args:
            wishes: each of at least one token. The blocks of each sequence have room for its newest token and for so
                many behind it.

        Returns:
            For each wish its tokens; perhaps fewer than were wished, or none.
        """
        ...

    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None) -> None:
        """A step has ended, and its draws have not joined their sequences yet.

        Args:
            collected: its runs in the batch's order, each with those of its draws that count.
            states: see `LaunchedStep`.
        """
        ...

    def seconds(self, num_sequences: int) -> float:
        """What one more token of so many sequences takes, about; 0: it is not known, or next to nothing."""
        ...

    def drop(self, request_id: str) -> None:
        """The sequence is over; unknown ids are no error."""
        ...
