"""How many drafts of each sequence a step tries: as many as bring the most tokens per second. Pure functions."""
# mypy: disable-error-code="untyped-decorator"

from collections.abc import Callable
from math import inf

import numpy as np

from deployments.engine.compiled import njit

# Drafts that are right this seldom are never worth a place.
_LEAST_CHANCE = 0.005
# Estimates are noisy: drafts must promise so much more than none. Less to go on where a step with drafts is waited for:
# who stops and begins anew waits in vain in between.
_LEAST_GAIN, _LEAST_GAIN_ON = 1.03, 0.97

Seconds = Callable[[np.ndarray], np.ndarray]


def choose_lengths(
    rates: np.ndarray,
    num_sequences: int,
    plain_s: float,
    seconds: Seconds,
    draft_s: Callable[[int], float] = lambda num_sequences: 0.0,
    max_step_s: float | None = None,
    *,
    goes_on: bool = False,
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
        goes_on: the step before had drafts, and was waited for; one without would overlap with the next one.

    Returns:
        For each of the N a number; none at all unless they pay. A step takes the likeliest drafts first, so each number
        is the one that maximises expected tokens over seconds for the batch as a whole.
    """
    num_rows = len(rates)
    step_s = seconds(num_sequences + np.arange(1, rates.size + 1))
    guess_s = np.zeros(num_rows + 1)
    if draft_s(num_rows):
        guess_s[1:] = [draft_s(count) for count in range(1, num_rows + 1)]
    least_gain = _LEAST_GAIN_ON if goes_on else _LEAST_GAIN
    least_rate = least_gain * num_sequences / plain_s if plain_s else 0.0
    most_s = inf if max_step_s is None else max_step_s
    lengths: list[int] = _choose(rates, num_sequences, step_s, guess_s, least_rate, most_s).tolist()
    return lengths


# Compiled, for a GPU waits for it: numpy takes twenty times as long, nearly all of it for calling.
@njit(cache=True)
def _choose(
    rates: np.ndarray,
    num_sequences: int,
    step_s: np.ndarray,
    guess_s: np.ndarray,
    least_rate: float,
    max_step_s: float,
) -> np.ndarray:
    """(N,) see `choose_lengths`.

    The first tokens of all sequences are guessed at once, then the second ones of those that want two.

    Args:
        rates: (N, P) see there.
        num_sequences: see there.
        step_s: (N * P,) of a step with one, two ... drafts; 0: it is not known, so it is to be tried.
        guess_s: (N + 1,) that guessing one more token of none, one, two ... sequences takes.
        least_rate: tokens per second without drafts, and the gain that is asked for.
        max_step_s: see there.
    """
    num_rows, num_places = rates.shape
    chances = np.empty(rates.size)  # to be right together with all before it
    for row in range(num_rows):
        chance = 1.0
        for place in range(num_places):
            chance *= rates[row, place]
            chances[row * num_places + place] = chance
    order = np.argsort(-chances, kind="mergesort")  # of a sequence's equally likely ones the first goes first
    guessed = np.zeros(num_places, np.int64)  # so many tokens of each place
    lengths, best = np.zeros(num_rows, np.int64), 0
    expected, guessing_s, best_rate = float(num_sequences), 0.0, least_rate
    for count in range(1, rates.size + 1):
        draft = order[count - 1]
        if chances[draft] < _LEAST_CHANCE:
            break
        place = draft % num_places
        expected += chances[draft]
        guessing_s += guess_s[guessed[place] + 1] - guess_s[guessed[place]]
        guessed[place] += 1
        seconds = step_s[count - 1] + guessing_s
        if seconds > max_step_s:
            break
        if seconds == 0:
            best, best_rate = count, 0.0
        elif expected / seconds > best_rate:
            best, best_rate = count, expected / seconds
    for draft in order[:best]:
        lengths[draft // num_places] += 1
    return lengths
