"""The next step is chosen late, behind steps of one kind; first tokens are told before the next one is launched."""

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engine.config import EngineLimits
from deployments.engine.pacing import Pace, is_awaited
from deployments.engine.stats import EngineStats

LIMITS = EngineLimits(max_model_len=64, block_size=16, num_blocks=4, max_num_seqs=4, max_num_batched_tokens=64)
CHUNK_S = 0.050
NOW_S = 100.0


class Step:
    """A launched step of prompt tokens, with or without decodes, or of decodes alone."""

    def __init__(self, num_prompt_tokens: int, *, decodes: int = 0, draws: bool = False) -> None:
        prompts = [SimpleNamespace(is_decode=False, num_draws=int(draws))] if num_prompt_tokens else []
        self.items = [*prompts, *[SimpleNamespace(is_decode=True, num_draws=1)] * decodes]
        self.num_prompt_tokens = num_prompt_tokens
        self.has_ended = False
        self.done = SimpleNamespace(query=lambda: self.has_ended)


def paced(*steps: "Step", seconds: float = CHUNK_S) -> Pace:
    """Steps that took equally long ran one after the other, each begun as the one before ended, the last at `NOW_S`."""
    pace = Pace(EngineStats.begin(LIMITS))
    for number, step in enumerate(steps):
        begun_s = NOW_S + (number - len(steps)) * seconds
        launch(pace, step, begun_s - NOW_S)
        pace.end(begun_s + seconds)
    return pace


def launch(pace: Pace, step: Any, after_s: float = 0.0) -> None:
    """A step is launched, its preparation begun so long after `NOW_S`."""
    pace.begin(step, NOW_S + after_s)


def pauses_until(pace: Pace) -> float:
    """Milliseconds after `NOW_S` at which the next step is chosen."""
    now_s = NOW_S
    while (pause_s := pace.pause_s(now_s)) > 1e-9:
        assert pause_s <= 0.002
        now_s += pause_s
    return (now_s - NOW_S) * 1e3


def test_behind_a_part_of_a_prompt_the_next_step_is_chosen_shortly_before_it_ends() -> None:
    pace = paced(Step(2048), Step(2048))
    launch(pace, Step(2048), -0.02)  # launched while the one before ran
    assert pauses_until(pace) == pytest.approx(40, abs=0.1)


def test_a_step_that_ends_sooner_than_expected_is_not_waited_out() -> None:
    pace, step = paced(Step(2048)), Step(2048)
    launch(pace, step)
    assert pace.pause_s(NOW_S + 0.010)
    step.has_ended = True
    assert not pace.pause_s(NOW_S + 0.012)


def test_behind_decodes_it_is_chosen_when_the_host_still_has_the_time_to_launch_it() -> None:
    pace = paced(*[Step(0, decodes=32)] * 3, seconds=0.006)
    launch(pace, Step(0, decodes=32), -0.003)
    assert pauses_until(pace) == pytest.approx(0.9 * 6 - 2.5, abs=0.5)


def test_behind_short_steps_of_decodes_nothing_is_paused_for() -> None:
    pace = paced(*[Step(0, decodes=32)] * 3, seconds=0.0025)
    launch(pace, Step(0, decodes=32))
    assert not pace.pause_s(NOW_S)


def test_prompts_say_nothing_of_decodes_nor_decodes_of_prompts() -> None:
    pace = paced(Step(2048), Step(2048, decodes=3))
    launch(pace, Step(0, decodes=32))
    assert not pace.pause_s(NOW_S)
    pace = paced(Step(0, decodes=32))
    launch(pace, Step(2048))
    assert not pace.pause_s(NOW_S)


def test_nothing_is_paused_for_beside_decodes_or_where_nothing_is_known_or_under_way() -> None:
    pace = paced(Step(2048))
    assert not pace.pause_s(NOW_S)
    launch(pace, Step(2048, decodes=1))
    assert not pace.pause_s(NOW_S)
    unknown = paced()
    launch(unknown, Step(2048))
    assert not unknown.pause_s(NOW_S)


def test_one_slow_step_is_forgotten_and_a_fast_one_counts_at_once() -> None:
    pace = paced(*[Step(2048)] * 3, Step(256))  # as long as eight times the tokens
    launch(pace, Step(2048))
    assert pauses_until(pace) < 43
    fast = paced(*[Step(2048)] * 3, Step(8192))
    launch(fast, Step(2048))
    assert pauses_until(fast) < 10


def test_what_is_awaited_is_a_first_token_that_no_decode_waits_beside() -> None:
    as_steps: Any = [Step(100, draws=True), Step(100), Step(100, decodes=1, draws=True)]
    assert [is_awaited(step) for step in as_steps] == [True, False, False]
