"""Takes the pictures of the live page in docs/images: light, dark and as wide as a phone, of a service at work.

Run: `make screenshots`. Starts a server, has it answer chats of various lengths for some minutes, tries a prompt on the
page, and takes the pictures. Needs Chromium (`.ci/browser`).
"""

import argparse
import random
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import httpx
from playwright.sync_api import Browser, ViewportSize, sync_playwright

from app.local_process import RunFolder
from tests.bench.page.at_work import Shift, Work, at_work
from tests.bench.service import serving
from tests.telemetry.browser import launch

IMAGES = Path(__file__).parents[3] / "docs" / "images"
# The name of a picture: how wide the window is, and in which colours.
PICTURES: dict[str, tuple[int, Literal["light", "dark"]]] = {
    "live-light": (1280, "light"),
    "live-dark": (1280, "dark"),
    "live-phone": (390, "light"),
}
# Of a phone's the upper part: all of it is as long as fifteen of its width.
PHONE_HEIGHT = 1560
ARGUMENTS = ["min_remote_prefill_tokens=64", "prefill.max_replicas=1", "decode.max_replicas=1", "ingress.max_ttft_s=8"]
PROMPT = "Explain in a few sentences why a library keeps its busiest books close to the door. " * 4
WORDS = ("river", "stone", "lamp", "winter", "garden", "harbour", "letter", "bridge")
# Whole, and a palette of so many colours: 100 kB and not 500.
NUM_COLOURS = 128


def talking(url: str) -> Work:
    """Chats of various lengths, some of them the next turn of one before."""

    def talk(number: int, shift: Shift) -> None:
        draw = random.Random(number)
        shift.begin()
        with httpx.Client(base_url=url, timeout=300) as client:
            while not shift.is_over.wait(draw.expovariate(1 / 3)):
                words = " ".join(draw.choices(WORDS, k=8))
                messages = [{"role": "user", "content": f"Tell me of {words}. " * draw.choice([1, 4, 12])}]
                for _ in range(draw.choice([1, 1, 2, 3])):
                    body = {"messages": messages, "max_tokens": draw.randrange(8, 64)}
                    answer = client.post("/v1/chat/completions", json=body)
                    if answer.status_code != httpx.codes.OK:
                        break  # refused, which is shown, too
                    messages += [answer.json()["choices"][0]["message"] | {"refusal": None}]
                    messages += [{"role": "user", "content": "Go on."}]

    return talk


def picture(browser: Browser, url: str, name: str) -> None:
    """Open the page, try a prompt, and take all of it."""
    width, scheme = PICTURES[name]
    is_phone = width < 600
    size: ViewportSize = {"width": width, "height": PHONE_HEIGHT if is_phone else 900}
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(url)
    page.get_by_label("Prompt", exact=True).fill(f"{name.title()}. {PROMPT}".strip())  # one that is cached nowhere
    page.get_by_label("Tokens at most").fill("80")
    page.get_by_role("button", name="Send").click()
    page.locator("#receipt svg").wait_for(timeout=120_000)
    page.wait_for_timeout(2500)  # for numbers that have this call in them
    path = IMAGES / f"{name}.png"
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=path, full_page=not is_phone)
    page.close()
    shrink(path)


def shrink(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    """Serve, load, take pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8235)
    parser.add_argument("--minutes", type=float, default=6.0, help="of load before (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--url", help="of a service that runs; none is started then")
    options = parser.parse_args()
    url = options.url or f"http://127.0.0.1:{options.port}"
    with tempfile.TemporaryDirectory() as folder:
        served = nullcontext() if options.url else serving(RunFolder(Path(folder)), options.port, ARGUMENTS)
        with served, at_work(options.clients, talking(url)), sync_playwright() as playwright:
            threading.Event().wait(options.minutes * 60)
            browser = launch(playwright)
            for name in PICTURES:
                picture(browser, url, name)
            browser.close()


if __name__ == "__main__":
    main()
