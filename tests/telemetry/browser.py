"""A headless Chromium, Debian's or whichever there is, and what a page that it opens does that it should not."""

import os
import shutil
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Playwright

NAMES = ("chromium-headless-shell", "chromium", "google-chrome")


def options() -> dict[str, Any]:
    """To start it; on a machine without one a test is skipped, and fails where CI was to install it."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        told = "there is no Chromium: .ci/browser installs it"
        pytest.fail(told) if os.environ.get("CI") else pytest.skip(told)
    # As root, in a container: its own sandbox cannot be set up, and it opens our page alone.
    return {"executable_path": path, "chromium_sandbox": False}


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
