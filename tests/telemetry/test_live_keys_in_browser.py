"""The live page of a service with keys: it asks for one, and tells why one does not do."""

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from playwright.async_api import expect

from deployments.api.keys import KeyRing
from tests.api.fakes import serving
from tests.telemetry.shown_page import BLIND_KEY, KEY, PageOf, key_ring, keyed_app

# All in the event loop that the browser has.
pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_with_keys_it_asks_for_one_before_it_asks_for_numbers(tmp_path: Path, page_of: PageOf) -> None:
    complaints: list[str] = []
    async with serving(keyed_app(key_ring(tmp_path))) as url, page_of("about:blank", complaints) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(url)
        await expect(page.locator("#key-form")).to_be_visible()
        await expect(page.locator("#live")).to_be_hidden()
        await expect(page.get_by_label("API key")).to_be_focused()
        assert f"{url}/live" not in asked
        await page.get_by_label("API key").fill(KEY)
        await page.keyboard.press("Enter")
        await expect(page.locator("#live")).to_be_visible()
        await page.reload()
        await expect(page.locator("#status")).to_have_text("Serving")
    assert complaints == []


async def test_a_key_that_may_not_read_numbers_is_told_why_and_forgotten(tmp_path: Path, page_of: PageOf) -> None:
    complaints: list[str] = []
    async with serving(keyed_app(key_ring(tmp_path))) as url, page_of(url, complaints) as page:
        for key, said in (("sk-nobody-0123456789", "is not valid"), (BLIND_KEY, "may not read the metrics")):
            await page.get_by_label("API key").fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#key-form")).to_contain_text(said)
            assert await page.evaluate("sessionStorage.length") == 0
        await page.reload()
        await expect(page.get_by_label("API key")).to_be_focused()
    refused = "Failed to load resource: the server responded with a status of"
    assert complaints == [f"{refused} 401 (Unauthorized)", f"{refused} 403 (Forbidden)"], "what the browser itself says"


async def test_a_key_that_no_header_can_carry_is_refused_and_does_not_lock_the_page(
    tmp_path: Path, page_of: PageOf
) -> None:
    complaints: list[str] = []
    async with serving(keyed_app(key_ring(tmp_path))) as url, page_of(url, complaints) as page:
        form = page.locator("#key-form")
        unseen, long = "has a character that no key has", "has 20,000 characters, and no header carries more"
        for key, said in (("sk\u2013watcher", unseen), ("x" * 20_000, long), ("sk-watcher\u200b", unseen)):
            await page.get_by_label("API key").fill(key)
            await page.keyboard.press("Enter")
            await expect(form).to_contain_text(said)
            assert await page.evaluate("sessionStorage.length") == 0
        for key, said in (("sk\u2013of an older page", unseen), ("x" * 20_000, long)):
            await page.evaluate("key => sessionStorage.setItem('kvrelay-key', key)", key)
            await page.reload()
            await expect(form).to_contain_text(said)
        await page.get_by_label("API key").fill(KEY)
        await page.keyboard.press("Enter")
        await expect(page.locator("#status")).to_have_text("Serving")
    assert complaints == []


async def test_a_key_whose_limit_is_used_up_is_told_so_and_left_alone_as_long_as_the_service_says(
    tmp_path: Path, page_of: PageOf
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[watcher]\nkey = "{KEY}"\nmetrics = true\nrequests_per_minute = 1\n')
    now_s, began = [0.0], datetime(2026, 1, 1)
    app = keyed_app(KeyRing(str(file), clock=lambda: now_s[0]))
    async with serving(app) as url, page_of("about:blank", []) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/live") else None)
        await page.add_init_script(f"if (location.host) sessionStorage.setItem('kvrelay-key', '{KEY}')")
        await page.clock.install(time=began)
        await page.goto(url)
        await expect(page.locator("#status")).to_have_text("Serving")
        await page.clock.pause_at(began + timedelta(hours=1))
        banner = page.locator("#banner")
        words = "Your key's limit of 1 requests per minute is used up, and this page makes 30: asked again in 60 s."
        await expect(banner).to_contain_text(words)
        await page.clock.run_for(59_000)
        await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        assert len(asked) == 2
        now_s[0] += 60.0
        await page.clock.run_for(1_000)
        await expect(banner).to_be_hidden()
        await expect(page.locator("#status")).to_have_text("Serving")
