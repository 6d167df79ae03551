"""What several tests of the load tests use."""

from pathlib import Path

import pytest


@pytest.fixture
def file(tmp_path: Path):
    """Write a text to a file."""

    def write(text: str, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write
