"""Arrays of the ids that a sequence has, as they are in memory."""

from array import array
from collections.abc import Iterable


def token_array(token_ids: Iterable[int] = ()) -> "array[int]":
    """Tokens of a sequence, ready to be hashed and copied into a step: 4 bytes each, as they are in memory."""
    return array("I", token_ids)


def block_array(blocks: Iterable[int] = ()) -> "array[int]":
    """Blocks of a sequence, likewise."""
    return array("i", blocks)
