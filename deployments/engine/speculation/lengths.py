"""How many drafts of each sequence a step tries: as many as bring the most tokens per second. Pure functions."""

from collections.abc import Callable, Sequence

# Drafts that are right this seldom are never worth a place.
_LEAST_CHANCE = 0.02
# Estimates are noisy: drafts must promise so much more than none.
_LEAST_GAIN = 1.03


def choose_lengths(
    guesses: Sequence[Sequence[float]],
    num_sequences: int,
    plain_s: float,
    seconds: Callable[[int], float],
    draft_s: Callable[[int], float] = lambda num_sequences: 0.0,
    max_step_s: float | None = None,
) -> list[int]:
    """Drafts to try of each sequence.

    Args:
        guesses: of each sequence that has any, how likely each of its drafts is right, if those before it are.
        num_sequences: all that the step continues, each by one token for certain.
        plain_s: seconds of a step without drafts.
        seconds: of one of so many tokens in all.
        draft_s: that guessing one more token of so many sequences takes before.
        max_step_s: no step, with its guesses, shall take longer for the sake of drafts; None: whatever pays.

    Returns:
        For each guess a number; none at all unless they pay. A step takes the likeliest drafts first, so each number is
        the one that maximises expected tokens over seconds for the batch as a whole.
    """
    chances = sorted(((chance, row) for row, guess in enumerate(guesses) for chance in _chances(guess)), reverse=True)
    best_rate, best_count = _LEAST_GAIN * num_sequences / plain_s if plain_s else 0.0, 0
    expected = float(num_sequences)
    guessing = _Guessing(len(guesses), draft_s) if draft_s(len(guesses)) else None
    for count, (chance, row) in enumerate(chances, 1):
        expected += chance
        step_s = seconds(num_sequences + count) + (0.0 if guessing is None else guessing.add(row))
        if max_step_s is not None and step_s > max_step_s:
            break
        if not step_s or expected / step_s > best_rate:
            best_rate, best_count = expected / step_s if step_s else 0.0, count
    lengths = [0] * len(guesses)
    for _, row in chances[:best_count]:
        lengths[row] += 1
    return lengths


class _Guessing:
    """What guessing takes: the first tokens of all sequences at once, then the second ones of those that want two."""

    def __init__(self, num_rows: int, draft_s: Callable[[int], float]) -> None:
        self._draft_s = draft_s
        self._lengths = [0] * num_rows
        self._num_rows: list[int] = []  # of the first tokens, of the second ones ...
        self._total_s = 0.0

    def add(self, row: int) -> float:
        """One more token of a sequence; tells the seconds of all."""
        place = self._lengths[row]
        self._lengths[row] += 1
        if place == len(self._num_rows):
            self._num_rows.append(0)
        before = self._num_rows[place]
        self._num_rows[place] += 1
        self._total_s += self._draft_s(before + 1) - (self._draft_s(before) if before else 0.0)
        return self._total_s


def _chances(rates: Sequence[float]) -> list[float]:
    """Of each of a sequence's drafts to be right together with all before it."""
    chances: list[float] = []
    chance = 1.0
    for rate in rates:
        chance *= rate
        if chance < _LEAST_CHANCE:
            break
        chances.append(chance)
    return chances
