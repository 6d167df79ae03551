"""Pages of other origins: refused by browsers unless the operator named them; then they can use all of the API."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from deployments.api.cors import check_origin
from deployments.api.http import build_app
from deployments.api.keys import KeyRing
from deployments.errors import OverloadedError
from deployments.messages import FinishReason
from tests.api.fakes import COMPLETIONS, INFO, FakeBackend, body_of, build_codec, client_of, playing

OURS, THEIRS = "https://chat.example.com", "https://evil.example"
KEY = "sk-alice-0123456789"


@asynccontextmanager
async def client_for(
    *origins: str, keys: KeyRing | None = None, backend: FakeBackend | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    backend = backend or playing("a", FinishReason.LENGTH)
    async with client_of(build_app(backend, build_codec(), INFO, keys=keys, cors_origins=origins)) as client:
        yield client


def asking(origin: str, method: str = "POST") -> dict[str, str]:
    """What a browser sends before it sends what the page wants."""
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    file = tmp_path / "keys.toml"
    file.write_text(f'[alice]\nkey = "{KEY}"\nrequests_per_minute = 1\n')
    return KeyRing(str(file))


def allowed(answer: httpx.Response) -> str | None:
    origin: str | None = answer.headers.get("access-control-allow-origin")
    return origin


async def test_by_default_no_page_is_allowed_anything() -> None:
    async with client_for() as client:
        asked = await client.options(COMPLETIONS, headers=asking(OURS))
        sent = await client.post(COMPLETIONS, json=body_of(COMPLETIONS), headers={"origin": OURS})
    assert (asked.status_code, asked.headers["allow"]) == (405, "POST")
    assert not [name for answer in (asked, sent) for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("origins", [(OURS,), ("*",), ("https://other.example", OURS)])
async def test_a_page_of_an_origin_that_was_named_may_ask_and_send(origins: tuple[str, ...]) -> None:
    async with client_for(*origins) as client:
        asked = await client.options(COMPLETIONS, headers=asking(OURS))
        sent = await client.post(COMPLETIONS, json=body_of(COMPLETIONS, stream=True), headers={"origin": OURS})
    for answer in (asked, sent):
        assert answer.status_code == 200
        assert allowed(answer) in (OURS, "*")
        assert "access-control-allow-credentials" not in answer.headers
        assert "x-request-id" in answer.headers
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in asked.headers["access-control-allow-headers"]
    assert "x-ratelimit-remaining-tokens" in sent.headers["access-control-expose-headers"]


@pytest.mark.parametrize("origin", [THEIRS, OURS + ".evil.example", "http://chat.example.com", "null", ""])
async def test_another_page_is_not(origin: str) -> None:
    async with client_for(OURS) as client:
        asked = await client.options(COMPLETIONS, headers=asking(origin))
        sent = await client.post(COMPLETIONS, json=body_of(COMPLETIONS), headers={"origin": origin})
    assert asked.status_code == 400
    assert allowed(asked) is None and allowed(sent) is None


async def test_a_method_that_the_api_does_not_have_is_refused_to_pages() -> None:
    async with client_for(OURS) as client:
        assert (await client.options(COMPLETIONS, headers=asking(OURS, "DELETE"))).status_code == 400


async def test_a_page_reads_refusals_as_well(keys: KeyRing) -> None:
    headers = {"origin": OURS, "authorization": f"Bearer {KEY}"}
    backend = playing()
    backend.refusal = OverloadedError("full")
    async with client_for(OURS, keys=keys, backend=backend) as client:
        assert (await client.options(COMPLETIONS, headers=asking(OURS))).status_code == 200, (
            "browsers ask without a key"
        )
        answers = [
            await client.post(COMPLETIONS, json=body_of(COMPLETIONS), headers={"origin": OURS}),
            await client.post(COMPLETIONS, json=body_of(COMPLETIONS), headers=headers),
            await client.post(COMPLETIONS, json=body_of(COMPLETIONS), headers=headers),
            await client.get("/nowhere", headers={"origin": OURS}),
        ]
    assert [answer.status_code for answer in answers] == [401, 429, 429, 401]
    assert [answer.json()["error"]["code"] for answer in answers[1:3]] == ["overloaded", "rate_limit_exceeded"]
    assert {allowed(answer) for answer in answers} == {OURS}


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "a.example", "https://*.example", "https://A.example", "null", ""]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="must be an origin"):
        check_origin(origin)


@pytest.mark.parametrize("origin", ["*", "https://a.example", "http://localhost:3000", "http://[::1]:3000"])
def test_origins_are_as_browsers_send_them(origin: str) -> None:
    assert check_origin(origin) == origin
