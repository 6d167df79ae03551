"""One thread for all tests of the engine: the models are tiny, and threads that wait for each other only slow them."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
