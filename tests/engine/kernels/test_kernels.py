"""Kernels on a CPU against torch, in shapes that do not fit their tiles as well."""

import pkgutil
from collections import Counter
from importlib import import_module

import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher
from torch import Tensor

from deployments.engine import kernels
from deployments.engine.kernels.cpu import silu_mul, use_torch_threads
from deployments.engine.kernels.cpu_attention import decode_attention
from deployments.engine.kernels.cpu_matmul import PackedWeight, linear

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def test_torch_has_one_thread_in_tests_whatever_kernel_has_run() -> None:
    use_torch_threads()  # as an engine does before each step
    silu_mul(randn(2, 8))
    assert torch.get_num_threads() == 1


def test_no_two_kernels_have_one_name() -> None:
    """By names a process tells apart what several others have compiled and cached."""
    names = [f"{kernels.__name__}.{found.name}" for found in pkgutil.iter_modules(kernels.__path__)]
    modules = [import_module(name) for name in names if name.rpartition(".")[2].startswith("cpu")]
    compiled = {
        id(value): value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)
    }
    counts = Counter((kernel.py_func.__module__, kernel.py_func.__qualname__) for kernel in compiled.values())
    assert len(counts) > 20
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(("num_columns", "depth"), [(1, 1), (3, 7), (48, 16), (77, 100), (130, 1600), (96, 768)])
@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 7, 8, 13, 127, 300])
def test_a_packed_product_equals_torchs(num_rows: int, num_columns: int, depth: int) -> None:
    x, weight, bias = randn(num_rows, depth), randn(num_columns, depth), randn(num_columns)
    expected = (x.double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(linear(x, PackedWeight(weight, bias)), expected, rtol=1e-5, atol=1e-4)


def test_a_packed_product_takes_rows_that_lie_apart() -> None:
    x, weight = randn(6, 64)[:, 8:40], randn(50, 32)
    torch.testing.assert_close(linear(x, PackedWeight(weight, None)), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_row_of_a_packed_product_has_the_same_bits_whatever_is_beside_it() -> None:
    x, weight = randn(200, 900), PackedWeight(randn(130, 900), None)
    whole = linear(x, weight)
    for start, end in ((0, 1), (5, 8), (190, 200), (64, 192)):
        assert torch.equal(linear(x[start:end], weight), whole[start:end])


@pytest.mark.parametrize("head_dim", [4, 16, 40, 64, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (6, 3), (9, 3), (4, 1), (5, 1), (16, 2), (32, 4)])
def test_decode_attention_serves_every_shape_of_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    block_size, lens = 8, (1, 8, 21)
    keys, values = randn(2, 12, block_size, num_kv_heads, head_dim)
    tables = torch.randperm(12, generator=GENERATOR).view(3, 4)
    queries, scaling = randn(3, num_heads, head_dim), head_dim**-0.5
    splits = np.array([(0, 0, 1), (1, 0, 8), (2, 0, 10), (2, 10, 21)], np.int64)
    scratch = np.empty((4, num_heads, head_dim), np.float32), *np.empty((2, 4, num_heads), np.float32)
    out = np.empty((3, num_heads, head_dim), np.float32)
    where = tables.numpy(), splits, np.array([0, 1, 2, 4])
    arguments = queries.numpy(), keys.numpy(), values.numpy(), *where, np.float32(scaling), *scratch, out
    decode_attention(*arguments)
    for query, table, length, result in zip(queries, tables, lens, out, strict=True):
        key, value = (part[table].flatten(0, 1)[:length].double() for part in (keys, values))
        key, value = (part.repeat_interleave(num_heads // num_kv_heads, dim=1) for part in (key, value))
        scores = torch.einsum("hd,thd->ht", query.double(), key) * scaling
        expected = torch.einsum("ht,thd->hd", scores.softmax(-1), value).float()
        torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-5)
