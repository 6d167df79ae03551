"""How long answers are, told before the long ones have ended."""

import random
from functools import partial

import pytest

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


class Answers:
    """Answers of given lengths that begin at a steady rate, ten tokens of each per second."""

    def __init__(self, believed=256.0) -> None:
        self.learned = MeanLength(believed, weight=4.0, half_life=64.0)
        self.running: list[tuple[int, float]] = []

    def run(self, seconds: float, length, rate=2.0) -> list[float]:
        """What is learned in each tenth of a second; `length` is asked for each answer that begins."""
        values, coming = [], 0.0
        for _ in range(round(10 * seconds)):
            coming += rate / 10
            while coming >= 1:
                self.running.append((0, length()))
                coming -= 1
            still = [(drawn + 1, whole) for drawn, whole in self.running if drawn + 1 < whole]
            self.learned.add(len(self.running), len(self.running) - len(still))
            self.running = still
            self.learned.note_running(len(still), sum(drawn for drawn, _ in still), len(still), 0)
            values.append(self.learned.value)
        return values


def test_answers_that_become_longer_are_known_before_most_of_them_have_ended_and_stay_known():
    answers = Answers()
    answers.run(200, lambda: 12)
    values = answers.run(9, lambda: 120)
    assert max(values[:10]) < 15
    assert values[80] > 50, "they are taken to be as long as those that run already are"
    values = answers.run(60, lambda: 120)
    assert all(90 < value < 125 for value in values[100:])
    assert answers.run(90, lambda: 12)[-1] < 25


def test_what_was_believed_before_any_had_ended_does_not_hide_that_they_become_longer():
    answers = Answers(believed=256.0)
    answers.run(60, lambda: 12)
    values = answers.run(10, lambda: 120)
    assert max(values[:10]) < 20
    assert values[75] > 50 and values[95] > 70


LENGTHS = {
    "one length": lambda draw: 100,
    "as if ended by chance": lambda draw: draw.expovariate(0.01),
    "some very long": lambda draw: draw.lognormvariate(4.3, 1.1),
}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_answers_of_the_same_kind_are_not_taken_to_become_longer_however_many_come(length):
    values = []
    for seed in range(8):
        answers, draw_one = Answers(), partial(length, random.Random(seed))
        usual = answers.run(300, draw_one)[-1]
        for rate in (20.0, 0.5, 10.0):
            values += [value / usual for value in answers.run(30, draw_one, rate)]
    assert sum(value > 2.0 for value in values) < 0.01 * len(values)


def test_before_any_has_ended_they_are_taken_to_be_no_longer_than_they_may_be():
    learned = MeanLength(believed=256.0, weight=4.0, half_life=64.0)
    learned.note_running(num_running=1, drawn=1, num_open=3, allowed=36)
    assert learned.value == 12.0
    learned.note_running(num_running=1, drawn=1, num_open=1, allowed=8000)
    assert learned.value == 256.0


def test_what_was_believed_is_forgotten():
    answers = Answers()
    assert answers.run(300, lambda: 12)[-1] == pytest.approx(12, rel=0.05)


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
