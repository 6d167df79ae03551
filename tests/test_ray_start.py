"""A Ray that does not come up is started again. No Ray runs."""

import os
import subprocess

import psutil
import pytest
import ray
from ray._private import services

from tests.local.commands import is_alive
from tests.ray_start import SETTINGS, start_ray


def test_what_a_start_that_failed_has_left_is_ended_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[psutil.Process] = []

    def init(**options: object) -> None:
        assert options["num_cpus"] == 8
        assert [os.environ[name] for name in SETTINGS] == ["120", "120000"]
        if left:
            assert not is_alive(left[0])
            return
        left.append(psutil.Process(subprocess.Popen(["sleep", "300"]).pid))
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    start_raylet = services.start_raylet
    start_ray(num_cpus=8)
    assert left
    assert services.start_raylet is start_raylet


def test_a_ray_that_never_comes_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise TimeoutError("no node")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TimeoutError, match="no node"):
        start_ray()
