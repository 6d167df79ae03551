"""Schedules of `load_tests` in files, so that processes without this project can play them too.

A file holds one scenario: what is sent, what is sent to find out how an idle system does, and how long. Times and
lengths are those of `load_tests.scenario`.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from load_tests.measure import IDLE_REQUESTS
from load_tests.samples import GeneratorHealth, Run, Sample
from load_tests.scenario import Scenario
from load_tests.schedule import Planned, build_idle_schedule, build_schedule

IDLE = " idle"


@dataclass(frozen=True, slots=True)
class Play:
    """What is sent, how long, and what it is called.

    Attributes:
        name: of the scenario; that of an idle system ends with `IDLE`.
        warmup_s: beginning that is not counted.
        duration_s: steady state that is; nothing is sent behind it.
        drain_s: how long answers are awaited after it.
        round: seed of the schedule.
        requests: all of them.
    """

    name: str
    warmup_s: float
    duration_s: float
    drain_s: float
    round: int
    requests: tuple[Planned, ...]

    def run(self, deployment: str, samples: tuple[Sample, ...], generator: GeneratorHealth) -> Run:
        """What came of it, just now."""
        return Run(
            scenario=self.name,
            deployment=deployment,
            url="",
            load=1.0,
            round=self.round,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            warmup_s=self.warmup_s,
            duration_s=self.duration_s,
            samples=samples,
            generator=generator,
        )


def plays_of(scenario: Scenario, round_: int, load: float = 1.0) -> tuple[Play, Play]:
    """An idle system first, then the scenario itself with so many times its arrivals."""
    idle = build_idle_schedule(scenario, "idle", IDLE_REQUESTS + 1)
    planned = build_schedule(scenario, f"{scenario.name}/{round_}/{load:g}", load)
    return (
        Play(scenario.name + IDLE, 0.0, 60.0, 30.0, round_, tuple(idle)),
        Play(scenario.name, scenario.warmup_s, scenario.duration_s, scenario.drain_s, round_, tuple(planned)),
    )


def write_play(path: Path, play: Play) -> None:
    path.write_text(json.dumps(asdict(play)))


def read_play(path: Path) -> Play:
    values = json.loads(path.read_text())
    requests = (Planned(**{**request, "prompt": tuple(request["prompt"])}) for request in values["requests"])
    return Play(**{**values, "requests": tuple(requests)})
