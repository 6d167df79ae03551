"""Names of full KV blocks: the same in every process, so that engines, and those that choose among them, agree."""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

_HASH_BYTES = 16
# Sets roots apart from blocks: without it a caller's salt that reads like the tokens of a first block would name it.
_OF_ROOTS = b"root"


def hash_block(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """Identify a full block by its tokens and everything before it.

    Args:
        parent: hash of the previous block; `root_of` for the first one.
        token_ids: the tokens of this block.

    Returns:
        16 bytes.
    """
    return blake2b(array("I", token_ids).tobytes(), key=parent, digest_size=_HASH_BYTES).digest()


def root_of(position_offset: int, cache_salt: str = "") -> bytes:
    """What the first block of a sequence follows; none is the usual root.

    KV of other positions has another one, and so has KV that is not to be shared with requests of another salt.
    """
    root = position_offset.to_bytes(8, "big") if position_offset else b""
    if not cache_salt:
        return root
    return blake2b(cache_salt.encode(), key=root, digest_size=_HASH_BYTES, person=_OF_ROOTS).digest()


def hash_chain(root: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of all full blocks of a sequence, from the first; `root` as of `root_of`."""
    hashes, parent = [], root
    for end in range(block_size, len(token_ids) + 1, block_size):
        parent = hash_block(parent, token_ids[end - block_size : end])
        hashes.append(parent)
    return hashes
