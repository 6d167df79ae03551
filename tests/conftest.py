"""One thread of torch for all tests: the models are tiny, and threads that wait for each other only slow them.

`make test` runs two processes. Each begins with tests that start Ray, one after the other: much of their time is
waiting. All others follow, file by file.

Where there is no GPU Triton's kernels run in its interpreter; it must know before anything imports it. Machines are
shared, so hypothesis sets tests no bound of time either.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

# Every run of the suite tries the same examples; who asks for a number of them, as `make fuzz` does, gets new ones.
WANTED_EXAMPLES = os.environ.get("KVRELAY_EXAMPLES")

settings.register_profile(
    "kvrelay",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # to make examples up, which a deadline says nothing of
    max_examples=int(WANTED_EXAMPLES or 100),
    derandomize=WANTED_EXAMPLES is None,
)
settings.load_profile("kvrelay")


# As the Makefile tells it. Here and not later: another conftest.py may import what imports Triton.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

NICENESS_OF_RAY = 15  # as by default
# Two rows of tests that start Ray. After `tests/kv_transfer/actors` no other Ray can be driven by the same process.
RAY_ROWS = (
    (
        "tests/e2e/test_make_serve.py",
        "tests/kv_transfer/actors/",
        "tests/local/test_server.py",
    ),
    ("tests/e2e/",),
)
NO_RAY = len(RAY_ROWS)


def row_of(nodeid: str) -> int:
    """Which of the rows a test is in, or `NO_RAY`."""
    return next((row for row, paths in enumerate(RAY_ROWS) if nodeid.startswith(paths)), NO_RAY)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, which get whole scopes in this order
        items.sort(key=lambda item: row_of(item.nodeid))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ray's workers are nice to others. So that these do not hold up what takes longest, they are as nice."""
    if hasattr(item.config, "workerinput") and row_of(item.nodeid) == NO_RAY:
        os.nice(max(0, NICENESS_OF_RAY - os.nice(0)))


@pytest.hookimpl(optionalhook=True)  # on a machine with GPUs pytest-xdist may be missing
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class RowsOfRay(LoadScopeScheduling):  # type: ignore[misc]  # untyped
        """Whole files, and a row of those that start Ray as if it were one."""

        def _split_scope(self, nodeid: str) -> str:
            row = row_of(nodeid)
            return nodeid.partition("::")[0] if row == NO_RAY else f"row {row}"

    config.option.loadscopereorder = False  # it would begin with the files of the most tests
    return RowsOfRay(config, log)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    import torch

    from deployments.engine.kernels.cpu import start_threads

    # First: else the first kernel that runs gives torch all of the cores, which other processes use: three files of
    # tests/engine took 190 s so, and 60 s with one thread (2 shared cores, 2026-11-28).
    start_threads()
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_list_of_authorities() -> Iterator[None]:
    """All clients of httpx have one; each would read it anew, for 20 ms of a core, and nobody here speaks TLS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("httpx._transports.default.create_ssl_context", cache(httpx.create_ssl_context))
        yield


@pytest.fixture(autouse=True)
def same_numbers(one_thread: None) -> None:
    """What a test draws at random is the same in every run, whichever tests this process ran before."""
    import torch

    torch.manual_seed(0)


def _is_not_asyncio(record: logging.LogRecord) -> bool:
    return record.name != "asyncio"


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Without what asyncio says: that may be of a task which a test before this one has left."""
    caplog.handler.addFilter(_is_not_asyncio)
    yield caplog
    caplog.handler.removeFilter(_is_not_asyncio)
