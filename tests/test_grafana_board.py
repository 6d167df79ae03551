"""The board has the form of those that Ray gives its own Grafana, beside which it is loaded."""

import json
import re
import warnings
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
from ray.dashboard.modules.metrics import grafana_dashboard_factory as ray_boards

from tests.docs.pages import ROOT

Board = dict[str, Any]
BOARD: Board = json.loads((ROOT / "app" / "grafana" / "kvrelay.json").read_text())
NUM_COLUMNS = 24
# What is in a query beside names of metrics.
FUNCTIONS = {"sum", "max", "count", "rate", "increase", "histogram_quantile"}
# A source is an object since Grafana 8.3, which reads its name, as Ray's have it, as well; a refresh is a time, or off.
MAY_DIFFER = {"datasource", "refresh"}


@pytest.fixture(scope="module")
def rays() -> list[Board]:
    makers = [getattr(ray_boards, name) for name in dir(ray_boards) if name.startswith("generate_")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the files that Ray reads and leaves open (2.60)
        boards = [json.loads(make()[0]) for make in makers]
    assert len(boards) >= 5
    return boards


def panels_of(board: Board) -> Iterator[Board]:
    """Those within rows that are folded, too."""
    for panel in board["panels"]:
        yield panel
        yield from panel.get("panels", [])


def shapes(values: list[Any]) -> dict[str, set[type]]:
    """Of each key the types that it has."""
    found: dict[str, set[type]] = {}
    for value in values:
        for key, of_key in value.items():
            found.setdefault(key, set()).add(type(of_key))
    return found


def test_its_parts_have_the_types_that_rays_have(rays: list[Board]) -> None:
    def all_of(board: Board) -> dict[str, list[Any]]:
        panels = list(panels_of(board))
        return {
            "board": [board],
            "panel": panels,
            "grid": [panel["gridPos"] for panel in panels],
            "target": [target for panel in panels for target in panel.get("targets", [])],
            "variable": board["templating"]["list"],
        }

    ours = all_of(BOARD)
    for part, values in ours.items():
        known = shapes([value for board in rays for value in all_of(board)[part]])
        for key, types in shapes(values).items():
            assert key in MAY_DIFFER or key not in known or types & known[key], (part, key, types, known.get(key))


def test_it_stands_beside_rays_and_reads_the_same_source(rays: list[Board]) -> None:
    assert BOARD["uid"] not in {board["uid"] for board in rays}
    assert BOARD["title"] not in {board["title"] for board in rays}
    (source,) = [variable for variable in BOARD["templating"]["list"] if variable["type"] == "datasource"]
    theirs = [
        variable for board in rays for variable in board["templating"]["list"] if variable["name"] == "datasource"
    ]
    assert (source["name"], source["query"]) in {(variable["name"], variable["query"]) for variable in theirs}
    for panel in panels_of(BOARD):
        for asker in [panel, *panel.get("targets", [])] if panel["type"] != "row" else []:
            assert asker["datasource"] == {"type": "prometheus", "uid": f"${{{source['name']}}}"}, panel["title"]


def test_its_panels_have_names_of_their_own_and_lie_beside_each_other(rays: list[Board]) -> None:
    panels = list(panels_of(BOARD))
    assert len({panel["id"] for panel in panels}) == len(panels)
    # "graph" is what Grafana called time series when Ray's were made.
    known = {panel["type"] for board in rays for panel in panels_of(board)} | {"timeseries"}
    assert {panel["type"] for panel in panels} <= known, known
    for panel in panels:
        refs = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(refs)) == len(refs), panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= NUM_COLUMNS, panel["title"]
    for one, other in combinations(panels, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])


def overlap(one: Board, other: Board) -> bool:
    return all(
        one[at] < other[at] + other[length] and other[at] < one[at] + one[length]
        for at, length in (("x", "w"), ("y", "h"))
    )


def test_each_panel_has_a_unit_and_its_legend_names_what_its_query_groups_by() -> None:
    for panel in panels_of(BOARD):
        assert panel["type"] == "row" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel.get("targets", []):
            groups = re.findall(r"by \(([^)]*)\)", target["expr"])
            grouped = {label for group in groups for label in group.split(", ")} - {"le"}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == grouped, target["expr"]


def test_queries_name_metrics_by_the_prefix_that_was_chosen_alone() -> None:
    for query in [target["expr"] for panel in panels_of(BOARD) for target in panel.get("targets", [])]:
        bare = re.sub(r"by \([^)]*\)|\[\$__rate_interval\]|\$\{prefix\}_\w+", "", query)
        assert set(re.findall(r"[a-z_]{2,}", bare)) <= FUNCTIONS, query
