"""Copies of whole blocks, where a GPU is on it and else in Triton's interpreter."""

import pytest
import torch

from tests.engine.interpreted import DEVICE  # before the kernels

from deployments.engine.kernels import cuda_blocks  # isort: skip
from deployments.engine.kernels.cuda_blocks import gather_blocks, scatter_blocks  # isort: skip


@pytest.mark.parametrize("num_programs", [1, 5, 64])
@pytest.mark.parametrize("width", [8, 12], ids=["whole pieces", "a piece that is not full"])
def test_blocks_go_out_and_in_by_however_few_programs(
    num_programs: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_blocks, "_PIECE_BYTES", 256)
    monkeypatch.setattr(cuda_blocks, "_SCATTER_PROGRAMS", num_programs)
    shape, ids = (3, 2, 7, 16, 2, width), [5, 0, 3]
    numbers = torch.arange(torch.Size(shape).numel(), device=DEVICE) % 251
    pool, other = numbers.view(shape).to(torch.bfloat16), torch.full(shape, -1.0, device=DEVICE, dtype=torch.bfloat16)
    block_ids = torch.tensor(ids, device=DEVICE)
    chunk = torch.empty((*shape[:2], len(ids), *shape[3:]), dtype=pool.dtype, device=DEVICE)
    gather_blocks(pool, block_ids, chunk)
    assert torch.equal(chunk, pool[:, :, ids])
    scatter_blocks(other, block_ids, chunk)
    expected = torch.full_like(other, -1.0)
    expected[:, :, ids] = pool[:, :, ids]
    assert torch.equal(other, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["numbers", "codes and their scales"])
def test_some_blocks_of_a_larger_chunk_go_in_as_they_lie(dtype: torch.dtype) -> None:
    shape = (3, 2, 7, 16, 2, 12)
    chunk = (torch.arange(torch.Size(shape).numel(), device=DEVICE) % 251).view(shape).to(dtype)
    pool = torch.full((5, 2, 9, 16, 2, 12), 255, device=DEVICE, dtype=dtype)
    expected = pool.clone()
    ids = [8, 1, 4]
    scatter_blocks(pool[1:4], torch.tensor(ids, device=DEVICE), chunk.narrow(2, 2, 3))
    expected[1:4, :, ids] = chunk[:, :, 2:5]
    assert torch.equal(pool, expected)
    scatter_blocks(pool[1:3], torch.tensor(ids, device=DEVICE), chunk[1:3].narrow(2, 4, 3))
    expected[1:3, :, ids] = chunk[1:3, :, 4:]
    assert torch.equal(pool, expected)
