"""The KV pool on a CPU takes its share of the available memory, full of cached files or in a container."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from deployments.engine.config import EngineConfig
from deployments.engine.execution.memory import available_memory
from deployments.engine.execution.sizing import choose_limits
from tests.engine.families import load

GIB = 1 << 30
V2 = {"memory.current": "3221225472\n", "memory.stat": "anon 1073741824\ninactive_file 1073741824\n"}
V1 = {"memory/memory.usage_in_bytes": "3221225472\n", "memory/memory.stat": "cache 5\ntotal_inactive_file 1073741824\n"}


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The machine's memory: nearly all of it holds cached files."""
    found = SimpleNamespace(free=GIB // 64, available=16 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: found)
    return found


@pytest.fixture
def no_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(available_memory, "__defaults__", (tmp_path,))


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
    ],
    ids=["none", "v2-unbounded", "v2", "v2-exceeded", "v1", "v1-unbounded"],
)
def test_a_containers_limit_bounds_what_is_available(tmp_path: Path, files: dict[str, str], available: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == available
