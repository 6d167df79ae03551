"""The planner follows the steps of the load that `make bench-autoscale` plays, here to modelled engines alone."""

from dataclasses import replace

import pytest

from deployments.load.reading import DECODE, PREFILL
from deployments.simulator.pools import PoolSetup
from deployments.simulator.requests import Request
from deployments.simulator.scaling import Planned
from deployments.simulator.service import Service, Setup
from tests.bench.autoscale.bench_autoscale import LEAST, MOST, TIMES_ANSWERS, TIMES_PROMPTS, arguments, build_load
from tests.bench.autoscale.modelled import CURVES
from tests.bench.autoscale.verdict import Phase

STEP_S = 25.0
SOON_S = 10.0


def targets_in(phase: Phase, behind_s: float, seed: int) -> dict[str, list[tuple[float, int]]]:
    """How many replicas of each pool are wanted when, in seconds since a phase began behind a calm one."""
    config = arguments([])
    load = build_load([Phase("little", behind_s), phase], seed)
    requests = [Request(one.at_s or 0.0, len(one.prompt), one.output_tokens) for one in load]
    engine, least = config.engine_config("decode"), config.min_remote_prefill_tokens
    assert engine.num_blocks and engine.block_size and engine.max_num_batched_tokens and engine.max_num_seqs
    curves = replace(
        CURVES,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_num_seqs=engine.max_num_seqs,
        num_kv_tokens=engine.num_blocks * engine.block_size,
    )
    pool, settings = PoolSetup(curves, config.planner.start_s, LEAST, MOST), config.planner
    service = Service(Setup(pool, pool, config.ingress.max_ttft_s, settings.itl_s, least), Planned(settings))
    service.play(requests)
    return {
        name: [(at_s - behind_s, target) for at_s, target, _ in service.pools[name].history if at_s >= behind_s]
        for name in (PREFILL, DECODE)
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_answers_ten_times_as_long_have_more_decode_wanted_soon_and_no_prefill(seed: int):
    targets = targets_in(Phase("long answers", STEP_S, answers=TIMES_ANSWERS), 130.0, seed)
    wanted_s = [at_s for at_s, target in targets[DECODE] if target > LEAST]
    assert wanted_s and wanted_s[0] <= SOON_S
    assert {target for at_s, target in targets[DECODE] if at_s >= wanted_s[0]} <= {2, 3}, "and it stays so"
    assert {target for _, target in targets[PREFILL]} == {LEAST}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_prompts_five_times_as_long_have_more_prefill_wanted_soon_and_no_decode(seed: int):
    targets = targets_in(Phase("long prompts", STEP_S, prompts=TIMES_PROMPTS), 70.0, seed)
    wanted_s = [at_s for at_s, target in targets[PREFILL] if target > LEAST]
    assert wanted_s and wanted_s[0] <= SOON_S
    assert {target for _, target in targets[DECODE]} == {LEAST}
