"""What a service's `/metrics` teach of its engines."""

import pytest

from deployments.engine.stats import EngineStats
from deployments.replica_stats import HandoffStats, ReplicaStats
from deployments.simulator.curves import Curves
from deployments.telemetry.metrics import render
from deployments.telemetry.peers import IngressReading
from tests.bench.simulator.teacher import Snapshot, Teacher, parse_metrics

TRUE = Curves(step_s=0.02, token_s=0.003, sequence_s=0.002, context_s=0.0)


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


def snapshot(**engines: Engine) -> Snapshot:
    pools = {pool: [ReplicaStats(one.name, one.stats.copy(), one.handoff.copy())] for pool, one in engines.items()}
    return parse_metrics(render(pools, IngressReading([])).decode())


@pytest.mark.parametrize("are_apart", [False, True])
def test_curves_are_learned_from_what_the_metrics_say(are_apart):
    decode = Engine("d#1")
    prefill = Engine("p#1") if are_apart else decode
    engines = {"decode": decode} | ({"prefill": prefill} if are_apart else {})
    teacher = Teacher(port=0)
    teacher.snapshots.append(snapshot(**engines))
    for second in range(60):
        decode.decode(1 + second % 5, 20)
        prefill.compute(40 + 7 * second % 200, 0 if are_apart else 1 + second % 5)
        prefill.handoff.observe(3, 1000, 0.025)
        teacher.snapshots.append(snapshot(**engines))
    elsewhere_s = teacher.curves("prefill", 128).token_s if are_apart else 0.0
    curves = teacher.curves("decode", 128, elsewhere_s)
    assert curves.step_s == pytest.approx(TRUE.step_s, rel=0.1)
    assert curves.sequence_s == pytest.approx(TRUE.sequence_s, rel=0.25)
    assert curves.token_s == pytest.approx(TRUE.token_s, rel=0.05)
    assert curves.handoff_s == pytest.approx(0.025)
    assert teacher.ttft("prefill" if are_apart else "decode").mean_s == pytest.approx(0.5)
    assert curves.num_kv_tokens == 16_000


def test_engines_that_did_nothing_teach_nothing():
    teacher = Teacher(port=0)
    engine = Engine("d#1")
    teacher.snapshots += [snapshot(decode=engine), snapshot(decode=engine)]
    with pytest.raises(ValueError, match="ran no step"):
        teacher.curves("decode", 128)
