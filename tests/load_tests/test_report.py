"""The page that a load test ends with: what is on it, and that it needs nothing but itself."""

import base64
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from load_tests.plots import deployment_colors, goodput_against_load, itl_cdf, latency_over_time
from load_tests.report import number, shown, slo_in_words, table, write_report
from load_tests.samples import Run
from load_tests.stats import Slo
from tests.load_tests.runs import build_run, build_sample, synthetic_run

SLO = Slo({"chat": 0.5, "long": 3.0}, itl_s=0.12)
ABOUT = {
    "command": "python -m load_tests.run mixed",
    "versions": {"python": "3.11", "ray": {"core": "2.60"}},
    "loads": [0.5, 1],
    "scenario": "duration_s: 20\nclasses:\n  chat: {}",
    "model": None,
}
LATE = "requests were sent late"
VOID = {"meta", "img", "br", "link", "hr", "input"}


@dataclass
class Page(HTMLParser):
    """A parsed page: its text, how often each tag is there, and attributes by name; refuses tags left open."""

    text: str = ""
    tags: Counter[str] = field(default_factory=Counter)
    attributes: dict[str, list[str]] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += f" {data}"


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    page.close()
    assert not page.open
    page.text = " ".join(page.text.split())
    return page


def build_runs() -> list[Run]:
    """Two deployments at two loads, two rounds each; one invalid run has a valid twin, two have none."""
    invalid = {("colocated", 2.0, 1), ("disaggregated", 1.0, 0), ("disaggregated", 1.0, 1)}
    return [
        synthetic_run(
            name, load, number, [f"{LATE}: {name}"] if (name, load, number) in invalid else [], stall_s=stall_s
        )
        for load in (1.0, 2.0)
        for number in (0, 1)
        for name, stall_s in (("colocated", 0.8), ("disaggregated", 0.15))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("report") / "new"
    write_report(path, "Load test: mixed", build_runs(), SLO, ABOUT, ["Stay colocated.", "It is enough."])
    return path


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return read(folder / "report.html")


def test_the_page_needs_nothing_from_elsewhere(folder, page):
    assert not page.tags.keys() & {"script", "link", "iframe"}
    assert page.attributes.get("href", []) == []
    assert all(source.startswith("data:image/png;base64,") for source in page.attributes["src"])
    style = (folder / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_every_plot_is_a_file_and_on_the_page(folder, page):
    files = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert files.keys() == {"goodput.png", "itl-chat.png", "itl-long.png", "latency.png"}
    embedded = [base64.b64decode(source.partition(",")[2]) for source in page.attributes["src"]]
    assert sorted(embedded) == sorted(files.values())
    assert all(page.attributes["alt"])


def test_findings_come_first(page):
    assert page.text.index("Stay colocated.") < page.text.index("It is enough.") < page.text.index("Plots")


def test_every_class_deployment_and_kind_of_error_is_on_the_page(page):
    for words in ("chat", "long", "colocated", "disaggregated", "errors: – ", "errors: timeout 2 "):  # noqa: RUF001
        assert words in page.text


def test_every_invalid_run_has_a_box_with_its_problems(page):
    assert page.attributes["class"].count("box") == 3
    for words in ("colocated, load 2, round 1", "disaggregated, load 1, round 0", "disaggregated, load 1, round 1"):
        assert f"Invalid run: {words} {LATE}: {words.partition(',')[0]}" in page.text


def test_an_invalid_run_is_shown_only_where_no_valid_one_is(page):
    runs = build_runs()
    assert [run for run in runs if run not in shown(runs)] == [runs[6]]
    assert "1 invalid run is left out" in page.text
    assert "disaggregated (invalid)" in page.text
    assert "colocated (invalid)" not in page.text


def test_what_the_servers_say_stands_side_by_side(page):
    assert "kv_transferred_bytes 0 1,500,000,000 0 1,500,000,000" in page.text


def test_how_the_generator_did_is_said_of_every_run(page):
    assert page.text.count("0.400 2.00 11.0 driver 12%, client-0 31%") == 8


def test_what_reproduces_it_is_a_list_of_definitions(folder, page):
    assert (page.tags["dl"], page.tags["dt"], page.tags["pre"]) == (3, 8, 1)
    assert f"<pre>{ABOUT['scenario']}</pre>" in (folder / "report.html").read_text()
    assert "loads 0.5, 1" in page.text


def test_names_cannot_become_markup(tmp_path):
    runs = [build_run([build_sample("<b>"), build_sample("<b>", error="<script>x</script>")], "<i>", problems=["<u>"])]
    path = write_report(tmp_path, "<s>", runs, Slo({"<b>": 1.0}, 0.1), {"<q>": "<em>\n"}, ["<a href=http://x>"])
    page = read(path)
    assert not page.tags.keys() & {"b", "i", "script", "u", "s", "q", "a"}
    for words in ("<b>", "<i>", "<u>", "<s>", "<q>", "<script>x</script> 1", "<a href=http://x>"):
        assert words in page.text


@pytest.mark.parametrize(
    ("loads", "slo", "files"),
    [
        ((1.0, 2.0), None, {"itl-chat.png", "latency.png"}),
        ((1.0,), SLO, {"itl-chat.png", "latency.png"}),
    ],
)
def test_goodput_needs_an_slo_and_several_loads_and_itl_needs_gaps(tmp_path, loads, slo, files):
    samples = [build_sample(), build_sample("long", gaps_s=[])]
    page = read(write_report(tmp_path, "One", [build_run(samples, load=load) for load in loads], slo, {}, []))
    assert {path.name for path in tmp_path.glob("*.png")} == files
    assert ("goodput" in page.text) == (slo is not None)


def test_a_run_in_which_nothing_succeeded_is_reported(tmp_path):
    failed = build_sample(ttft_s=None, gaps_s=[], error="HTTP 503")
    page = read(write_report(tmp_path, "Down", [build_run([failed] * 3)], SLO, {}, []))
    assert "3 requests in 1 run; errors: HTTP 503 3" in page.text
    assert "0.0% met the SLO" in page.text


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        write_report(tmp_path, "None", [], None, {}, [])


def test_the_slo_is_said_in_words():
    words = (
        "A request is good if it finished, its first token came within 0.500 s (chat), 3.00 s (long), and {} at most "
    )
    assert slo_in_words(SLO) == words.format("95% of its gaps between tokens took") + "120 ms."
    mean = Slo(SLO.ttft_s, 0.0125, itl_quantile=None)
    assert slo_in_words(mean) == words.format("its mean gap between tokens took") + "12.5 ms."


def test_the_text_table_has_one_line_per_deployment_load_and_class():
    samples = [build_sample(ttft_s=0.2, gaps_s=[0.1, 0.3])] * 4
    failed = build_sample("long", ttft_s=None, gaps_s=[], error="timeout")
    runs = [build_run([*samples, failed]), build_run(samples, "split", 2.0, problems=["late"])]
    head, *lines = (line.split() for line in table(runs, Slo({"chat": 0.5, "long": 1.0}, 0.3)).splitlines())
    assert head[:5] == ["deployment", "load", "class", "n", "errors"]
    none = "–"  # noqa: RUF001
    assert lines == [
        ["colocated", "1", "chat", "4", none, "200", "200", "200", "300", "300", "600", "0.200"],
        ["colocated", "1", "long", "1", "timeout", "1", *[none] * 6, "0"],
        ["split", "(invalid)", "2", "chat", "4", none, "200", "200", "200", "300", "300", "600", "0.200"],
        ["split", "(invalid)", "2", "long", "0", none, *[none] * 6, "0"],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (999.6, "1,000"), (1234567.0, "1,234,567")],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert number(value) == text


def test_a_deployment_keeps_its_colour_when_another_is_missing():
    runs = [synthetic_run(name, load) for load in (1.0, 2.0) for name in ("colocated", "disaggregated")]
    colors = deployment_colors(runs)
    of_all = {line.get_label(): line.get_color() for line in goodput_against_load(runs, SLO, colors).axes[0].lines}
    of_one = {line.get_label(): line.get_color() for line in itl_cdf(runs[1:2], "chat", SLO, colors).axes[0].lines}
    (one,) = [color for label, color in of_one.items() if str(label).startswith("disaggregated")]
    assert one == of_all["disaggregated"] != of_all["colocated"]


def test_latency_has_a_column_per_deployment_on_shared_log_axes():
    runs = [synthetic_run(name, round=number) for number in (1, 0) for name in ("colocated", "disaggregated")]
    axes = latency_over_time(runs).axes
    assert [axis.get_title() for axis in axes] == ["colocated", "disaggregated", "", ""]
    for left, right in (axes[:2], axes[2:]):
        assert left.get_yscale() == right.get_yscale() == "log"
        assert left.get_ylim() == right.get_ylim()


def test_p99_is_marked_on_the_tail_of_itl():
    gaps_s = [number / 1e3 for number in range(1, 102)]
    axis = itl_cdf([build_run([build_sample(gaps_s=gaps_s)])], "chat", SLO).axes[0]
    (mark,) = (line for line in axis.lines if line.get_marker() == "o")
    assert np.ravel(mark.get_xydata()) == pytest.approx([100.0, 0.01])
