"""The live page in headless Chromium, of a service that is made up."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from playwright.async_api import Browser, Page, expect
from starlette.applications import Starlette

from deployments.api.http import build_app
from deployments.api.keys import KeyRing
from deployments.load.reading import DECODE, PREFILL
from deployments.messages import FinishReason
from deployments.telemetry.live import ServiceState, describe
from tests.api.fakes import INFO, FakeBackend, build_codec, playing
from tests.telemetry.browser import GRAVE, IS_TOO_WIDE, LOOKS, axe_core
from tests.telemetry.minutes import Service
from tests.waiting import PATIENCE_S

PATIENCE_MS = PATIENCE_S * 1000
KEY, BLIND_KEY = "sk-watcher-0123456789", "sk-caller-0123456789"
HURRY = "const wait = setTimeout; window.setTimeout = (call, ms) => wait(call, ms / 10)"
PageOf = Callable[..., AbstractAsyncContextManager[Page]]
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
async def open_page(
    browser: Browser, url: str, complaints: list[str], *, is_hurried: bool = False, **of_page: Any
) -> AsyncIterator[Page]:
    """A page that knows nothing of others, and what it complains of; in a hurry it asks every 200 ms, not every 2 s."""
    page = await browser.new_page(**of_page)
    if is_hurried:
        await page.add_init_script(HURRY)
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page.on("console", lambda said: complaints.append(said.text) if said.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    await page.goto(url)
    yield page
    await page.close()


async def check_for_everybody(page: Page) -> None:
    """By axe-core's rules everybody can use the page as it is now, in whichever look; and nothing is too wide."""
    for look, (scheme, width) in LOOKS.items():
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        await page.set_viewport_size({"width": width, "height": 900})
        await page.evaluate(axe_core())
        assert await page.evaluate(GRAVE) == [], look
        assert not await page.evaluate(IS_TOO_WIDE), look


def key_ring(folder: Path) -> KeyRing:
    """One key that may read the numbers, and one that may not."""
    file = folder / "keys.toml"
    file.write_text(f'[watcher]\nkey = "{KEY}"\nmetrics = true\n[caller]\nkey = "{BLIND_KEY}"\n')
    return KeyRing(str(file))


def keyed_app(keys: KeyRing) -> Starlette:
    """That service, where these keys are asked for."""
    return build_app(backend(service(), ServiceState("m", "disaggregated", "1")), build_codec(), INFO, keys=keys)
