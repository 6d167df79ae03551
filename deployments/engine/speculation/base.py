"""What guesses tokens, and what a guess is. Knows no model and no step."""

from typing import NamedTuple, Protocol

from deployments.engine.scheduling.sequence import Sequence


class Draft(NamedTuple):
    """Tokens that may come next.

    Attributes:
        token_ids: the guess, at least one.
        kind: guesses of one kind are about as often right; small numbers from 0 on.
    """

    token_ids: tuple[int, ...]
    kind: int


class Drafter(Protocol):
    """Guesses the tokens behind the newest one of a sequence."""

    num_kinds: int

    def draft(self, sequence: Sequence, max_tokens: int) -> Draft | None:
        """Guess at most so many; None: there is nothing to go by. All tokens of the sequence are known."""
        ...

    def drop(self, request_id: str) -> None:
        """The sequence is over; unknown ids are no error."""
        ...
