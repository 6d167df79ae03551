"""Brings prompts that prefill engines compute into the pool, chunk by chunk, until the first token is here as well."""

from torch import Tensor

from deployments.engine.handoff.inbox import Inbox
from deployments.engine.handoff.states import State
from deployments.engine.kv.copies import KVCopies
from deployments.engine.scheduling.sequence import Sequence
from deployments.engine.stats import EngineStats
from deployments.kv_groups import BLOCK_AXIS
from deployments.messages import ChunkReady, DrawnToken


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
        self._sequences: dict[str, Sequence] = {}

    def add(self, sequence: Sequence) -> None:
        """Await the blocks of a reserved sequence behind those that were found here."""
        first_block = sequence.num_computed_tokens // self._block_size
        self._inbox.reserve(sequence.request_id, range(first_block, len(sequence.block_table)))
        self._sequences[sequence.request_id] = sequence

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
        sequence = self._sequences[chunk.request_id]
        if len(blocks) < chunk.num_blocks:
            tensor = tensor.narrow(BLOCK_AXIS, chunk.num_blocks - len(blocks), len(blocks)).contiguous()
        if blocks:
            self._copies.import_([sequence.block_table[i] for i in blocks], tensor, chunk.layers)
        sequence.limit_cached(chunk.num_cached_tokens)
        if self._inbox.fill(chunk) is not State.READY:
            return None
        self._stats.delta_hit_tokens += max(0, sequence.num_cached_tokens - sequence.num_computed_tokens)
        return self._sequences.pop(chunk.request_id), self._inbox.claim(chunk.request_id)

    def give_up(self, request_id: str) -> Sequence | None:
        """Await nothing more; the sequence keeps what has come, up to the first gap. None: it is not awaited."""
        num_arrived = self._inbox.drop(request_id)
        if num_arrived is None:
            return None
        sequence = self._sequences.pop(request_id)
        # The last token is computed here: it draws the next one.
        usable = min(num_arrived, (sequence.num_prompt_tokens - 1) // self._block_size)
        sequence.receive(usable * self._block_size)
        return sequence

    def discard(self, request_id: str) -> None:
        """The request is over. Unknown ones are no error."""
        self._inbox.drop(request_id)
        self._sequences.pop(request_id, None)
