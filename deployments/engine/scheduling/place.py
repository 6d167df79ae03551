"""What the block manager gives a sequence that it admits, found before anything is given."""

from typing import NamedTuple


class Place(NamedTuple):
    """See the module.

    Attributes:
        num_passed: leading blocks of the sequence that it never reads, and is not given.
        shared: blocks behind them that the cache holds.
        num_new: blank ones behind those.
        num_found: leading blocks of it, passed ones included, that need not be computed since the cache holds enough.
        is_awaited: a prefill engine is to compute the rest of its prompt.
    """

    num_passed: int
    shared: list[int]
    num_new: int
    num_found: int
    is_awaited: bool
