"""Engines find each other's KV where they can read it, and nowhere else."""

from dataclasses import replace

import pytest

from deployments.engine.scheduling.block_hash import hash_chain, root_of
from deployments.kv_groups import KVGroup
from deployments.kv_tier.keys import TierKeys, shard_of
from deployments.kv_transfer.layout import KVLayout

LAYOUT = KVLayout("model", "float32", 4, (KVGroup((0, 1), 2, 8),))
BLOCK_BYTES = LAYOUT.bytes_per_block
CHAIN = hash_chain(root_of(0), range(41), 4)


def test_a_key_is_the_same_in_every_process() -> None:
    assert TierKeys(LAYOUT, 3 * BLOCK_BYTES).of_chain(CHAIN)[0].hex() == "301092f2a362c24902242cb677c2806d"


@pytest.mark.parametrize(
    "other",
    [
        replace(LAYOUT, model="another"),
        replace(LAYOUT, dtype="bfloat16"),
        replace(LAYOUT, dtype="fp8"),
        replace(LAYOUT, groups=(KVGroup((0, 1), 2, 8, window=16),)),
        replace(LAYOUT, groups=(KVGroup((0, 1, 2), 2, 8),)),
    ],
    ids=["model", "kind of numbers", "fp8", "window", "layers"],
)
def test_kv_that_differs_has_other_names(other: KVLayout) -> None:
    ours, theirs = (TierKeys(layout, 2 * layout.bytes_per_block) for layout in (LAYOUT, other))
    assert ours.num_blocks == theirs.num_blocks
    assert not set(ours.of_chain(CHAIN)) & set(theirs.of_chain(CHAIN))


def test_objects_of_another_size_have_other_names() -> None:
    assert TierKeys(LAYOUT, 2 * BLOCK_BYTES).of_chain(CHAIN)[1] != TierKeys(LAYOUT, 4 * BLOCK_BYTES).of_chain(CHAIN)[0]


@pytest.mark.parametrize("root", [root_of(0, "tenant"), root_of(7)])
def test_another_tenants_kv_and_that_of_other_positions_have_other_names(root: bytes) -> None:
    keys = TierKeys(LAYOUT, BLOCK_BYTES)
    assert not set(keys.of_chain(CHAIN)) & set(keys.of_chain(hash_chain(root, range(41), 4)))


@pytest.mark.parametrize(("object_bytes", "num_blocks"), [(1, 1), (BLOCK_BYTES, 1), (5 * BLOCK_BYTES - 1, 4)])
def test_an_object_has_as_many_whole_blocks_as_fit_and_one_at_least(object_bytes: int, num_blocks: int) -> None:
    keys = TierKeys(LAYOUT, object_bytes)
    assert (keys.num_blocks, keys.num_bytes) == (num_blocks, num_blocks * BLOCK_BYTES)
    assert len(keys.of_chain(CHAIN)) == len(CHAIN) // num_blocks


def test_shards_share_the_keys_evenly() -> None:
    keys = TierKeys(LAYOUT, 1).of_chain(hash_chain(root_of(0), range(4 * 900), 4))
    counts = [sum(shard_of(key, 3) == shard for key in keys) for shard in range(3)]
    assert sum(counts) == 900 and min(counts) > 200
