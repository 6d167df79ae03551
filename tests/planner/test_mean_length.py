"""How long answers are, told before the long ones have ended."""

import random

from deployments.planner.windows import MeanLength


def play(seconds: int, lengths: random.Random, rate: int = 3, tokens_per_s: int = 10) -> tuple[float, float]:
    """What is learned of answers that begin now, and the mean of those that have ended."""
    learned = MeanLength(believed=256.0, weight=4.0, half_life=64.0)
    running: list[list[int]] = []
    ended: list[int] = []
    for _ in range(seconds):
        running += [[0, int(lengths.expovariate(1 / 400)) + 1] for _ in range(rate)]
        drawn = 0
        for answer in running:
            step = min(tokens_per_s, answer[1] - answer[0])
            answer[0] += step
            drawn += step
        done = [answer for answer in running if answer[0] == answer[1]]
        running = [answer for answer in running if answer[0] < answer[1]]
        ended += [answer[1] for answer in done]
        learned.add(drawn, len(done))
    return learned.value, sum(ended) / len(ended)


def test_the_mean_is_known_while_most_long_answers_still_run():
    values = [play(20, random.Random(seed)) for seed in range(20)]
    learned, of_ended = (sum(column) / len(column) for column in zip(*values, strict=True))
    assert of_ended < 120, "those that have ended are the short ones"
    assert 280 < learned < 480


def test_before_anything_has_ended_what_is_believed_holds_and_grows_with_what_is_drawn():
    learned = MeanLength(believed=256.0, weight=4.0, half_life=64.0)
    assert learned.value == 256.0
    learned.add(2000, 0)
    assert learned.value == 256.0 + 2000 / 4


def test_a_counter_that_went_back_changes_nothing():
    learned = MeanLength(believed=256.0, weight=4.0, half_life=64.0)
    learned.add(-500, 3)
    learned.add(500, -3)
    assert learned.value == 256.0
