"""What `up` looks at before it starts anything."""

import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from app import local_checks
from app.local_checks import MIN_TEMP_BYTES, LocalError, check_temp_folder, tell_of_memory
from app.local_process import RunFolder
from tests.local.commands import call

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """By folder; what is not named has plenty."""
    free: dict[str, int] = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**50, 0, free.get(str(path), 2**40)))
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    return free


def test_a_folder_without_room_is_named_with_what_is_needed(free_bytes: dict[str, int]) -> None:
    check_temp_folder()
    free_bytes["/tmp"] = MIN_TEMP_BYTES - 1
    with pytest.raises(LocalError, match=r"511 MiB are free in /tmp, and Ray's files need 512; .* TMPDIR"):
        check_temp_folder()


def test_a_folder_whose_path_is_too_long_for_rays_sockets_is_named(free_bytes: dict[str, int]) -> None:
    tempfile.tempdir = "/" + "t" * 25
    check_temp_folder()
    tempfile.tempdir = "/" + "t" * 26
    with pytest.raises(LocalError, match="has a path of 27 bytes, and Ray's sockets in it allow 26"):
        check_temp_folder()


def test_little_shared_memory_is_told_and_is_no_error(
    free_bytes: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert tell_of_memory() is None
    free_bytes["/dev/shm"] = 64 * 2**20
    assert (tell_of_memory() or "").startswith("64 MiB are free in /dev/shm: KV goes ")
    monkeypatch.setattr(local_checks, "SHARED_MEMORY", tmp_path / "none")
    assert (tell_of_memory() or "").startswith("0 MiB")


def test_a_run_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path, port: int) -> None:
    (tmp_path / "file").touch()
    refused = call(
        RunFolder(tmp_path / "file" / "run"), "up", "--port", str(port), "--app", "tests.tiny_graphs:healthy"
    )
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert str(tmp_path / "file") in refused.stderr
