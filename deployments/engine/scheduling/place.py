"""What the block manager gives a sequence that it admits, found before anything is given."""

from typing import NamedTuple


class Place(NamedTuple):
    """See the module.

    Attributes:
        num_passed: leading blocks of the sequence that it never reads within windows, and is not given there.
        shared: blocks that the cache holds, by the group of layers; behind the passed ones in those with a window.
        num_new: blank ones behind those, by the group.
        num_found: leading blocks of it, passed ones included, that need not be computed since the cache holds enough.
        num_ready: leading ones that are there, or are not read at all.
        is_awaited: a prefill engine is to compute the rest of its prompt.
    """

    num_passed: int
    shared: list[list[int]]
    num_new: list[int]
    num_found: int
    num_ready: int
    is_awaited: bool
