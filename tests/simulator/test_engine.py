"""A modelled engine: in which order prompts go, when steps begin, who gives way."""

from dataclasses import replace

import pytest
import simpy

from deployments.simulator.curves import Curves
from deployments.simulator.engine import ModelledEngine
from deployments.simulator.gaps import Gaps
from deployments.simulator.machine import Machine
from deployments.simulator.requests import BLOCK_SIZE, Request
from deployments.simulator.sequences import Answer

CURVES = Curves(step_s=0.1, token_s=1e-3, sequence_s=0.0, context_s=0.0, max_num_batched_tokens=100)


class Bench:
    """One engine, and when what ended there."""

    def __init__(
        self, curves: Curves = CURVES, env: simpy.Environment | None = None, machine: Machine | None = None
    ) -> None:
        self.env = env or simpy.Environment()
        self.gaps = Gaps()
        self.engine = ModelledEngine(self.env, curves, 0.18, self.gaps, machine)
        self.ended: dict[str, float] = {}
        self.sent_back: dict[str, int] = {}

    def at(self, seconds: float, name: str, prompt: int = 0, output: int = 0, since_s: float | None = None) -> None:
        def begin(_: simpy.Event) -> None:
            request = Request(seconds, prompt, output)
            if output:
                begun_s = seconds if since_s is None else since_s
                answer = Answer(request, lambda: self._end(name), lambda drawn: self._note(name, drawn), begun_s)
                self.engine.answer(answer)
            else:
                self.engine.compute(request, lambda: self._end(name))

        self.env.timeout(seconds).callbacks.append(begin)

    def _end(self, name: str) -> None:
        self.ended[name] = round(self.env.now, 6)

    def _note(self, name: str, drawn: int) -> None:
        self.sent_back[name] = drawn


def test_the_shortest_prompt_goes_first():
    bench = Bench()
    bench.at(0.0, "first", prompt=100)
    bench.at(0.01, "long", prompt=300)
    bench.at(0.02, "short", prompt=100)
    bench.env.run()
    assert list(bench.ended) == ["first", "short", "long"]


def test_no_prompt_is_overtaken_by_more_tokens_than_it_has():
    bench = Bench()
    bench.at(0.0, "first", prompt=100)
    bench.at(0.01, "long", prompt=300)
    for i in range(9):
        bench.at(0.02 + i / 1000, f"short {i}", prompt=100)
    bench.env.run()
    order = list(bench.ended)
    assert order[:4] == ["first", "short 0", "short 1", "short 2"]
    assert order[4] == "long"


def test_what_comes_while_a_step_runs_is_part_of_the_next_one():
    bench = Bench()
    bench.at(0.0, "old", prompt=0, output=101)
    bench.at(0.25, "new", prompt=0, output=3, since_s=0.21)
    bench.at(0.25, "prompt", prompt=50)
    bench.env.run()
    # The third step ends at 0.3; the one with the prompt takes 0.15.
    assert bench.ended["prompt"] == pytest.approx(0.45)
    assert bench.ended["new"] == pytest.approx(0.55)
    # From its first token at 0.21 to the end of the step that begins at 0.3.
    assert max(bench.gaps.quantiles((1.0,))) == pytest.approx(0.45 - 0.21, rel=0.01)
    assert bench.gaps.quantiles((0.5,))[0] == pytest.approx(0.1, rel=0.01)


def test_the_newest_answer_gives_way_when_the_kv_pool_is_full():
    bench = Bench(replace(CURVES, num_kv_tokens=2 * BLOCK_SIZE))
    bench.at(0.0, "old", output=600)
    bench.at(1.0, "new", output=600)
    bench.env.run()
    # 10 tokens are drawn before the second one comes, and 507 of each until there is no room for two more.
    assert bench.sent_back == {"new": 508}
    assert list(bench.ended) == ["old"]
    assert bench.engine.stats.preemptions == 1
    assert bench.engine.held_blocks == 0


def test_an_engine_that_fails_tells_what_it_has_drawn_and_ends_nothing():
    bench = Bench()
    request = Request(0.0, 10, 100)
    bench.engine.answer(Answer(request, lambda: bench._end("answer"), lambda drawn: None, 0.0))
    bench.env.run(until=0.55)
    assert bench.engine.fail() == {id(request): 6}
    bench.at(1.0, "late", prompt=10)
    bench.env.run()
    assert bench.ended == {}


def test_gaps_are_told_to_a_hundredth():
    gaps = Gaps()
    gaps.add(0.01, 980)
    gaps.add(0.5, 20)
    gaps.add(0.5, -5)
    assert list(gaps.quantiles((0.5, 0.98, 0.99))) == pytest.approx([0.01, 0.01, 0.5], rel=0.01)


def gaps_of(bench: Bench, num_gaps: int) -> list[float]:
    """From the shortest on."""
    shares = tuple((i + 0.5) / num_gaps for i in range(num_gaps))
    return [round(gap, 2) for gap in bench.gaps.quantiles(shares)]


def test_engines_that_share_cores_take_longer_while_both_compute():
    machine = Machine(2.0)
    bench = Bench(machine=machine)
    other = Bench(env=bench.env, machine=machine)
    bench.at(0.0, "answer", output=11)
    other.at(0.25, "prompt", prompt=45)  # 0.145 s alone
    bench.env.run()
    # The third step is half over when the other engine begins, and the fourth takes twice as long.
    assert other.ended["prompt"] == pytest.approx(0.25 + 2 * 0.145)
    # A hundredth is left of it then.
    assert bench.ended["answer"] == pytest.approx(0.35 + 0.2 - 0.005 + 6 * 0.1)
    assert gaps_of(bench, 10) == pytest.approx([0.1] * 8 + [0.15, 0.195], rel=0.03)
    assert bench.engine.stats.itl_s.total == pytest.approx(8 * 0.1 + 0.15 + 0.195)
    assert other.engine.stats.prefill_s == pytest.approx(0.29)


def test_a_step_with_prompts_takes_longer_while_another_engine_computes():
    machine = Machine(1.5)
    bench = Bench(machine=machine)
    other = Bench(env=bench.env, machine=machine)
    bench.at(0.0, "prompt", prompt=100)  # 0.2 s alone
    other.at(0.1, "short", output=3)  # two steps of 0.1 s alone, 0.15 s beside the prompt
    bench.env.run()
    assert bench.ended["prompt"] == pytest.approx(0.1 + 1.5 * 0.1)
    assert other.ended["short"] == pytest.approx(0.1 + 0.15 + 0.1)


def test_what_a_slower_engine_makes_late_is_counted_for_the_first_gap_as_well():
    machine = Machine(2.0)
    bench = Bench(machine=machine)
    other = Bench(env=bench.env, machine=machine)
    answer = Request(0.0, 0, 2)
    bench.engine.answer(Answer(answer, lambda: None, lambda drawn: None, -0.06))
    other.at(0.05, "prompt", prompt=100)
    bench.env.run()
    # 0.1 s and what its hand-off took would be in time, the step that is stretched is not.
    assert gaps_of(bench, 1) == pytest.approx([0.15 + 0.06], rel=0.05)
    assert answer.gaps_over == 1


def test_an_engine_that_fails_slows_nobody():
    machine = Machine(3.0)
    bench = Bench(machine=machine)
    other = Bench(env=bench.env, machine=machine)
    bench.at(0.0, "answer", output=11)
    other.engine.answer(Answer(Request(0.0, 0, 500), lambda: None, lambda drawn: None, 0.0))
    bench.env.run(until=0.45)
    other.engine.fail()
    bench.env.run()
    # One step of 0.3 s, the half of another one, and what is left at the pace of one alone.
    assert bench.ended["answer"] == pytest.approx(0.45 + 0.05 + 8 * 0.1)
