"""A Ray that does not come up is started again. No Ray runs."""

import os
import subprocess

import psutil
import pytest
import ray
from ray._private import services
from ray._private.node import Node

from tests.local.commands import is_alive
from tests.ray_start import SETTINGS, UNUSED, start_ray


def test_what_a_start_that_failed_has_left_is_ended_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[psutil.Process] = []

    def init(**options: object) -> None:
        assert options["num_cpus"] == 8
        assert [os.environ[name] for name in SETTINGS] == ["120", "120000"]
        assert not {getattr(Node, name) for name in UNUSED} & starts
        if left:
            assert not is_alive(left[0])
            return
        left.append(psutil.Process(subprocess.Popen(["sleep", "300"]).pid))
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    start_raylet, starts = services.start_raylet, {getattr(Node, name) for name in UNUSED}
    start_ray(num_cpus=8)
    assert left
    assert services.start_raylet is start_raylet
    assert {getattr(Node, name) for name in UNUSED} == starts


def test_a_ray_that_never_comes_up_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise TimeoutError("no node")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TimeoutError, match="no node"):
        start_ray()
