"""What admission makes of a call at the API: who asks, what it is told of the call, and how a refusal looks."""

import json
import logging

import pytest
from starlette.datastructures import Headers

from deployments.api.caller import ANONYMOUS, read_caller
from deployments.api.http import build_app
from deployments.api.observer import Outcome
from deployments.errors import EngineDeadError, InvalidRequestError, OverloadedError, RequestTooLargeError
from deployments.messages import FinishReason, Priority
from tests.api.fakes import CHAT, COMPLETIONS, INFO, FakeBackend, Recorder, body_of, build_codec, client_of, playing

LENGTH = FinishReason.LENGTH
SECRET = "sk-very-secret"


async def ask(backend: FakeBackend, path: str = COMPLETIONS, headers: dict[str, str] | None = None, **fields: object):
    async with client_of(build_app(backend, build_codec(), INFO)) as client:
        return await client.post(path, json=body_of(path, **fields), headers=headers or {})


def key_of(**headers: str) -> bytes:
    return read_caller(Headers({name.replace("_", "-"): value for name, value in headers.items()})).key


def test_callers_are_told_apart_by_a_hash_of_their_key() -> None:
    key = key_of(authorization=f"Bearer {SECRET}")
    assert key == key_of(authorization=f"bearer  {SECRET} ") == key_of(x_api_key=SECRET)
    assert key != key_of(authorization="Bearer other")
    assert SECRET.encode() not in key
    assert key == key_of(authorization=f"Bearer {SECRET}", x_api_key="other"), "the bearer token comes first"


@pytest.mark.parametrize("headers", [{}, {"authorization": "Basic abc"}, {"authorization": "Bearer "}])
def test_callers_without_a_key_are_one(headers: dict[str, str]) -> None:
    assert key_of(**headers) == ANONYMOUS


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_key_and_priority_reach_admission_and_the_engine(path: str) -> None:
    backend = playing("a", LENGTH)
    answer = await ask(backend, path, {"x-priority": "High", "x-api-key": SECRET})
    assert answer.status_code == 200
    ((requests, key),) = backend.calls
    assert key == key_of(x_api_key=SECRET)
    assert [request.priority for request in requests] == [Priority.HIGH]
    assert backend.requests == list(requests)


async def test_a_call_is_of_normal_priority_unless_it_says_otherwise() -> None:
    backend = playing("a", LENGTH)
    await ask(backend)
    assert backend.calls[0][0][0].priority is Priority.NORMAL


async def test_an_unknown_priority_is_400_with_those_there_are() -> None:
    backend = playing("a", LENGTH)
    answer = await ask(backend, headers={"x-priority": "urgent"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-priority")
    assert "'urgent', must be one of high, normal, low" in answer.json()["error"]["message"]
    assert not backend.calls


@pytest.mark.parametrize(("retry_after_s", "header"), [(0.01, "1"), (1.0, "1"), (1.2, "2"), (33.0, "33")])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_call_is_429_and_says_when_to_come_back(
    retry_after_s: float, header: str, stream: bool
) -> None:
    backend = playing("a", LENGTH)
    backend.refusal = OverloadedError("overloaded: 500 prompt tokens are queued", retry_after_s)
    answer = await ask(backend, stream=stream)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, header)
    assert answer.json()["error"]["message"] == "overloaded: 500 prompt tokens are queued"
    assert not backend.requests, "nothing of it reached the pools"


async def test_what_can_never_fit_is_400_before_admission_could_say_429() -> None:
    backend = playing("a", LENGTH)
    backend.refusal = OverloadedError("full")
    assert (await ask(backend, prompt="x" * 99)).status_code == 400
    backend.refusal = RequestTooLargeError("never", "prompt")
    answer = await ask(backend)
    assert answer.status_code == 400
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_a_ticket_hears_of_each_first_token_and_is_closed(stream: bool) -> None:
    backend = playing("a", "b", LENGTH)
    await ask(backend, stream=stream, prompt=["x", "y", "z"])
    (ticket,) = backend.tickets
    assert sorted(ticket.first_tokens) == [0, 1, 2]
    assert ticket.is_closed


async def test_a_ticket_is_closed_when_the_call_fails() -> None:
    backend = playing("a", EngineDeadError("dead"))
    await ask(backend, stream=True)
    assert backend.tickets[0].is_closed


async def test_a_refusal_counts_as_overloaded() -> None:
    backend, recorder = playing(), Recorder()
    backend.refusal = OverloadedError("full")
    async with client_of(build_app(backend, build_codec(), INFO, observer=recorder)) as client:
        await client.post(COMPLETIONS, json=body_of(COMPLETIONS))
    assert recorder.outcomes == [Outcome.OVERLOADED]


async def test_the_key_is_in_no_log_and_in_no_request(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    backend = playing("a", LENGTH)
    await ask(backend, headers={"authorization": f"Bearer {SECRET}"})
    assert SECRET not in caplog.text
    assert SECRET not in repr(backend.requests) + repr(backend.calls)


def test_a_priority_is_read_without_regard_to_case() -> None:
    assert read_caller(Headers({"x-priority": " LOW "})).priority is Priority.LOW
    with pytest.raises(InvalidRequestError):
        read_caller(Headers({"x-priority": ""}))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "header", "told"),
    [("flex", "high", "flex"), ("auto", "high", "priority"), ("default", "normal", "default"), (None, "low", None)],
)
async def test_an_answer_says_the_tier_that_it_was_served_with_where_one_was_asked_for(
    path: str, stream: bool, asked: str | None, header: str, told: str | None
) -> None:
    body = {"input": "x"} if path == "/v1/responses" else body_of(path)
    app = build_app(playing("ab", FinishReason.LENGTH), build_codec(), INFO)
    async with client_of(app) as client:
        fields = {"service_tier": asked, "stream": stream}
        answer = await client.post(path, json=body | fields, headers={"x-priority": header})
    told_events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    values = [json.loads(event) for event in told_events] if stream else [answer.json()]
    if path == "/v1/responses":  # always, as OpenAI has it
        told = told or "flex"
        values = [event["response"] for event in values if "response" in event] if stream else values
    assert values and {value.get("service_tier") for value in values} == {told}
