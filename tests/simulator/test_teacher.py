"""What a service's `/metrics` teach of its engines."""

import random
from dataclasses import replace

import pytest

from deployments.engine.stats import EngineStats
from deployments.load.held import Held
from deployments.load.reading import Reading
from deployments.replica_stats import HandoffStats, ReplicaStats
from deployments.simulator.curves import Curves
from deployments.simulator.pools import PoolSetup, PoolState
from deployments.simulator.requests import Request
from deployments.simulator.scaling import Fixed
from deployments.simulator.service import Service, Setup
from deployments.telemetry.metrics import render
from deployments.telemetry.peers import IngressReading
from tests.bench.simulator.teacher import Snapshot, Teacher, parse_metrics

TRUE = Curves(
    step_s=0.02, token_s=0.003, sequence_s=0.002, context_s=0.0, max_num_batched_tokens=128, num_kv_tokens=20_480
)


class Engine:
    """Counts as an engine does whose steps take what the curves say."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stats = EngineStats(num_blocks=1000, block_size=16, max_num_seqs=64)
        self.handoff = HandoffStats()

    def decode(self, batch: int, steps: int) -> None:
        for _ in range(steps):
            self._step(batch, 0)

    def compute(self, tokens: int, batch: int = 0) -> None:
        for begin in range(0, tokens, 128):
            self._step(batch, min(128, tokens - begin))
        self.stats.ttft_s.observe(0.5)

    def _step(self, batch: int, tokens: int) -> None:
        seconds = TRUE.step_s + TRUE.sequence_s * batch + TRUE.token_s * tokens
        stats = self.stats
        stats.steps += 1
        stats.num_running = batch
        if batch:
            stats.itl_s.observe(seconds, batch)
        if tokens:
            stats.prompt_tokens += tokens
            stats.prefill_steps += 1
            stats.prefill_s += seconds
            stats.prefill_gaps += batch
            stats.prefill_gap_s += seconds * batch


def snapshot(**engines: Engine) -> Snapshot:
    pools = {pool: [ReplicaStats(one.name, one.stats.copy(), one.handoff.copy())] for pool, one in engines.items()}
    return parse_metrics(render(pools, IngressReading([])).decode(), block_size=16)


@pytest.mark.parametrize("are_apart", [False, True])
def test_curves_are_learned_from_what_the_metrics_say(are_apart):
    decode = Engine("d#1")
    prefill = Engine("p#1") if are_apart else decode
    engines = {"decode": decode} | ({"prefill": prefill} if are_apart else {})
    watch = [snapshot(**engines)]
    for second in range(60):
        decode.decode(1 + second % 5, 20)
        prefill.compute(40 + 7 * second % 200, 0 if are_apart else 1 + second % 5)
        prefill.handoff.observe(3, 1000, 0.025)
        watch.append(snapshot(**engines))
    teacher = Teacher([watch])
    elsewhere_s = teacher.curves("prefill", 128).token_s if are_apart else 0.0
    curves = teacher.curves("decode", 128, elsewhere_s)
    assert curves.step_s == pytest.approx(TRUE.step_s, rel=0.1)
    assert curves.sequence_s == pytest.approx(TRUE.sequence_s, rel=0.25)
    assert curves.token_s == pytest.approx(TRUE.token_s, rel=0.05)
    assert curves.handoff_s == pytest.approx(0.025)
    assert teacher.ttft("prefill" if are_apart else "decode").mean_s == pytest.approx(0.5)
    assert curves.num_kv_tokens == 16_000


def test_engines_that_did_nothing_teach_nothing():
    engine = Engine("d#1")
    teacher = Teacher([[snapshot(decode=engine), snapshot(decode=engine)]])
    with pytest.raises(ValueError, match="ran no step"):
        teacher.curves("decode", 128)


class Watching(Fixed):
    """Looks at a modelled service each second."""

    period_s = 1.0

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def decide(
        self, reading: Reading, pools: dict[str, PoolState], at_s: float, num_refused: int, held: Held
    ) -> dict[str, int]:
        engines = {(pool, name): stats for pool, read in reading.pools.items() for name, stats in read.items()}
        self.snapshots.append(Snapshot(engines))
        return super().decide(reading, pools, at_s, num_refused, held)


def test_what_a_modelled_engine_teaches_makes_another_one_like_it():
    draw, at_s, trace = random.Random(3), 0.0, list[Request]()
    for _ in range(200):
        at_s += draw.expovariate(0.7)
        trace.append(Request(at_s, draw.randint(32, 160), draw.randint(16, 48)))

    def play(curves: Curves, scaler: Fixed) -> tuple[float, ...]:
        service = Service(Setup(PoolSetup(curves, most=1), None, ttft_s=60.0, itl_s=1.0), scaler)
        requests = [replace(request) for request in trace]
        service.play(requests)
        ttft_s = sorted(request.ttft_s or 0.0 for request in requests)
        return ttft_s[100], ttft_s[198], *service.gaps.quantiles((0.5, 0.99))

    watching = Watching()
    true = play(TRUE, watching)
    curves = Teacher([watching.snapshots]).curves("decode", TRUE.max_num_batched_tokens)
    # Idle engines compute prompts beside nobody, busy ones beside many: neither may be taken for the other.
    assert play(curves, Fixed()) == pytest.approx(true, rel=0.06)


def test_the_wait_for_a_step_that_runs_is_no_part_of_a_hand_off():
    decode, prefill, watch = Engine("d#1"), Engine("p#1"), list[Snapshot]()
    for second in range(11):
        watch.append(replace(snapshot(decode=decode, prefill=prefill), at_s=float(second)))
        decode.decode(5, 20)  # of 0.03 s each, so that it is busy for 0.6 s of each
        prefill.handoff.observe(3, 1000, 0.025)
    assert Teacher([watch]).handoff_s == pytest.approx(0.025 - 0.6 * 0.03 / 2)
