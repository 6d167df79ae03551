"""Two engine actors hand KV over, in memory that both map and by a group of two: the tokens are those of one engine.

On a GPU, where there is one: both are on it, and over NCCL each claims to be on a host of its own. On two, where there
are two: then each has its own.
"""

import os
import signal
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import ray
from ray.exceptions import RayError

from deployments.errors import TransferError
from deployments.kv_tier.ray_store import counts_of, shards
from deployments.kv_tier.settings import TierSettings
from deployments.kv_transfer import direct
from deployments.kv_transfer.base import TransferStats
from tests.engine_pair import DrivenEngine, hand_over, random_prompt
from tests.kv_transfer.handoff_engines import BLOCK_SIZE, NUM_GPUS, VOCAB_SIZE, WatchedEngine
from tests.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

NUM_TOKENS = 24
# One block and many, a last block that is full and one that is not.
LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 6 * BLOCK_SIZE - 7, 12 * BLOCK_SIZE)
# What the error says of a transfer that nobody noticed to be lost.
TIMED_OUT = "not done after"
NUM_OBJECTS = 5
TIER = TierSettings(max_bytes=1 << 30, object_bytes=1, num_shards=2)  # a block is an object

_hosts = count()


def start(share_kv: bool, tier: TierSettings | None = None) -> Any:
    actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(WatchedEngine)
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": (0, 0.3, 1)[NUM_GPUS]}
    if NUM_GPUS:
        env = {"NCCL_NVLS_ENABLE": "0"}
        if NUM_GPUS == 1:
            env |= {"NCCL_HOSTID": f"host-{next(_hosts)}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        options["runtime_env"] = {"env_vars": env}
    return actor_class.options(**options).remote(share_kv, tier)


def held(tier: TierSettings) -> tuple[int, int, int]:
    """Objects, their bytes, and objects on their way, over all shards; each asserts its own integrity."""
    found = counts_of(tier)
    return (
        sum(counts.num_objects for counts in found),
        sum(counts.num_bytes for counts in found),
        sum(counts.num_pending for counts in found),
    )


# First, since on a GPU or two there is no room beside the engines of the other tests.
def test_the_tier_outlives_the_engine_and_a_new_index_starts_empty(cluster):
    first, second = (DrivenEngine(actor) for actor in [start(True, TIER) for _ in range(2)])
    prompt = random_prompt(NUM_OBJECTS * BLOCK_SIZE + 3, 11, VOCAB_SIZE)
    cold = first.generate(prompt, "cold", NUM_TOKENS)
    # Two more of what was generated.
    num_all = (len(prompt) + NUM_TOKENS - 1) // BLOCK_SIZE
    wait_until(lambda: held(TIER) == (num_all, num_all * first.info.bytes_per_block, 0), 60)
    os.kill(ray.get(first.actor.pid.remote()), signal.SIGKILL)
    assert second.generate(prompt, "warm", NUM_TOKENS) == cold
    stats = ray.get(second.actor.stats.remote())
    assert stats.tier_hit_tokens == stats.prefix_hit_tokens == NUM_OBJECTS * BLOCK_SIZE
    assert (stats.tier_failures, stats.num_used_blocks) == (0, 0)

    shard: Any  # Ray kills by its own type of handle
    for shard in shards(TIER):
        ray.kill(shard, no_restart=False)
    wait_until(lambda: _answers(TIER), 60)
    assert held(TIER)[0] < num_all, "what the index owned died with it"
    other = random_prompt(2 * BLOCK_SIZE, 12, VOCAB_SIZE)
    assert len(second.generate(other, "other", NUM_TOKENS)) == NUM_TOKENS
    # All of it: what is still to be offered would be on its way when the index is cleared.
    num_other = (len(other) + NUM_TOKENS - 1) // BLOCK_SIZE
    wait_until(lambda: held(TIER)[0] >= num_other and held(TIER)[2] == 0, 60)
    ray.get([shard.clear.remote() for shard in shards(TIER)])
    assert held(TIER) == (0, 0, 0)
    for actor in [second.actor, *shards(TIER)]:
        ray.kill(actor)


def _answers(tier: TierSettings) -> bool:
    try:
        held(tier)
    except RayError:
        return False
    return True


class Engines:
    """One that shares its KV with others of its machine and one that sends it, for all tests: a start takes seconds.

    The dead are replaced.
    """

    def __init__(self) -> None:
        actors = {share_kv: start(share_kv) for share_kv in (True, False)}
        self._by_kind = {share_kv: DrivenEngine(actor) for share_kv, actor in actors.items()}

    def replace(self, dead: DrivenEngine) -> None:
        """Put a new engine into the dead one's place."""
        (share_kv,) = (kind for kind, engine in self._by_kind.items() if engine is dead)
        self._by_kind[share_kv] = DrivenEngine(start(share_kv))

    def pair(self, share_kv: bool) -> tuple[DrivenEngine, DrivenEngine]:
        """A source of that kind, and the other one as its target."""
        return self._by_kind[share_kv], self._by_kind[not share_kv]

    def end(self) -> None:
        for engine in self._by_kind.values():
            ray.kill(engine.actor)


@pytest.fixture(scope="module")
def engines(cluster: None) -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.end()


@pytest.fixture(params=[True, False], ids=["shared memory", "group of two"])
def share_kv(request: pytest.FixtureRequest) -> bool:
    """How the source hands over."""
    share_kv: bool = request.param
    return share_kv


def stats(pair: tuple[DrivenEngine, DrivenEngine]) -> list[TransferStats]:
    found: list[TransferStats] = ray.get([engine.actor.transfer_stats.remote() for engine in pair])
    return found


def num_held(engine: DrivenEngine) -> tuple[int, int]:
    """Blocks that sequences use, and blocks that wait to be taken."""
    found = ray.get(engine.actor.stats.remote())
    return found.num_used_blocks, found.num_exported_blocks


def check_tokens(source: DrivenEngine, target: DrivenEngine, name: str) -> None:
    for length in LENGTHS:
        prompt = random_prompt(length, seed=length, vocab_size=VOCAB_SIZE)
        alone = target.generate(prompt, f"{name}-alone-{length}", NUM_TOKENS)
        for i in range(2):
            found = hand_over(source, target, prompt, f"{name}-{length}-{i}", NUM_TOKENS)
            assert found.token_ids == alone, f"prompt of {length} tokens"
            assert found.num_bytes == -(-length // BLOCK_SIZE) * source.info.bytes_per_block


def test_tokens_are_those_of_one_engine(engines, share_kv):
    source, target = pair = engines.pair(share_kv)
    before = stats(pair)
    check_tokens(source, target, f"first-{share_kv}")
    num_received = 2 * sum(-(-length // BLOCK_SIZE) for length in LENGTHS)
    received = stats(pair)[1]
    assert received.num_received - before[1].num_received == num_received
    num_in_place = received.num_read_in_place - before[1].num_read_in_place
    # Memory that both map has room for all that may be under way at once.
    assert num_in_place == (num_received if share_kv else 0)
    num_sent = num_received - num_in_place
    # What is sent counts behind its arrival.
    wait_until(lambda: stats(pair)[0].num_sent >= before[0].num_sent + num_sent, 60)
    sent, received = stats(pair)
    assert (sent.num_failed, received.num_failed) == (before[0].num_failed, before[1].num_failed)
    assert sent.num_sent - before[0].num_sent == num_sent


def test_what_an_engine_has_loaded_is_not_looked_through_for_garbage_while_it_serves(engines):
    """That takes longer than fifty steps of a GPU."""
    for engine in engines.pair(True):
        assert ray.get(engine.actor.num_searched_objects.remote()) < 100_000


@pytest.mark.parametrize("killed", ["source", "target"])
def test_a_death_amid_transfers_leaves_the_other_serving(engines, share_kv, killed):
    source, target = engines.pair(share_kv)
    case = f"{share_kv}-{killed}"
    hand_over(source, target, random_prompt(BLOCK_SIZE, 1, VOCAB_SIZE), f"before-{case}")
    victim, survivor = (source, target) if killed == "source" else (target, source)
    pid, before = ray.get([victim.actor.pid.remote(), target.actor.transfer_stats.remote()])

    def kill() -> None:
        """Once the first of thirty chunks have come."""
        while ray.get(target.actor.transfer_stats.remote()).num_received < before.num_received + 2:
            pass
        os.kill(pid, signal.SIGKILL)

    with pytest.raises((TransferError, RayError)) as failure:
        hand_over(source, target, random_prompt(30 * BLOCK_SIZE, 2, VOCAB_SIZE), f"dying-{case}", NUM_TOKENS, kill)
    assert TIMED_OUT not in str(failure.value), "the death was noticed"
    ray.get(survivor.actor.abort.remote(f"dying-{case}", None))
    engines.replace(victim)
    source, target = engines.pair(share_kv)
    check_tokens(source, target, f"after-{case}")
    # Chunks are released when what they were sent by has ended; the last of them behind its tokens.
    wait_until(lambda: num_held(survivor) == (0, 0), 60)
