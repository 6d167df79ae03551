"""Hand-off between real Ray actors over gloo, and everything that can die on the way."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import ray

from deployments.errors import LayoutMismatchError, TransferError
from deployments.kv_transfer.base import TransferConfig
from deployments.messages import DrawnToken
from tests.kv_transfer.engines import EARLY, LAYOUT, PATIENCE_S, FakeEngine
from tests.waiting import stop_process, wait_until

# What a machine that is busy for a while does not exceed.
CONFIG = TransferConfig(
    connect_timeout_s=60, transfer_timeout_s=60, probe_interval_s=0.1, idle_probe_interval_s=0.3, doubt_after_s=30
)
# Of engines whose peers hang.
IMPATIENT = replace(CONFIG, transfer_timeout_s=8, doubt_after_s=4)
TIMED_OUT = "not done after"
BIG = 4000  # blocks: 250 MiB
ARENA_BLOCKS = 256

Engine = Any
# Ray's decorator types do not tell an actor class from a class.
EngineClass: Any = FakeEngine


@pytest.fixture(scope="module")
def engines(cluster: None) -> Iterator[list[Engine]]:
    """Four that every test leaves alive and well; starting one takes seconds."""
    engines = [EngineClass.remote(LAYOUT, CONFIG) for _ in range(4)]
    yield engines
    for engine in engines:
        ray.kill(engine)


@pytest.fixture(scope="module")
def sharing(cluster: None) -> Iterator[Engine]:
    """Likewise, one whose chunks others of this machine can read where they are: `ARENA_BLOCKS` at a time."""
    engine = EngineClass.remote(LAYOUT, CONFIG, ARENA_BLOCKS * LAYOUT.bytes_per_block)
    yield engine
    ray.kill(engine)


@pytest.fixture
def start_engine(cluster: None) -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def start(config: TransferConfig = CONFIG, arena_bytes: int = 0, **fields: Any) -> Engine:
        engine = EngineClass.remote(replace(LAYOUT, **fields), config, arena_bytes)
        started.append(engine)
        return engine

    yield start
    for engine in started:
        ray.kill(engine)


def hand_off(source: Engine, destination: Engine, num_blocks: int, value: float) -> "ray.ObjectRef[Any]":
    ack: ray.ObjectRef[Any] = destination.receive_kv.remote("request", source.take_handoff.remote(num_blocks, value))
    return ack


def assert_arrived(
    acks: "list[ray.ObjectRef[Any]]", expected: list[tuple[int, float]], timeout: float = PATIENCE_S
) -> None:
    received = ray.get(acks, timeout=timeout)
    assert received == [[(value, value + 0.5, num_blocks)] for num_blocks, value in expected]


def arrives(ack: "ray.ObjectRef[Any]") -> bool:
    try:
        ray.get(ack, timeout=PATIENCE_S)
    except TransferError:
        return False
    return True


wait_for = partial(wait_until, timeout_s=PATIENCE_S)


def wait_until_moving(engine: Engine, is_amid: bool) -> None:
    """Until a chunk is held back there; or, amid the bytes, until it is not any more and they are on their way."""
    assert ray.get(engine.wait_until_about_to_move.remote())
    if is_amid:
        ray.get(engine.let_go.remote())
        assert ray.get(engine.wait_until_moving.remote())


def links_and_threads(engine: Engine) -> tuple[int, int]:
    stats, threads = ray.get([engine.stats.remote(), engine.threads.remote()])
    return stats.num_links, len(threads)


def has_nothing_left(engine: Engine) -> bool:
    exported: int = ray.get(engine.num_exported_alive.remote())
    return exported == 0


def has_no_links(engine: Engine) -> bool:
    return links_and_threads(engine) == (0, 0)


def test_many_concurrent_chunks_arrive_whole_in_crossing_directions(engines):
    rng = random.Random(0)
    jobs = [(*rng.sample(range(4), 2), rng.choice([1, 16, 100])) for _ in range(200)]
    acks = [hand_off(engines[s], engines[d], blocks, float(i)) for i, (s, d, blocks) in enumerate(jobs)]
    assert_arrived(acks, [(blocks, float(i)) for i, (_, _, blocks) in enumerate(jobs)])
    wait_for(lambda: sum(s.num_sent for s in ray.get([engine.stats.remote() for engine in engines])) == 200)
    stats = ray.get([engine.stats.remote() for engine in engines])
    assert sum(s.num_received for s in stats) == 200
    assert sum(s.num_received_bytes for s in stats) == sum(job[2] for job in jobs) * LAYOUT.bytes_per_block
    assert [s.num_failed for s in stats] == [0] * 4
    wait_for(lambda: sum(ray.get([e.num_exported_alive.remote() for e in engines])) == 0)
    assert sum(s.num_links for s in stats) == 2 * 12, "both ends of every ordered pair"


def test_rays_manager_of_transfers_is_made_before_two_threads_can_make_one_each(engines):
    assert ray.get([engine.had_manager.remote() for engine in engines]) == [True] * 4


def test_an_engine_hands_nothing_over_to_itself(engines):
    with pytest.raises(TransferError, match="to itself"):
        ray.get(hand_off(engines[0], engines[0], 4, 7.0), timeout=PATIENCE_S)


def test_chunks_of_one_hand_off_come_under_one_reference_as_they_are_complete(engines, sharing):
    chunks = [(blocks, float(i)) for i, blocks in enumerate((1, 7, 3, 16, 2))]
    expected = [(value, value + 0.5, blocks) for blocks, value in chunks]
    for source in (engines[0], sharing):
        acks = [engines[3].receive_kv.remote("request", source.take_chunks.remote(chunks)) for _ in range(10)]
        received = [
            sorted(found) for found in ray.get(acks, timeout=PATIENCE_S)
        ]  # those without room come when they do
        assert received == [expected] * 10
        wait_for(partial(has_nothing_left, source))


def test_a_dropped_reference_frees_the_chunk_at_its_source(engines):
    ref = engines[0].take_handoff.remote(100, 1.0)
    ray.wait([ref], fetch_local=False)
    wait_for(lambda: ray.get(engines[0].stats.remote()).num_held == 1)  # and not one of before
    del ref
    wait_for(lambda: ray.get(engines[0].num_exported_alive.remote()) == 0)
    wait_for(lambda: ray.get(engines[0].stats.remote()).num_held == 0)


def test_what_was_received_and_given_back_is_not_received_again(engines):
    ref = engines[0].take_handoff.remote(8, 3.0)
    assert_arrived([engines[1].receive_kv.remote("request", ref)], [(8, 3.0)])
    wait_for(lambda: ray.get(engines[0].num_exported_alive.remote()) == 0)
    assert ray.get(engines[2].receive_kv.remote("request", ref), timeout=PATIENCE_S) == []


def test_another_layout_is_refused_before_anything_is_sent(engines, start_engine):
    source = start_engine(groups=(replace(LAYOUT.groups[0], head_dim=32),))
    for _ in range(2):
        with pytest.raises(LayoutMismatchError, match="head_dim of group 0: ours 64, theirs 32"):
            ray.get(hand_off(source, engines[0], 4, 1.0), timeout=PATIENCE_S)
    stats = ray.get(source.stats.remote())
    assert (stats.num_sent, stats.num_links) == (0, 0)
    assert_arrived([hand_off(engines[1], engines[0], 1, 1.0)], [(1, 1.0)])


def test_a_tensor_that_is_no_chunk_is_not_sent(engines):
    source, destination = engines[:2]
    with pytest.raises(TransferError, match="no longer has it"):
        ray.get(
            destination.receive_kv.remote("request", source.take_wrong_handoff.remote()),
            timeout=PATIENCE_S,
        )
    assert_arrived([hand_off(source, destination, 1, 1.0)], [(1, 1.0)])


@pytest.mark.parametrize("is_amid", [True, False], ids=["amid the bytes", "before the bytes"])
def test_a_killed_source_fails_the_transfer_fast_and_others_go_on(engines, start_engine, is_amid):
    source, (other, destination) = start_engine(), engines[:2]
    assert_arrived([hand_off(other, destination, 1, 1.0)], [(1, 1.0)])  # their link is there before and behind
    before = links_and_threads(destination)
    ray.get(source.hold_back.remote("send", PATIENCE_S))
    ack = hand_off(source, destination, BIG, 2.0)
    wait_until_moving(source, is_amid)
    ray.kill(source)
    with pytest.raises(TransferError) as failure:
        ray.get(ack, timeout=PATIENCE_S)
    assert TIMED_OUT not in str(failure.value), "the death was noticed"
    assert_arrived([hand_off(other, destination, 1, 3.0)], [(1, 3.0)])
    wait_for(lambda: links_and_threads(destination) == before)


@pytest.mark.parametrize("is_amid", [True, False], ids=["amid the bytes", "before the bytes"])
def test_a_killed_receiver_frees_the_chunk_and_the_source_serves_others(engines, start_engine, is_amid):
    (source, other), destination = engines[:2], start_engine()
    assert_arrived([hand_off(source, other, 1, 0.0)], [(1, 0.0)])
    before = links_and_threads(source)
    ray.get(destination.hold_back.remote("recv", PATIENCE_S))
    ack = hand_off(source, destination, BIG, 1.0)
    assert ray.get(destination.wait_until_about_to_move.remote())
    wait_for(lambda: ray.get(source.num_exported_alive.remote()) == 1)  # and not one of before
    wait_until_moving(destination, is_amid)
    ray.kill(destination)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(ack, timeout=PATIENCE_S)
    del ack
    wait_for(lambda: ray.get(source.num_exported_alive.remote()) == 0)
    assert_arrived([hand_off(source, other, 1, 3.0)], [(1, 3.0)])
    wait_for(lambda: links_and_threads(source) == before)


def test_a_stopped_source_is_bounded_and_holds_up_nobody(engines, start_engine):
    # More chunks than the receiver has threads to receive with.
    (other, stopped), destination = engines[:2], start_engine(IMPATIENT)
    assert_arrived([hand_off(e, destination, 1, 1.0) for e in (stopped, other)], [(1, 1.0)] * 2)
    refs = [stopped.take_handoff.remote(16, 2.0) for _ in range(12)]
    ray.wait(refs, num_returns=12, fetch_local=False)
    pid = ray.get(stopped.pid.remote())
    stop_process(pid)
    try:
        hung = [destination.receive_kv.remote("request", ref) for ref in refs]
        assert_arrived([hand_off(other, destination, 16, 3.0) for _ in range(3)], [(16, 3.0)] * 3)
        assert ray.wait(hung, num_returns=len(hung), timeout=0)[1], "nobody had to wait until the last of them failed"
        for ack in hung:
            with pytest.raises(TransferError):
                ray.get(ack, timeout=PATIENCE_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    # The first ones may still meet the end of the broken link, or an engine that is in doubt.
    wait_for(lambda: arrives(hand_off(stopped, destination, 1, 4.0)))
    retried = [destination.receive_kv.remote("request", ref) for ref in refs]
    assert_arrived(retried, [(16, 2.0)] * 12)


def test_a_pair_is_formed_again_after_a_failure_and_after_a_rest(engines, start_engine):
    source, destination = engines[3], start_engine(replace(IMPATIENT, idle_timeout_s=0.5))
    before = links_and_threads(source)

    def wait_until_closed() -> None:
        wait_for(partial(has_no_links, destination))
        wait_for(lambda: links_and_threads(source) == before)

    assert_arrived([hand_off(source, destination, 4, 1.0)], [(4, 1.0)])
    wait_until_closed()  # unused: the receiver closes, and tells the source
    assert_arrived([hand_off(source, destination, 4, 2.0)], [(4, 2.0)])
    ray.get(source.hold_back.remote("send", PATIENCE_S))
    with pytest.raises(TransferError):
        ray.get(hand_off(source, destination, 4, 3.0), timeout=PATIENCE_S)
    ray.get(source.let_go.remote())
    assert_arrived([hand_off(source, destination, 4, 4.0)], [(4, 4.0)])
    wait_until_closed()
    wait_for(lambda: ray.get([engine.num_exported_alive.remote() for engine in (source, destination)]) == [0, 0])


def test_on_one_machine_chunks_are_read_where_they_are_and_freed(engines, sharing):
    destination = engines[1]
    before = ray.get(destination.stats.remote())
    num_sent = ray.get(sharing.stats.remote()).num_sent
    acks = [hand_off(sharing, destination, 4, float(i)) for i in range(50)]
    assert_arrived(acks, [(4, float(i)) for i in range(50)])
    stats = ray.get(destination.stats.remote())
    assert stats.num_received - before.num_received == 50
    assert stats.num_read_in_place - before.num_read_in_place == 50
    assert stats.num_neighbours == before.num_neighbours + 1
    assert stats.num_received_bytes - before.num_received_bytes == 50 * 4 * LAYOUT.bytes_per_block
    assert ray.get(sharing.stats.remote()).num_sent == num_sent
    wait_for(lambda: ray.get(sharing.num_exported_alive.remote()) == 0)


def test_a_chunk_for_which_shared_memory_has_no_room_is_sent(engines, sharing):
    destination = engines[1]
    before, was_sent = (ray.get(engine.stats.remote()) for engine in (destination, sharing))
    num_blocks = ARENA_BLOCKS * 2 // 3
    refs = [sharing.take_handoff.remote(num_blocks, float(i)) for i in range(3)]
    acks = [destination.receive_kv.remote("request", ref) for ref in refs]
    assert_arrived(acks, [(num_blocks, float(i)) for i in range(3)])
    assert ray.get(destination.stats.remote()).num_read_in_place == before.num_read_in_place + 1
    # Its sender counts behind the arrival.
    wait_for(lambda: ray.get(sharing.stats.remote()).num_sent == was_sent.num_sent + 2)


def test_memory_of_a_dead_source_is_forgotten(engines, start_engine):
    source, (other, destination) = start_engine(arena_bytes=16 << 20), engines[:2]
    assert_arrived([hand_off(other, destination, 1, 0.0)], [(1, 0.0)])
    before, num_neighbours = links_and_threads(destination), ray.get(destination.stats.remote()).num_neighbours
    assert_arrived([hand_off(source, destination, 4, 1.0)], [(4, 1.0)])
    ref = source.take_handoff.remote(4, 2.0)
    ray.wait([ref], fetch_local=False)
    os.kill(ray.get(source.pid.remote()), signal.SIGKILL)
    wait_for(lambda: ray.get(destination.stats.remote()).num_neighbours == num_neighbours)
    with pytest.raises(TransferError):
        ray.get(destination.receive_kv.remote("request", ref), timeout=PATIENCE_S)
    assert_arrived([hand_off(other, destination, 1, 3.0)], [(1, 3.0)])
    wait_for(lambda: links_and_threads(destination) == before)  # which other tests count


def check_parts(parts: list[Any], value: float) -> None:
    """They are those of a chunk of this value, in order; what was all complete may come as one."""
    edges = [0, *(end for (_, end), *_ in parts)]
    assert [layers for layers, *_ in parts] == list(pairwise(edges)) and edges[-1] == 4
    for side in (1, 2):
        values = [layer for part in parts for layer in part[side]]
        assert values == pytest.approx([value + i / 10 for i in range(4)])
    assert [token for *_, token in parts] == [None] * (len(parts) - 1) + [DrawnToken(int(value))]


def test_parts_of_several_prompts_between_two_sources_and_two_receivers_are_never_mixed_up(engines, sharing):
    """Asked for before they are there, completed at random, some of them given up after their first part."""
    sources, receivers = [engines[0], engines[1], sharing], engines[2:]
    rng = random.Random(1)
    before = ray.get([engine.stats.remote() for engine in sources])
    jobs = [(rng.choice(sources), rng.choice(receivers), rng.random() < 0.2) for _ in range(60)]
    acks = []
    for i, (source, receiver, is_dropped) in enumerate(jobs):
        ref = source.take_parts.remote(4, float(i), is_dropped)
        acks.append(receiver.receive_parts.remote("request", ref))
        del ref
    for i, (ack, (*_, is_dropped)) in enumerate(zip(acks, jobs, strict=True)):
        if is_dropped:
            with pytest.raises(TransferError, match="no longer has it"):
                ray.get(ack, timeout=PATIENCE_S)
        else:
            check_parts(ray.get(ack, timeout=PATIENCE_S), float(i))
    del acks
    wait_for(lambda: sum(ray.get([engine.num_exported_alive.remote() for engine in sources])) == 0)
    stats = ray.get([engine.stats.remote() for engine in sources])
    num_sent = [stats[i].num_sent - before[i].num_sent for i in range(3)]
    num_whole = [sum(source is by and not is_dropped for by, _, is_dropped in jobs) for source in sources]
    assert num_sent[:2] == num_whole[:2] and num_sent[2] == 0, "those of the third are read where they are"
    assert [stats[i].num_failed for i in range(3)] == [before[i].num_failed for i in range(3)]


def test_a_source_that_is_killed_between_two_parts_fails_the_transfer_fast(engines, start_engine):
    source, (other, destination) = start_engine(), engines[:2]
    assert_arrived([hand_off(other, destination, 1, 0.0)], [(1, 0.0)])
    before = links_and_threads(destination)
    ray.get(source.hold_back.remote("send", PATIENCE_S))
    ack = destination.receive_parts.remote("request", source.take_parts.remote(BIG, 1.0, False))
    assert ray.get(source.wait_until_about_to_move.remote())
    ray.kill(source)
    with pytest.raises(TransferError) as failure:
        ray.get(ack, timeout=PATIENCE_S)
    assert TIMED_OUT not in str(failure.value), "the death was noticed"
    assert_arrived([hand_off(other, destination, 1, 3.0)], [(1, 3.0)])
    wait_for(lambda: links_and_threads(destination) == before)


@pytest.mark.parametrize("arena_bytes", [0, 16 << 20], ids=["sent", "read in place"])
def test_chunks_that_are_pulled_before_they_are_complete_wait_at_their_source(engines, start_engine, arena_bytes):
    source, (other, destination) = start_engine(arena_bytes=arena_bytes), engines[:2]
    assert_arrived([hand_off(other, destination, 1, 0.0)], [(1, 0.0)])  # their link is there before and behind
    before = links_and_threads(destination)
    early = [hand_off(source, destination, 4, EARLY) for _ in range(3)]
    wait_for(lambda: ray.get(source.stats.remote()).num_held == 3)
    # They hold up neither others of the same source nor those of another one.
    assert_arrived([hand_off(e, destination, 4, 1.0) for e in (source, other)], [(4, 1.0)] * 2)
    assert ray.wait(early, num_returns=3, timeout=0)[0] == []
    token = DrawnToken(7, logprob=float("-inf"), rank=3, top=((7, -0.5), (9, float("-inf"))))
    ray.get(source.complete.remote(token))
    assert_arrived(early, [(4, EARLY)] * 3)
    assert ray.get(destination.first_token.remote()) == token
    wait_for(lambda: ray.get(source.stats.remote()).num_held == 0)
    gone = hand_off(source, destination, 4, EARLY)
    wait_for(lambda: ray.get(source.stats.remote()).num_held == 1)
    ray.get(source.complete.remote(None))
    with pytest.raises(TransferError, match="no longer has it"):
        ray.get(gone, timeout=PATIENCE_S)
    died = hand_off(source, destination, 4, EARLY)
    wait_for(lambda: ray.get(source.num_exported_alive.remote()) >= 1)
    ray.kill(source)
    with pytest.raises((TransferError, ray.exceptions.ActorDiedError)):
        ray.get(died, timeout=PATIENCE_S)
    assert_arrived([hand_off(other, destination, 1, 3.0)], [(1, 3.0)])
    wait_for(lambda: links_and_threads(destination) == before)
