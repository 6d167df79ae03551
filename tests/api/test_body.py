"""Which bodies are read at all: what their headers claim, and how long they are."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from deployments.api.http import build_app
from deployments.messages import FinishReason
from tests.api.fakes import CHAT, COMPLETIONS, INFO, body_of, build_codec, client_of, playing

BODIES = {path: orjson.dumps(body_of(path)) for path in (COMPLETIONS, CHAT)}
BODY = BODIES[COMPLETIONS]


async def post(content: bytes, headers: dict[str, str], path: str = COMPLETIONS) -> tuple[int, dict[str, Any]]:
    backend = playing("a", FinishReason.LENGTH)
    async with client_of(build_app(backend, build_codec(), INFO, max_body_bytes=1000)) as client:
        answer = await client.post(path, content=content, headers=headers)
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json", "", " ", None],
)
async def test_json_is_taken_and_so_is_a_body_that_does_not_say_what_it_is(content_type: str | None):
    assert (await post(BODY, {} if content_type is None else {"content-type": content_type}))[0] == 200


@pytest.mark.parametrize(
    "charset",
    ["latin-1", "utf-16", '"ISO-8859-1"', "utf-7", "x" * 50_000, "no such", ""],
)
async def test_another_character_set_is_refused_by_name(charset: str):
    content_type = f"application/json; charset={charset}"
    status, body = await post(BODY, {"content-type": content_type})
    assert status == 415
    message = body["error"]["message"]
    assert message.startswith("the header content-type is 'application/json; charset=")
    assert message.endswith(", must be application/json in UTF-8")
    assert len(message) < 300


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", '"utf-8"', "us-ascii", "utf-8; v=1"])
async def test_utf_8_is_taken_by_all_its_names(charset: str):
    assert (await post(BODY, {"content-type": f"application/json; charset={charset}"}))[0] == 200


@pytest.mark.parametrize("headers", [{}, {"content-type": ""}, {"content-type": " "}])
async def test_a_page_cannot_make_a_browser_send_what_does_not_say_that_it_is_json(headers: dict[str, str]):
    status, body = await post(BODY, headers | {"origin": "https://evil.example"})
    assert status == 415
    assert body["error"]["message"].startswith("the header content-type is ''")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_another_content_type_is_refused_by_name(path: str, content_type: str):
    status, body = await post(BODIES[path], {"content-type": content_type}, path)
    assert status == 415
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"] == f"the header content-type is '{content_type}', must be application/json"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, identity"])
async def test_a_compressed_body_is_refused_by_name(encoding: str):
    status, body = await post(BODY, {"content-encoding": encoding})
    assert status == 415
    assert body["error"]["message"] == f"the header content-encoding is '{encoding}', must be no encoding"


async def test_a_body_that_says_that_it_is_not_compressed_is_taken():
    assert (await post(BODY, {"content-encoding": "identity"}))[0] == 200


@pytest.mark.parametrize("length", ["abc", "-1", "1.5", "+5", "", "1_0", "0x10"])
async def test_a_length_that_is_no_number_is_refused(length: str):
    status, body = await post(BODY, {"content-length": length})
    assert status == 400
    assert body["error"]["message"] == f"the header content-length is '{length}', must be a number of bytes"


@pytest.mark.parametrize("length", ["1001", "9" * 5000])
async def test_a_body_that_says_that_it_is_too_long_is_refused_unread(length: str):
    status, body = await post(BODY, {"content-length": length})
    assert (status, body["error"]["message"]) == (413, "the body must be at most 1000 bytes")


async def test_a_body_that_turns_out_too_long_is_refused():
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b" " * 500

    async with client_of(build_app(playing(), build_codec(), INFO, max_body_bytes=1000)) as client:
        assert (await client.post(COMPLETIONS, content=parts())).status_code == 413
