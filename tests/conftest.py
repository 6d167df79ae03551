"""One thread of torch for all tests: the models are tiny, and threads that wait for each other only slow them.

`make test` runs two processes. One of them has all tests that start Ray, one after the other, and begins with them:
they take as long as all others together.

Where there is no GPU Triton's kernels run in its interpreter; it must know before anything imports it. Machines are
shared, so hypothesis sets tests no bound of time either.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

from deployments.engine.kernels.cpu import start_threads

settings.register_profile("kvrelay", deadline=None)
settings.load_profile("kvrelay")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


NICENESS_OF_RAY = 15  # as by default
STARTS_RAY = ("tests/e2e/", "tests/kv_transfer/test_direct.py", "tests/local/test_server.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, which get whole scopes in this order
        items.sort(key=lambda item: not item.nodeid.startswith(STARTS_RAY))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ray's workers are nice to others. So that these do not hold up what takes longest, they are as nice."""
    if hasattr(item.config, "workerinput") and not item.nodeid.startswith(STARTS_RAY):
        os.nice(max(0, NICENESS_OF_RAY - os.nice(0)))


@pytest.hookimpl(optionalhook=True)  # on a machine with GPUs pytest-xdist may be missing
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class OneProcessForRay(LoadScopeScheduling):  # type: ignore[misc]  # untyped
        """Whole files, and all that start Ray as if they were one."""

        def _split_scope(self, nodeid: str) -> str:
            return "ray" if nodeid.startswith(STARTS_RAY) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # it would begin with the files of the most tests
    return OneProcessForRay(config, log)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    # First: else the first kernel that runs gives torch all of the cores, which other processes use: three files of
    # tests/engine took 190 s so, and 60 s with one thread (2 shared cores, 2026-11-28).
    start_threads()
    torch.set_num_threads(1)
