"""Copies computed prompts out of the pool for other engines, chunk by chunk, as far as the outbox has room."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from deployments.engine.handoff.states import Outbox
from deployments.engine.kv.copies import KVCopies
from deployments.engine.scheduling.sequence import Sequence, Status
from deployments.messages import ChunkReady


class Exporter:
    """Owns the sequences that are computed for others, until all of their KV is copied out. For the engine's thread.

    Args:
        outbox: where chunks wait to be taken.
        copies: of the pool.
        block_size: tokens per block.
        max_chunk_blocks: of one chunk.
    """

    def __init__(self, outbox: Outbox, copies: KVCopies, block_size: int, max_chunk_blocks: int) -> None:
        self._outbox = outbox
        self._copies = copies
        self._block_size = block_size
        self._max_chunk_blocks = max_chunk_blocks
        self._sequences: dict[str, Sequence] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sequences)

    @property
    def has_work(self) -> bool:
        """Whether some chunk could be copied out now."""
        room = self._outbox.num_free_blocks
        return any(0 < self._next_size(sequence) <= room for sequence in self._sequences.values())

    def add(self, sequence: Sequence, first_block: int) -> None:
        """Hand a sequence over from this block on."""
        self._outbox.open(sequence.request_id, first_block)
        self._sequences[sequence.request_id] = sequence

    def discard(self, request_id: str) -> None:
        """Copy nothing more of it out."""
        self._sequences.pop(request_id, None)

    def export(self, done: torch.cuda.Event | None) -> list[ChunkReady]:
        """Copy out what is computed, or in flight, and fits; the chunk with the first token is a sequence's last.

        Args:
            done: when the step in flight has ended; None: nothing is in flight, or copies wait for it anyway.
        """
        chunks: list[ChunkReady] = []
        for sequence in list(self._sequences.values()):
            while 0 < (size := self._next_size(sequence)) <= self._outbox.num_free_blocks:
                chunks.append(self._export(sequence, size, done))
        return chunks

    def _export(self, sequence: Sequence, size: int, done: torch.cuda.Event | None) -> ChunkReady:
        request_id = sequence.request_id
        start = self._outbox.next_block(request_id)
        block_ids = sequence.block_table[start : start + size].tolist()
        tensor, ready = self._copies.export(block_ids, done if sequence.num_in_flight_tokens else None)
        is_last = self._is_computed(sequence) and start + size == len(sequence.block_table)
        if is_last:
            del self._sequences[request_id]
        chunk = self._outbox.put(request_id, size, tensor, ready, is_last=is_last)
        return replace(chunk, num_cached_tokens=sequence.num_cached_tokens)

    def _next_size(self, sequence: Sequence) -> int:
        """Blocks of the next chunk, launched and not copied out; the last ones count when the first token is known."""
        if sequence.status is not Status.RUNNING or sequence.request_id not in self._sequences:
            return 0
        num_blocks = len(sequence.block_table)
        if not self._is_computed(sequence):
            num_blocks = min(sequence.num_launched_tokens // self._block_size, num_blocks - 1)
        return min(num_blocks - self._outbox.next_block(sequence.request_id), self._max_chunk_blocks)

    def _is_computed(self, sequence: Sequence) -> bool:
        """Whether all of its KV is computed, and the token that its last chunk brings."""
        return sequence.num_remaining_tokens == 0 and self._outbox.first_token(sequence.request_id) is not None
