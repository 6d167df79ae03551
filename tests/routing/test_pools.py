"""Both replicas of a request are chosen at once: where the prompt is computed depends on what decode lacks of it."""

from dataclasses import replace

import pytest

from deployments.engine.scheduling.cache_log import CacheLog
from deployments.engine.scheduling.positions import SwitchedPositions
from deployments.engine.stats import EngineStats
from deployments.load.reading import DECODE, PREFILL, Reading, by_role
from deployments.messages import ANYWHERE, GenerateRequest, Route, SamplingParams
from deployments.replica_stats import HandoffStats, ReplicaStats
from deployments.routing.costs import UNMEASURED_TOKEN_S
from deployments.routing.crossover import Crossover, Goals
from deployments.routing.hashes import PromptHashes
from deployments.routing.pools import PoolRouters
from deployments.routing.scoring import Reason
from deployments.routing.settings import RoutingSettings

SIZE = 16
MIN_REMOTE = 256
IDLE = EngineStats(num_blocks=1000, block_size=SIZE, max_num_seqs=64, max_num_batched_tokens=8192)
SESSION = tuple(range(1600))


def request(tokens: tuple[int, ...], **fields: object) -> GenerateRequest:
    return GenerateRequest("r", tokens, SamplingParams(max_tokens=100), **fields)  # type: ignore[arg-type]


class Pools:
    """What two pools of two say of themselves."""

    def __init__(
        self,
        mode: str = "disaggregated",
        settings: RoutingSettings | None = None,
        *,
        may_lack_pool: bool = False,
        **options: object,
    ) -> None:
        self.now_s = 1000.0
        names = {DECODE: ("d0", "d1")} | ({PREFILL: ("p0", "p1")} if mode == "disaggregated" else {})
        self.engines = {pool: dict.fromkeys(of, IDLE) for pool, of in names.items()}
        self.ages: dict[str, float] = {}
        self.logs = {name: CacheLog() for of in names.values() for name in of}
        goals = Goals(ttft_s=2.0, itl_s=0.1)
        crossover = Crossover(goals, MIN_REMOTE, may_lack_pool) if mode == "disaggregated" else None
        clock = lambda: self.now_s  # noqa: E731
        self.routers = PoolRouters(settings or RoutingSettings(), crossover, clock=clock, **options)  # type: ignore[arg-type]

    def holds(self, name: str, prompt: PromptHashes) -> None:
        for block in prompt.of(SIZE):
            self.logs[name].published(block)

    def read(self) -> None:
        self.now_s += 1.0
        replicas = {}
        for pool, engines in self.engines.items():
            read = self.routers.positions(pool)
            caches = {name: None if read is None else self.logs[name].since(read.get(name)) for name in engines}
            replicas[pool] = [
                ReplicaStats(name, engine, HandoffStats(), self.ages.get(name, 0.0), caches[name])
                for name, engine in engines.items()
            ]
        self.routers.update(Reading.of(by_role(replicas), self.now_s))

    def know(self) -> None:
        """Who the replicas are is read first, and then what they have."""
        self.read()
        self.read()


def test_a_session_goes_on_where_it_is_and_no_prefill_replica_counts_it() -> None:
    pools = Pools()
    pools.holds("d1", PromptHashes(SESSION))
    pools.know()
    for number in range(8):
        routed = pools.routers.route(request((*SESSION, *[number] * 100)))
        assert routed.route.decode == "d1"
        assert routed.route.prefill, "should the decode replica have forgotten it"
    assert pools.routers.choices == {(DECODE, Reason.CACHE): 8}
    assert pools.routers.promised_tokens == {DECODE: 8 * 1600, PREFILL: 0}


def test_a_prompt_that_decode_lacks_goes_to_the_prefill_replica_that_has_it() -> None:
    pools = Pools()
    pools.holds("p1", PromptHashes(SESSION))
    pools.know()
    assert pools.routers.route(request((*SESSION, *range(300)))).route.prefill == "p1"
    assert pools.routers.promised_tokens == {DECODE: 0, PREFILL: 1600}


def test_where_decode_has_little_and_prefill_all_the_little_is_not_worth_a_wait() -> None:
    pools = Pools()
    pools.holds("d1", PromptHashes(SESSION[:160]))
    pools.holds("p1", PromptHashes(SESSION))
    pools.engines[DECODE]["d1"] = replace(IDLE, num_running=64, num_waiting=20)
    pools.engines[DECODE]["d0"] = replace(IDLE, num_running=1)
    pools.know()
    assert pools.routers.route(request((*SESSION, *range(100)))).route.decode == "d0"


def test_what_prefill_has_anyway_makes_little_of_what_decode_has() -> None:
    pools = Pools()
    pools.holds("d1", PromptHashes(SESSION[:1504]))
    pools.engines[DECODE]["d1"] = replace(IDLE, num_running=5)
    pools.know()
    assert pools.routers.route(request((*SESSION, *range(100)))).route.decode == "d1", "it need only compute 196 tokens"
    pools.holds("p1", PromptHashes(SESSION))
    pools.now_s += 3600.0  # and what was sent is not expected any more
    pools.know()
    assert pools.routers.route(request((*SESSION, *range(100)))).route.decode == "d0"


@pytest.mark.parametrize("has_tier", [False, True])
def test_a_prefill_replica_is_taken_to_fetch_from_the_tier_what_a_busy_decode_replica_has(has_tier: bool) -> None:
    pools = Pools()
    pools.holds("d1", PromptHashes(SESSION))
    if has_tier:  # a token of it took a tenth of what it takes to compute one
        fetched = replace(IDLE, tier_hit_tokens=1000, tier_fetch_s=1000 * UNMEASURED_TOKEN_S / 10)
        pools.engines[PREFILL]["p0"] = fetched
    pools.know()
    routed = pools.routers.route(request((*SESSION, *range(300))))
    decode, prefill = routed.reasons
    assert routed.route.decode == "d1" and "1600 tokens cached" in decode
    seconds = (300 + 1600 / 10 if has_tier else 1900) * UNMEASURED_TOKEN_S
    assert f"0 tokens cached, {seconds:.3f} s for the rest" in prefill


def test_a_request_weighs_as_others_turned_out_to_and_not_as_it_may() -> None:
    pools = Pools(mode="colocated")
    pools.holds("d1", PromptHashes(SESSION[:320]))
    pools.engines[DECODE]["d1"] = replace(IDLE, num_running=5)
    pools.know()
    assert pools.routers.route(request(SESSION)).route.decode == "d0", "5 others slow down 100 tokens"
    for name, engine in pools.engines[DECODE].items():
        pools.engines[DECODE][name] = replace(engine, generated_tokens=1000, finished=100)
    pools.now_s += 3600.0
    pools.know()
    assert pools.routers.route(request(SESSION)).route.decode == "d1", "and 10 tokens less"


def test_requests_that_were_just_sent_count_at_once_and_no_more_when_they_have_ended() -> None:
    pools = Pools(mode="colocated")
    pools.know()
    others = [pools.routers.route(request(tuple(range(i, i + 20)))) for i in range(0, 4000, 100)]
    sent = [routed.route.decode for routed in others]
    assert sent.count("d0") == sent.count("d1")
    for routed in others:
        routed.first_token()
        routed.ended()
        routed.ended()
    assert pools.routers.route(request(tuple(range(5000, 5020)))).route.decode in ("d0", "d1")


def test_blocks_of_a_request_that_was_lost_before_its_first_token_are_not_expected() -> None:
    pools = Pools(mode="colocated")
    pools.know()
    pools.routers.route(request(SESSION)).ended()
    pools.routers.route(request(SESSION)).ended()
    assert pools.routers.promised_tokens[DECODE] == 0
    routed = pools.routers.route(request(SESSION))
    routed.first_token()
    routed.ended()
    assert pools.routers.route(request((*SESSION, 7))).route.decode == routed.route.decode
    assert pools.routers.promised_tokens[DECODE] == 1600


def test_a_decode_replica_that_is_gone_is_not_chosen_until_it_is_heard_of() -> None:
    pools = Pools()
    pools.holds("d1", PromptHashes(SESSION))
    pools.know()
    lost = pools.routers.route(request(SESSION))
    pools.routers.lost(lost.route)
    assert pools.routers.route(request(SESSION)).route.decode == "d0"
    pools.know()
    assert pools.routers.route(request(SESSION)).route.decode in ("d0", "d1")


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_kv_of_another_tenant_is_not_looked_for(salt: str) -> None:
    pools = Pools(mode="colocated")
    pools.holds("d1", PromptHashes(SESSION, cache_salt="tenant"))
    pools.know()
    pools.routers.route(request(SESSION, cache_salt=salt))
    assert (pools.routers.promised_tokens[DECODE] > 0) == (salt == "tenant")


def test_requests_of_one_key_meet_before_anything_of_them_is_cached_and_those_of_another_meet_elsewhere() -> None:
    def places(salt: str, *, gathers: bool) -> set[tuple[str, str]]:
        pools = Pools()  # each time as another ingress replica, which does not know what this one has sent
        pools.know()
        first = tuple(range(next(beginnings), 100_000))[:1600]
        route = pools.routers.route(request(first, cache_salt=salt, gathers=gathers)).route
        return {(route.decode, route.prefill)}

    beginnings = iter(range(0, 90_000, 7))
    homes = [set().union(*(places(f"key {key}", gathers=True) for _ in range(8))) for key in range(32)]
    assert all(len(home) == 1 for home in homes)
    assert len(set().union(*homes)) == 4, "two decode replicas, two prefill replicas"
    assert len(set().union(*(places("salt", gathers=False) for _ in range(16)))) == 4, "of a salt they need not"


def test_requests_of_one_key_go_apart_where_one_replica_is_too_busy() -> None:
    pools = Pools(mode="colocated")
    pools.know()
    home = pools.routers.route(request(SESSION, cache_salt="key", gathers=True)).route.decode
    pools.engines[DECODE][home] = replace(IDLE, num_running=64, num_waiting=100)
    pools.now_s += 3600.0
    pools.know()
    other = pools.routers.route(request(SESSION[::-1], cache_salt="key", gathers=True)).route.decode
    assert {home, other} == {"d0", "d1"}


def test_what_was_generated_before_a_request_was_lost_is_part_of_its_prompt() -> None:
    pools = Pools(mode="colocated")
    pools.holds("d1", PromptHashes(SESSION))
    pools.know()
    assert pools.routers.route(request(SESSION[:800], generated_token_ids=SESSION[800:])).route.decode == "d1"
    assert pools.routers.promised_tokens[DECODE] == 1584


def test_kv_of_other_positions_has_other_names() -> None:
    rule = SwitchedPositions(border=1000, stride=4096)
    pools = Pools(mode="colocated", positions=rule)
    pools.holds("d1", PromptHashes(SESSION, position_offset=4096))
    pools.know()
    assert pools.routers.route(request(SESSION)).route.decode == "d1"


def test_one_of_each_is_no_choice_and_nobody_asks_what_it_has_cached() -> None:
    pools = Pools()
    for engines in pools.engines.values():
        engines.popitem()
    pools.know()
    assert pools.routers.positions(DECODE) is None
    assert pools.routers.route(request(SESSION)).route == ANYWHERE
    pools.engines[PREFILL]["new"], pools.logs["new"] = IDLE, CacheLog()
    pools.know()
    assert pools.routers.positions(DECODE) is not None, "what decode has tells who computes"
    assert pools.routers.route(request(SESSION)).route.decode == "d0"


def test_an_engine_that_hangs_is_given_nothing_more() -> None:
    pools = Pools()
    pools.holds("d1", PromptHashes(SESSION))
    pools.know()
    assert pools.routers.route(request(SESSION)).route.decode == "d1"
    pools.ages["d1"] = 11.0
    pools.know()
    assert pools.routers.route(request(SESSION)).route.decode == "d0"


def test_engines_that_have_said_nothing_yet_are_not_chosen() -> None:
    pools = Pools()
    assert pools.routers.route(request(SESSION)).route == ANYWHERE
    pools.engines[DECODE]["d0"] = EngineStats()
    pools.know()
    assert {pools.routers.route(request((i, *SESSION))).route.decode for i in range(8)} == {"d1"}
    pools.engines[DECODE]["d1"] = EngineStats()
    pools.know()
    assert pools.routers.route(request(SESSION)).route == ANYWHERE


def flipped(pools: Pools, name: str, is_flipped: bool = True) -> None:
    """A replica of decode changes its role, and all are read."""
    pools.engines[DECODE][name] = replace(IDLE, is_flipped=is_flipped)
    pools.know()


def test_a_flipped_replica_is_chosen_for_prompts_and_named_as_one_of_decode() -> None:
    pools = Pools()
    pools.engines[PREFILL] = {}
    pools.know()
    flipped(pools, "d1")
    for number in range(4):
        route = pools.routers.route(request(tuple(range(number, number + 400)))).route
        assert (route.decode, route.prefill, route.by_peer) == ("d0", "d1", True)
    flipped(pools, "d1", is_flipped=False)
    assert {pools.routers.route(request((n,) * 40)).route.decode for n in range(20)} == {"d0", "d1"}
    assert pools.routers.route(request(tuple(range(400)))).route.prefill == ""


def test_a_prefill_replica_is_no_peer() -> None:
    pools = Pools()
    pools.know()
    flipped(pools, "d1")
    routes = [pools.routers.route(request((n,) * 400)).route for n in range(20)]
    assert {(route.prefill, route.by_peer) for route in routes} == {("p0", False), ("p1", False), ("d1", True)}


def test_what_a_replica_has_cached_is_known_after_it_has_changed_its_role() -> None:
    pools = Pools()
    pools.holds("d1", PromptHashes(SESSION))
    pools.know()
    pools.holds("d1", PromptHashes(range(5000, 5160)))
    flipped(pools, "d1")
    routed = pools.routers.route(request((*SESSION, *range(300))))
    assert routed.route.prefill == "d1"
    assert pools.routers.promised_tokens == {DECODE: 0, PREFILL: 1600}


def test_where_there_is_no_prefill_replica_decode_computes_prompts_and_admission_knows() -> None:
    pools = Pools(may_lack_pool=True)
    pools.engines = {DECODE: {"d0": IDLE}, PREFILL: {}}
    pools.know()
    assert pools.routers.route(request(tuple(range(400)))).route == Route("d0")
    assert not pools.routers.is_remote(400)
    pools.engines[PREFILL]["p0"] = IDLE
    pools.logs["p0"] = CacheLog()
    pools.know()
    assert pools.routers.route(request(tuple(range(400)))).route == Route("d0", "p0", MIN_REMOTE)
    assert pools.routers.is_remote(400)
