"""Every page of the documentation: its links, files, settings and targets exist, and the figures are those measured."""

import re

import pytest

from app.arguments import arguments_of
from app.config import AppConfig
from tests.docs.pages import PAGES, ROOT, anchors, exists, links, paths, spans, targets
from tests.docs.plot import MEASURED, PLOT, draw, panels

# Files of a model, of a user, or of another project.
FOREIGN = {"INPUT.csv", "OUTPUT.csv"}
# The log tells what was; a file that it names may have moved since.
LIVING = [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")]

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_living_page = pytest.mark.parametrize("page", LIVING, ids=lambda page: page.name)


@each_page
def test_links_lead_to_files_and_headings(page):
    for link in links(page):
        assert link.page.exists(), f"{link.page} is linked"
        assert not link.anchor or link.anchor in anchors(link.page), f"{link.page.name} has no #{link.anchor}"


@each_living_page
def test_files_and_folders_that_are_named_exist(page):
    assert [path for path in paths(page.read_text()) if path not in FOREIGN and not exists(path)] == []


def test_what_is_tried_of_hostile_inputs_names_tests_that_exist():
    named = re.findall(r"\| `(tests/[^`]+\.py)`: `(test_[^`]+)` \|$", (ROOT / "docs" / "hostile.md").read_text(), re.M)
    assert len(named) == (ROOT / "docs" / "hostile.md").read_text().count("\n| ") - 1
    assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


@each_living_page
def test_settings_that_are_named_exist(page):
    known = {argument.name.removesuffix(".KEY") for argument in arguments_of(AppConfig)}
    known |= {name for argument in known for name in _folders(argument)}
    named = {re.split(r"[=*]", span)[0].rstrip(".") for span in spans(page.read_text()) if _is_setting(span)}
    assert sorted(named - known) == []


def _is_setting(span: str) -> bool:
    return (
        not span.endswith(".py")
        and re.fullmatch(r"(?:engine|ingress|prefill|decode|routing|tier)\.[a-z_.]+(?:=\S+)?", span) is not None
    )


def _folders(argument: str) -> list[str]:
    parts = argument.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


@each_living_page
def test_targets_of_make_that_are_named_exist(page):
    named = {target for span in spans(page.read_text()) for target in re.findall(r"\bmake ([a-z][a-z-]*)", span)}
    assert named <= targets()


def test_the_plot_is_what_the_measured_figures_draw():
    assert PLOT.read_text() == draw(panels(MEASURED.read_text())), "run python -m tests.docs.plot"


def test_the_log_has_an_index_of_all_its_entries_in_their_order():
    log = (ROOT / "docs" / "log.md").read_text()
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d: .*)", log, flags=re.MULTILINE)
    index = log.split("## Index\n")[1].split("\n## ")[0]
    listed = re.findall(r"^- .*?\[(.*?)\]\(#(.*?)\): \S", index, flags=re.MULTILINE)
    assert [anchor for _, anchor in listed] == [
        anchor for anchor in anchors(ROOT / "docs" / "log.md") if anchor[0] == "2"
    ]
    assert len(entries) == len(listed)


def test_contributing_and_the_readme_name_every_room():
    rooms = [path.parent for path in (ROOT / "deployments").rglob("__init__.py") if path.parent.name != "deployments"]
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        assert [room.name for room in rooms if f"{room.name}/" not in text] == []
