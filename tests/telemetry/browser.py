"""A headless Chromium, Debian's or whichever there is, and what a page that it opens does that it should not."""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Playwright

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
AXE = Path(__file__).parents[1] / "clients" / "node" / "node_modules" / "axe-core" / "axe.min.js"
# With axe-core on the page: the rules that it breaks gravely, each with where; and whether it is wider than the window.
GRAVE = """async () => (await axe.run()).violations
  .filter(({ impact }) => impact === "serious" || impact === "critical")
  .map(({ id, nodes }) => [id, nodes.map(({ html, any }) => `${html}: ${any.map(({ message }) => message)}`)])"""
IS_TOO_WIDE = "() => document.documentElement.scrollWidth > innerWidth"
# As people see a page: colours, and how wide the window is.
LOOKS: dict[str, tuple[Literal["light", "dark"], int]] = {
    "light": ("light", 1280),
    "dark": ("dark", 1280),
    "phone": ("light", 375),
    "dark phone": ("dark", 375),
}


def options() -> dict[str, Any]:
    """To start it; on a machine without one a test is skipped, and fails where CI was to install it."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        told = "there is no Chromium: .ci/browser installs it"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    # As root, in a container: its own sandbox cannot be set up, and it opens our page alone.
    return {"executable_path": path, "chromium_sandbox": False}


def axe_core() -> str:
    """Its script, for a page whose policy is set aside; see `options` for where there is none."""
    if not AXE.exists():
        told = "there is no axe-core: `make test` installs it, where npm is there"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    return AXE.read_text()


def launch(playwright: Playwright) -> Browser:
    """Start it."""
    return playwright.chromium.launch(**options())


@dataclass
class Visit:
    """A page that was opened.

    Attributes:
        complaints: what stands in its console as a warning or an error, and errors of its scripts.
        hosts: all that it asked anything.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda asked: self.hosts.add(urlsplit(asked.url).netloc))
