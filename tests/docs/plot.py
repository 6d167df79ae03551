"""Draws the README's plot from the tables of `docs/measured.md`: `python -m tests.docs.plot` writes it.

Knows no measurement: a figure that changes there changes here. The plot paints its own background, so that it can be
read on light and dark pages alike.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "docs" / "measured.md"
PLOT = ROOT / "docs" / "images" / "two-gpus.svg"

_SECTION = "## bench-two-gpus"
_WIDTH, _ROW, _BAR = 830, 50, 15
_TOP, _BOTTOM = 92, 34
_LABEL, _SPAN = 120, 215
_STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
    .title { font-weight: 600; font-size: 14px } .note { fill: #57606a; font-size: 12px } .end { text-anchor: end }
    .page { fill: #ffffff; stroke: #d0d7de } .axis { stroke: #8c959f }
    .disaggregated { fill: #0072b2 } .colocated { fill: #d55e00 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .note { fill: #9da7b3 } .page { fill: #0d1117; stroke: #30363d } .axis { stroke: #6e7681 }
      .disaggregated { fill: #56b4e9 } .colocated { fill: #f0883e }
    }"""


@dataclass(frozen=True)
class Panel:
    """Pairs of bars, disaggregated above colocated.

    Attributes:
        title: what is measured, with its unit.
        note: which way is better.
        pairs: (label, disaggregated, colocated), each value as it stands in the table.
    """

    title: str
    note: str
    pairs: tuple[tuple[str, str, str], ...]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every Markdown table, rows without the ruler."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [[_cells(line) for line in block.splitlines() if not re.fullmatch(r"[|\-: ]+", line)] for block in blocks]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def panels(measured: str) -> tuple[Panel, Panel]:
    """What the plot shows, from the text of `docs/measured.md`."""
    section = measured.split(_SECTION)[1].split("\n## ")[0]
    (table,) = tables(section)
    gaps, rates = _pairs(table, "chat: ITL "), _pairs(table, "goodput: ")
    return (
        Panel("Gap between tokens of a chat (ITL), ms", "shorter is better", gaps),
        Panel("Requests per second within the SLO", "longer is better; rows: bound of ITL, share of gaps", rates),
    )


def _pairs(table: list[list[str]], kind: str) -> tuple[tuple[str, str, str], ...]:
    """The rows of one kind."""
    rows = [(row[0].removeprefix(kind), row[1], row[2]) for row in table if row[0].startswith(kind)]
    return tuple((_label(name), _number(mine), _number(theirs)) for name, mine, theirs in rows)


def _label(name: str) -> str:
    """`p99`, or the bound in milliseconds and the share of gaps of `2 times idle (11 ms), 95% of gaps`."""
    match = re.search(r"\((\d+ ms)\), (\d+%)", name)
    return f"{match[1]}, {match[2]}" if match else name


def _number(cell: str) -> str:
    return cell.split()[0]


def draw(shown: Sequence[Panel]) -> str:
    """The plot as SVG."""
    height = _TOP + _ROW * max(len(panel.pairs) for panel in shown) + _BOTTOM
    body = "\n".join(line for column, panel in enumerate(shown) for line in _panel(panel, 24 + column * 395))
    legend = (
        '  <rect class="disaggregated" x="24" y="14" width="13" height="13"/>'
        '<text x="43" y="25">1 prefill + 1 decode engine</text>\n'
        '  <rect class="colocated" x="240" y="14" width="13" height="13"/>'
        '<text x="259" y="25">2 colocated engines, their best budget per step</text>'
    )
    about = "2 H100, Llama-3.1-8B shape: 32 chat streams beside 1.5 prompts of 8,000 tokens per second, 2026-11-27"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{about}">\n  <style>{_STYLE}\n  </style>\n'
        f'  <rect class="page" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="6"/>\n{legend}\n{body}\n'
        f'  <text class="note" x="24" y="{height - 14}">{about}</text>\n</svg>\n'
    )


def _panel(panel: Panel, left: int) -> Iterator[str]:
    most = max(float(value) for _, *pair in panel.pairs for value in pair)
    start = left + _LABEL
    yield f'  <text class="title" x="{left}" y="56">{panel.title}</text>'
    yield f'  <text class="note" x="{left}" y="74">{panel.note}</text>'
    for row, (label, *pair) in enumerate(panel.pairs):
        top = _TOP + row * _ROW
        yield f'  <text class="end" x="{start - 10}" y="{top + _BAR + 5}">{label}</text>'
        for place, (name, value) in enumerate(zip(("disaggregated", "colocated"), pair, strict=True)):
            width, y = _SPAN * float(value) / most, top + place * (_BAR + 2)
            yield f'  <rect class="{name}" x="{start}" y="{y}" width="{width:.1f}" height="{_BAR}"/>'
            yield f'  <text x="{start + width + 6:.1f}" y="{y + 12}">{value}</text>'
    bottom = _TOP + len(panel.pairs) * _ROW - 12
    yield f'  <line class="axis" x1="{start}" y1="{_TOP - 6}" x2="{start}" y2="{bottom}"/>'


if __name__ == "__main__":
    PLOT.write_text(draw(panels(MEASURED.read_text())))
    print(PLOT)
