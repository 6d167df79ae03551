"""Copies of whole blocks of KV in and out of the pool on a GPU, one kernel for all layers, in Triton."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes that one program copies at once.
_PIECE_BYTES = 32768
# Chunks come in beside steps, whose programs need room on the multiprocessors: so few, as it takes to fill a link.
_SCATTER_PROGRAMS = 32


def gather_blocks(pool: Tensor, block_ids: Tensor, out: Tensor) -> None:
    """Copy blocks of every layer out of the pool.

    Args:
        pool: (num_layers, 2, num_blocks, block_size, H_kv, width of a head), contiguous; a block's bytes a multiple
            of 8.
        block_ids: (N,) int64.
        out: (num_layers, 2, N, block_size, H_kv, width of a head), on the same GPU or one it can reach; contiguous, or
            some neighbouring blocks of what is.
    """
    _copy(pool, block_ids, out, None)


def scatter_blocks(pool: Tensor, block_ids: Tensor, chunk: Tensor) -> None:
    """Copy a chunk into blocks of the pool, by few programs; arguments as those of `gather_blocks`."""
    _copy(pool, block_ids, chunk, _SCATTER_PROGRAMS)


def _copy(pool: Tensor, block_ids: Tensor, chunk: Tensor, scatter_programs: int | None) -> None:
    """Into the pool by so many programs at most; None: out of it, by as many as there are pieces."""
    num_planes, num_blocks, count = pool.shape[0] * pool.shape[1], pool.shape[2], len(block_ids)
    words = pool[0, 0, 0].numel() * pool.itemsize // 8
    piece = min(_PIECE_BYTES // 8, triton.next_power_of_2(words))
    num_items = triton.cdiv(words, piece) * count * num_planes
    _copy_blocks[(min(num_items, scatter_programs or num_items),)](
        pool.view(-1).view(torch.int64),
        block_ids,
        chunk.as_strided((8 // chunk.itemsize,), (1,)).view(torch.int64),  # where it begins
        num_blocks,
        count,
        chunk.stride(1) * chunk.itemsize // 8,
        num_items,
        WORDS=words,
        PIECE=piece,
        INTO_POOL=scatter_programs is not None,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["count", "num_items"])  # or chunks of other sizes would compile their own
def _copy_blocks(
    pool,
    block_ids,
    chunk,
    num_blocks,
    count,
    plane_words,
    num_items,
    WORDS: tl.constexpr,
    PIECE: tl.constexpr,
    INTO_POOL: tl.constexpr,
):
    """Each item is one piece of one block of one plane, the keys or the values of a layer; a program takes each nth."""
    PIECES: tl.constexpr = (WORDS + PIECE - 1) // PIECE
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        word = item % PIECES * PIECE + tl.arange(0, PIECE)
        index, plane = item // PIECES % count, (item // PIECES // count).to(tl.int64)
        mask = word < WORDS
        in_pool = (plane * num_blocks + tl.load(block_ids + index)) * WORDS + word
        in_chunk = plane * plane_words + index * WORDS + word
        if INTO_POOL:
            tl.store(pool + in_pool, tl.load(chunk + in_chunk, mask=mask), mask=mask)
        else:
            tl.store(chunk + in_chunk, tl.load(pool + in_pool, mask=mask), mask=mask)
