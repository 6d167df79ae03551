"""How many drafts of each sequence a step tries: as many as bring the most tokens per second. Pure functions."""

from collections.abc import Callable

import numpy as np

# Drafts that are right this seldom are never worth a place.
_LEAST_CHANCE = 0.02
# Estimates are noisy: drafts must promise so much more than none.
_LEAST_GAIN = 1.03

Seconds = Callable[[np.ndarray], np.ndarray]


def choose_lengths(
    rates: np.ndarray,
    num_sequences: int,
    plain_s: float,
    seconds: Seconds,
    draft_s: Callable[[int], float] = lambda num_sequences: 0.0,
    max_step_s: float | None = None,
) -> list[int]:
    """Drafts to try of each sequence.

    Args:
        rates: (N, P) of N sequences that have drafts: how likely each is right, if those before it are; 0: there is
            none.
        num_sequences: all that the step continues, each by one token for certain.
        plain_s: seconds of a step without drafts.
        seconds: (M,) of steps of (M,) tokens in all, in ascending order.
        draft_s: that guessing one more token of so many sequences takes before.
        max_step_s: no step, with its guesses, shall take longer for the sake of drafts; None: whatever pays.

    Returns:
        For each of the N a number; none at all unless they pay. A step takes the likeliest drafts first, so each number
        is the one that maximises expected tokens over seconds for the batch as a whole.
    """
    chances = np.cumprod(rates, axis=1)  # to be right together with all before it
    rows, places = np.nonzero(chances >= _LEAST_CHANCE)
    order = np.argsort(
        -chances[rows, places], kind="stable"
    )  # of a sequence's equally likely ones the first goes first
    rows, places = rows[order], places[order]
    expected = num_sequences + np.cumsum(chances[rows, places])
    step_s = seconds(num_sequences + np.arange(1, len(rows) + 1)) + _guessing_s(places, draft_s, len(rates))
    best = _best_count(expected, step_s, _LEAST_GAIN * num_sequences / plain_s if plain_s else 0.0, max_step_s)
    lengths: list[int] = np.bincount(rows[:best], minlength=len(rates)).tolist()
    return lengths


def _guessing_s(places: np.ndarray, draft_s: Callable[[int], float], num_rows: int) -> np.ndarray:
    """(M,) what guessing takes with the first one, two ... of these drafts.

    The first tokens of all sequences are guessed at once, then the second ones of those that want two.

    Args:
        places: (M,) of each among its sequence's drafts.
        draft_s: see `choose_lengths`.
        num_rows: of how many sequences they are.
    """
    more_s = np.zeros(len(places))
    if draft_s(num_rows):
        added_s = np.diff([0.0, *map(draft_s, range(1, num_rows + 1))])  # for one more sequence at once
        for place in range(places.max(initial=-1) + 1):
            (of_place,) = np.nonzero(places == place)
            more_s[of_place] = added_s[: len(of_place)]
    return np.cumsum(more_s)


def _best_count(expected: np.ndarray, step_s: np.ndarray, least_rate: float, max_step_s: float | None) -> int:
    """Of how many drafts the most tokens per second are expected; 0: none brings more than the least rate.

    Args:
        expected: (M,) tokens of a step with one, two ... drafts.
        step_s: (M,) what it takes; 0: it is not known, so it is to be tried.
        least_rate: tokens per second without drafts, and the gain that is asked for.
        max_step_s: see `choose_lengths`.
    """
    if max_step_s is not None and (too_long := step_s > max_step_s).any():
        expected, step_s = expected[: too_long.argmax()], step_s[: too_long.argmax()]
    unknown = np.flatnonzero(step_s == 0)
    first = int(unknown[-1]) + 1 if len(unknown) else 0
    rates = expected[first:] / step_s[first:]
    if not len(rates):
        return first
    best = int(rates.argmax())
    return first + best + 1 if first or rates[best] > least_rate else 0
