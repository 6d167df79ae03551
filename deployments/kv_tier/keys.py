"""What KV in the tier is called. Pure; knows no tensors.

Some consecutive blocks of a prompt are kept together, in one object. The hash of the last of them tells everything
before it, and what salts it: the tenant's cache and positions are at the root of each chain (`root_of`). The layout of
the KV, model and kind of numbers included, is added here: engines that cannot read each other's KV never find it.
"""

from collections.abc import Sequence
from hashlib import blake2b

from deployments.kv_transfer.layout import KVLayout

_KEY_BYTES = 16


class TierKeys:
    """Names of objects of one layout.

    Args:
        layout: of the engine's KV.
        object_bytes: see `TierSettings`.
    """

    def __init__(self, layout: KVLayout, object_bytes: int) -> None:
        self.block_size = layout.block_size
        self.num_blocks = max(1, object_bytes // layout.bytes_per_block)  # of an object
        self.num_bytes = self.num_blocks * layout.bytes_per_block
        said = repr((layout.model, layout.dtype, layout.block_size, layout.groups, self.num_blocks))
        self._salt = blake2b(said.encode(), digest_size=_KEY_BYTES).digest()

    def of(self, last_block: bytes) -> bytes:
        """Name of the object that ends with the block of this hash."""
        return blake2b(last_block, key=self._salt, digest_size=_KEY_BYTES).digest()

    def of_chain(self, hashes: Sequence[bytes]) -> list[bytes]:
        """Names of the whole objects of a sequence, from its first block."""
        return [self.of(hashes[end - 1]) for end in range(self.num_blocks, len(hashes) + 1, self.num_blocks)]


def shard_of(key: bytes, num_shards: int) -> int:
    """Which part of the index knows of an object."""
    return int.from_bytes(key[:8], "big") % num_shards
