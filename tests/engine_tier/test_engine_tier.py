"""Engines and a tier in one process: tokens are those of one engine, whatever the tier does; nothing stays held."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from deployments.engine.engine import Engine
from deployments.engine.loop import EngineLoop
from deployments.engine.scheduling.block_hash import hash_chain, root_of
from deployments.engine.scheduling.positions import FIXED
from deployments.engine.stats import EngineStats
from deployments.engine_tier import giving
from deployments.engine_tier.tier import EngineTier
from deployments.errors import TierError
from deployments.kv_tier import policy
from deployments.kv_tier.keys import TierKeys
from deployments.kv_tier.policy import FetchPolicy
from deployments.kv_transfer.layout import KVLayout
from deployments.messages import EngineEvent, GenerateRequest, TokenOutput, resumed_id
from tests.engine.driving import BLOCK_SIZE, build_engine, greedy
from tests.engine.families import load, random_prompt, reference
from tests.kv_tier.local_tier import LocalStore, LocalTier
from tests.waiting import wait_until

PROMPT = random_prompt(100, seed=57)
OBJECT_BLOCKS = 3
NUM_OBJECTS = 4  # whole ones without the last token: 12 blocks of 8
ALL = NUM_OBJECTS * OBJECT_BLOCKS * BLOCK_SIZE


class Member:
    """An engine in its loop, with its side of the tier."""

    def __init__(self, tier: LocalTier, model: str = "model", family: str = "llama", **overrides: Any) -> None:
        self.engine = build_engine(load(family), **overrides)
        shape = self.engine.kv_shape
        layout = KVLayout(model, shape.form.name, BLOCK_SIZE, shape.groups)
        self.loop = EngineLoop(self.engine, self._emit)
        store = self._store = LocalStore(tier)
        keys = TierKeys(layout, OBJECT_BLOCKS * layout.bytes_per_block)
        self.tier = EngineTier(self.engine, self.loop, store, keys, FIXED, copy_share=1.0)
        store.give = self.tier.give
        self._tokens: dict[str, list[int]] = {}
        self._cached: dict[str, int] = {}
        self._ends: dict[str, Future[tuple[tuple[int, ...], int]]] = {}

    def ask(self, request: GenerateRequest) -> "Future[tuple[tuple[int, ...], int]]":
        """Its tokens, and how many of the prompt were cached."""
        end = self._await(request)
        self.tier.bring(request, lambda: self._enter(request))
        return end

    def tokens(self, request: GenerateRequest) -> tuple[tuple[int, ...], int]:
        return self.ask(request).result(60)

    def stats(self) -> Any:
        stats = self.loop.call(lambda engine: engine.stats())
        self.tier.add_to(stats)
        return stats

    def forget_cached(self) -> None:
        """Fill the pool with something else, without a word to the tier."""
        for seed in (90, 91):
            filler = greedy(f"filler {seed}", random_prompt(1000, seed), 2)
            end = self._await(filler)
            self._enter(filler)
            end.result(60)

    def check_idle(self) -> None:
        """Nothing is held when nothing runs."""

        def check(engine: Engine) -> None:
            engine.check_integrity()
            assert (engine.stats().num_used_blocks, engine.num_sequences) == (0, 0)

        self.loop.call(check)

    def stop(self) -> None:
        self.tier.stop()
        self._store.tier.wait_idle()
        if self.loop.is_alive:
            self.check_idle()
            self.loop.stop()

    def _await(self, request: GenerateRequest) -> "Future[tuple[tuple[int, ...], int]]":
        self._tokens[request.request_id] = []
        end = self._ends[request.request_id] = Future()
        return end

    def _enter(self, request: GenerateRequest) -> None:
        self.loop.submit(lambda engine: engine.add(request))

    def _emit(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenOutput):
                self._tokens[event.request_id] += event.token_ids
                self._cached.setdefault(event.request_id, event.num_cached_tokens)
                if event.finish_reason is not None:
                    name = event.request_id
                    self._ends[name].set_result((tuple(self._tokens[name]), self._cached[name]))


@pytest.fixture
def tier() -> Iterator[LocalTier]:
    tier = LocalTier()
    yield tier
    tier.stop()


@pytest.fixture
def members(tier: LocalTier) -> Iterator[list[Member]]:
    """An engine that has computed the prompt, and one that has not; the tier has it."""
    members = [Member(tier), Member(tier)]
    assert members[0].tokens(greedy("cold", PROMPT, 8)) == (reference("llama", PROMPT, 8), 0)
    tier.wait_for(NUM_OBJECTS)
    yield members
    for member in members:
        member.stop()


def warm(member: Member, name: str = "warm") -> int:
    """Ask for the prompt again; how much of it was cached."""
    tokens, num_cached = member.tokens(greedy(name, PROMPT, 8))
    assert tokens == reference("llama", PROMPT, 8)
    return num_cached


def test_an_engine_finds_what_another_has_computed(members: list[Member]) -> None:
    assert warm(members[1]) == ALL
    stats = members[1].stats()
    assert (stats.tier_hit_tokens, stats.prompt_tokens) == (ALL, len(PROMPT) - ALL)
    assert stats.tier_fetched_bytes == members[0].stats().tier_given_bytes > 0
    assert warm(members[1], "again") == ALL, "it is in its own cache now"
    assert members[1].stats().tier_hit_tokens == ALL


def test_an_engine_tells_what_the_whole_tier_has(tier: LocalTier, members: list[Member]) -> None:
    assert warm(members[1]) == ALL  # and it offers what it has found
    wait_until(lambda: members[1].stats().tier_objects == NUM_OBJECTS)
    assert members[1].stats().tier_bytes == members[0].stats().tier_given_bytes == tier.index.counts().num_bytes
    assert members[1].stats().tier_evictions == 0


def test_behind_a_window_nothing_is_fetched(tier: LocalTier) -> None:
    members = [Member(tier, family="mistral_windowed") for _ in range(2)]
    expected = reference("mistral_windowed", PROMPT, 8)
    assert members[0].tokens(greedy("cold", PROMPT, 8)) == (expected, 0)
    tier.wait_for(NUM_OBJECTS)
    assert members[1].tokens(greedy("warm", PROMPT, 8)) == (expected, ALL)
    num_bytes = members[1].stats().tier_fetched_bytes
    assert num_bytes == members[0].stats().tier_given_bytes // NUM_OBJECTS, "a window is one object"
    assert members[1].tokens(greedy("again", PROMPT, 8)) == (expected, ALL)
    assert members[1].stats().tier_fetched_bytes == num_bytes, "it has the last window, and needs no more"
    for member in members:
        member.stop()


@pytest.fixture
def asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that has not answered is not left alone."""
    monkeypatch.setattr(policy, "_FIRST_REST_S", 0.0)


@pytest.mark.usefixtures("asked_again_at_once")
def test_what_is_behind_the_own_part_of_a_window_is_fetched(tier: LocalTier) -> None:
    members = [Member(tier, family="mistral_windowed") for _ in range(2)]
    members[0].tokens(greedy("cold", PROMPT, 8))
    tier.wait_for(NUM_OBJECTS)
    tier.is_away = True
    members[1].tokens(greedy("shorter", PROMPT[:86], 1))  # 10 blocks, of which 3 whole objects
    tier.is_away = False
    assert members[1].tokens(greedy("warm", PROMPT, 8)) == (reference("mistral_windowed", PROMPT, 8), ALL)
    assert members[1].stats().tier_hit_tokens == ALL - 10 * BLOCK_SIZE
    for member in members:
        member.stop()


def test_blocks_of_all_groups_of_layers_are_fetched(tier: LocalTier) -> None:
    members = [Member(tier, family="gemma2") for _ in range(2)]
    expected = reference("gemma2", PROMPT, 8)
    assert members[0].tokens(greedy("cold", PROMPT, 8)) == (expected, 0)
    tier.wait_for(NUM_OBJECTS)
    assert members[1].tokens(greedy("warm", PROMPT, 8)) == (expected, ALL)
    stats = members[1].stats()
    assert (stats.tier_hit_tokens, stats.prompt_tokens) == (ALL, len(PROMPT) - ALL)
    assert stats.tier_fetched_bytes == members[0].stats().tier_given_bytes > 0
    for member in members:
        member.stop()


def test_it_outlives_the_engine_that_computed_it(tier: LocalTier, members: list[Member]) -> None:
    members[0].stop()
    assert warm(members[1]) == ALL


@pytest.mark.usefixtures("asked_again_at_once")
def test_what_the_engine_has_itself_is_not_fetched_again(tier: LocalTier, members: list[Member]) -> None:
    tier.is_away = True
    members[1].tokens(greedy("shorter", PROMPT[:30], 1))
    tier.is_away = False
    assert warm(members[1]) == ALL
    assert members[1].stats().tier_hit_tokens == ALL - 3 * BLOCK_SIZE


def test_requests_that_wait_for_an_index_that_hangs_wait_for_it_once(
    tier: LocalTier, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Semaphore(0)

    def hang(*_: object) -> None:
        asked.release()
        time.sleep(0.2)
        raise TierError("the index has not answered within 0.2 s")

    monkeypatch.setattr(policy, "_FIRST_REST_S", 60.0)
    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "find", hang)
        prompts = [random_prompt(100, seed) for seed in range(600, 624)]
        ends = [members[1].ask(greedy(f"r{number}", prompt, 1)) for number, prompt in enumerate(prompts)]
        for end in ends:
            assert end.result(60)[1] == 0
        assert members[1].tokens(greedy("later", random_prompt(100, 700), 1))[1] == 0
    assert 1 <= members[1].stats().tier_failures <= 4, "of the four that ask at once"
    num_asked = 0
    while asked.acquire(blocking=False):
        num_asked += 1
    assert num_asked == members[1].stats().tier_failures


def test_only_whole_objects_count_and_the_last_token_is_computed(members: list[Member]) -> None:
    tokens, num_cached = members[1].tokens(greedy("whole", PROMPT[:48], 4))
    assert (tokens, num_cached) == (reference("llama", PROMPT[:48], 4), 24)


@pytest.mark.parametrize(
    "change", [{"cache_salt": "tenant"}, {"num_prompt_logprobs": 0}], ids=["another salt", "scores are wanted"]
)
def test_who_may_share_nothing_is_brought_nothing(members: list[Member], change: dict[str, Any]) -> None:
    tokens, num_cached = members[1].tokens(replace(greedy("r", PROMPT, 8), **change))
    assert (tokens, num_cached) == (reference("llama", PROMPT, 8), 0)
    assert members[1].stats().tier_fetched_bytes == 0


@pytest.mark.parametrize("overrides", [{"model": "another"}, {"kv_dtype": "fp8"}], ids=["model", "kind of numbers"])
def test_engines_with_other_kv_find_nothing(tier: LocalTier, members: list[Member], overrides: Any) -> None:
    members.append(Member(tier, **overrides))
    assert members[-1].tokens(greedy("r", PROMPT, 8))[1] == 0


def test_rounded_kv_is_shared_as_well(tier: LocalTier) -> None:
    members = [Member(tier, kv_dtype="fp8") for _ in range(2)]
    expected, _ = members[0].tokens(greedy("cold", PROMPT, 8))
    tier.wait_for(NUM_OBJECTS)
    assert members[1].tokens(greedy("warm", PROMPT, 8)) == (expected, ALL)
    for member in members:
        member.stop()


@pytest.mark.parametrize("num_readable", [0, 1, 3])
def test_what_is_lost_while_it_is_read_is_computed_and_offered_anew(
    tier: LocalTier, members: list[Member], num_readable: int
) -> None:
    tier.num_readable = num_readable
    assert warm(members[1]) == num_readable * OBJECT_BLOCKS * BLOCK_SIZE
    assert members[1].stats().tier_failures == 1
    assert tier.index.counts().num_lost == NUM_OBJECTS - num_readable
    tier.wait_for(NUM_OBJECTS)


@pytest.mark.usefixtures("asked_again_at_once")
def test_what_leaves_the_cache_while_the_tier_is_asked_leaves_no_gap(tier: LocalTier) -> None:
    members = [Member(tier), Member(tier)]
    members[0].tokens(greedy("cold", PROMPT, 8))
    tier.wait_for(NUM_OBJECTS)
    tier.is_away = True
    members[1].tokens(greedy("shorter", PROMPT[:30], 1))
    tier.is_away = False

    def forget() -> None:
        tier.on_find = lambda: None
        members[1].forget_cached()

    tier.on_find = forget
    assert warm(members[1]) == 0, "its beginning is gone, so what comes behind it is of no use"
    for member in members:
        member.stop()


def test_an_error_that_nobody_knows_of_costs_the_hits_alone(tier: LocalTier, members: list[Member]) -> None:
    tier.error = RuntimeError("out of pinned memory")
    assert warm(members[1]) < ALL
    assert members[1].stats().tier_failures == 1


def test_an_index_that_is_away_costs_the_hits_alone(tier: LocalTier, members: list[Member]) -> None:
    tier.is_away = True
    assert warm(members[1]) == 0
    assert members[1].stats().tier_failures == 1


def test_what_nobody_heard_is_offered_again(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "_RETRY_S", 0.01)
    tier.is_away = True
    member = Member(tier)
    member.tokens(greedy("cold", PROMPT, 1))
    tier.restart()
    tier.wait_for(NUM_OBJECTS)
    member.stop()


def test_an_index_that_was_restarted_is_told_of_what_is_asked_for_again(
    tier: LocalTier, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.restart()
    assert tier.index.counts().num_objects == 0
    monkeypatch.setattr(giving, "_OFFERED_FOR_S", 0.0)
    members[0].tokens(greedy("again", PROMPT, 1))  # found in its own cache
    tier.wait_for(NUM_OBJECTS)
    assert warm(members[1]) == ALL


def test_a_fetch_that_takes_longer_than_computing_is_given_up(tier: LocalTier, members: list[Member]) -> None:
    tier.goes_on.clear()
    assert warm(members[1]) == 0
    assert members[1].stats().tier_failures == 1
    tier.goes_on.set()


def test_a_request_that_ends_while_it_waits_never_enters(tier: LocalTier, members: list[Member]) -> None:
    tier.is_patient = True
    tier.goes_on.clear()
    end = members[1].ask(greedy("left", PROMPT, 8))
    assert tier.is_read.wait(60)
    assert members[1].tier.holds("left") and members[1].stats().num_waiting == 1
    members[1].tier.forget("left")
    assert not members[1].tier.holds("left")
    tier.goes_on.set()
    assert warm(members[1]) == ALL, "what came is there for others"
    assert not end.done()


def test_the_batch_goes_on_while_a_request_waits(tier: LocalTier, members: list[Member]) -> None:
    tier.is_patient = True
    tier.goes_on.clear()
    waiting = members[1].ask(greedy("waits", PROMPT, 8))
    assert tier.is_read.wait(60)
    other = random_prompt(20, seed=4)
    assert members[1].tokens(greedy("other", other, 4)) == (reference("llama", other, 4), 0)
    assert members[1].tier.holds("waits")
    tier.goes_on.set()
    assert waiting.result(60)[0] == reference("llama", PROMPT, 8)


def test_a_fetch_is_weighed_against_what_the_engine_would_compute_before(
    members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[int]()

    def fetches(_: FetchPolicy, num_tokens: int, num_bytes: int, num_before: int) -> bool:
        asked.append(num_before)
        return False

    monkeypatch.setattr(FetchPolicy, "fetches", fetches)
    members[1].tier.add_to(EngineStats(num_queued_prompt_tokens=700, num_remote_prompt_tokens=200))
    assert warm(members[1]) == 0
    assert asked == [500]


def test_no_step_begins_between_the_end_of_a_fetch_and_the_request_that_it_was_for(
    members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = members[1].engine, list[str]()
    chain = hash_chain(root_of(0), PROMPT, BLOCK_SIZE)[: NUM_OBJECTS * OBJECT_BLOCKS]
    begin_step, add = engine.begin_step, engine.add

    def begin_noted() -> list[EngineEvent]:
        if engine.lending.num_cached(chain) == len(chain):
            seen.append("step")
        return begin_step()

    def add_noted(request: GenerateRequest) -> None:
        seen.append(f"{request.request_id} beside {engine.num_sequences}")
        add(request)

    monkeypatch.setattr(engine, "begin_step", begin_noted)
    monkeypatch.setattr(engine, "add", add_noted)
    running = members[1].ask(greedy("runs", random_prompt(20, seed=6), 200))
    assert members[1].tokens(greedy("waits", PROMPT, 8)) == (reference("llama", PROMPT, 8), ALL)
    running.result(60)
    assert seen[:3] == ["runs beside 0", "waits beside 1", "step"]


def test_without_room_in_the_pool_the_prompt_is_computed_when_there_is(tier: LocalTier, members: list[Member]) -> None:
    member = Member(tier, num_blocks=16)
    members.append(member)
    running = member.ask(greedy("runs", random_prompt(60, seed=5), 50))
    waiting = member.ask(greedy("waits", PROMPT, 8))
    assert waiting.result(60)[0] == reference("llama", PROMPT, 8)
    assert running.result(60)[0] == reference("llama", random_prompt(60, seed=5), 50)


def test_those_that_lack_the_same_fetch_it_once(members: list[Member]) -> None:
    ends = [members[1].ask(greedy(f"r{i}", PROMPT, 8)) for i in range(4)]
    assert {end.result(60) for end in ends} == {(reference("llama", PROMPT, 8), ALL)}
    assert members[1].stats().tier_fetched_bytes == members[0].stats().tier_given_bytes


def test_what_a_request_computed_before_it_was_lost_is_not_cached_for_it(members: list[Member]) -> None:
    tokens, num_cached = members[1].tokens(replace(greedy("r", PROMPT, 8), request_id=resumed_id("cold", 1)))
    assert (tokens, num_cached) == (reference("llama", PROMPT, 8), 0)
    assert members[1].stats().tier_hit_tokens == ALL, "it was not computed again for all that"


def test_what_left_the_cache_before_it_was_asked_for_is_not_given(tier: LocalTier) -> None:
    member = Member(tier)
    member.tokens(greedy("cold", PROMPT, 2))
    tier.wait_for(NUM_OBJECTS)
    tier.restart()
    member.forget_cached()
    assert any(member.tier.give(offer.key) is None for offer in tier.offered[:NUM_OBJECTS])
    assert member.tier.give(b"never offered") is None
    member.stop()


def test_an_engine_that_dies_amid_a_fetch_leaves_no_thread_waiting(tier: LocalTier) -> None:
    members = [Member(tier), Member(tier)]
    members[0].tokens(greedy("cold", PROMPT, 8))
    tier.wait_for(NUM_OBJECTS)
    tier.is_patient = True
    tier.goes_on.clear()
    members[1].ask(greedy("r", PROMPT, 8))
    assert tier.is_read.wait(60)
    members[1].loop.stop()
    tier.goes_on.set()
    stopping = threading.Thread(target=members[1].stop)
    stopping.start()
    stopping.join(60)
    assert not stopping.is_alive()
    members[0].stop()
