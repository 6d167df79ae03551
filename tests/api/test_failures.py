"""What a client sees when its request fails or is refused, over a scripted backend."""

import pytest

from deployments.api.http import build_app
from deployments.api.observer import Outcome
from deployments.errors import (
    EngineDeadError,
    InvalidRequestError,
    KvRelayError,
    OverloadedError,
    RequestTooLargeError,
    TransferError,
)
from deployments.messages import FinishReason
from tests.api.fakes import (
    CHAT,
    COMPLETIONS,
    INFO,
    FakeBackend,
    Hang,
    Recorder,
    build_codec,
    client_of,
    events_of,
    playing,
    post,
)

LENGTH = FinishReason.LENGTH


ERRORS: list[tuple[Exception, int, str, str | None, str | None]] = [
    (InvalidRequestError("bad", "seed"), 400, "invalid_request_error", "seed", None),
    (RequestTooLargeError("big"), 400, "invalid_request_error", None, "context_length_exceeded"),
    (OverloadedError("full"), 429, "rate_limit_error", None, "overloaded"),
    (EngineDeadError("dead"), 503, "server_error", None, "engine_unavailable"),
    (TransferError("lost"), 503, "server_error", None, "engine_unavailable"),
    (RuntimeError("secret"), 500, "server_error", None, "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "param", "code"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_an_error_before_the_first_token_has_its_status(
    path: str, stream: bool, error: Exception, status: int, kind: str, param: str | None, code: str | None
):
    backend = playing(error)
    answer = await post(backend, path, stream=stream)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    message = str(error) if isinstance(error, KvRelayError) else "internal error"
    assert answer.json() == {"error": {"message": message, "type": kind, "param": param, "code": code}}
    assert answer.headers.get("retry-after") == ("1" if status == 429 else None)
    assert "x-request-id" in answer.headers
    assert not backend.running


@pytest.mark.parametrize("error", [EngineDeadError("dead"), RuntimeError("secret")])
async def test_an_error_after_the_first_token_is_an_event_that_ends_the_stream(error: Exception):
    answer = await post(playing("a", error), COMPLETIONS, stream=True)
    assert answer.status_code == 200
    first, last = events_of(answer.content)
    assert first["choices"][0]["text"] == "a"
    assert last["error"]["message"] == ("dead" if isinstance(error, EngineDeadError) else "internal error")


async def test_an_error_in_one_prompt_ends_the_others():
    backend = FakeBackend(lambda r: [OverloadedError("full")] if r.prompt_token_ids == (98,) else ["x", Hang()])
    answer = await post(backend, COMPLETIONS, prompt=["a", "b"])
    assert answer.status_code == 429
    assert not backend.running


async def test_an_unexpected_error_is_logged(caplog: pytest.LogCaptureFixture):
    await post(playing(RuntimeError("secret")), COMPLETIONS)
    assert "secret" in caplog.text


async def test_a_wrong_model_is_404():
    answer = await post(playing("a", LENGTH), COMPLETIONS, model="gpt-9")
    assert answer.status_code == 404
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == ("model_not_found", "model")


async def test_a_prompt_that_does_not_fit_is_400():
    answer = await post(playing("a", LENGTH), COMPLETIONS, prompt="x" * 99)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", COMPLETIONS, 405), ("POST", "/health", 405), ("GET", "/v1/models/other", 404)],
)
async def test_other_refusals_have_the_same_shape(method: str, path: str, status: int):
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert "x-request-id" in answer.headers
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("POST", "/chat/completions", "nothing is served at '/chat/completions'; GET /docs says what is"),
        ("GET", "/" + "a" * 1000, f"nothing is served at '/{'a' * 99}...'; GET /docs says what is"),
        ("GET", COMPLETIONS, "GET is not allowed at '/v1/completions'; allowed: POST"),
        ("DELETE", "/health", "DELETE is not allowed at '/health'; allowed: GET, HEAD"),
    ],
)
async def test_a_wrong_address_is_named_with_what_helps(method: str, path: str, message: str):
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        answer = await client.request(method, path)
    assert answer.json()["error"]["message"] == message


async def test_bad_json_is_400():
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        answer = await client.post(COMPLETIONS, content=b"{")
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_over_the_limit_is_413(is_chunked: bool):
    async def parts():
        for _ in range(3):
            yield b" " * 500

    recorder = Recorder()
    async with client_of(build_app(playing(), build_codec(), INFO, max_body_bytes=1000, observer=recorder)) as client:
        answer = await client.post(COMPLETIONS, content=parts() if is_chunked else b" " * 1500)
    assert answer.status_code == 413
    assert "at most 1000 bytes" in answer.json()["error"]["message"]
    assert recorder.outcomes == [Outcome.INVALID]
