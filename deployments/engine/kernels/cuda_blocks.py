"""Copies of whole blocks of KV in and out of the pool on a GPU, one kernel for all layers, in Triton."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes that one program copies.
_PIECE_BYTES = 32768


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """Copy blocks of every layer out of the pool.

    Args:
        pool: (num_layers, 2, num_blocks, block_size, H_kv, width of a head), contiguous; a block's bytes a multiple
            of 8.
        block_ids: (N,) int64.
        out: (num_layers, 2, N, block_size, H_kv, width of a head), contiguous, on the same GPU or one it can reach.
    """
    _copy(pool, block_ids, out, into_pool=False)


def scatter_blocks(pool: Tensor, block_ids: Tensor, chunk: Tensor) -> None:
    """Copy a chunk into blocks of the pool; arguments as those of `gather_blocks`."""
    _copy(pool, block_ids, chunk, into_pool=True)


def _copy(pool: Tensor, block_ids: Tensor, chunk: Tensor, into_pool: bool) -> None:
    num_planes, num_blocks, count = pool.shape[0] * pool.shape[1], pool.shape[2], len(block_ids)
    words = pool[0, 0, 0].numel() * pool.itemsize // 8
    piece = min(_PIECE_BYTES // 8, triton.next_power_of_2(words))
    _copy_blocks[(triton.cdiv(words, piece), count, num_planes)](
        pool.view(-1).view(torch.int64),
        block_ids,
        chunk.view(-1).view(torch.int64),
        num_blocks,
        count,
        WORDS=words,
        PIECE=piece,
        INTO_POOL=into_pool,
        num_warps=8,
    )


@triton.jit
def _copy_blocks(
    pool, block_ids, chunk, num_blocks, count, WORDS: tl.constexpr, PIECE: tl.constexpr, INTO_POOL: tl.constexpr
):
    """One piece of one block of one plane: the keys or the values of a layer."""
    word = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    index, plane = tl.program_id(1), tl.program_id(2).to(tl.int64)
    mask = word < WORDS
    in_pool = (plane * num_blocks + tl.load(block_ids + index)) * WORDS + word
    in_chunk = (plane * count + index) * WORDS + word
    if INTO_POOL:
        tl.store(pool + in_pool, tl.load(chunk + in_chunk, mask=mask), mask=mask)
    else:
        tl.store(chunk + in_chunk, tl.load(pool + in_pool, mask=mask), mask=mask)
