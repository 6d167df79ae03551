"""FlashAttention 3 is used only where it is installed, runs, and computes the same; the kernel itself needs a GPU."""

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from deployments.engine.attention import flash3
from deployments.engine.kernels.arguments import Scores

PLAIN = Scores(1.0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU with the package, whose kernel is right."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", ModuleType("fa3_fwd_interface"))
    monkeypatch.setattr(flash3, "_try", lambda *_: 1e-3)
    flash3._can_attend.cache_clear()
    yield
    flash3._can_attend.cache_clear()


def test_a_kernel_that_computes_the_same_is_used_and_tried_once(monkeypatch):
    tried: list[tuple[int, float | None]] = []

    def count(dtype: torch.dtype, head_dim: int, softcap: float | None) -> float:
        tried.append((head_dim, softcap))
        return 1e-3

    monkeypatch.setattr(flash3, "_try", count)
    assert [flash3.can_attend(torch.bfloat16, head_dim, PLAIN) for head_dim in (128, 128, 64)] == [True] * 3
    assert flash3.can_attend(torch.bfloat16, 128, Scores(1.0, softcap=50.0))
    assert tried == [(128, None), (64, None), (128, 5.0)]


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((9, 0), torch.float16)])
def test_other_gpus_and_types_are_not_tried(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert not flash3.can_attend(dtype, 128, PLAIN)


def test_without_the_package_it_says_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", None)
    with caplog.at_level(logging.INFO):
        assert not flash3.can_attend(torch.bfloat16, 128, PLAIN)
    assert "pip install 'kvrelay[gpu]'" in caplog.text


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch, caplog, difference):
    monkeypatch.setattr(flash3, "_try", lambda *_: difference)
    assert not flash3.can_attend(torch.bfloat16, 128, PLAIN)
    assert "is off by" in caplog.text


def test_a_wheel_that_does_not_run_here_is_not_used(monkeypatch, caplog):
    def no_kernel(*_: object) -> float:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(flash3, "_try", no_kernel)
    assert not flash3.can_attend(torch.bfloat16, 128, PLAIN)
    assert "no kernel image is available" in caplog.text
