"""One thread of torch for all tests: the models are tiny, and threads that wait for each other only slow them.

Where there is no GPU Triton's kernels run in its interpreter; it must know before anything imports it.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tests that start Ray run one after the other in one process: two cores hold one Ray and the other tests.
STARTS_RAY = ("/tests/e2e/", "/tests/kv_transfer/test_direct.py")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell pytest-xdist what belongs together: what starts Ray, and else the tests of a file, which share fixtures."""
    for item in items:
        path = item.path.as_posix()
        group = "ray" if any(place in path for place in STARTS_RAY) else path
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
