"""Brings prompts that prefill engines compute into the pool, chunk by chunk, until the first token is here as well."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deployments.engine.handoff.inbox import Inbox
from deployments.engine.handoff.states import State
from deployments.engine.kv.copies import KVCopies
from deployments.engine.scheduling.block_tables import BlockTables
from deployments.engine.scheduling.sequence import Sequence
from deployments.engine.stats import EngineStats
from deployments.kv_groups import BLOCK_AXIS
from deployments.messages import ChunkReady, DrawnToken


class _Awaited(NamedTuple):
    """A sequence, and when its blocks are its own on a GPU, too."""

    sequence: Sequence
    are_free: torch.cuda.Event | None


class Importer:
    """Owns the sequences whose blocks are filled from outside, until they are whole. For the engine's thread.

    Args:
        inbox: what is awaited.
        copies: of the pool.
        block_size: tokens per block.
        stats: where hits go.
    """

    def __init__(self, inbox: Inbox, copies: KVCopies, block_size: int, stats: EngineStats) -> None:
        self._stats = stats
        self._inbox = inbox
        self._copies = copies
        self._block_size = block_size
        self._awaited: dict[str, _Awaited] = {}

    def add(self, sequence: Sequence) -> None:
        """Await the blocks of a reserved sequence behind those that were found here.

        Steps that were launched before may still use these blocks, for whoever had them; later ones do not.
        """
        first_block = sequence.num_computed_tokens // self._block_size
        self._inbox.reserve(sequence.request_id, range(first_block, sequence.tables.num_blocks))
        self._awaited[sequence.request_id] = _Awaited(sequence, self._copies.fence())

    def fill(self, chunk: ChunkReady, tensor: Tensor) -> tuple[Sequence, DrawnToken] | None:
        """Copy a chunk, or some layers of it, into its blocks.

        Returns:
            The sequence and its first token once all is here, which ends the hand-off; None before, and if nobody waits
            for the chunk any more.

        Raises:
            ValueError: the tensor does not fit the pool, or its blocks were not reserved; nothing was changed.
        """
        blocks = self._inbox.expect(chunk)
        if blocks is None:
            return None
        sequence, are_free = self._awaited[chunk.request_id]
        if blocks:
            self._copies.import_(_wanted(sequence.tables, chunk, blocks, tensor), chunk.layers, are_free)
        sequence.limit_cached(chunk.num_cached_tokens)
        if self._inbox.fill(chunk) is not State.READY:
            return None
        self._stats.delta_hit_tokens += max(0, sequence.num_cached_tokens - sequence.num_computed_tokens)
        del self._awaited[chunk.request_id]
        return sequence, self._inbox.claim(chunk.request_id)

    def give_up(self, request_id: str) -> Sequence | None:
        """Await nothing more; the sequence keeps what has come, up to the first gap. None: it is not awaited."""
        num_arrived = self._inbox.drop(request_id)
        if num_arrived is None:
            return None
        sequence, _ = self._awaited.pop(request_id)
        # The last token is computed here: it draws the next one.
        usable = min(num_arrived, (sequence.num_prompt_tokens - 1) // self._block_size)
        sequence.receive(usable * self._block_size)
        return sequence

    def discard(self, request_id: str) -> None:
        """The request is over. Unknown ones are no error."""
        self._inbox.drop(request_id)
        self._awaited.pop(request_id, None)


def _wanted(
    tables: BlockTables, chunk: ChunkReady, blocks: range, tensor: Tensor
) -> Iterator[tuple[list[int], Tensor]]:
    """Where what a chunk has of its last blocks goes, and that; it has what groups hold of it behind each other."""
    sent, end = tables.spans(range(chunk.start_block, blocks.stop), tables.num_passed), 0
    if len(blocks) == chunk.num_blocks:
        yield [table[i] for table, span in zip(tables.each, sent, strict=True) for i in span], tensor
        return
    for table, span in zip(tables.each, sent, strict=True):
        wanted = span[max(0, blocks.start - span.start) :]
        end += len(span)
        if wanted:
            yield [table[i] for i in wanted], tensor.narrow(BLOCK_AXIS, end - len(wanted), len(wanted))
