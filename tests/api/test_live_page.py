"""The live page loads nothing of others and tells nothing; its numbers are for keys that may read them."""

import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from deployments.api.http import build_app
from deployments.api.keys import KeyRing
from deployments.api.live_page import ASSETS
from tests.api.fakes import INFO, build_codec, client_of, playing

WATCHER, CALLER = "sk-watcher-0123456789", "sk-caller-0123456789"


class Page(HTMLParser):
    """Notes what a page loads or refers to, and what stands in it that its policy forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        self.sources += [str(names[name]) for name in ("src", "href") if name in names]
        self.inline += [f"{tag} {name}" for name in names if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)


@pytest_asyncio.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    file = tmp_path / "keys.toml"
    file.write_text(f'[watcher]\nkey = "{WATCHER}"\nmetrics = true\n[caller]\nkey = "{CALLER}"\n')
    async with client_of(build_app(playing(), build_codec(), INFO, keys=KeyRing(str(file)))) as client:
        yield client


async def test_the_page_and_its_parts_come_without_a_key_and_load_nothing_of_others(client: httpx.AsyncClient) -> None:
    answer = await client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    page = Page(answer.text)
    assert not page.inline
    parts = [source for source in page.sources if not source.startswith("#")]
    assert parts
    seen: set[str] = set()
    while parts:
        part = parts.pop()
        assert re.fullmatch(r"live/[a-z]+\.[a-z]+", part), "relative, so that it works wherever the service is mounted"
        if part not in seen:
            told = await client.get(f"/{part}")
            assert told.status_code == 200
            seen.add(part)
            parts += [f"live/{name}" for name in re.findall(r'from "\./([^"]+)"', told.text)]
    assert seen == {f"live/{name}" for name in ASSETS}, "and nothing is served that the page does not need"


async def test_nothing_but_these_files_may_run_or_be_loaded(client: httpx.AsyncClient) -> None:
    for path in ("/", *(f"/live/{name}" for name in ASSETS)):
        headers = (await client.get(path)).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
        assert headers["x-content-type-options"] == "nosniff"


async def test_no_file_names_another_host() -> None:
    others = {
        name: found
        for name, asset in ASSETS.items()
        if (
            found := re.findall(
                rb"(?:https?:)?//[a-z][^\s\"']*", asset.body.replace(b"http://www.w3.org/2000/svg", b"")
            )
        )
    }
    assert others == {}


async def test_numbers_are_for_keys_that_may_read_them(client: httpx.AsyncClient) -> None:
    statuses = []
    for headers in ({}, {"authorization": f"Bearer {CALLER}"}, {"authorization": f"Bearer {WATCHER}"}):
        answer = await client.get("/live", headers=headers)
        statuses.append(answer.status_code)
    assert statuses == [401, 403, 200]
    assert answer.json() == {"model": "fake/model"}
    assert answer.headers["cache-control"] == "no-store"


async def test_the_page_says_whether_a_key_is_needed_and_else_is_the_same_everywhere(client: httpx.AsyncClient) -> None:
    keyed = await client.get("/")
    async with client_of(build_app(playing(), build_codec(), INFO)) as of_nobody:
        open_to_all = await of_nobody.get("/")
    assert keyed.text.replace("<html data-needs-key ", "<html ") == open_to_all.text
    assert "needs-key" in keyed.text
    assert "needs-key" not in open_to_all.text
    assert keyed.headers["etag"] != open_to_all.headers["etag"]


async def test_a_part_that_has_not_changed_is_not_sent_again(client: httpx.AsyncClient) -> None:
    tag = (await client.get("/live/page.css")).headers["etag"]
    again = await client.get("/live/page.css", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.get("/live/page.css", headers={"if-none-match": '"other"'})).status_code == 200


@pytest.mark.parametrize("path", ["/live/assets.py", "/live/page.html", "/live/..%2fkeys.py", "/live/"])
async def test_no_other_file_is_served(path: str) -> None:
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        answer = await client.get(path)
    assert answer.status_code in (404, 307)
    assert "import" not in answer.text


async def test_the_page_is_found_where_the_service_is_mounted() -> None:
    transport = httpx.ASGITransport(build_app(playing(), build_codec(), INFO), root_path="/kv")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/kv/")).status_code == 200
        assert (await client.get("/kv/live/main.js")).status_code == 200
        answer = await client.get("/kv")
        assert (answer.status_code, answer.headers["location"]) == (307, "http://test/kv/")
