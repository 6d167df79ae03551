"""The tables of `docs/metrics.md`, for tests that hold them to a running system."""

import re
from dataclasses import dataclass

from tests.docs.pages import ROOT

_ROW = re.compile(
    r"^\| `(?P<name>[a-z_:0-9]+)` \| (?P<type>\w+) \| (?P<unit>[^|]+) \| (?P<labels>[^|]+) \| (?P<meaning>.+) \|$"
)


@dataclass(frozen=True)
class Described:
    """A metric as the page has it."""

    name: str
    type: str
    unit: str
    labels: tuple[str, ...]
    meaning: str


def described_metrics() -> list[Described]:
    """All of them, in their order."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    rows = [row for line in page.splitlines() if (row := _ROW.match(line))]
    return [
        Described(row["name"], row["type"], row["unit"], tuple(re.findall(r"`(\w+)`", row["labels"])), row["meaning"])
        for row in rows
    ]
