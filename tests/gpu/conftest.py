"""Tests of one GPU, by as many processes as `-n` says: each takes its place; those that fill the card wait for it."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_PLACES = Path(tempfile.gettempdir()) / f"kvrelay-gpu-tests-{os.getuid()}"


@pytest.fixture(autouse=True)
def place_on_the_card(request: pytest.FixtureRequest) -> Iterator[None]:
    """One of many; for a test with the mark `whole_card` the only one."""
    is_whole = request.node.get_closest_marker("whole_card") is not None
    _PLACES.mkdir(exist_ok=True)
    with (_PLACES / "turn").open("w") as turn, (_PLACES / "card").open("w") as card:
        # Whoever waits for the card has the turn meanwhile, so that no other test begins before it.
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(card, fcntl.LOCK_EX if is_whole else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        yield
