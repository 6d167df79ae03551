"""What waits at one replica, as far as a router knows.

Owns the last reading of its engine, what this router has sent there since, and how much it was given lately. A reading
is old when it comes, so what this router has sent counts at once, and what the engine has computed since is taken off.
Of other routers it is taken that they send as much as this one. Pure: no clock.
"""

import math
from dataclasses import dataclass

from deployments.engine.stats import EngineStats
from deployments.load.outlook import MAX_AGE_S
from deployments.load.own_share import Entry, OwnShare
from deployments.routing.scoring import HeldKV

# Of what a replica was given lately: after so long it counts half.
RECENT_HALF_LIFE_S = 60.0
# Prompt tokens after which an observation of how many of them are cached counts half.
_MISS_HALF_LIFE_TOKENS = 65_536.0
_HOLDS_ALL = HeldKV()


@dataclass(slots=True)
class Sent:
    """A request that this router has sent; `ReplicaLoad.computed` and `ended` are told how it goes on."""

    tokens: Entry | None
    sequence: Entry
    blocks: Entry


class ReplicaLoad:
    """What waits at a replica, and how full it is."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self._tokens, self._sequences, self._blocks = OwnShare(), OwnShare(), OwnShare()
        self._as_of_s = -math.inf
        self._miss_share = 1.0  # of prompt tokens, as was seen lately
        self._recent_tokens, self._recent_s = 0.0, 0.0
        self._own_tokens = self._open = 0  # prompt tokens and sequences, in the last reading

    def update(self, stats: EngineStats, as_of_s: float, now_s: float) -> None:
        """Take a reading; see `OwnShare.note_reading` for the times."""
        if as_of_s < self._as_of_s:
            return
        computed = stats.prompt_tokens - self.stats.prompt_tokens
        found = stats.prefix_hit_tokens - self.stats.prefix_hit_tokens
        if computed >= 0 and found >= 0 and (total := computed + found):
            keep = 0.5 ** (total / _MISS_HALF_LIFE_TOKENS)
            self._miss_share = keep * self._miss_share + (1 - keep) * computed / total
        self.stats, self._as_of_s = stats, as_of_s
        # Now, and not with every request that asks.
        self._own_tokens = stats.num_queued_prompt_tokens - stats.num_remote_prompt_tokens
        self._open = stats.num_waiting + stats.num_reserved + stats.num_running
        for share in self._own:
            share.note_reading(as_of_s, now_s)

    def send(self, num_tokens: int, num_blocks: int, now_s: float) -> Sent:
        """A request goes there, with so many tokens to compute."""
        for share in self._own:
            share.forget_before(now_s - MAX_AGE_S)  # nobody looks at them: a reading is newer, or there is none
        self._recent_tokens = self.recent_tokens(now_s) + num_tokens
        self._recent_s = now_s
        return Sent(
            self._tokens.enter(num_tokens, now_s),
            self._sequences.enter(1, now_s),
            self._blocks.enter(num_blocks, now_s),
        )

    def computed(self, sent: Sent, now_s: float) -> None:
        """Its prompt is computed. Again: nothing happens."""
        if sent.tokens is not None:
            self._tokens.leave(sent.tokens, now_s, is_drained=True)
            sent.tokens = None

    def ended(self, sent: Sent, now_s: float) -> None:
        """It is done with, or lost; once."""
        if sent.tokens is not None:
            self._tokens.leave(sent.tokens, now_s, is_drained=False)
            sent.tokens = None
        self._sequences.leave(sent.sequence, now_s, is_drained=True)
        self._blocks.leave(sent.blocks, now_s, is_drained=True)

    def recent_tokens(self, now_s: float) -> float:
        """What it was given lately by this router."""
        keep: float = 0.5 ** ((now_s - self._recent_s) / RECENT_HALF_LIFE_S)
        return self._recent_tokens * keep

    def start_at(self, recent_tokens: float, now_s: float) -> None:
        """It is new, and is to be taken for one that was given so much: else all would go there until it was."""
        self._recent_tokens, self._recent_s = recent_tokens, now_s

    @property
    def num_open(self) -> int:
        """Requests that this router has sent there and that have not ended."""
        return self._sequences.total

    def queued_tokens(self, now_s: float, tokens_per_s: float, num_routers: int) -> float:
        """Prompt tokens that it has to compute itself, without those that are cached.

        The engine counts whole prompts while they wait, for it looks into its cache last; so of what it says, as much
        as was cached lately is taken off.

        Args:
            now_s: the time.
            tokens_per_s: that an engine computes; 0: not known.
            num_routers: that send as much as this one.
        """
        if now_s - self._as_of_s > MAX_AGE_S:
            return float(self._tokens.total * num_routers)
        if not self._own_tokens and not self._tokens.total:
            return 0.0  # most replicas, mostly
        drained = max(0.0, now_s - self._as_of_s) * tokens_per_s
        return self._tokens.whole(self._own_tokens * self._miss_share, drained, num_routers)

    def num_sequences(self, now_s: float, num_routers: int) -> float:
        """That have a seat or wait for one."""
        total = self._sequences.total
        if now_s - self._as_of_s > MAX_AGE_S:
            return float(total * num_routers)
        # Serve may hold back what no engine has seen; what this router has open it knows for sure.
        whole = self._sequences.whole(self._open, 0.0, num_routers)
        return whole if whole > total else float(total)

    @property
    def held(self) -> HeldKV:
        """Of a sequence's KV there at once: within windows a window and a step."""
        stats = self.stats
        if not stats.kv_window:
            return _HOLDS_ALL
        num_windowed = stats.kv_groups - stats.full_kv_groups
        return HeldKV(stats.full_kv_groups, num_windowed, stats.kv_window + stats.max_num_batched_tokens)

    def blocks_held(self, num_tokens: int, block_size: int) -> int:
        """Blocks that so many tokens of a sequence take there at once."""
        return self.held.blocks(num_tokens, block_size)

    def num_free_blocks(self, now_s: float, num_routers: int) -> float:
        """Without those that sequences on their way will take."""
        if now_s - self._as_of_s > MAX_AGE_S:
            return float(self.stats.num_blocks - self._blocks.total * num_routers)
        return self.stats.num_blocks - self._blocks.whole(self.stats.num_used_blocks, 0.0, num_routers)

    @property
    def _own(self) -> tuple[OwnShare, ...]:
        return self._tokens, self._sequences, self._blocks
