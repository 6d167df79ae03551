"""Drafters that know the answers, and say what they like."""

from collections.abc import Callable

from torch import Tensor

from deployments.engine.engine import Engine
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Sequence
from deployments.engine.speculation.base import Prospect, Wish
from deployments.messages import Draws
from tests.engine.insides import speculate_by

Answer = Callable[[Sequence], tuple[int, ...]]


class Knowing:
    """Guesses what it is told that the answer is, except where it lies.

    Args:
        answer: all that a sequence will generate.
        lies: whether to guess something else in this place of an answer.
    """

    num_kinds = 1

    def __init__(self, answer: Answer, lies: Callable[[int], bool]) -> None:
        self._answer, self._lies = answer, lies
        self.known: set[str] = set()

    def look(self, wish: Wish) -> Prospect | None:
        self.known.add(wish.sequence.request_id)
        num_tokens = len(self._guess(wish))
        return Prospect(num_tokens) if num_tokens else None

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        return [self._guess(wish) for wish in wishes]

    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None) -> None:
        """It knows all."""

    def seconds(self, num_sequences: int) -> float:
        return 0.0

    def _guess(self, wish: Wish) -> tuple[int, ...]:
        sequence = wish.sequence
        first = sequence.num_tokens - len(sequence.request.prompt_token_ids)
        rest = self._answer(sequence)[first : first + wish.num_tokens]
        return tuple(token ^ self._lies(first + place) for place, token in enumerate(rest))

    def drop(self, request_id: str) -> None:
        self.known.discard(request_id)


def truth(place: int) -> bool:
    return False


def lies(place: int) -> bool:
    return True


def mixture(place: int) -> bool:
    return place % 3 == 2


def with_drafter(engine: Engine, answer: Answer, lies: Callable[[int], bool]) -> Engine:
    """Have an engine that guesses try all that this drafter says."""
    speculate_by(engine, Knowing(answer, lies))
    return engine
