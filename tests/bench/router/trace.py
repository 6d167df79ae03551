"""A trace in the form of the Mooncake paper's, and what one cache for all of it could reuse. Knows no router."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Tokens of what the trace calls a block.
BLOCK_SIZE = 512


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt of the trace.

    Attributes:
        at_s: when it comes.
        num_tokens: its length.
        chain: hashes of its full blocks.
    """

    at_s: float
    num_tokens: int
    chain: tuple[bytes, ...]

    @property
    def usable(self) -> tuple[bytes, ...]:
        """Blocks that may be found in a cache: the last token is always computed."""
        return self.chain[: (self.num_tokens - 1) // BLOCK_SIZE]


def load_trace(path: Path, max_requests: int | None = None) -> list[Arrival]:
    """Prompts of a trace, in order; two are equal up to a block if the trace has the same id there."""
    arrivals = []
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            num_tokens = row["input_length"]
            ids = row["hash_ids"][: num_tokens // BLOCK_SIZE]
            chain = tuple(block.to_bytes(16, "big") for block in ids)
            arrivals.append(Arrival(row["timestamp"] / 1000, num_tokens, chain))
            if len(arrivals) == max_requests:
                break
    return arrivals


def hot_prefix(prefix_tokens: int, own_tokens: int, num_requests: int, gap_s: float) -> list[Arrival]:
    """Prompts that all begin alike and go on each in its own way, one every `gap_s`."""
    prefix = tuple(block.to_bytes(16, "big") for block in range(prefix_tokens // BLOCK_SIZE))
    num_own = (prefix_tokens + own_tokens) // BLOCK_SIZE - len(prefix)
    return [
        Arrival(
            number * gap_s,
            prefix_tokens + own_tokens,
            prefix + tuple((2**64 + number * num_own + i).to_bytes(16, "big") for i in range(num_own)),
        )
        for number in range(num_requests)
    ]


def reusable_tokens(arrivals: Sequence[Arrival], max_blocks: int | None = None) -> int:
    """Tokens that one cache for all prompts would find, each at once where the one before left its own.

    Args:
        arrivals: in order.
        max_blocks: what was used longest ago goes, the end of a prefix first; None: nothing ever goes.
    """
    cache: OrderedDict[bytes, None] = OrderedDict()
    found = 0
    for arrival in arrivals:
        for block in arrival.usable:
            if block not in cache:
                break
            found += BLOCK_SIZE
        for block in reversed(arrival.chain):
            cache[block] = None
            cache.move_to_end(block)
        while max_blocks is not None and len(cache) > max_blocks:
            cache.popitem(last=False)
    return found
