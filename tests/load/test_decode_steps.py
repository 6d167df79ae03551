"""What steps without prompts took is told from counters, whatever ran beside the prompts."""

import pytest

from deployments.engine.stats import EngineStats
from deployments.load.decode_steps import decode_steps_between

STEP_S, PROMPT_STEP_S = 0.02, 0.3


class Engine:
    """Counts as engines do."""

    def __init__(self) -> None:
        self.stats = EngineStats()

    def decode(self, batch: int, times: int) -> None:
        self.stats.steps += times
        self.stats.itl_s.observe(STEP_S, batch * times)

    def compute(self, batch: int, times: int) -> None:
        self.stats.steps += times
        self.stats.prefill_steps += times
        self.stats.prefill_s += PROMPT_STEP_S * times
        self.stats.prefill_gaps += batch * times
        self.stats.prefill_gap_s += PROMPT_STEP_S * batch * times
        self.stats.itl_s.observe(PROMPT_STEP_S, batch * times)


@pytest.mark.parametrize("batch", [0, 2, 8], ids=["an idle engine computes them", "as ever", "a crowded one"])
def test_steps_with_prompts_are_left_out_however_many_sequences_ran_beside(batch: int) -> None:
    engine = Engine()
    engine.compute(batch, 3)
    before = engine.stats.copy()
    engine.decode(2, 40)
    engine.compute(batch, 5)
    steps = decode_steps_between(engine.stats, before)
    assert steps is not None
    assert (steps.steps, steps.sequences) == (40, 80)
    assert steps.seconds == pytest.approx(40 * STEP_S)


def test_without_a_step_that_only_decodes_nothing_is_told() -> None:
    engine, before = Engine(), EngineStats()
    assert decode_steps_between(engine.stats, before) is None
    engine.compute(2, 5)
    assert decode_steps_between(engine.stats, before) is None
    assert decode_steps_between(before, engine.stats) is None, "it is of another start"
