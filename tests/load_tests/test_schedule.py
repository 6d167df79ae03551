"""What a scenario becomes: arrivals, lengths, prefixes, turns; the same for everybody who has the same seed."""

import statistics
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from load_tests.scenario import FOLDER, Scenario, load_scenario
from load_tests.schedule import IDLE_OUTPUT_TOKENS, Planned, build_idle_schedule, build_schedule
from load_tests.trace import PREFIX_BLOCK_TOKENS, TraceRow, write_trace

SHIPPED = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def scenario(arrivals: dict[str, Any], **more) -> Scenario:
    traffic = {"arrivals": arrivals, "prompt_tokens": 10, "output_tokens": 5} | more
    return Scenario.model_validate(
        {"name": "s", "description": "s", "warmup_s": 10, "duration_s": 90, "classes": {"chat": traffic}}
    )


def by_session(planned: list[Planned]) -> dict[str, list[Planned]]:
    found = defaultdict(list)
    for request in planned:
        found[request.session].append(request)
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_a_seed_fixes_every_instant_and_every_token(name):
    shipped = load_scenario(name)
    assert build_schedule(shipped, "a") == build_schedule(shipped, "a") != build_schedule(shipped, "b")


@pytest.mark.parametrize("name", SHIPPED)
def test_sessions_are_in_order_and_only_their_first_request_has_a_time(name):
    shipped = load_scenario(name)
    for requests in by_session(build_schedule(shipped, "a")).values():
        assert [request.turn for request in requests] == list(range(len(requests)))
        assert requests[0].at_s is not None and 0 <= requests[0].at_s < shipped.warmup_s + shipped.duration_s
        assert all(request.at_s is None for request in requests[1:])


@pytest.mark.parametrize("load", [0.5, 1.0, 3.0])
def test_poisson_arrivals_have_their_rate_times_the_load(load):
    planned = build_schedule(scenario({"poisson_per_s": 20}), "a", load)
    assert len(planned) == pytest.approx(20 * load * 100, rel=0.1)
    times = [request.at_s or 0.0 for request in planned]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.15), "exponential gaps"


def test_given_times_count_from_the_beginning_of_the_steady_state():
    planned = build_schedule(scenario({"times_s": [5, -3, 89.5, -11, 91]}), "a")
    assert [request.at_s for request in planned] == [7, 15, 99.5]


def test_bursts_come_all_at_once():
    planned = build_schedule(scenario({"bursts": {"every_s": 40, "size": 3}}), "a")
    assert [request.at_s for request in planned] == [20] * 3 + [60] * 3


def test_streams_are_always_open_and_scale_in_number():
    for load, number in ((1.0, 4), (0.5, 2), (0.01, 1)):
        sessions = by_session(build_schedule(scenario({"streams": 4}, output_tokens=500), "a", load))
        assert len(sessions) == number
        for requests in sessions.values():
            assert requests[0].at_s is not None and requests[0].at_s < 10, "all begin in the warm-up"
            assert len(requests) >= 90, "one a second would not run out"


def test_lengths_stay_within_their_bounds_and_are_exact_where_they_are_fixed():
    planned = build_schedule(scenario({"poisson_per_s": 5}, prompt_tokens=[3, 30], output_tokens=7), "a")
    lengths = {len(request.prompt) for request in planned}
    assert min(lengths) >= 3 and max(lengths) <= 30 and len(lengths) > 15
    assert {request.output_tokens for request in planned} == {7}


def test_prefixes_are_shared_within_their_groups_and_the_rest_is_new():
    planned = build_schedule(
        scenario({"poisson_per_s": 2}, shared_prefix={"tokens": 50, "groups": 3}, prompt_tokens=20), "a"
    )
    assert len({request.prompt[:50] for request in planned}) == 3
    assert len({request.prompt[50:] for request in planned}) == len(planned)


def test_later_turns_repeat_the_conversation_with_an_answer_of_the_length_asked_for():
    planned = build_schedule(scenario({"times_s": [0]}, turns=3, turn_tokens=4, pause_s=2.0), "a")
    first, second, third = planned
    assert second.prompt[:10] == first.prompt and third.prompt[: len(second.prompt)] == second.prompt
    assert [len(request.prompt) for request in planned] == [10, 10 + 5 + 4, 10 + 2 * (5 + 4)]
    assert second.delay_s == 2.0


def test_a_trace_keeps_lengths_and_shares_the_blocks_of_equal_prefix_ids():
    shipped = load_scenario("trace")
    planned = build_schedule(shipped, "a")
    by_prefix = defaultdict(set)
    for request in planned:
        by_prefix[request.prompt[:PREFIX_BLOCK_TOKENS]].add(request.session)
    assert max(len(sessions) for sessions in by_prefix.values()) >= 3
    faster = build_schedule(shipped, "a", load=2.0)
    assert [request.at_s for request in faster[:10]] == pytest.approx([(r.at_s or 0) / 2 for r in planned[:10]])


def test_a_trace_that_is_shrunk_shares_as_much_of_its_prompts():
    shipped = load_scenario("trace")
    assert shipped.trace is not None
    small = shipped.model_copy(update={"trace": shipped.trace.model_copy(update={"shrink": 16})})
    whole, shrunk = (build_schedule(one, "a") for one in (shipped, small))
    assert len(whole) == len(shrunk) > 10
    for before, after in zip(whole, shrunk, strict=True):
        assert (len(after.prompt), after.output_tokens) == (
            -(-len(before.prompt) // 16),
            -(-before.output_tokens // 16),
        )
    assert len({one.prompt[:PREFIX_BLOCK_TOKENS] for one in whole}) == len({one.prompt[:32] for one in shrunk})


def test_a_trace_that_is_thinned_keeps_conversations_whole(tmp_path: Path):
    rows = [TraceRow(float(n), 1600, 4, (0, n % 50, 100 + n)) for n in range(200)]
    rows += [TraceRow(200.0 + n, 40, 4, ()) for n in range(200)]
    write_trace(tmp_path / "trace.csv", rows)
    trace = {"path": tmp_path / "trace.csv", "thin": 4}
    scenario = Scenario.model_validate({"name": "thin", "description": "", "duration_s": 1000, "trace": trace})
    planned = build_schedule(scenario, "a")
    kept = [int(request.session.removeprefix("trace-")) for request in planned]
    conversations = {number % 50 for number in kept if number < 200}
    assert 5 <= len(conversations) <= 20
    assert sorted(n for n in kept if n < 200) == [n for n in range(200) if n % 50 in conversations]
    assert 25 <= sum(number >= 200 for number in kept) <= 75
    assert [request.at_s for request in planned] == [float(number) for number in kept]


def test_idle_requests_come_one_after_the_other_some_of_each_class():
    shipped = load_scenario("mixed")
    planned = build_idle_schedule(shipped, "a", 3)
    assert [request.request_class for request in planned] == ["chat"] * 3 + ["long"] * 3
    assert {request.session for request in planned} == {"idle"}
    assert [request.at_s for request in planned] == [0.0] + [None] * 5
    assert max(request.output_tokens for request in planned) <= IDLE_OUTPUT_TOKENS
    assert len({request.prompt for request in planned}) == 6
