"""Reading the project's Markdown: code blocks, links, headings, and the paths that a text names."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# A path in the text may leave out the package it is in.
BASES = (ROOT, ROOT / "app", ROOT / "deployments", ROOT / "deployments" / "engine", ROOT / "docs", ROOT / "load_tests")

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|yaml|md|env|csv|svg|png)|[\w-]+(?:/[\w-]+)*/")


@dataclass(frozen=True)
class Link:
    """Where a link goes: a page, and a heading on it if there is one."""

    page: Path
    anchor: str


def blocks(text: str, language: str) -> list[str]:
    """Bodies of the fenced code blocks in a language."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """Every command of the shell blocks, whole and without comments."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"\s+# .*", "", line).strip())]


def spans(text: str) -> list[str]:
    """What stands in `code` outside the blocks."""
    return _SPAN.findall(_FENCE.sub("", text))


def links(page: Path) -> Iterator[Link]:
    """Links of a page to files of this repository."""
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield Link((page.parent / path).resolve() if path else page, anchor)


def anchors(page: Path) -> list[str]:
    """How links name the headings of a page, as GitHub makes the names."""
    headings = re.findall(r"^#+ (.*)", _FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def paths(text: str) -> list[str]:
    """Files and folders that a text names in `code`."""
    return [span for span in spans(text) if _PATH.fullmatch(span)]


def exists(path: str) -> bool:
    return any((base / path).exists() for base in BASES)


@cache
def targets() -> frozenset[str]:
    """What `make help` lists."""
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return frozenset(re.findall(r"^  ([a-z-]+)  ", listed, flags=re.MULTILINE))
