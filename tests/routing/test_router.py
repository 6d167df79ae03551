"""A router with reports that are late, few, or of replicas that are gone."""

import pytest

from deployments.engine.scheduling.cache_log import CacheLog
from deployments.engine.stats import EngineStats
from deployments.routing.hashes import PromptHashes
from deployments.routing.router import Report, Router
from deployments.routing.scoring import Costs
from deployments.routing.settings import PrefillWeights, RoutingSettings

SIZE = 16
NAMES = ("a", "b", "c", "d")


def prompt(*parts: tuple[int, int]) -> PromptHashes:
    """Of parts, each so many times a token."""
    return PromptHashes([token for token, count in parts for _ in range(count)])


def report(log: CacheLog | None = None, **stats: float) -> Report:
    defaults = {"num_blocks": 1000, "max_num_seqs": 64, "max_num_batched_tokens": 8192}
    events = None if log is None else log.since(None)
    return Report(EngineStats(**(defaults | stats)), SIZE, events)  # type: ignore[arg-type]


def holding(*prompts: PromptHashes) -> CacheLog:
    log = CacheLog(epoch=1)
    for block in dict.fromkeys(block for held in prompts for block in held.of(SIZE)):
        log.published(block)
    return log


@pytest.fixture
def router() -> Router:
    router = Router.for_prefill(RoutingSettings(prefill=PrefillWeights(compute=1.0, crowding=0.1)))
    router.update({name: report() for name in NAMES}, 0.0, 0.0)
    return router


def finish(routed, now_s: float) -> None:
    routed.computed(now_s)
    routed.ended(now_s)


def test_a_prompt_goes_where_its_prefix_is(router: Router) -> None:
    shared = (7, 1600)
    router.update({name: report(holding(prompt(shared)) if name == "c" else None) for name in NAMES}, 1.0, 1.0)
    routed = router.route(prompt(shared, (1, 100)), 1.0)
    assert (routed.replica, routed.cached_tokens) == ("c", 1600)
    assert routed.choice.describe().startswith("c: 1600 tokens cached")


def test_it_does_not_where_too_much_waits(router: Router) -> None:
    log = holding(prompt((7, 1600)))
    reports = {name: report(log, num_queued_prompt_tokens=5000) if name == "c" else report() for name in NAMES}
    router.update(reports, 1.0, 1.0)
    assert router.route(prompt((7, 1600), (1, 100)), 1.0).replica != "c"


def test_a_burst_of_different_prompts_does_not_go_to_one_place(router: Router) -> None:
    replicas = [router.route(prompt((i, 1000)), 1.0).replica for i in range(40)]
    assert max(map(replicas.count, NAMES)) <= 12


def test_a_burst_of_one_long_prefix_meets_where_the_first_of_it_went() -> None:
    router = Router.for_prefill(RoutingSettings(prefill=PrefillWeights(compute=4.0, crowding=0.1)))
    router.update({name: report() for name in NAMES}, 0.0, 0.0)
    replicas = [router.route(prompt((7, 8000), (i, 32)), 1.0).replica for i in range(8)]
    assert len(set(replicas)) == 1


def test_a_hot_prefix_is_computed_again_elsewhere_and_its_load_is_spread(router: Router) -> None:
    load = dict.fromkeys(NAMES, 0)
    for number in range(1200):
        now_s = 1.0 + number / 20
        routed = router.route(prompt((7, 1600), (number, 160)), now_s)
        load[routed.replica] += 1600 + 160 - routed.cached_tokens
        finish(routed, now_s)
    assert max(load.values()) <= 1.5 * sum(load.values()) / len(NAMES)
    assert sum(load.values()) <= 1200 * 160 * 1.1, "and it is not computed again and again"


def test_two_routers_send_one_new_prefix_to_one_place_without_talking() -> None:
    first, second = (Router.for_prefill(RoutingSettings()) for _ in range(2))
    for number in range(50):
        for router in (first, second):
            router.update({name: report() for name in NAMES}, number * 1000.0, number * 1000.0)
        tokens = prompt((number, 1600))
        assert first.route(tokens, number * 1000.0).replica == second.route(tokens, number * 1000.0).replica


def test_a_router_that_starts_late_knows_after_one_report_what_is_where() -> None:
    router = Router.for_prefill(RoutingSettings())
    assert router.positions() == {}
    tokens = prompt((7, 1600), (1, 10))
    assert router.route(tokens, 0.0, among=NAMES).replica in NAMES, "no report has come"
    router.update({name: report(holding(tokens) if name == "b" else CacheLog(epoch=2)) for name in NAMES}, 1.0, 1.0)
    assert router.route(tokens, 1.0, among=NAMES).replica == "b"
    assert set(router.positions()) == set(NAMES)


def test_a_dead_replica_is_not_chosen_and_what_it_had_is_forgotten(router: Router) -> None:
    tokens = prompt((7, 1600), (1, 10))
    held = router.route(tokens, 1.0)
    router.leave(held.replica)
    other = router.route(tokens, 1.0)
    assert other.replica != held.replica
    assert other.cached_tokens == 0
    held.ended(2.0, is_lost=True)  # its caller learns of the death later
    router.update({name: report() for name in NAMES if name != held.replica}, 2.0, 2.0)
    assert held.replica not in router.replicas


def test_what_was_lost_on_the_way_is_not_expected(router: Router) -> None:
    tokens = prompt((7, 1600), (1, 10))
    routed = router.route(tokens, 1.0)
    routed.ended(1.1, is_lost=True)
    routed.ended(1.2, is_lost=True)  # again: nothing
    assert router.route(tokens, 1.2).cached_tokens == 0


def test_a_new_replica_is_not_given_everything_until_it_has_caught_up(router: Router) -> None:
    tokens = prompt((7, 1600))
    for number in range(400):
        finish(router.route(prompt((7, 1600), (number, 160)), 1.0), 1.0)
    router.update({name: report() for name in (*NAMES, "new")}, 2.0, 2.0)
    replicas = []
    for number in range(50):
        routed = router.route(prompt((7, 1600), (number + 500, 160)), 2.0)
        finish(routed, 2.0)
        replicas.append(routed.replica)
    assert replicas.count("new") < 25
    assert tokens.num_tokens == 1600


def test_only_those_that_may_be_chosen_are(router: Router) -> None:
    tokens = prompt((7, 1600), (1, 10))
    router.update({name: report(holding(tokens) if name == "c" else None) for name in NAMES}, 1.0, 1.0)
    assert router.route(tokens, 1.0, among=["a", "unknown"]).replica in ("a", "unknown")


def test_the_cost_of_a_token_is_learned_from_reports(router: Router) -> None:
    for second in range(1, 20):
        stats: dict[str, float] = {"prompt_tokens": 4096 * second, "prefill_steps": second, "prefill_s": 0.5 * second}
        router.update({name: report(None, **stats) for name in NAMES}, float(second), float(second))
    assert router.costs.token_s == pytest.approx(0.5 / 4096, rel=0.05)


def test_a_decode_replica_with_the_sessions_kv_is_chosen_unless_it_has_no_seat() -> None:
    router = Router.for_decode(RoutingSettings(), Costs(token_s=1e-3, sequence_s=1e-4, seat_s=5.0))
    session = prompt((7, 1600), (1, 10))
    idle = {name: report(holding(session) if name == "b" else None) for name in NAMES}
    router.update(idle, 1.0, 1.0)
    assert router.route(session, 1.0, num_new_tokens=100).replica == "b"
    full = idle | {"b": report(num_running=64, num_waiting=64)}
    router.update(full, 2.0, 2.0)
    assert router.route(session, 2.0, num_new_tokens=100).replica != "b"


def test_requests_on_their_way_to_a_decode_replica_count_at_once() -> None:
    router = Router.for_decode(RoutingSettings(), Costs(token_s=1e-3, sequence_s=1e-3, seat_s=5.0))
    router.update({name: report() for name in NAMES}, 1.0, 1.0)
    replicas = [router.route(prompt((i, 20)), 1.0, num_new_tokens=50).replica for i in range(40)]
    assert [replicas.count(name) for name in NAMES] == [10] * 4
