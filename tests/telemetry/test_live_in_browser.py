"""The live page of services that are ill, asleep, wordy or busy, in headless Chromium."""

import re
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from deployments.api.http import build_app
from deployments.load.reading import DECODE, PREFILL
from deployments.planner.shared import Decision
from deployments.telemetry.live import ServiceState
from tests.api.fakes import INFO, build_codec, serving
from tests.telemetry.browser import IS_TOO_WIDE, LOOKS
from tests.telemetry.minutes import Service
from tests.telemetry.shown_page import PageOf, backend, check_for_everybody, key_ring, service

# All in the event loop that the browser has.
pytestmark = pytest.mark.asyncio(loop_scope="session")

TOP = "element => element.getBoundingClientRect().top"


async def test_a_service_that_has_too_much_to_do_is_not_said_to_be_gone(page_of: PageOf) -> None:
    app = build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of("about:blank", []) as page:
        await page.route("**/live", lambda route: route.fulfill(status=429, headers={"retry-after": "7"}))
        await page.goto(url)
        words = "The service has too much to do to answer: asked again in 7 s."
        await expect(page.locator("#banner")).to_have_text(words)


async def test_a_long_reason_is_told_in_short_and_whole_where_one_points(page_of: PageOf) -> None:
    reason = "no prefill replica answers (ActorDiedError: The actor died unexpectedly before finishing this task. " * 4
    state = ServiceState("m", "disaggregated", "1", (False, reason))
    async with serving(build_app(backend(service(), state), build_codec(), INFO)) as url, page_of(url, []) as page:
        status = page.locator("#status")
        await expect(status).to_have_text(re.compile(r"^Cannot serve: no prefill replica answers.{1,60}$"))
        assert len(await status.text_content() or "") <= 80
        await expect(status).to_have_attribute("title", f"Cannot serve: {reason}")


async def test_a_service_that_sleeps_serves_and_says_so_though_its_last_replica_is_gone(page_of: PageOf) -> None:
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


async def test_silence_refusals_and_decisions_are_told_and_a_service_that_is_gone(page_of: PageOf) -> None:
    ill, state = ill_service()
    async with page_of("about:blank", [], is_hurried=True) as page:
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


async def test_everybody_can_use_it_whatever_ails_the_service(tmp_path: Path, page_of: PageOf) -> None:
    ill, state = ill_service()
    async with page_of("about:blank", [], bypass_csp=True, is_hurried=True) as page:
        async with serving(build_app(backend(ill, state), build_codec(), INFO)) as url:
            await page.goto(url)
            await page.get_by_label("Prompt", exact=True).fill("hi " * 40)
            await page.get_by_role("button", name="Send").click()
            await expect(page.locator("#answer .error")).to_be_visible()
            await check_for_everybody(page)
        await expect(page.locator("#live")).to_have_class("stale")
        await check_for_everybody(page)
        async with serving(build_app(backend(ill, state), build_codec(), INFO, keys=key_ring(tmp_path))) as url:
            await page.goto(url)
            await expect(page.get_by_label("API key")).to_be_focused()
            await check_for_everybody(page)


async def two_polls(page: Page) -> None:
    """What was answered before the second is shown."""
    for _ in range(2):
        async with page.expect_response("**/live"):
            pass


async def test_a_list_that_somebody_reads_stays_where_it_is_whatever_comes_to_it(page_of: PageOf) -> None:
    busy = service()
    for number in range(20):
        busy.start(DECODE, f"d{number}")
        busy.run(1)
    decisions = [Decision(float(n), {"decode": 1}, {"decode": 2}, f"reason {n}", False) for n in range(20)]
    state = ServiceState("m", "disaggregated", "1", is_planned=True, decisions=decisions)
    async with (
        serving(build_app(backend(busy, state), build_codec(), INFO)) as url,
        page_of(url, [], is_hurried=True) as page,
    ):
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


async def test_long_words_are_broken_wherever_they_stand(page_of: PageOf) -> None:
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
    async with page_of("about:blank", [], is_hurried=True) as page:
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


async def test_a_prompt_that_cannot_be_served_is_told_why(page_of: PageOf) -> None:
    app = build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO)
    async with serving(app) as url, page_of(url, []) as page:
        await page.get_by_label("Prompt", exact=True).fill("hi " * 40)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer .error")).to_contain_text("the model's context is 64 tokens")
        await expect(page.get_by_role("button", name="Send")).to_be_enabled()


async def test_the_waterfall_puts_prefill_before_the_first_token_and_shows_the_gap(page_of: PageOf) -> None:
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


async def test_computing_a_prompt_has_one_colour_for_each_pool_and_being_found_has_others(page_of: PageOf) -> None:
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
