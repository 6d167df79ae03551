"""Tests of one GPU, by as many processes as `-n` says. None takes more of the card than its share."""

import gc
from collections.abc import Iterator

import pytest
import torch

# Eight of them fit onto a card of 140 GiB, beside what other tests of their processes keep.
_SHARE = 16 << 30


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Have an engine that takes what is left find a card of so many bytes, and run out of memory beyond them."""

    def mem_get_info(device: object = None) -> tuple[int, int]:
        return max(0, _SHARE - torch.cuda.memory_reserved()), _SHARE

    gc.collect()
    torch.cuda.empty_cache()
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    torch.cuda.set_per_process_memory_fraction(_SHARE / torch.cuda.get_device_properties(0).total_memory)
    yield _SHARE
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()
