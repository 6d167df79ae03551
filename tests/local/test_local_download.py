"""Who waits for a model of the hub is told how much of it has come; of one that is here, nothing."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from app.local import Launch, _wait_until_healthy
from app.local_checks import LocalError
from app.local_download import PERIOD_S, Downloads
from app.local_process import RunFolder, Server
from deployments.engine.model.files import BUNDLED_MODEL

MODEL = "some-owner/some-model"


@pytest.fixture
def blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the hub's cache has the model's files."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--some-owner--some-model" / "blobs"


def write(file: Path, size: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as part:
        part.write(os.urandom(size))


def test_what_has_come_is_told_once_in_a_while_and_only_if_it_is_more(blobs: Path) -> None:
    downloads = Downloads([MODEL], 100.0)
    assert downloads.news(100.0 + PERIOD_S) == [], "it has not begun"
    write(blobs / "abc.incomplete", 20_000_000)
    assert downloads.news(105.0 + PERIOD_S) == [], "a moment ago it was looked at"
    assert downloads.news(100.0 + 2 * PERIOD_S) == [f"downloading {MODEL}: 0.02 GB so far, 2 MB/s"]
    assert downloads.news(100.0 + 3 * PERIOD_S) == []
    (blobs / "abc.incomplete").rename(blobs / "abc")
    write(blobs / "def.incomplete", 40_000_000)
    assert downloads.news(100.0 + 4 * PERIOD_S) == [f"downloading {MODEL}: 0.06 GB so far, 4 MB/s"]


def test_parts_that_were_there_before_are_no_news(blobs: Path) -> None:
    write(blobs / "abc.incomplete", 5_000_000)
    assert Downloads([MODEL], 0.0).news(PERIOD_S) == []


def test_a_model_that_is_here_is_not_downloaded(blobs: Path, tmp_path: Path) -> None:
    downloads = Downloads([BUNDLED_MODEL, str(tmp_path)], 0.0)
    write(blobs / "abc", 5_000_000)
    assert downloads.news(PERIOD_S) == []


def test_whoever_waits_for_the_server_is_told(
    blobs: Path, folder: RunFolder, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    began_s = time.monotonic() - 2 * PERIOD_S
    downloads = Downloads([MODEL], began_s)
    write(blobs / "abc.incomplete", 20_000_000)
    launch = Launch("app:graph", port, 1, [], began_s, time.monotonic(), downloads)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.log.touch()
    with subprocess.Popen(["sleep", "600"]) as process, pytest.raises(LocalError, match="not ready"):
        try:
            _wait_until_healthy(folder, Server(process.pid, 0.0, port, ""), process, launch)
        finally:
            process.kill()
    assert f" s  downloading {MODEL}: 0.02 GB so far, 1 MB/s\n" in capsys.readouterr().out
