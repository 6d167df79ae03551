"""One headless Chromium for all tests of the live page in it: a start takes two seconds of a core."""

from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio
from playwright.async_api import Browser, async_playwright

from tests.telemetry.browser import options
from tests.telemetry.shown_page import PageOf, open_page


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(**options())
        yield browser
        await browser.close()


@pytest.fixture
def page_of(browser: Browser) -> PageOf:
    """Opens a page: `open_page`."""
    return partial(open_page, browser)
