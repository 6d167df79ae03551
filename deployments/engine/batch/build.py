"""From scheduled sequences to the tensors of one step: a flat ragged batch, decodes first.

Shape suffixes: T tokens of the step, D decoding sequences, P prompt chunks, B logical blocks of the longest decode.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.engine.scheduling.scheduler import ScheduledSequence


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A run of more than one query token of one sequence.

    Attributes:
        query_start: where the chunk begins in the flat batch.
        num_queries: its tokens.
        context_len: tokens of the sequence that were computed before it.
        block_ids: (ceil((context_len + num_queries) / block_size),) int64 physical blocks.
    """

    query_start: int
    num_queries: int
    context_len: int
    block_ids: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one step.

    Attributes:
        input_ids: (T,) int64; `PENDING` for tokens that the step before draws.
        positions: (T,) int64, within each sequence, plus the sequence's `position_offset`.
        slot_mapping: (T,) int64, where each token's KV goes in the flattened pool.
        logits_indices: (S,) int64, flat positions whose logits are wanted, in the order of the sequences.
        decode_block_tables: (D, B) int64, padded with zeros.
        decode_lens: (D,) int64 tokens of each decoding sequence, the new one included.
        chunks: the prompt chunks, behind the D decodes.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    logits_indices: Tensor
    decode_block_tables: np.ndarray
    decode_lens: np.ndarray
    chunks: tuple[PromptChunk, ...]

    @property
    def num_decodes(self) -> int:
        return len(self.decode_lens)


def order_for_batch(scheduled: list[ScheduledSequence]) -> list[ScheduledSequence]:
    """Single-token runs first: they are attended together, whatever their lengths."""
    return sorted(scheduled, key=lambda s: s.num_tokens > 1)


def build_batch(scheduled: list[ScheduledSequence], block_size: int, device: torch.device) -> Batch:
    """Lay out one step.

    Args:
        scheduled: as `order_for_batch` leaves them.
        block_size: tokens per block.
        device: where the tensors go.
    """
    input_ids: list[int] = []
    positions, slots = [], []
    logits_indices: list[int] = []
    chunks: list[PromptChunk] = []
    decodes = [s for s in scheduled if s.num_tokens == 1]
    for item in scheduled:
        sequence, start = item.sequence, item.start
        end = start + item.num_tokens
        table = np.asarray(sequence.block_table[: -(-end // block_size)], dtype=np.int64)
        position = np.arange(start, end)
        if item.num_tokens > 1:
            block_ids = torch.from_numpy(table).to(device)
            chunks.append(PromptChunk(len(input_ids), item.num_tokens, start, block_ids))
        input_ids += sequence.token_ids[start:end]
        positions.append(position + sequence.position_offset)
        slots.append(table[position // block_size] * block_size + position % block_size)
        if item.samples:
            logits_indices.append(len(input_ids) - 1)
    return Batch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        slot_mapping=torch.from_numpy(np.concatenate(slots)).to(device),
        logits_indices=torch.tensor(logits_indices, dtype=torch.int64, device=device),
        decode_block_tables=_pad_tables(decodes, block_size),
        decode_lens=np.array([s.start + 1 for s in decodes], dtype=np.int64),
        chunks=tuple(chunks),
    )


def _pad_tables(decodes: list[ScheduledSequence], block_size: int) -> np.ndarray:
    num_blocks = [s.start // block_size + 1 for s in decodes]
    tables = np.zeros((len(decodes), max(num_blocks, default=0)), dtype=np.int64)
    for row, item, count in zip(tables, decodes, num_blocks, strict=True):
        row[:count] = item.sequence.block_table[:count]
    return tables
