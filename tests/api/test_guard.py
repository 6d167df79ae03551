"""A service that has keys, as callers with and without one see it."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deployments.api.guard import OPEN_PATHS
from deployments.api.http import build_app
from deployments.api.keys import KeyRing
from deployments.errors import OverloadedError
from deployments.messages import FinishReason, Priority
from tests.api.fakes import (
    CHAT,
    COMPLETIONS,
    INFO,
    FakeBackend,
    Recorder,
    body_of,
    build_codec,
    client_at,
    client_of,
    playing,
    serving,
)
from tests.call_lines import kept_lines, logging_observer

LENGTH = FinishReason.LENGTH
RESPONSES = "/v1/responses"
ALICE, BOB, WATCHER = "sk-alice-0123456789", "sk-bob-0123456789abc", "sk-watcher-0123456789"
BATCH = "sk-batch-0123456789a"
FILE = f"""
[alice]
key = "{ALICE}"
[bob]
key = "{BOB}"
requests_per_minute = 3
tokens_per_minute = 20
cache = "shared"
max_priority = "high"
[watcher]
key = "{WATCHER}"
metrics = true
max_priority = "low"
[batch]
key = "{BATCH}"
priority = "low"
"""


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> KeyRing:
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    return KeyRing(str(file), clock=clock)


@asynccontextmanager
async def client_for(
    keys: KeyRing, backend: FakeBackend | None = None, recorder: Recorder | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    app = build_app(backend or playing("ab", LENGTH), build_codec(), INFO, keys=keys, observer=recorder)
    async with client_of(app) as client:
        yield client


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def complete(client: httpx.AsyncClient, key: str, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    return await client.post(path, json=body_of(path, **fields), headers=bearing(key))


WRONG: list[tuple[dict[str, str], bool]] = [
    ({}, False),
    ({"authorization": ALICE}, False),
    ({"authorization": "Bearer"}, False),
    ({"authorization": "Basic " + ALICE}, False),
    (bearing("none"), True),
    (bearing(ALICE + "x"), True),
    (bearing("é" * 20), True),
    ({"x-api-key": "nobody"}, True),
]


@pytest.mark.parametrize(("headers", "is_wrong"), WRONG)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_without_a_good_key_a_call_is_401_in_openais_form_and_reaches_nothing(
    keys: KeyRing, path: str, headers: dict[str, str], is_wrong: bool
) -> None:
    backend, recorder = playing("a", LENGTH), Recorder()
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    async with client_for(keys, backend, recorder) as client:
        answer = await client.post(path, json=body_of(path), headers=raw)
    assert (answer.status_code, answer.headers["content-type"]) == (401, "application/json")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    challenge = answer.headers["www-authenticate"]
    assert challenge.startswith('Bearer realm="kvrelay"')
    assert ("invalid_token" in challenge) is is_wrong
    assert "x-request-id" in answer.headers
    assert not backend.calls and recorder.num_started == 0
    assert recorder.denied == ["unauthorized"]


@pytest.mark.parametrize(("name", "form"), [("authorization", "Bearer {}"), ("x-api-key", "{}")])
async def test_two_headers_with_a_key_are_none(keys: KeyRing, name: str, form: str) -> None:
    async with client_for(keys) as client:
        headers = [(name, form.format(ALICE)), (name, form.format(BOB))]
        assert (await client.get("/v1/models", headers=headers)).status_code == 401


@pytest.mark.parametrize("headers", [bearing(ALICE), {"x-api-key": ALICE}, {"authorization": f"bearer  {ALICE} "}])
async def test_with_a_good_key_a_call_is_served(keys: KeyRing, headers: dict[str, str]) -> None:
    async with client_for(keys) as client:
        answer = await client.post(COMPLETIONS, json=body_of(COMPLETIONS), headers=headers)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")], "this key has no limits"


def paths_of_routes() -> set[str]:
    return {route.path for route in build_app(playing(), build_codec(), INFO).routes}  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", sorted(paths_of_routes() | {"/nowhere", "/health/", "http://test//health", "/v1"}))
async def test_every_path_needs_a_key_but_those_that_are_said_not_to(keys: KeyRing, path: str, method: str) -> None:
    async with client_for(keys) as client:
        status = (await client.request(method, path)).status_code
    assert (status == 401) is (path not in OPEN_PATHS)


async def test_the_path_below_which_the_service_is_mounted_opens_no_door(keys: KeyRing) -> None:
    app = build_app(playing(), build_codec(), INFO, keys=keys)
    transport = httpx.ASGITransport(app, root_path="/kv")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        assert (await client.get("/kv/health")).status_code == 200
        assert (await client.get("/kv/v1/models")).status_code == 401
        assert (await client.get("/kv/v1/models", headers=bearing(ALICE))).status_code == 200


async def test_metrics_are_for_keys_that_may_read_them(keys: KeyRing) -> None:
    async with client_for(keys) as client:
        assert (await client.get("/metrics")).status_code == 401
        refused = await client.get("/metrics", headers=bearing(ALICE))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
        assert (await client.get("/metrics", headers=bearing(WATCHER))).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_limits_of_requests_are_told_with_every_answer_and_kept(
    keys: KeyRing, clock: Clock, stream: bool
) -> None:
    backend, recorder = playing("a", LENGTH), Recorder()
    async with client_for(keys, backend, recorder) as client:
        for left in (2, 1):
            answer = await complete(client, BOB, stream=stream, prompt="a")
            assert answer.status_code == 200
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        assert (await client.get("/v1/models/none", headers=bearing(BOB))).status_code == 404, "counts as well"
        refused = await complete(client, BOB, stream=stream, prompt="a")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
        assert refused.headers["x-ratelimit-limit-requests"] == "3"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert (await complete(client, ALICE)).status_code == 200, "nobody else is affected"
        clock.now_s += 20
        assert (await complete(client, BOB, prompt="a")).status_code == 200
    assert recorder.denied == ["too_many_requests"]
    assert len(backend.calls) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_of_prompts_and_generated_ones_count(keys: KeyRing, clock: Clock, stream: bool) -> None:
    backend = playing("12345", "67890", LENGTH)
    async with client_for(keys, backend) as client:
        assert (
            await complete(client, BOB, prompt=["123", "45"], stream=stream)
        ).status_code == 200  # 5, and 2 times 10
        refused = await complete(client, BOB, prompt="1", stream=stream)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
        assert refused.headers["retry-after"] == "18", "from -5 to 1, at 20 a minute"
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert len(backend.calls) == 1, "admission is not asked"
        clock.now_s += 18
        assert (await complete(client, BOB, prompt="1", stream=stream)).status_code == 200


async def test_a_call_that_admission_refuses_costs_no_tokens(keys: KeyRing) -> None:
    backend = playing("a", LENGTH)
    backend.refusal = OverloadedError("full")
    async with client_for(keys, backend) as client:
        refused = await complete(client, BOB, prompt="12345")
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-tokens"] == "20"


@pytest.mark.parametrize(("key", "cache"), [(ALICE, "alice"), (BOB, "shared")])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_kv_is_found_only_by_callers_of_the_same_cache(keys: KeyRing, path: str, key: str, cache: str) -> None:
    backend = playing("a", LENGTH)
    async with client_for(keys, backend) as client:
        await complete(client, key, path)
    assert [request.cache_salt for request in backend.requests] == [f"{cache}\0"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
async def test_within_a_cache_a_key_for_prompts_parts_it_further(keys: KeyRing, path: str) -> None:
    backend = playing("a", LENGTH)
    async with client_for(keys, backend) as client:
        for key in ("one", "two"):
            body = {"input": "x"} if path == RESPONSES else body_of(path)
            answer = await client.post(path, headers=bearing(ALICE), json=body | {"prompt_cache_key": key})
            assert answer.status_code == 200
    assert len({request.cache_salt for request in backend.requests}) == 2
    assert all(request.gathers and request.cache_salt.startswith("alice\0") for request in backend.requests)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
@pytest.mark.parametrize(
    ("key", "header", "fields", "expected"),
    [
        (ALICE, None, {}, Priority.NORMAL),
        (ALICE, "low", {}, Priority.LOW),
        (ALICE, "high", {}, None),
        (ALICE, None, {"service_tier": "priority"}, None),
        (ALICE, None, {"priority": -1}, None),
        (ALICE, "high", {"service_tier": "flex"}, Priority.LOW),
        (BOB, "high", {}, Priority.HIGH),
        (BOB, None, {"service_tier": "priority"}, Priority.HIGH),
        (WATCHER, None, {}, Priority.LOW),
        (WATCHER, None, {"service_tier": "auto"}, Priority.LOW),
        (WATCHER, "normal", {}, None),
        (BATCH, None, {}, Priority.LOW),
        (BATCH, None, {"service_tier": "auto"}, Priority.LOW),
        (BATCH, "normal", {}, Priority.NORMAL),
        (BATCH, "high", {}, None),
    ],
)
async def test_a_key_may_ask_for_the_priorities_of_its_terms(
    keys: KeyRing, path: str, key: str, header: str | None, fields: dict[str, Any], expected: Priority | None
) -> None:
    backend = playing("ab", LENGTH)
    headers = bearing(key) | ({} if header is None else {"x-priority": header})
    body = {"input": "x", **fields} if path == RESPONSES else body_of(path, **fields)
    async with client_for(keys, backend) as client:
        answer = await client.post(path, headers=headers, json=body)
    if expected is None:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (403, "insufficient_permissions") and not backend.requests
        assert "may not ask for" in error["message"]
    else:
        assert answer.status_code == 200 and backend.requests[0].priority is expected


async def test_names_tell_callers_apart_where_calls_share_what_there_is(keys: KeyRing) -> None:
    backend = playing("a", LENGTH)
    async with client_for(keys, backend) as client:
        await complete(client, ALICE)
    assert backend.calls[0][1] == b"alice"


async def test_the_log_names_whose_key_it_was_and_never_the_key(
    keys: KeyRing, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    backend = playing(RuntimeError("broken"))
    app = build_app(backend, build_codec(), INFO, keys=keys, observer=logging_observer())
    with kept_lines() as kept:
        async with client_of(app) as client:
            await complete(client, ALICE)
            await complete(client, "sk-wrong-0123456789")
            for _ in range(5):
                await complete(client, BOB)
    lines = [record.getMessage() for record in kept]
    assert " key=alice " in lines[0] and " key=bob " in lines[1]
    for key in (ALICE, BOB, "sk-wrong-0123456789"):
        assert key not in caplog.text + repr(lines)
    assert ALICE not in repr(backend.calls) + repr(vars(keys))


async def test_a_body_of_somebody_without_a_key_is_not_read(keys: KeyRing) -> None:
    async with serving(build_app(playing(), build_codec(), INFO, keys=keys)) as url, client_at(url) as client:
        answer = await client.post(COMPLETIONS, json=body_of(COMPLETIONS))
    assert (answer.status_code, answer.headers["connection"]) == (401, "close")


async def test_openais_client_knows_what_is_wrong(keys: KeyRing) -> None:
    app = build_app(playing("a", LENGTH), build_codec(), INFO, keys=keys)
    async with serving(app) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                await client.models.list()
            assert refused.value.code == "invalid_api_key"
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=BOB, max_retries=0) as client:
            raw = await client.completions.with_raw_response.create(model=INFO.name, prompt="a")
            assert raw.headers["x-ratelimit-limit-tokens"] == "20"
            await client.models.list()
            await client.models.list()
            with pytest.raises(openai.RateLimitError, match="3 requests per minute"):
                await client.models.list()
