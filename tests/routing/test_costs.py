"""What requests cost at decode replicas is learned from the numbers that engines keep anyway."""

from dataclasses import replace

import pytest

from deployments.engine.stats import EngineStats
from deployments.replica_stats import HandoffStats
from deployments.routing.costs import DecodeCosts, Mean, TierCost

STEP_S, SEQUENCE_S, PREFILL_STEP_S = 0.005, 0.0004, 0.2


class Engine:
    """Decodes batches, with a step that computes a prompt now and then, and counts as engines do."""

    def __init__(self) -> None:
        self.stats = EngineStats(max_num_batched_tokens=1000, max_num_seqs=64, num_blocks=100, block_size=16)

    def run(self, batch: int, num_steps: int, num_prompts: int = 0) -> None:
        """So many decode steps and, with prompts of a full step each in them, so many more."""
        step_s = STEP_S + batch * SEQUENCE_S
        for seconds, times in ((step_s, num_steps), (PREFILL_STEP_S, num_prompts)):
            self.stats.itl_s.observe(seconds, batch * times)
        self.stats.steps += num_steps + num_prompts
        self.stats.generated_tokens += batch * (num_steps + num_prompts)
        self.stats.prefill_steps += num_prompts
        self.stats.prefill_s += PREFILL_STEP_S * num_prompts
        self.stats.prefill_gaps += batch * num_prompts
        self.stats.prefill_gap_s += PREFILL_STEP_S * batch * num_prompts
        self.stats.prompt_tokens += 1000 * num_prompts


def learn(costs: DecodeCosts, batches: list[int], num_prompts: int = 0) -> None:
    engine = Engine()
    costs.update({"d": engine.stats.copy()}, {}, 16, 0.0)
    for second, batch in enumerate(batches, start=1):
        engine.run(batch, 100, num_prompts)
        costs.update({"d": engine.stats.copy()}, {}, 16, float(second))


@pytest.mark.parametrize("num_prompts", [0, 5])
def test_what_a_sequence_adds_to_a_step_is_told_by_batches_of_different_sizes(num_prompts: int) -> None:
    costs = DecodeCosts()
    learn(costs, [1, 4, 16, 2, 32, 8] * 20, num_prompts)
    assert costs.costs(0.0001).sequence_s == pytest.approx(SEQUENCE_S, rel=0.15)


def test_as_long_as_all_batches_were_alike_a_sequence_is_taken_to_add_what_a_prompt_token_costs() -> None:
    costs = DecodeCosts()
    assert costs.costs(0.0001).sequence_s == 0.0001
    learn(costs, [1] * 50)
    assert costs.costs(0.0001).sequence_s == 0.0001


def test_a_prompt_token_costs_what_it_does_here_once_one_was_computed_here() -> None:
    costs = DecodeCosts()
    assert costs.costs(0.001).token_s == 0.001
    learn(costs, [1] * 60, num_prompts=5)
    assert costs.costs(0.001).token_s == pytest.approx(PREFILL_STEP_S / 1000, rel=0.05)


def test_a_short_prompt_that_was_held_up_does_not_say_that_prompts_take_longer_here_than_elsewhere() -> None:
    costs, before = DecodeCosts(), EngineStats(max_num_batched_tokens=1000)
    costs.update({"d": before}, {}, 16, 0.0)
    costs.update({"d": replace(before, prefill_steps=1, prefill_s=0.2, prompt_tokens=40)}, {}, 16, 1.0)
    assert costs.costs(0.0001).token_s == 0.0001
    assert costs.costs(None).token_s == pytest.approx(0.005), "where there is nothing to compare it with"


def test_a_request_is_expected_to_generate_as_many_tokens_as_others_did() -> None:
    costs = DecodeCosts()
    assert costs.num_new_tokens(4000) == 4000
    before, now = EngineStats(), EngineStats(generated_tokens=5000, finished=50)
    costs.update({"d": before}, {}, 16, 0.0)
    costs.update({"d": now}, {}, 16, 1.0)
    assert costs.num_new_tokens(4000) == 100
    assert costs.num_new_tokens(20) == 20


def test_tokens_that_were_generated_while_no_answer_ended_count_when_one_does() -> None:
    costs, now = DecodeCosts(), EngineStats()
    for second in range(200):  # one answer of 240 tokens at a time
        now = replace(now, generated_tokens=12 * second, finished=12 * second // 240)
        costs.update({"d": now}, {}, 16, float(second))
    assert costs.num_new_tokens(4000) == 240


def test_a_hand_off_costs_what_chunks_took() -> None:
    costs, handoff = DecodeCosts(), HandoffStats()
    assert costs.there(1.0, 0.001).seconds(100) == pytest.approx(1.005), "nothing is known of it"
    for second in range(500):
        num_blocks = (10, 40)[second % 2]
        handoff.observe(num_blocks, num_bytes=1, seconds=0.02 + 0.016 * num_blocks / 10)
        costs.update({}, {"p": handoff.copy()}, 16, float(second))
    there = costs.there(1.0, 0.001)
    assert there.gap_s(160) == pytest.approx(0.036, rel=0.01)
    assert 0.5 < there.sure < 1.0
    costs.update({}, {"p": handoff.copy()}, 16, 500.0 + 1200.0)
    assert costs.there(1.0, 0.001).sure < 0.01, "it was long ago, and is tried again"


def test_gaps_are_late_that_are_longer_than_their_bound() -> None:
    costs, stats = DecodeCosts(itl_s=0.0875), EngineStats()  # amid a bucket of its own
    costs.update({"d": stats.copy()}, {}, 16, 0.0)
    assert costs.gaps(300).late_share == 0.0
    for second in range(1, 60):
        stats.itl_s.observe(0.02, 90)
        stats.itl_s.observe(0.2, 10)
        costs.update({"d": stats.copy()}, {}, 16, float(second))
    assert costs.gaps(300).late_share == pytest.approx(0.1, rel=0.01)
    stats.itl_s.observe(0.08, 100)
    costs.update({"d": stats.copy()}, {}, 16, 1000.0)
    assert costs.gaps(300).late_share == pytest.approx(0.5), "of a bucket, as much as is beyond"


def test_a_mean_is_of_what_was_added_lately() -> None:
    mean = Mean(half_life=10.0)
    assert mean.value is None
    mean.add(5.0, 0)
    assert mean.value is None
    mean.add(995.0, 100)
    assert mean.value == 10.0, "what came early counts as well"
    mean.add(100.0, 100)
    assert mean.value == pytest.approx(1.0, rel=0.05)


def test_a_token_from_the_tier_costs_what_fetches_took_for_those_that_were_found() -> None:
    tier = TierCost()
    assert tier.token_s is None
    tier.update({"d": EngineStats(), "p": EngineStats()})
    assert tier.token_s is None
    tier.update({"d": EngineStats(tier_fetch_s=0.2, tier_hit_tokens=1000), "p": EngineStats()})
    assert tier.token_s == pytest.approx(0.0002)
    tier.update({"d": EngineStats(), "p": EngineStats(tier_fetch_s=0.4, tier_hit_tokens=1000)})
    assert tier.token_s == pytest.approx(0.0003, rel=0.05), "one was replaced, the other one has fetched"
