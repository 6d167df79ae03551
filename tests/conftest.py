"""One thread of torch for all tests: the models are tiny, and threads that wait for each other only slow them.

`make test` runs two processes. One of them has all tests that start Ray, one after the other.

Where there is no GPU Triton's kernels run in its interpreter; it must know before anything imports it. Machines are
shared, so hypothesis sets tests no bound of time either.
"""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("kvrelay", deadline=None)
settings.load_profile("kvrelay")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


STARTS_RAY = ("tests/e2e/", "tests/kv_transfer/test_direct.py", "tests/test_local.py")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(place in item.path.as_posix() for place in STARTS_RAY):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
