"""What the simulator sees far behind is not measured."""

import json
from pathlib import Path

import pytest

from load_tests.deployments import Deployment
from load_tests.measure import Idle
from load_tests.narrow import NarrowError, arrivals, narrow, rough_curves
from load_tests.scenario import load_scenario
from load_tests.schedule import Planned
from load_tests.stats import Slo


def deployment(prefill: int, decode: int) -> Deployment:
    return Deployment(num_prefill=prefill, num_decode=decode, start="", stop="")


FOUR = {
    "colocated": deployment(0, 4),
    "1 to 3": deployment(1, 3),
    "2 to 2": deployment(2, 2),
    "3 to 1": deployment(3, 1),
}
IDLE = Idle({"chat": 0.1, "long": 1.6}, 0.05)
SLO = Slo({"chat": 0.3, "long": 4.8}, 0.1, 0.95)


def play(commands: list[list[str]], goodput: dict[str, float]):
    def run(command):
        commands.append(list(command))
        Path(command[command.index("--json") + 1]).write_text(
            json.dumps({name: {"goodput": value} for name, value in goodput.items()})
        )

    return run


def test_ratios_that_are_far_behind_are_left_out_and_colocated_never(tmp_path):
    commands: list[list[str]] = []
    run = play(commands, {"0+4": 0.1, "1+3": 2.0, "2+2": 1.7, "3+1": 0.5})
    said = narrow("python -m simulator", load_scenario("mixed"), FOUR, [0.5, 1.0], IDLE, SLO, tmp_path / "s", run)
    assert said.dropped == ("3 to 1",)
    assert said.goodput["2 to 2"] == 1.7
    assert len(commands) == 2 and commands[0][:3] == ["python", "-m", "simulator"]
    assert commands[0][-5:] == ["--fixed", "0+4", "1+3", "2+2", "3+1"]


def test_a_simulator_that_does_not_run_says_why(tmp_path):
    with pytest.raises(NarrowError, match="ended with status 2"):
        narrow("python3 -c 'import sys; sys.exit(2)'", load_scenario("mixed"), FOUR, [1.0], IDLE, SLO, tmp_path / "s")
    with pytest.raises(NarrowError, match="no-such-command"):
        narrow("no-such-command", load_scenario("mixed"), FOUR, [1.0], IDLE, SLO, tmp_path / "s")


def test_curves_are_what_an_idle_service_shows():
    schedule = [
        Planned("chat", "a", 0, 0.0, 0.0, (1,) * 40, 10),
        Planned("long", "b", 0, 0.0, 0.0, (1,) * 1550, 10),
    ]
    curves = rough_curves(schedule, IDLE)
    assert curves["token_s"] == pytest.approx(0.001)
    assert curves["step_s"] + curves["sequence_s"] == pytest.approx(0.05)


def test_later_turns_come_when_an_idle_service_has_ended_those_before_them():
    schedule = [
        Planned("chat", "a", 0, 2.0, 1.0, (1,) * 40, 10),
        Planned("chat", "a", 1, None, 1.0, (1,) * 60, 10),
        Planned("chat", "a", 2, None, 1.0, (1,) * 80, 10),
    ]
    rows = arrivals(schedule, IDLE, end_s=5.0)
    assert [row.arrival_s for row in rows] == [2.0, pytest.approx(2.0 + 0.6 + 1.0)]
    assert [row.prompt_tokens for row in rows] == [40, 60]
