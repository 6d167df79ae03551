"""The KV pool on a CPU takes its share of the available memory, full of cached files or in a container, and no more."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from deployments.engine.config import EngineConfig
from deployments.engine.execution.memory import available_memory, total_memory
from deployments.engine.execution.sizing import choose_limits
from tests.engine.families import load

GIB = 1 << 30
V2 = {"memory.current": "3221225472\n", "memory.stat": "anon 1073741824\ninactive_file 1073741824\n"}
V1 = {"memory/memory.usage_in_bytes": "3221225472\n", "memory/memory.stat": "cache 5\ntotal_inactive_file 1073741824\n"}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The machine's memory: nearly all of it holds cached files."""
    found = SimpleNamespace(free=GIB // 64, available=16 * GIB, total=24 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    return found


@pytest.fixture
def no_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for look in (available_memory, total_memory):
        monkeypatch.setattr(look, "__defaults__", (tmp_path,))


@pytest.mark.usefixtures("memory", "no_container")
def test_cached_files_leave_the_pool_its_size() -> None:
    limits = choose_limits(load("llama"), EngineConfig())
    assert limits.num_blocks * limits.block_size * load("llama").kv_shape.bytes_per_token == GIB


@pytest.mark.usefixtures("no_container")
def test_a_pool_smaller_than_a_context_is_told_of(memory: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    memory.available = 64 * load("llama").kv_shape.bytes_per_token
    limits = choose_limits(load("llama"), EngineConfig(max_model_len=32))
    assert limits.num_blocks == 1
    assert "the KV pool holds 16 tokens, fewer than max_model_len (32)" in caplog.text
    assert "kv_cache_bytes" in caplog.text


@pytest.mark.usefixtures("memory", "no_container")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kv_cache_bytes": 10**15},
            r"kv_cache_bytes is 1000000000000000: the KV pool takes 931322\.57 GiB, the machine or container has 24\.00"
            r" GiB of memory, of which 16\.00 are available",
        ),
        ({"num_blocks": 25 * GIB // 8192}, r"num_blocks is 3276800: the KV pool takes 25\.00 GiB, .* 24\.00 GiB"),
        ({"block_size": 10**9}, r"block_size is 1000000000: the KV pool takes 476\.84 GiB, .* 24\.00 GiB"),
    ],
)
def test_a_pool_that_cannot_fit_is_refused_with_its_size(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_limits(load("llama"), EngineConfig(**settings))


@pytest.mark.usefixtures("memory")
def test_a_pool_that_cannot_fit_into_a_container_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (V2 | {"memory.max": f"{4 * GIB}\n"}).items():
        (tmp_path / name).write_text(text)
    for look in (available_memory, total_memory):
        monkeypatch.setattr(look, "__defaults__", (tmp_path,))
    with pytest.raises(ValueError, match=r"has 4\.00 GiB of memory, of which 2\.00 are available"):
        choose_limits(load("llama"), EngineConfig(kv_cache_bytes=5 * GIB))


@pytest.mark.usefixtures("memory", "no_container")
def test_a_pool_that_does_not_fit_now_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Other engines of the machine may end, or never fill theirs."""
    limits = choose_limits(load("llama"), EngineConfig(kv_cache_bytes=20 * GIB))
    assert limits.num_blocks == 20 * GIB // 8192
    assert "kv_cache_bytes is 21474836480: the KV pool takes 20.00 GiB" in caplog.text
    assert "of which 16.00 are available" in caplog.text
    caplog.clear()
    choose_limits(load("llama"), EngineConfig(kv_cache_bytes=15 * GIB))
    assert not caplog.text


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 16 * GIB),
        (V2 | {"memory.max": "max\n"}, 16 * GIB),
        (V2 | {"memory.max": f"{4 * GIB}\n"}, 2 * GIB),
        (V2 | {"memory.max": f"{GIB}\n"}, 0),
        (V1 | {"memory/memory.limit_in_bytes": f"{4 * GIB}\n"}, 2 * GIB),
        (V1 | {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 16 * GIB),
        (V2 | {"memory.max": "\n"}, 16 * GIB),
        (V1 | {"memory/memory.limit_in_bytes": "-1\n"}, 16 * GIB),
    ],
    ids=["none", "v2-unbounded", "v2", "v2-exceeded", "v1", "v1-unbounded", "v2-empty", "v1-negative"],
)
def test_a_containers_limit_bounds_what_is_available(tmp_path: Path, files: dict[str, str], available: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == available
    assert total_memory(tmp_path) == (24 if available == 16 * GIB else 1 if available == 0 else 4) * GIB
