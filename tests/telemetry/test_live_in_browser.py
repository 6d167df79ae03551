"""The live page in headless Chromium, of services that are made up: with keys, ill, and with an evil model."""

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, async_playwright, expect
from starlette.applications import Starlette

from deployments.api.http import build_app
from deployments.api.keys import KeyRing
from deployments.load.reading import DECODE, PREFILL
from deployments.messages import FinishReason
from deployments.planner.shared import Decision
from deployments.telemetry.live import ServiceState, describe
from tests.api.fakes import INFO, FakeBackend, build_codec, playing, serving
from tests.telemetry.browser import GRAVE, IS_TOO_WIDE, LOOKS, axe_core, options
from tests.telemetry.minutes import Service
from tests.waiting import PATIENCE_S

PATIENCE_MS = PATIENCE_S * 1000
KEY, BLIND_KEY = "sk-watcher-0123456789", "sk-caller-0123456789"
TOP = "element => element.getBoundingClientRect().top"
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"


def service() -> Service:
    """That has worked for a minute."""
    service = Service()
    prefill, decode = service.start(PREFILL, "p"), service.start(DECODE, "d")

    def work() -> None:
        prefill.prompt_tokens += 80
        decode.generated_tokens += 10
        service.clients.first_token(0.3)
        service.clients.inter_token(0.02, 10)

    service.run(60, work)
    return service


def backend(service: Service, state: ServiceState) -> FakeBackend:
    """Shows that service as it is when it is asked."""

    class Shown(FakeBackend):
        async def live(self) -> Mapping[str, object]:
            return describe(state, service.history, (), service.now_s)

    return Shown(playing(EVIL, FinishReason.LENGTH).script)


@asynccontextmanager
async def page_of(url: str, complaints: list[str], **of_page: Any) -> AsyncIterator[Page]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(**options())
        page = await browser.new_page(**of_page)
        page.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        page.on("console", lambda said: complaints.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        await page.goto(url)
        yield page
        await browser.close()


async def check_for_everybody(page: Page) -> None:
    """By axe-core's rules everybody can use the page as it is now, in whichever look; and nothing is too wide."""
    for look, (scheme, width) in LOOKS.items():
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        await page.set_viewport_size({"width": width, "height": 900})
        await page.evaluate(axe_core())
        assert await page.evaluate(GRAVE) == [], look
        assert not await page.evaluate(IS_TOO_WIDE), look


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    file = tmp_path / "keys.toml"
    file.write_text(f'[watcher]\nkey = "{KEY}"\nmetrics = true\n[caller]\nkey = "{BLIND_KEY}"\n')
    return KeyRing(str(file))


def keyed_app(keys: KeyRing) -> Starlette:
    return build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO, keys=keys)


async def test_with_keys_it_asks_for_one_before_it_asks_for_numbers(keys: KeyRing) -> None:
    complaints: list[str] = []
    async with serving(keyed_app(keys)) as url, page_of("about:blank", complaints) as page:
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


async def test_a_key_that_may_not_read_numbers_is_told_why_and_forgotten(keys: KeyRing) -> None:
    complaints: list[str] = []
    async with serving(keyed_app(keys)) as url, page_of(url, complaints) as page:
        for key, said in (("sk-nobody-0123456789", "is not valid"), (BLIND_KEY, "may not read the metrics")):
            await page.get_by_label("API key").fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#key-form")).to_contain_text(said)
            assert await page.evaluate("sessionStorage.length") == 0
        await page.reload()
        await expect(page.get_by_label("API key")).to_be_focused()
    refused = "Failed to load resource: the server responded with a status of"
    assert complaints == [f"{refused} 401 (Unauthorized)", f"{refused} 403 (Forbidden)"], "what the browser itself says"


async def test_a_key_that_no_header_can_carry_is_refused_and_does_not_lock_the_page(keys: KeyRing) -> None:
    complaints: list[str] = []
    async with serving(keyed_app(keys)) as url, page_of(url, complaints) as page:
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
    tmp_path: Path,
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


async def test_a_service_that_has_too_much_to_do_is_not_said_to_be_gone() -> None:
    app = build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of("about:blank", []) as page:
        await page.route("**/live", lambda route: route.fulfill(status=429, headers={"retry-after": "7"}))
        await page.goto(url)
        words = "The service has too much to do to answer: asked again in 7 s."
        await expect(page.locator("#banner")).to_have_text(words)


async def test_a_long_reason_is_told_in_short_and_whole_where_one_points() -> None:
    reason = "no prefill replica answers (ActorDiedError: The actor died unexpectedly before finishing this task. " * 4
    state = ServiceState("m", "disaggregated", "1", (False, reason))
    async with serving(build_app(backend(service(), state), build_codec(), INFO)) as url, page_of(url, []) as page:
        status = page.locator("#status")
        await expect(status).to_have_text(re.compile(r"^Cannot serve: no prefill replica answers.{1,60}$"))
        assert len(await status.text_content() or "") <= 80
        await expect(status).to_have_attribute("title", f"Cannot serve: {reason}")


async def test_a_service_that_sleeps_serves_and_says_so_though_its_last_replica_is_gone() -> None:
    complaints: list[str] = []
    sleeper = service()
    sleeper.engines = {PREFILL: {}, DECODE: {}}
    sleeper.run(1)
    app = build_app(backend(sleeper, ServiceState("m", "disaggregated", "1", may_sleep=True)), build_codec(), INFO)
    async with serving(app) as url, page_of(url, complaints) as page:
        status = page.locator("#status")
        await expect(status).to_have_text("Serving: no decode replica runs, the next request starts one")
        await expect(status).to_have_class("status good")
    assert complaints == []


async def test_what_a_model_says_is_text_and_nothing_else() -> None:
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


async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one() -> None:
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


async def test_the_focus_goes_to_the_button_that_works() -> None:
    app = build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of(url, []) as page:
        await expect(page.locator("#legend")).to_be_visible()
        await page.route(re.compile("completions$"), lambda route: None)  # which nobody answers
        await page.get_by_label("Prompt", exact=True).fill("hi")
        await page.get_by_role("button", name="Send").press("Enter")
        await expect(page.get_by_role("button", name="Stop")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("#answer")).to_have_text("Stopped.")
        await expect(page.get_by_role("button", name="Send")).to_be_focused()


def ill_service() -> tuple[Service, ServiceState]:
    """One with a silent replica and one that is gone, refusals, and a planner that decides."""
    ill = service()
    ill.start(DECODE, "lost")
    ill.run(1)
    del ill.engines[DECODE]["lost"]
    ill.silent_s["d"] = 12.0
    ill.refusals["ttft", "low"] += 4
    ill.run(5)
    decision = Decision(1.0, {"decode": 1}, {"decode": 2}, "gaps of 80 ms", True)
    return ill, ServiceState("m", "disaggregated", "1", is_planned=True, decisions=[decision])


async def test_silence_refusals_and_decisions_are_told_and_a_service_that_is_gone() -> None:
    ill, state = ill_service()
    async with page_of("about:blank", []) as page:
        async with serving(build_app(backend(ill, state), build_codec(), INFO)) as url:
            await page.goto(url)
            await expect(page.locator(".pool.decode .state.silent")).to_have_text("silent for 12 s")
            await expect(page.locator("#status")).to_have_text("decode replica silent for 12 s")
            await expect(page.locator("#refusals")).to_contain_text(
                "the first token would come too late (low priority)4"
            )
            await expect(page.locator("#planner")).to_contain_text("decode 1 → 2 (dry run)gaps of 80 ms")
        await expect(page.locator("#banner")).to_contain_text("The service does not answer")
        await expect(page.locator("#live")).to_have_class("stale")


async def test_everybody_can_use_it_whatever_ails_the_service(keys: KeyRing) -> None:
    ill, state = ill_service()
    async with page_of("about:blank", [], bypass_csp=True) as page:
        async with serving(build_app(backend(ill, state), build_codec(), INFO)) as url:
            await page.goto(url)
            await page.get_by_label("Prompt", exact=True).fill("hi " * 40)
            await page.get_by_role("button", name="Send").click()
            await expect(page.locator("#answer .error")).to_be_visible()
            await check_for_everybody(page)
        await expect(page.locator("#live")).to_have_class("stale")
        await check_for_everybody(page)
        async with serving(build_app(backend(ill, state), build_codec(), INFO, keys=keys)) as url:
            await page.goto(url)
            await expect(page.get_by_label("API key")).to_be_focused()
            await check_for_everybody(page)


async def two_polls(page: Page) -> None:
    """What was answered before the second is shown."""
    for _ in range(2):
        async with page.expect_response("**/live"):
            pass


async def test_a_list_that_somebody_reads_stays_where_it_is_whatever_comes_to_it() -> None:
    busy = service()
    for number in range(20):
        busy.start(DECODE, f"d{number}")
        busy.run(1)
    decisions = [Decision(float(n), {"decode": 1}, {"decode": 2}, f"reason {n}", False) for n in range(20)]
    state = ServiceState("m", "disaggregated", "1", is_planned=True, decisions=decisions)
    async with serving(build_app(backend(busy, state), build_codec(), INFO)) as url, page_of(url, []) as page:
        for name in ("planner", "events"):
            entries = page.locator(f"#{name} ol")
            await entries.evaluate("list => { list.focus(); list.scrollTop = 120; }")
            entry = await entries.locator("li").nth(8).element_handle()
            assert entry is not None
            await entry.evaluate("entry => getSelection().selectAllChildren(entry)")
            top, words = await entry.evaluate(TOP), await entry.inner_text()
            await two_polls(page)
            decisions.append(Decision(20.0, {"decode": 2}, {"decode": 3}, f"newer than {name}", False))
            del decisions[0]
            busy.start(DECODE, f"newer than {name}")
            busy.run(1)
            await expect(entries.locator("li").first).to_contain_text(f"newer than {name}")
            await expect(entries).to_be_focused()
            assert await entry.inner_text() == words
            assert await entry.evaluate(TOP) == pytest.approx(top, abs=1), "an entry is 37 pixels high at least"
            selected = await page.evaluate("getSelection().toString()")
            assert selected.split() == words.split()


async def test_long_words_are_broken_wherever_they_stand() -> None:
    long = "abcdefghij" * 10
    state = ServiceState(
        long,
        "disaggregated",
        "1",
        (False, long),
        {DECODE: {long: 1}},
        is_planned=True,
        decisions=[Decision(1.0, {"decode": 1}, {"decode": 2}, long, False)],
    )
    wordy = service()
    for pool in (PREFILL, DECODE):
        wordy.start(pool, long)
        wordy.silent_s[long] = 500.0
    wordy.refusals[long, long] += 1
    wordy.run(5)
    spills = """() => [...document.querySelectorAll(".top, .tile, .card, .chart, #banner")]
      .filter(({ scrollWidth, clientWidth }) => scrollWidth > clientWidth).map(({ outerHTML }) => outerHTML)"""
    async with page_of("about:blank", []) as page:
        async with serving(build_app(backend(wordy, state), build_codec(), INFO)) as url:
            await page.goto(url)
            await expect(page.locator("#events")).to_contain_text(long)
            await check_words(page, spills)
        await expect(page.locator("#banner")).to_be_visible()
        await check_words(page, spills)


async def check_words(page: Page, spills: str) -> None:
    for width in (1280, 1100, 800, 375, 320):
        await page.set_viewport_size({"width": width, "height": 900})
        assert not await page.evaluate(IS_TOO_WIDE), width
        assert await page.evaluate(spills) == [], width


async def test_a_prompt_that_cannot_be_served_is_told_why() -> None:
    app = build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of(url, []) as page:
        await page.get_by_label("Prompt", exact=True).fill("hi " * 40)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer .error")).to_contain_text("the model's context is 64 tokens")
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()


async def test_the_waterfall_puts_prefill_before_the_first_token_and_shows_the_gap() -> None:
    times = {"queued_s": 0.1, "computing_s": 0.3}
    attempt = {
        "decode": {"replica": "d", "queued_s": 0.0, "next_token_s": 0.05},
        "prefill": [{"replica": "p", **times}],
        "handoff": {"bytes": 1, "hidden_s": 0.02, "exposed_s": 0.01},
        "sent_s": 0.1,
        "first_token_s": 0.9,
    }
    receipt = {"ingress_s": 0.1, "choices": [{"ttft_s": 1.0, "attempts": [attempt]}]}
    app = build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of(url, []) as page:
        script = "async ([receipt, totalS]) => (await import('/live/waterfall.js')).lanes(receipt, totalS)"
        rows = dict(await page.evaluate(script, [receipt, 2.0]))
    bars = {kind: (begin, length) for begin, length, kind, _ in (*rows["Prefill"], *rows["Decode"])}
    assert bars["between"] == pytest.approx((0.1, 0.5))
    assert bars["prefill"] == pytest.approx((0.7, 0.3)), "it ends where the first token was sent"
    assert bars["decode"] == pytest.approx((1.06, 0.94))
    assert [kind for _, _, kind, _ in rows["Hand-off"]] == ["prefill", "warn"], "as in the panel of hand-offs"


async def test_computing_a_prompt_has_one_colour_for_each_pool_and_being_found_has_others() -> None:
    worked = service()
    prefill, decode = worked.engines[PREFILL]["p"], worked.engines[DECODE]["d"]

    def work() -> None:
        prefill.prompt_tokens += 10
        decode.prompt_tokens += 10
        decode.prefix_hit_tokens += 10
        decode.delta_hit_tokens += 10

    worked.run(10, work)
    attempt = {"decode": {"replica": "d", "queued_s": 0.1, "computing_s": 0.3, "next_token_s": 0.1}, "prefill": []}
    receipt = {"ingress_s": 0.1, "choices": [{"ttft_s": 1.0, "attempts": [attempt]}]}
    app = build_app(backend(worked, ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of(url, []) as page:
        script = "async receipt => (await import('/live/waterfall.js')).lanes(receipt, 2)"
        bars = {words: kind for _, _, kind, words in dict(await page.evaluate(script, receipt))["Decode"]}
        swatches = page.locator("#where .swatch")
        await expect(swatches).to_have_count(4)
        kinds = dict(await swatches.evaluate_all("all => all.map(one => [one.textContent, one.classList[1]])"))
        assert f"k-{bars['computes the prompt']}" == kinds["computed by the decode pool"]
        assert bars["computes the prompt"] != bars["the rest"]
        for scheme, _ in LOOKS.values():
            await page.emulate_media(color_scheme=scheme)
            shown = "all => all.map(one => getComputedStyle(one, '::before').backgroundColor)"
            assert len(set(await swatches.evaluate_all(shown))) == 4
