"""Copies computed prompts out of the pool for other engines, chunk by chunk, as far as the outbox has room.

A chunk is announced before the step that computes it is launched: its memory is set aside. Chunks of the step that ends
a prompt have nothing but that step to hide behind: if the engine's limits say so they go in parts of some layers each,
and each part is copied out as soon as the step has come so far.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from deployments.engine.config import EngineLimits
from deployments.engine.handoff.completions import Completions
from deployments.engine.handoff.outbox import Outbox
from deployments.engine.kv.copies import KVCopies
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.scheduling.retention import Retention
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Sequence, Status
from deployments.messages import ChunkReady


@dataclass(slots=True)
class _Announced:
    """A chunk that is not copied out yet.

    Attributes:
        chunk: it.
        tensor: its memory.
        ends: places in its blocks where its parts end.
        num_copied: of the parts.
    """

    chunk: ChunkReady
    tensor: Tensor
    ends: tuple[int, ...]
    num_copied: int = 0


@dataclass(slots=True)
class _Outgoing:
    """A sequence that is computed for another engine.

    Attributes:
        sequence: it.
        announced: what is copied out in this step.
        is_all_announced: no other chunk comes.
        found: when what was found of it in the cache is there on a GPU as well: others' steps in flight, and chunks on
            their way into the pool, may still write it.
        found_after: so many preemptions; behind another one other blocks may be found.
    """

    sequence: Sequence
    announced: list[_Announced] = field(default_factory=list)
    is_all_announced: bool = False
    found: torch.cuda.Event | None = None
    found_after: int = -1


class Exporter:
    """Owns the sequences that are computed for others, until all of their KV is copied out. For the engine's thread.

    Args:
        outbox: where chunks wait to be taken.
        copies: of the pool.
        limits: of the engine.
        max_chunk_blocks: of one chunk.

    Attributes:
        ends: of the model's layers, behind which a part is written of a chunk that is not handed over whole; see
            `LayerWatch`.
    """

    def __init__(self, outbox: Outbox, copies: KVCopies, limits: EngineLimits, max_chunk_blocks: int) -> None:
        self._outbox = outbox
        self._copies = copies
        self._retention = Retention.of(limits)  # as those keep it for whom it computes
        self._block_size = limits.block_size
        self._max_chunk_blocks = max_chunk_blocks
        self._part_ends, self.ends = copies.part_ends(limits.handoff_layer_parts)
        self._last_copied: torch.cuda.Event | None = None
        self._outgoing: dict[str, _Outgoing] = {}
        self._completions = Completions()

    def __iter__(self) -> Iterator[str]:
        return iter(self._outgoing)

    @property
    def has_work(self) -> bool:
        """Whether some chunk could be announced now."""
        room, outgoing = self._outbox.num_free_blocks, self._outgoing.values()
        return any(0 < self._next_size(each, each.sequence.num_launched_tokens) <= room for each in outgoing)

    def add(self, sequence: Sequence, first_block: int) -> None:
        """Hand a sequence over from this block on, but for blocks that nobody reads behind its prompt."""
        self._outbox.open(sequence.request_id, max(first_block, self._retention.num_unread(sequence.num_tokens)))
        self._outgoing[sequence.request_id] = _Outgoing(sequence)

    def discard(self, request_id: str) -> None:
        """Copy nothing more of it out."""
        self._outgoing.pop(request_id, None)

    def announce(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """Set memory aside for what is computed, in flight or in the next step, as far as there is room.

        Args:
            scheduled: the step that is launched next.
        """
        if not self._outgoing:
            return
        reach = {item.sequence.request_id: item.start + item.num_tokens for item in scheduled}
        for request_id, outgoing in self._outgoing.items():
            end = reach.get(request_id, outgoing.sequence.num_launched_tokens)
            while 0 < (size := self._next_size(outgoing, end)) <= self._outbox.num_free_blocks:
                if outgoing.found_after < outgoing.sequence.num_preemptions:
                    outgoing.found_after, outgoing.found = outgoing.sequence.num_preemptions, self._copies.fence()
                self._announce(outgoing, size, end, request_id in reach)

    @property
    def watch(self) -> LayerWatch | None:
        """Who is to be told how far the step has come that is launched next; None: nobody."""
        is_needed = len(self.ends) > 1 and any(
            len(each.ends) > 1 for outgoing in self._outgoing.values() for each in outgoing.announced
        )
        return self if is_needed else None

    def reach(self, num_layers: int, after: torch.cuda.Event | None = None, request_id: str | None = None) -> None:
        """See `LayerWatch`: copy out what is in parts, as far as the step has come."""
        after = self._copies.fence() if after is None else after
        for outgoing in self._outgoing.values() if request_id is None else [self._outgoing.get(request_id)]:
            for each in [] if outgoing is None else outgoing.announced:
                num_parts = bisect_right(self.ends, num_layers)
                if len(each.ends) > 1 and num_parts > each.num_copied:
                    assert outgoing is not None
                    self._copy_out(outgoing.sequence, each, num_parts, after)

    def export(self, done: torch.cuda.Event | None) -> None:
        """Copy out what was announced and is computed, or in flight.

        Args:
            done: when the step that was launched last has ended; None: it has, or copies wait for it anyway.
        """
        for outgoing in self._outgoing.values():
            sequence = outgoing.sequence
            for each in outgoing.announced:
                end = each.chunk.start_block + each.chunk.num_blocks
                is_computed = end * self._block_size <= sequence.num_computed_tokens
                if each.num_copied < len(each.ends):
                    self._copy_out(sequence, each, len(each.ends), outgoing.found if is_computed else done)
            outgoing.announced.clear()
        self._copies.hold_back(self._last_copied)
        self._last_copied = None

    def _copy_out(self, sequence: Sequence, each: _Announced, num_parts: int, after: torch.cuda.Event | None) -> None:
        """Copy what is missing of the first parts of a chunk."""
        chunk, first = each.chunk, each.ends[each.num_copied - 1] if each.num_copied else 0
        spans = self._spans(sequence, chunk.start_block, chunk.num_blocks)
        block_ids = [table[i] for table, span in zip(sequence.tables.each, spans, strict=True) for i in span]
        part = each.tensor[first : each.ends[num_parts - 1]]
        self._last_copied = copied = self._copies.export(block_ids, part, after, first)
        for _ in range(num_parts - each.num_copied):
            self._completions.call_after(copied, partial(self._outbox.note_copied, chunk.request_id, chunk.index))
        each.num_copied = num_parts

    def take_done(self) -> list[str]:
        """Sequences that are copied out, and of which nothing is awaited any more; this class forgets them."""
        done = [request_id for request_id, outgoing in self._outgoing.items() if self._is_done(outgoing)]
        for request_id in done:
            del self._outgoing[request_id]
        return done

    def _is_done(self, outgoing: _Outgoing) -> bool:
        return outgoing.is_all_announced and self._outbox.has_first_token(outgoing.sequence.request_id)

    def _announce(self, outgoing: _Outgoing, size: int, end: int, is_scheduled: bool) -> None:
        sequence = outgoing.sequence
        # What the step that ends the prompt computes; earlier steps have later ones to hide behind.
        ends = self._part_ends if is_scheduled and end >= sequence.num_tokens else self._part_ends[-1:]
        start = self._outbox.next_block(sequence.request_id)
        is_last = end >= sequence.num_tokens and start + size == self._num_blocks(sequence)
        tensor = self._copies.allocate(sum(map(len, self._spans(sequence, start, size))))
        chunk = self._outbox.put(
            sequence.request_id,
            size,
            tensor,
            is_last=is_last,
            cuts=ends[:-1],
            num_cached_tokens=sequence.num_cached_tokens,
        )
        outgoing.announced.append(_Announced(chunk, tensor, ends))
        outgoing.is_all_announced = is_last

    def _next_size(self, outgoing: _Outgoing, end: int) -> int:
        """Blocks of the next chunk, if so many tokens are computed or about to be; the last ones go together."""
        sequence = outgoing.sequence
        if sequence.status is not Status.RUNNING or outgoing.is_all_announced:
            return 0
        num_blocks = self._num_blocks(sequence)
        if end < sequence.num_tokens:
            num_blocks = min(end // self._block_size, num_blocks - 1)
        return min(num_blocks - self._outbox.next_block(sequence.request_id), self._max_chunk_blocks)

    def _spans(self, sequence: Sequence, start: int, size: int) -> list[range]:
        """What a chunk has of so many blocks, by the group: within windows nothing that nobody reads."""
        num_passed = self._retention.num_passed(sequence.num_tokens)
        return sequence.tables.spans(range(start, start + size), num_passed)

    def _num_blocks(self, sequence: Sequence) -> int:
        """Of all its tokens, which it may not all have yet."""
        return -(-sequence.num_tokens // self._block_size)
