"""Deployments take turns, every run is kept, and one in which the generator lagged is repeated on a fresh service."""

import contextlib

import pytest

from load_tests import compare as module
from load_tests.compare import Plan, compare
from load_tests.deployments import Deployment, Deployments
from load_tests.generator import Target
from load_tests.measure import Idle
from load_tests.samples import read_runs
from load_tests.scenario import load_scenario
from tests.load_tests.runs import build_run, build_sample

DEPLOYMENTS = Deployments(
    deployments={name: Deployment(num_prefill=0, num_decode=1, start="", stop="") for name in ("a", "b")}
)


class Service:
    """Stands for all that starts processes or sends requests; `problems` come up once each."""

    def __init__(self, problems: dict[tuple[str, float, int], int]) -> None:
        self.problems = problems
        self.said: list[str] = []

    @contextlib.contextmanager
    def running(self, name, deployment, url, timeout_s, log):
        self.said.append(f"up {name}")
        yield
        self.said.append(f"down {name}")

    def measure_idle(self, scenario, target, folder):
        self.said.append("idle")
        return Idle({"chat": 0.1, "long": 1.0}, 0.05)

    def measure(self, scenario, target, folder, name, load, round_):
        self.said.append(f"{name} {load:g} {round_}")
        left = self.problems.get((name, load, round_), 0)
        self.problems[name, load, round_] = left - 1
        return build_run([build_sample()], name, load, round_, ["late"] if left > 0 else [])


@pytest.fixture
def run_plan(monkeypatch, tmp_path):
    def run(problems=None, **changes):
        service = Service(dict(problems or {}))
        for name in ("running", "measure_idle", "measure"):
            monkeypatch.setattr(module, name, getattr(service, name))
        monkeypatch.setattr(module, "find_target", lambda url, model: Target(url, "m"))
        plan = Plan(load_scenario("mixed"), DEPLOYMENTS, [1.0, 2.0], range(2), **changes)
        return compare(plan, tmp_path, lambda line: None), service.said, read_runs(tmp_path / "samples.json")[0]

    return run


def test_every_round_has_another_order_and_all_loads_run_on_one_start(run_plan):
    found, said, _ = run_plan()
    first = ["up a", "idle", "a 1 0", "a 2 0", "down a", "up b", "idle", "b 1 0", "b 2 0", "down b"]
    assert said == [*first, "up b", "b 1 1", "b 2 1", "down b", "up a", "a 1 1", "a 2 1", "down a"]
    assert set(found.idle) == {"a", "b"}


def test_only_those_asked_for_are_measured_idle(run_plan):
    found, said, _ = run_plan(idle=["b"])
    assert set(found.idle) == {"b"} and said.count("idle") == 1


def test_an_invalid_run_is_repeated_alone_on_a_service_that_has_not_seen_its_prompts(run_plan):
    found, said, kept = run_plan({("a", 2.0, 0): 1})
    assert said[:8] == ["up a", "idle", "a 1 0", "a 2 0", "down a", "up a", "a 2 0", "down a"]
    assert all(run.is_valid for run in found.runs)
    assert [(run.deployment, run.load, run.round) for run in kept[:2]] == [("a", 1.0, 0), ("a", 2.0, 0)]


def test_a_run_that_is_invalid_again_is_kept_as_such(run_plan):
    found, said, kept = run_plan({("b", 1.0, 1): 2})
    assert said.count("b 1 1") == 2
    assert [run.is_valid for run in found.runs].count(False) == 1
    assert len(kept) == len(found.runs) == 8


def test_what_is_not_worth_measuring_is_left_out_from_then_on(run_plan):
    asked = []

    def leave_out(idle):
        asked.append(idle)
        return ["a", "b"]

    found, said, _ = run_plan(leave_out=leave_out)
    assert found.left_out == ("b",) and len(asked) == 1
    assert not [what for what in said if what.startswith(("b", "up b"))]
    assert {run.deployment for run in found.runs} == {"a"}
