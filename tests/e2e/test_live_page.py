"""The live page as people see it, in headless Chromium: under load, with a prompt of theirs, while an engine dies."""

import itertools
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from deployments import planner_log
from deployments.planner.shared import Decision
from tests.e2e.conftest import ANSWER_TIMEOUT_S, MODEL_NAME, Scaled, Service
from tests.telemetry.browser import GRAVE, IS_TOO_WIDE, LOOKS, Visit, axe_core, launch
from tests.waiting import wait_until

QUESTION = "Tell me, please, in a few words, what a river is and where it goes. " * 6
NUM_TOKENS = 12
PATIENCE_MS = ANSWER_TIMEOUT_S * 1000

_numbers = itertools.count(1)
Open = Callable[..., Visit]
T = TypeVar("T")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Opens the page of a service; at the end nothing is in its console, and it asked nobody else."""
    visits: list[tuple[Visit, str]] = []

    def open_page(service: Service, prepare: Callable[[Page], None] = lambda _: None, **options: Any) -> Visit:
        """`bypass_csp=True`: for axe-core, whose own script the page's policy keeps out."""
        page = browser.new_page(**options)
        prepare(page)
        page.set_default_timeout(PATIENCE_MS)
        visits.append((Visit(page), urlsplit(service.url).netloc))
        page.goto(f"{service.url}/")
        expect(page.locator("#live")).to_be_visible()
        return visits[-1][0]

    yield open_page
    for opened, host in visits:
        opened.page.close()
        assert opened.complaints == []
        assert opened.hosts == {host}


@contextmanager
def busy(service: Service) -> Iterator[None]:
    """Two callers ask one thing after the other."""
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            body = {"model": MODEL_NAME, "prompt": new_question(), "max_tokens": NUM_TOKENS, "ignore_eos": True}
            httpx.post(f"{service.url}/v1/completions", json=body, timeout=300).raise_for_status()

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            yield
        finally:
            is_over.set()
    for asked in asking:
        asked.result()


def apart(call: Callable[[], T]) -> T:
    """What a call gives that asks Ray and waits: not in the thread of the browser, which has an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def new_question() -> str:
    """One that nothing has cached, so that the prefill pool computes it."""
    return f"Question {next(_numbers)}. {QUESTION}"


def set_look(page: Page, look: str) -> None:
    scheme, width = LOOKS[look]
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 900})


def check_for_everybody(page: Page) -> None:
    """By axe-core's rules everybody can use the page as it is now; and nothing is wider than the window."""
    page.evaluate(axe_core())
    assert page.evaluate(GRAVE) == []
    assert not page.evaluate(IS_TOO_WIDE)


def kill_an_engine(service: Service) -> None:
    info = service.pool("Decode").broadcast("engine_info").results(timeout_s=ANSWER_TIMEOUT_S)[0]
    os.kill(info.pid, signal.SIGKILL)


def never_done(route: Route) -> None:
    """What the page asks for, but of a model that has never said all and whose first token is part of a word.

    It draws at random: it may end its answer, or begin it with a part of a character, which shows when the rest comes.
    """
    asked = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**asked, "ignore_eos": True, "temperature": 0}))


def talks_on(page: Page) -> None:
    """Prepares it."""
    page.route(re.compile("completions$"), never_done)


def tile(page: Page, title: str) -> str:
    return page.locator(".tile", has_text=title).locator(".big").inner_text()


def test_under_load_it_shows_the_pools_and_what_they_do(visit: Open, disaggregated: Service) -> None:
    with busy(disaggregated):
        page = visit(disaggregated).page
        expect(page.locator(".tile .big.none")).to_have_count(0)
        expect(page.locator(".state.busy").first).to_be_visible()
        assert re.fullmatch(r"[\d.]+\s?(ms|s)", tile(page, "First token, p95"))
        assert re.fullmatch(r"[\d.]+\s?: 1", tile(page, "Prefill : decode"))
        for pool in ("Prefill", "Decode"):
            expect(page.locator(".pool", has_text=pool).locator("tbody tr")).to_have_count(1)
        expect(page.locator(".chart svg .line, .chart svg .dot").first).to_be_attached()
        expect(page.locator("#where")).to_contain_text("computed by the prefill pool")
        expect(page.locator("#handoff")).to_contain_text("prompts handed over")
        expect(page.locator("#planner")).to_contain_text("Off")
        expect(page.locator("#refusals")).to_contain_text("Nobody was refused")
    # And not before: on a machine that others keep busy a pool may not answer in time, which is then told.
    expect(page.locator("#status")).to_have_text("Serving")


def test_a_prompt_is_typed_and_its_tokens_come_in_the_colours_of_their_pools(
    visit: Open, disaggregated: Service
) -> None:
    page = visit(disaggregated, talks_on).page
    keys = page.keyboard
    keys.press("Tab")
    keys.press("Enter")  # the way past everything to the prompt
    keys.press("Tab")
    keys.press("Control+A")
    keys.type(new_question())
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Control+A")
    keys.type(str(NUM_TOKENS))
    keys.press("Tab")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#receipt svg")).to_be_visible()
    tokens = page.locator("#answer .token")
    assert tokens.first.get_attribute("class") == "token prefill"
    assert page.locator("#answer .token.prefill").count() == 1
    assert page.locator("#answer .token.decode").count() >= 1, "those that came together are one piece of text"
    backgrounds = {
        tokens.nth(n).evaluate("token => getComputedStyle(token).backgroundColor") for n in range(tokens.count())
    }
    assert len(backgrounds) == 2, "one colour for each pool"
    assert page.locator("#receipt .lane").all_text_contents() == ["Ingress", "Prefill", "Hand-off", "Decode"]
    expect(page.locator("#receipt")).to_contain_text(f"{NUM_TOKENS} tokens")


def test_an_engine_that_dies_is_told_of_and_so_is_the_one_that_comes(visit: Open, scaled: Scaled) -> None:
    apart(scaled.wait_for_two)
    page = visit(scaled.service, bypass_csp=True).page
    rows = page.locator(".pool.decode tbody tr")
    expect(rows).to_have_count(2)  # one that has gone before is shown for a minute
    names = set(page.locator(".pool.decode td.name").all_inner_texts())
    apart(lambda: kill_an_engine(scaled.service))
    gone = page.locator(".pool.decode .state.gone")
    expect(gone).to_be_visible()
    expect(page.locator("#status")).to_have_text(re.compile("decode replica is gone|Cannot serve"))
    page.get_by_role("button", name="Pause").click()
    for look in LOOKS:
        set_look(page, look)
        check_for_everybody(page)
    name = page.locator(".pool.decode tr", has=page.locator(".state.gone")).locator("td.name").inner_text()
    assert name in names
    expect(page.locator("#events")).to_contain_text(f"decode replica {name} is gone")
    page.get_by_role("button", name="Go on").click()
    newcomer = rows.locator("td.name").filter(has_not_text=re.compile("|".join(names)))
    expect(newcomer).to_have_count(1, timeout=300_000)
    expect(page.locator("#events")).to_contain_text(f"decode replica {newcomer.inner_text()} serves")
    apart(scaled.wait_for_two)


def test_what_the_planner_decides_in_serves_controller_reaches_an_ingress(services: dict[str, Service]) -> None:
    decisions = [Decision(1.0, {"decode": 1}, {"decode": n}, "because", n == 3) for n in (2, 3)]
    assert planner_log.read("nobody") == []
    planner_log.publish("somebody", decisions[:1])
    planner_log.publish("somebody", decisions)
    wait_until(lambda: planner_log.read("somebody") == decisions, ANSWER_TIMEOUT_S)


@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_use_it_with_an_answer_and_its_receipt_on_it(
    visit: Open, disaggregated: Service, look: str
) -> None:
    page = visit(disaggregated, talks_on, bypass_csp=True).page
    set_look(page, look)
    page.get_by_label("Prompt", exact=True).fill(new_question())
    page.get_by_label("Tokens at most").fill("8")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#receipt svg")).to_be_visible()
    expect(page.locator("#answer .token.prefill")).to_have_count(1)
    check_for_everybody(page)


def test_while_it_is_paused_nothing_is_asked(visit: Open, disaggregated: Service) -> None:
    page = visit(disaggregated, prepare=lambda page: page.clock.install()).page
    page.get_by_role("button", name="Pause").click()
    page.wait_for_load_state("networkidle")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.clock.fast_forward(60_000)
    page.evaluate("fetch('live/icon.svg').then(answer => answer.text())")  # behind what would be asked
    assert asked == [f"{disaggregated.url}/live/icon.svg"]
    page.get_by_role("button", name="Go on").click()
    with page.expect_request("**/live"):
        page.clock.fast_forward(3_000)
