"""docs/measured.md: one table for each benchmark, with its command, its hardware and its date."""

import re

import pytest

from tests.docs.pages import targets
from tests.docs.plot import MEASURED, tables

# Nobody has measured these yet, which the page says.
UNMEASURED: set[str] = set()
SECTIONS = MEASURED.read_text().split("\n## ")[1:]

each_section = pytest.mark.parametrize("section", SECTIONS, ids=[text.partition("\n")[0] for text in SECTIONS])


@each_section
def test_a_benchmark_has_one_table(section: str) -> None:
    assert len(tables(section)) == 1


@each_section
def test_a_benchmark_tells_its_command_its_hardware_and_its_date(section: str) -> None:
    title = section.partition("\n")[0].partition(":")[0]
    assert re.search(r"\*\*Command\*\*: `make [a-z-]+", section)
    assert not title.startswith("bench-") or f"**Command**: `make {title}" in section
    assert "**Hardware**" in section
    assert re.search(r"2026-\d\d-\d\d", section)


def test_every_benchmark_has_a_section() -> None:
    told = {title for text in SECTIONS if (title := text.partition(":")[0]).startswith("bench-")}
    assert told == {target for target in targets() if target.startswith("bench-")} - UNMEASURED
    assert all(f"`make {target}`" in MEASURED.read_text() for target in UNMEASURED)
