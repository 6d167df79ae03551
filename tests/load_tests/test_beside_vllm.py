"""The harness that plays the service's schedules to vLLM: alone, played to whatever engine, in the same samples."""

import asyncio
import json
import selectors
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from load_tests.samples import Run, read_runs
from load_tests.scenario import Scenario
from tests.bench.two_gpus import vllm_engine
from tests.bench.two_gpus.comparison import figures_of, lines, ratios, throughput
from tests.bench.two_gpus.plays import plays_of, read_play, write_play
from tests.load_tests.runs import build_run, build_sample

SCENARIO = Scenario(
    name="mixed",
    description="",
    warmup_s=0.1,
    duration_s=0.4,
    drain_s=0.5,
    classes={
        "chat": {"arrivals": {"streams": 3}, "prompt_tokens": 5, "output_tokens": 4},
        "long": {"arrivals": {"poisson_per_s": 20}, "prompt_tokens": 50, "output_tokens": 2},
    },
)


@pytest.fixture
def plays(tmp_path):
    """Files of an idle system and of the scenario."""
    paths = [tmp_path / f"{number}.json" for number in range(2)]
    for path, one in zip(paths, plays_of(SCENARIO, 0), strict=True):
        write_play(path, one)
    return paths


def planned(path):
    return json.loads(path.read_text())["requests"]


class Jumping(selectors.DefaultSelector):
    """Time that stands still while there is something to do, and then jumps: a busy machine takes none of it."""

    now_s = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        self.now_s += 0.0 if ready else timeout or 0.0
        return ready


def play_to(engine, requests, end_s=1.0, drain_s=0.2):
    clock = Jumping()

    def build_loop():
        loop = asyncio.SelectorEventLoop(clock)
        loop.time = lambda: clock.now_s  # type: ignore[method-assign]
        return loop

    player = vllm_engine.Player(engine, 0.0, end_s, drain_s)
    told = SimpleNamespace(monotonic=lambda: clock.now_s)
    with asyncio.Runner(loop_factory=build_loop) as runner, patch.object(vllm_engine, "time", told):
        return runner.run(player.play(requests))


class InPairs:
    """Two tokens at a time; refuses long prompts, and never ends the answer to the first of the chats."""

    async def generate(self, request_id, prompt, num_tokens):
        if len(prompt) == 50:
            raise ValueError("too long")
        for _ in range(num_tokens // 2):
            yield 2
        yield 0
        if request_id.startswith("chat-0-0"):
            await asyncio.Event().wait()


def test_a_play_is_the_same_when_it_is_read_again(plays):
    assert [read_play(path) for path in plays] == list(plays_of(SCENARIO, 0))


def test_the_script_stands_alone(plays, tmp_path):
    imported = "import json, sys; print(json.dumps([name for name in sys.modules if '.' not in name]))"
    script = f"import runpy; runpy.run_path({vllm_engine.__file__!r}, run_name='alone')\n{imported}"
    found = subprocess.run([sys.executable, "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    names = set(json.loads(found.stdout))
    assert names.isdisjoint({"vllm", "torch", "load_tests", "deployments", "app", "tests"})


def test_each_session_goes_to_one_engine_and_each_class_to_all(plays):
    requests = planned(plays[1])
    shares = [vllm_engine.share_of(requests, index, 2) for index in range(2)]
    assert sorted(r["session"] for share in shares for r in share) == sorted(r["session"] for r in requests)
    sessions = [{(r["request_class"], r["session"]) for r in share} for share in shares]
    assert sessions[0].isdisjoint(sessions[1])
    for kind in ("chat", "long"):
        sizes = [sum(name == kind for name, _ in own) for own in sessions]
        assert max(sizes) - min(sizes) <= 1, f"{kind}: {sizes}"


def test_samples_say_what_came_when_and_what_failed(plays):
    requests = [r for r in planned(plays[1]) if r["turn"] == 0]
    samples = play_to(InPairs(), requests)
    assert len(samples) == len(requests)
    by_session = {sample["session"]: sample for sample in samples}
    assert by_session["chat-0"]["error"] == "unfinished"
    whole = by_session["chat-1"]
    assert whole["error"] is None
    assert (whole["output_tokens"], len(whole["gaps_s"])) == (4, 1)
    assert {s["error"] for s in samples if s["request_class"] == "long"} == {"ValueError"}


def test_a_turn_is_sent_behind_the_one_before_it_and_none_behind_the_end():
    class Slow:
        async def generate(self, request_id, prompt, num_tokens):
            await asyncio.sleep(0.06)
            yield num_tokens

    turns = [
        {
            "request_class": "chat",
            "session": "one",
            "turn": turn,
            "at_s": 0.0 if turn == 0 else None,
            "delay_s": 0.0,
            "prompt": [1],
            "output_tokens": 1,
        }
        for turn in range(5)
    ]
    samples = play_to(Slow(), turns, end_s=0.1, drain_s=5.0)
    assert [sample["turn"] for sample in samples] == [0, 1]
    assert samples[1]["sent_s"] == samples[0]["end_s"] == pytest.approx(0.06)


def test_two_processes_play_it_and_leave_runs_that_load_tests_reads(plays, tmp_path):
    out = tmp_path / "vllm.json"
    # Long, so that a busy machine sends all of it in time; it is over once all of it is answered.
    write_play(plays[1], replace(read_play(plays[1]), duration_s=60.0))
    command = [sys.executable, vllm_engine.__file__, *map(str, plays), "--model", "none", "--engine", "echo"]
    command += ["--budgets", "512,2048", "--together", "--out", str(out)]
    # The idle system's play is as long as a minute, unless it is over before.
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    runs, about = read_runs(out)
    assert [(run.deployment, run.scenario) for run in runs] == [
        ("vLLM, 512", "mixed idle"),
        ("vLLM, 2048", "mixed idle"),
        ("vLLM, 512", "mixed"),
        ("vLLM, 2048", "mixed"),
    ]
    assert set(about["started_s"]) == {"vLLM, 512", "vLLM, 2048"}
    sessions = {request.session for request in read_play(plays[1]).requests}
    for run in runs[2:]:
        assert {sample.session for sample in run.samples} == sessions
        assert all(sample.error is None for sample in run.samples)


def test_an_engine_that_ends_is_told_with_what_it_said_last(tmp_path):
    command = [sys.executable, vllm_engine.__file__, str(tmp_path / "none.json"), "--model", "none"]
    command += ["--engine", "echo", "--budgets", "512", "--out", str(tmp_path / "vllm.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr


def idle_and_loaded(deployment: str, gap_s: float) -> list[Run]:
    """An idle system with gaps of 10 ms, and the same under load."""
    idle = build_run([build_sample(sent_s=i, ttft_s=0.1, gaps_s=[0.01] * 3) for i in range(3)], deployment)
    loaded = build_run([build_sample(sent_s=10 + i, ttft_s=0.1, gaps_s=[gap_s] * 9) for i in range(10)], deployment)
    return [Run(**{**as_fields(idle), "scenario": "mixed idle"}), loaded]


def as_fields(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in asdict(run)}


def test_ratios_are_to_the_best_of_vllm_in_each_figure():
    runs = idle_and_loaded("disaggregated", 0.012)
    runs += idle_and_loaded("vLLM, 512", 0.024) + idle_and_loaded("vLLM, 2048", 0.048)
    found = ratios(runs, "mixed")["disaggregated"]
    assert found["chat ITL p99"] == pytest.approx(2.0)
    assert found["chat TTFT p50"] == pytest.approx(1.0)
    assert found["tokens/s"] == pytest.approx(1.0)
    # Within twice the idle gap nobody else serves anything.
    assert found["goodput 2x"] is None
    assert [one.goodput[2.0] > 0 for one in figures_of(runs, "mixed")] == [True, False, False]
    assert sum("vLLM, 512" in line for line in lines(runs, "mixed", {"vLLM, 512": 100.0})) == 1


def test_throughput_counts_tokens_when_they_come():
    # Two tokens a gap, one of them behind the end of the steady state.
    sample = build_sample(sent_s=28.0, ttft_s=0.5, gaps_s=[0.5, 0.5, 1.0], prompt_tokens=100)
    pairs = build_run([sample.__class__(**{**asdict(sample), "output_tokens": 8})])
    assert throughput(pairs) == (100 / 20, 6 / 20)
