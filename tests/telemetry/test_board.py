"""The board for Grafana is one that people can read: panels side by side, with units, of the source that they chose."""

import json
import re
from itertools import combinations
from typing import Any

import pytest

from tests.docs.pages import ROOT

BOARD = json.loads((ROOT / "app" / "grafana" / "kvrelay.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
# What is in a query beside names of metrics.
FUNCTIONS = {"sum", "max", "count", "rate", "increase", "histogram_quantile"}
WIDTH = 24


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in ("xw", "yh"))


def test_no_two_panels_lie_on_each_other_or_beside_the_board() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    assert not [pair for pair in combinations(places, 2) if overlap(*pair)]
    assert all(place["x"] + place["w"] <= WIDTH for place in places)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_a_unit_says_what_it_is_and_asks_the_source_that_was_chosen(panel: dict[str, Any]) -> None:
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["title"] and panel["targets"]
    for asked in (panel, *panel["targets"]):
        assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == grouped - {"le"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_query_names_metrics_by_the_prefix_that_was_chosen_and_its_brackets_close(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        query = target["expr"]
        assert "[$__rate_interval]" in query or not re.search(r"rate|increase", query)
        assert [query.count(bracket) for bracket in "([{"] == [query.count(bracket) for bracket in ")]}"]
        bare = re.sub(r"by \([^)]*\)|\[\$__rate_interval\]|\$\{prefix\}_\w+", "", query)
        assert set(re.findall(r"[a-z_]{2,}", bare)) <= FUNCTIONS
