"""More cached is never worse, more waiting is never better; of equals, all routers choose the same."""

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from deployments.routing.crossover import Crossover, Gaps, Goals, There
from deployments.routing.scoring import (
    Candidate,
    Choice,
    Costs,
    Elsewhere,
    HeldKV,
    Reason,
    Score,
    choose,
    score_decode,
    score_prefill,
)
from deployments.routing.settings import DecodeWeights, PrefillWeights

COSTS = Costs(token_s=0.001, sequence_s=0.0005, seat_s=2.0)
ELSEWHERE = Elsewhere(Crossover(Goals(ttft_s=2.0, itl_s=0.1), 256), There(0.5, 0.0, 0.0001), Gaps(100))
sizes = st.integers(1, 100_000)
amounts = st.floats(0, 1e6)
candidates = st.builds(
    Candidate,
    st.just("a"),
    cached_tokens=st.integers(500, 1000),
    kept_tokens=st.floats(0, 500),
    queued_tokens=amounts,
    recent_tokens=amounts,
    num_sequences=st.floats(0, 200),
    max_sequences=st.integers(1, 100),
    num_free_blocks=st.floats(0, 1000),
    num_blocks=st.just(1000),
    block_size=st.sampled_from([1, 16, 256]),
)
prefill_weights = st.builds(
    PrefillWeights, compute=st.floats(0, 10), queue=st.floats(0, 10), crowding=st.floats(0, 10), tie=st.just(0.0)
)
decode_weights = st.builds(
    DecodeWeights, fill=st.floats(0, 10), seat=st.floats(0, 10), batch=st.floats(0, 10), full=st.floats(0, 10)
)


def changed(candidate: Candidate, **values: float) -> Candidate:
    return Candidate(**{name: getattr(candidate, name) for name in candidate.__struct_fields__} | values)


def prefill(num_tokens: int, weights: PrefillWeights | None = None, **values: float):
    """Of a prefix that nobody else asks for, unless `kept_tokens` says so."""
    values = {"kept_tokens": values.get("cached_tokens", 0)} | values
    return score_prefill(num_tokens, changed(Candidate("a"), **values), COSTS, weights or PrefillWeights())


@given(candidates, prefill_weights, st.integers(1, 1000), st.floats(0, 1))
def test_more_cached_tokens_never_make_a_prefill_replica_worse(
    candidate: Candidate, weights: PrefillWeights, more: int, worth: float
) -> None:
    kept_tokens = candidate.kept_tokens + worth * more
    better = changed(candidate, cached_tokens=candidate.cached_tokens + more, kept_tokens=kept_tokens)
    costs = [score_prefill(3000, c, COSTS, weights).cost for c in (candidate, better)]
    assert costs[1] <= costs[0]


@given(candidates, prefill_weights, st.sampled_from(["queued_tokens", "recent_tokens"]), st.floats(0, 1e5))
def test_more_waiting_or_recent_tokens_never_make_a_prefill_replica_better(
    candidate: Candidate, weights: PrefillWeights, what: str, more: float
) -> None:
    worse = changed(candidate, **{what: getattr(candidate, what) + more})
    costs = [score_prefill(3000, c, COSTS, weights).cost for c in (candidate, worse)]
    assert costs[1] >= costs[0]


@given(candidates, decode_weights, st.integers(1, 1000), st.integers(0, 2000))
def test_more_cached_tokens_or_free_blocks_never_make_a_decode_replica_worse(
    candidate: Candidate, weights: DecodeWeights, more: int, num_new: int
) -> None:
    for what in ("cached_tokens", "num_free_blocks"):
        better = changed(candidate, **{what: getattr(candidate, what) + more})
        costs = [score_decode(3000, num_new, c, COSTS, weights).cost for c in (candidate, better)]
        assert costs[1] <= costs[0] + 1e-9


@given(candidates, decode_weights, st.floats(0, 100), st.integers(0, 2000))
def test_more_sequences_never_make_a_decode_replica_better(
    candidate: Candidate, weights: DecodeWeights, more: float, num_new: int
) -> None:
    worse = changed(candidate, num_sequences=candidate.num_sequences + more)
    costs = [score_decode(3000, num_new, c, COSTS, weights).cost for c in (candidate, worse)]
    assert costs[1] >= costs[0]


def test_a_prefix_is_worth_the_wait_up_to_what_it_saves() -> None:
    weights = PrefillWeights(compute=1.0, queue=1.0, crowding=0.0)
    cold = prefill(3000, weights).cost
    assert prefill(3000, weights, cached_tokens=2000, queued_tokens=1999).cost < cold
    assert prefill(3000, weights, cached_tokens=2000, queued_tokens=2001).cost > cold


def test_a_short_prefix_is_left_sooner_than_a_long_one() -> None:
    weights = PrefillWeights(compute=1.0, queue=1.0, crowding=0.1)
    cold = prefill(3000, weights).cost
    assert prefill(3000, weights, cached_tokens=256, recent_tokens=3000).cost > cold
    assert prefill(3000, weights, cached_tokens=2048, recent_tokens=3000).cost < cold


def test_a_hot_prefix_is_not_waited_for_even_if_it_is_long() -> None:
    cold = prefill(3000).cost
    assert prefill(3000, cached_tokens=2048, recent_tokens=3000).cost < cold
    assert prefill(3000, cached_tokens=2048, kept_tokens=20.0, recent_tokens=3000).cost > cold


def test_a_session_stays_with_its_kv_until_that_decode_replica_is_full() -> None:
    def cost(**values: float) -> float:
        full = {"max_sequences": 10, "num_free_blocks": 900, "num_blocks": 1000, "block_size": 16}
        return score_decode(4000, 100, changed(Candidate("a"), **(full | values)), COSTS, DecodeWeights()).cost

    assert cost(cached_tokens=3904, num_sequences=8) < cost(num_sequences=2)
    assert cost(cached_tokens=3904, num_sequences=30) > cost(num_sequences=2)
    assert cost(cached_tokens=3904, num_free_blocks=0) > cost() - 3.904, "too few blocks cost something"


def test_a_sequence_needs_no_more_blocks_than_its_window_and_a_step() -> None:
    def wait_s(num_free_blocks: int, *held: int) -> float:
        values = {"num_free_blocks": num_free_blocks, "num_blocks": 1000, "block_size": 16}
        candidate = changed(Candidate("a", held=HeldKV(*held)), **values)
        return score_decode(4000, 96, candidate, COSTS, DecodeWeights()).wait_s

    assert wait_s(256) == wait_s(63, 0, 1, 1000) == wait_s(256, 0, 1, 5000) == wait_s(256 + 2 * 63, 1, 2, 1000) == 0
    assert wait_s(255) > 0 and wait_s(62, 0, 1, 1000) > 0 and wait_s(255 + 2 * 63, 1, 2, 1000) > 0


def test_of_equals_all_routers_choose_the_same_and_prompts_are_spread() -> None:
    scores = [prefill(1000) for _ in range(8)]
    named = [
        type(score)(f"r{i}", *[getattr(score, f) for f in score.__struct_fields__[1:]])
        for i, score in enumerate(scores)
    ]
    choices = [choose(named, 0.0, number.to_bytes(16, "big")).score.replica for number in range(400)]
    again = [choose(named[::-1], 0.0, number.to_bytes(16, "big")).score.replica for number in range(400)]
    assert choices == again
    assert all(30 <= choices.count(score.replica) <= 75 for score in named)


def test_of_equals_the_one_that_has_most_of_the_prompt_is_chosen() -> None:
    scores = [prefill(1000), *(prefill(1000, cached_tokens=number) for number in (5, 10))]
    named = [msgspec.structs.replace(score, replica=f"r{number}") for number, score in enumerate(scores)]
    for number in range(50):
        choice = choose(named, 1.0, number.to_bytes(16, "big"))
        assert (choice.score.replica, choice.reason) == ("r2", Reason.CACHE)


def test_one_that_leaves_takes_only_its_own_prompts_along() -> None:
    named = [score_prefill(1000, Candidate(f"r{i}"), COSTS, PrefillWeights()) for i in range(8)]
    for number in range(100):
        key = number.to_bytes(16, "big")
        before = choose(named, 0.0, key).score.replica
        after = choose(named[1:], 0.0, key).score.replica
        assert before in (after, "r0")


def test_a_receipt_says_what_was_chosen_and_what_was_passed_over() -> None:
    weights = PrefillWeights(compute=1.0)
    near = score_prefill(3000, Candidate("near", 2048, queued_tokens=9000.0), COSTS, weights)
    far = score_prefill(3000, Candidate("far"), COSTS, weights)
    reason = choose([near, far], 0.0, b"").describe()
    assert reason.startswith("far: 0 tokens cached, 3.000 s for the rest, 0.000 s of waiting")
    assert "not near, which has more: 2048 tokens cached, 0.952 s for the rest, 9.000 s of waiting" in reason
    assert choose([far], 0.0, b"").describe().endswith("the only replica")
    assert choose([far, near], 0.0, b"").reason is Reason.SPREAD
    assert choose([far], 0.0, b"").reason is Reason.ONLY
    assert "next far" in choose([replace_cost(near, 0.1), far], 0.0, b"").describe()


def test_what_decided_is_told_apart() -> None:
    def reason(*scores: Score, tie_s: float = 0.0) -> Reason:
        return choose(scores, tie_s, b"").reason

    busy, idle = prefill(1000, queued_tokens=500.0), prefill(1000)
    assert reason(busy, idle) is Reason.LOAD
    assert reason(busy, idle, tie_s=100.0) is Reason.TIE
    assert reason(prefill(1000, cached_tokens=512), idle) is Reason.CACHE
    assert reason(prefill(1000, cached_tokens=512, queued_tokens=9000.0), idle) is Reason.SPREAD


def test_a_key_of_its_own_takes_the_place_of_the_prompt_where_load_allows() -> None:
    def chosen(*scores: Score, prompt: bytes, tie_s: float) -> Choice:
        return choose(scores, 0.0, prompt, b"key", tie_s)

    named = [score_prefill(1000, Candidate(f"r{i}"), COSTS, PrefillWeights()) for i in range(8)]
    choices = [chosen(*named, prompt=number.to_bytes(16, "big"), tie_s=1.0) for number in range(20)]
    assert len({choice.replica for choice in choices}) == 1, "whatever the prompt"
    assert {choice.reason for choice in choices} == {Reason.KEY}
    assert "7 more of 8 cost nearly as much, and its key chose" in choices[0].describe()
    home, *others = sorted(named, key=lambda score: score.replica != choices[0].replica)
    busier = [replace_cost(home, home.cost + more) for more in (0.9, 1.1)]
    assert chosen(busier[0], *others, prompt=b"", tie_s=1.0).replica == home.replica
    assert chosen(busier[1], *others, prompt=b"", tie_s=1.0).replica != home.replica


def test_a_key_does_not_lead_away_from_what_is_cached() -> None:
    cached = prefill(1000, cached_tokens=16)
    there, *rest = (score_prefill(1000, Candidate(f"r{i}"), COSTS, PrefillWeights()) for i in range(8))
    choice = choose([cached, there, *rest], 0.0, b"", b"key", 1000.0)
    assert (choice.replica, choice.reason) == (cached.replica, Reason.CACHE)


def test_what_is_computed_elsewhere_costs_the_wait_there_and_the_way_back() -> None:
    def cost(cached_tokens: int) -> float:
        candidate = changed(Candidate("a"), cached_tokens=cached_tokens, num_free_blocks=1e6, num_blocks=10**6)
        return score_decode(1000, 0, candidate, COSTS, DecodeWeights(), ELSEWHERE).own_s

    assert cost(745) == pytest.approx(0.255), "computed here"
    assert cost(744) == pytest.approx(0.5 + 0.0256)
    assert cost(0) == pytest.approx(0.5 + 0.1)


TIER = Costs(0.001, tier_token_s=0.0002)


def test_what_the_tier_has_makes_a_replica_without_the_kv_less_dear() -> None:
    def cost(cached_tokens: int, costs: Costs) -> float:
        candidate = changed(Candidate("a"), cached_tokens=cached_tokens, num_free_blocks=1e6, num_blocks=10**6)
        decode = score_decode(1000, 0, candidate, costs, DecodeWeights(), None, shared_tokens=800).own_s
        prefill = score_prefill(1000, candidate, costs, PrefillWeights(), shared_tokens=800).own_s
        assert decode == pytest.approx(prefill)
        return decode

    assert cost(0, COSTS) == pytest.approx(1.0), "no tier"
    assert cost(0, TIER) == pytest.approx(0.8 * 0.2 + 0.2)
    assert cost(300, TIER) == pytest.approx(0.5 * 0.2 + 0.2)
    assert cost(800, TIER) == pytest.approx(0.2) == cost(800, COSTS)
    assert cost(0, Costs(0.001, tier_token_s=0.002)) == pytest.approx(1.0), "it is faster to compute"


@given(candidates, prefill_weights, st.integers(1, 1000), st.integers(0, 3000))
def test_with_a_tier_more_cached_tokens_still_never_make_a_replica_worse(
    candidate: Candidate, weights: PrefillWeights, more: int, shared: int
) -> None:
    better = changed(candidate, cached_tokens=candidate.cached_tokens + more, kept_tokens=candidate.kept_tokens + more)
    costs = [score_prefill(3000, c, TIER, weights, shared).cost for c in (candidate, better)]
    assert costs[1] <= costs[0] + 1e-9


def test_what_the_tier_has_is_not_computed_elsewhere() -> None:
    candidate = changed(Candidate("a"), num_free_blocks=1e6, num_blocks=10**6)
    score = score_decode(1000, 0, candidate, TIER, DecodeWeights(), ELSEWHERE, shared_tokens=800)
    assert score.own_s == pytest.approx(0.8 * 0.2 + 0.2)
    score = score_decode(1000, 0, candidate, TIER, DecodeWeights(), ELSEWHERE, shared_tokens=700)
    assert score.own_s == pytest.approx(0.7 * 0.2 + 0.5 + 300 * 0.0001)


def replace_cost(score, cost: float):
    return type(score)(score.replica, cost, *[getattr(score, f) for f in score.__struct_fields__[2:]])
