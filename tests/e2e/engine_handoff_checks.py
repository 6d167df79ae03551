"""Two engine actors hand KV over, in memory that both map and by a group of two: the tokens are those of one engine.

On a GPU, where there is one: both are on it, and over NCCL each claims to be on a host of its own. On two, where there
are two: then each has its own.
"""

import os
import signal
import time
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
from tests.e2e.handoff_engines import BLOCK_SIZE, NUM_GPUS, VOCAB_SIZE, WatchedEngine
from tests.engine_pair import DrivenEngine, hand_over, random_prompt
from tests.waiting import wait_until

NUM_TOKENS = 24
# One block and many, a last block that is full and one that is not.
LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 6 * BLOCK_SIZE - 7, 12 * BLOCK_SIZE)
# By itself a transfer ends after 30 s, and a call not at all.
SOON_S = 25.0


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, num_gpus=NUM_GPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def start(rank: int, share_kv: bool, tier: TierSettings | None = None) -> Any:
    actor_class: Any = ray.remote(**direct.ENGINE_ACTOR_OPTIONS)(WatchedEngine)
    env = {"NCCL_NVLS_ENABLE": "0"}
    if NUM_GPUS == 1:
        env |= {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    options = {"num_cpus": 1, "num_gpus": (0, 0.3, 1)[NUM_GPUS], "runtime_env": {"env_vars": env}}
    return actor_class.options(**options).remote(share_kv, tier)


class Pair:
    """A source and a target for all tests, since starting an engine takes seconds; the dead are replaced."""

    def __init__(self, share_kv: bool) -> None:
        self.share_kv = share_kv
        self._ranks = count()
        self.engines = [DrivenEngine(actor) for actor in (self._start(), self._start())]

    def _start(self) -> Any:
        return start(next(self._ranks), self.share_kv)

    def replace(self, dead: DrivenEngine) -> None:
        """Put a new engine into the dead one's place."""
        self.engines[self.engines.index(dead)] = DrivenEngine(self._start())

    def stats(self) -> list[TransferStats]:
        found: list[TransferStats] = ray.get([engine.actor.transfer_stats.remote() for engine in self.engines])
        return found


@pytest.fixture(scope="module", params=[True, False], ids=["shared memory", "group of two"])
def pair(request: pytest.FixtureRequest, cluster: None) -> Iterator[Pair]:
    pair = Pair(request.param)
    yield pair
    for engine in pair.engines:
        ray.kill(engine.actor)


def check_tokens(source: DrivenEngine, target: DrivenEngine, name: str) -> None:
    for length in LENGTHS:
        prompt = random_prompt(length, seed=length, vocab_size=VOCAB_SIZE)
        alone = target.generate(prompt, f"{name}-alone-{length}", NUM_TOKENS)
        for i in range(2):
            found = hand_over(source, target, prompt, f"{name}-{length}-{i}", NUM_TOKENS)
            assert found.token_ids == alone, f"prompt of {length} tokens"
            assert found.num_bytes == -(-length // BLOCK_SIZE) * source.info.bytes_per_block


def test_tokens_are_those_of_one_engine(pair):
    source, target = pair.engines
    before = pair.stats()
    check_tokens(source, target, "first")
    num_received = 2 * sum(-(-length // BLOCK_SIZE) for length in LENGTHS)
    num_in_place = num_received if pair.share_kv else 0
    num_sent = num_received - num_in_place
    # What is sent counts behind its arrival.
    wait_until(lambda: pair.stats()[0].num_sent >= before[0].num_sent + num_sent, 60)
    sent, received = pair.stats()
    assert (sent.num_failed, received.num_failed) == (before[0].num_failed, before[1].num_failed)
    assert received.num_received - before[1].num_received == num_received
    assert received.num_read_in_place - before[1].num_read_in_place == num_in_place
    assert sent.num_sent - before[0].num_sent == num_sent


@pytest.mark.parametrize("killed", ["source", "target"])
def test_a_death_amid_transfers_leaves_the_other_serving(pair, killed):
    source, target = pair.engines
    hand_over(source, target, random_prompt(BLOCK_SIZE, 1, VOCAB_SIZE), f"before-{killed}")
    victim, survivor = (source, target) if killed == "source" else (target, source)
    pid = ray.get(victim.actor.pid.remote())
    num_before, died = count(), []

    def kill(_: int) -> None:
        if next(num_before) == 4:
            os.kill(pid, signal.SIGKILL)
            died.append(time.monotonic())

    with pytest.raises((TransferError, RayError)):
        hand_over(source, target, random_prompt(30 * BLOCK_SIZE, 2, VOCAB_SIZE), f"dying-{killed}", NUM_TOKENS, kill)
    assert time.monotonic() - died[0] < SOON_S
    ray.get(survivor.actor.abort.remote(f"dying-{killed}", None))
    pair.replace(victim)
    source, target = pair.engines
    check_tokens(source, target, f"after-{killed}")
    stats = ray.get(survivor.actor.stats.remote())
    assert (stats.num_used_blocks, stats.num_exported_blocks) == (0, 0)


NUM_OBJECTS = 5
TIER = TierSettings(max_bytes=1 << 30, object_bytes=1, num_shards=2)  # a block is an object


def held(tier: TierSettings) -> tuple[int, int, int]:
    """Objects, their bytes, and objects on their way, over all shards; each asserts its own integrity."""
    found = counts_of(tier)
    return (
        sum(counts.num_objects for counts in found),
        sum(counts.num_bytes for counts in found),
        sum(counts.num_pending for counts in found),
    )


def test_the_tier_outlives_the_engine_and_a_new_index_starts_empty(cluster):
    first, second = (DrivenEngine(start(rank, True, TIER)) for rank in range(2))
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

    for shard in shards(TIER):
        ray.kill(shard, no_restart=False)
    wait_until(lambda: _answers(TIER), 60)
    assert held(TIER)[0] < num_all, "what the index owned died with it"
    other = random_prompt(2 * BLOCK_SIZE, 12, VOCAB_SIZE)
    assert len(second.generate(other, "other", NUM_TOKENS)) == NUM_TOKENS
    wait_until(lambda: held(TIER)[0] > 0 and held(TIER)[2] == 0, 60)
    ray.get([shard.clear.remote() for shard in shards(TIER)])
    assert held(TIER) == (0, 0, 0)
    ray.kill(second.actor)


def _answers(tier: TierSettings) -> bool:
    try:
        held(tier)
    except RayError:
        return False
    return True
