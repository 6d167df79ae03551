"""One id for a request: for HAProxy, Serve, the API and its logs."""

from pathlib import Path
from typing import Any

import httpx

from app.haproxy import _REQUEST_ID
from deployments.api.asgi import REQUEST_ID
from deployments.messages import FinishReason
from tests.api.fakes import INFO, playing
from tests.call_lines import kept_lines, logging_observer
from tests.haproxy.proxied import (
    SOON_S,
    api,
    proxied,
)
from tests.waiting import until


def test_the_proxy_and_the_api_allow_the_same_request_ids() -> None:
    assert f"^{REQUEST_ID.pattern}$" == _REQUEST_ID


async def test_every_answer_has_one_request_id_and_it_is_the_callers_if_that_is_well_formed(tmp_path: Path) -> None:
    backend = playing("a", FinishReason.LENGTH)
    backend.healthy = RuntimeError("nobody thought of it")
    body = {"model": INFO.name, "prompt": "abc"}
    well, badly = ("job-7/Root=1", "a" * 128), ("", "a" * 129, 'no "quotes"', "no, commas", "ä".encode("latin-1"))
    async with (
        proxied(api(backend), tmp_path) as proxy,
        httpx.AsyncClient(base_url=proxy.url, timeout=SOON_S) as client,
    ):
        for named in (*well, *badly, None):
            headers: Any = {} if named is None else {"x-request-id": named}
            answers = [
                await client.post("/v1/completions", json=body, headers=headers),
                await client.post("/v1/completions", json={}, headers=headers),
                *[await client.get(path, headers=headers) for path in ("/v1/models", "/nowhere", "/health")],
                await client.get(f"http://127.0.0.1:{proxy.port}/other", headers=headers),
            ]
            assert [answer.status_code for answer in answers] == [200, 400, 200, 404, 500, 404]
            for answer in answers:
                (request_id,) = answer.headers.get_list("x-request-id")
                assert (request_id == named) is (named in well)
                assert REQUEST_ID.fullmatch(request_id)


async def test_the_logs_name_a_request_as_the_answer_does(tmp_path: Path) -> None:
    app = api(playing("a", FinishReason.LENGTH), observer=logging_observer())
    with kept_lines() as kept:
        async with proxied(app, tmp_path) as proxy, httpx.AsyncClient(timeout=SOON_S) as client:
            body = {"model": INFO.name, "prompt": "abc"}
            for headers in ({}, {"x-request-id": "mine"}):
                kept.clear()
                answer = await client.post(f"{proxy.url}/v1/completions", json=body, headers=headers)
                await until(lambda: kept)
                line = kept[0].getMessage()
                assert line.startswith(f"call={answer.json()['id']} ")
                assert line.endswith(f" request_id={answer.headers['x-request-id']}")
