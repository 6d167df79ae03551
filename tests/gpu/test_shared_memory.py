"""Device memory of another process on the same GPU: read where it is, also while that process is killed."""

import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch

from deployments.kv_transfer.local import Arena, Neighbours
from tests.waiting import wait_until

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from deployments.engine.kernels.cuda_blocks import gather_blocks, scatter_blocks  # noqa: E402

SHAPE = (4, 2, 16, 256, 8, 128)


def serve(pipe: Connection) -> None:
    arena = Arena(1 << 30, "cuda")
    kept = arena.allocate((1000,), torch.uint8)
    chunk = arena.allocate(SHAPE, torch.bfloat16)
    assert kept is not None
    assert chunk is not None
    chunk.copy_(torch.arange(chunk.numel(), device="cuda").view(SHAPE) % 251)
    torch.cuda.synchronize()
    pipe.send(arena.place_of(chunk))
    pipe.recv()


def test_a_killed_process_leaves_its_reader_unharmed():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    neighbours = Neighbours()
    chunk = neighbours.view(ours.recv(), SHAPE, torch.bfloat16)
    assert chunk is not None
    expected = (torch.arange(chunk.numel(), device="cuda").view(SHAPE) % 251).to(torch.bfloat16)
    assert torch.equal(chunk, expected)
    pool = torch.zeros((4, 2, 40, 256, 8, 128), dtype=torch.bfloat16, device="cuda")
    ids = torch.arange(3, 3 + SHAPE[2], device="cuda")
    for i in range(4000):
        scatter_blocks(pool, ids, chunk)
        if i == 300:
            process.kill()
    process.join()
    torch.cuda.synchronize()
    assert torch.equal(pool[:, :, 3:19], expected)
    wait_until(lambda: not len(neighbours))
    del chunk
    torch.cuda.synchronize()
    assert float(torch.ones(10, device="cuda").sum()) == 10


def test_an_arena_gives_out_device_memory_and_takes_it_back():
    arena = Arena(1 << 20, "cuda")
    first = arena.allocate((1 << 19,), torch.uint8)
    second = arena.allocate((1 << 18,), torch.bfloat16)
    assert first is not None
    assert second is not None
    assert arena.allocate((1,), torch.uint8) is None
    first.fill_(1)
    second.fill_(2.5)
    assert (int(first.sum()), float(second.float().mean())) == (1 << 19, 2.5)
    view = second[7:]
    del second
    assert arena.allocate((1,), torch.uint8) is None
    del view
    assert arena.allocate((1,), torch.uint8) is not None


@pytest.mark.parametrize("head_dim", [4, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_copied_out_and_in(dtype, head_dim):
    pool = torch.randn(3, 2, 10, 256, 2, head_dim, device="cuda").to(dtype)
    ids = torch.tensor([7, 0, 3], device="cuda")
    out = torch.empty(3, 2, 3, 256, 2, head_dim, dtype=dtype, device="cuda")
    gather_blocks(pool, ids, out)
    assert torch.equal(out, pool.index_select(2, ids))
    other = torch.zeros_like(pool)
    scatter_blocks(other, ids, out)
    assert torch.equal(other.index_select(2, ids), out)
    untouched = torch.tensor([1, 2, 4, 5, 6, 8, 9], device="cuda")
    assert not other.index_select(2, untouched).any()
