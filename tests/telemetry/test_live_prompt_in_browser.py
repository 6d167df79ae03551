"""The live page's box to try a prompt: whatever the model says, and however its answer ends."""

import json
import re

import pytest
from playwright.async_api import Route, expect

from deployments.api.http import build_app
from deployments.telemetry.live import ServiceState
from tests.api.fakes import INFO, build_codec, serving
from tests.telemetry.shown_page import EVIL, PageOf, backend, service

# All in the event loop that the browser has.
pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_what_a_model_says_is_text_and_nothing_else(page_of: PageOf) -> None:
    complaints: list[str] = []
    app = build_app(backend(service(), ServiceState(EVIL, "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of(url, complaints) as page:
        await page.get_by_label("Prompt", exact=True).fill("hi")
        await page.get_by_label("Tokens at most").fill("40")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer .token").first).to_have_text(EVIL)
        await expect(page.locator("#served b")).to_have_text(EVIL)
        assert await page.locator("#answer img, #answer script, #served img").count() == 0
    assert complaints == []


async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(page_of: PageOf) -> None:
    app = build_app(backend(service(), ServiceState("m", "colocated", "1")), build_codec(), INFO)
    said = {"choices": [{"index": 0, "text": "half of"}]}
    async with serving(app) as url, page_of(url, []) as page:
        await expect(page.locator("#legend")).to_be_hidden()
        await page.route(re.compile("completions$"), lambda route: route.fulfill(body=f"data: {json.dumps(said)}\n\n"))
        await page.get_by_label("Prompt", exact=True).fill("hi")
        await page.get_by_role("button", name="Send").press("Enter")
        await expect(page.locator("#answer .token")).to_have_text("half of")
        await expect(page.locator("#answer .error")).to_have_text("The connection ended before the answer did.")
        await expect(page.get_by_role("button", name="Send")).to_be_focused()


async def test_the_focus_goes_to_the_button_that_works(page_of: PageOf) -> None:
    app = build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of(url, []) as page:
        await expect(page.locator("#legend")).to_be_visible()
        unanswered: list[Route] = []
        await page.route(re.compile("completions$"), lambda route: unanswered.append(route))
        await page.get_by_label("Prompt", exact=True).fill("hi")
        await page.get_by_role("button", name="Send").press("Enter")
        await expect(page.get_by_role("button", name="Stop")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("#answer")).to_have_text("Stopped.")
        await expect(page.get_by_role("button", name="Send")).to_be_focused()
        await unanswered.pop().abort()  # else what waits for its end is found by a later test
