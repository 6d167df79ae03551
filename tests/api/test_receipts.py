"""Receipts in answers: in which form they come, and that nobody hears of them who did not ask."""

import json
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deployments.api.http import build_app
from deployments.api.observer import Outcome
from deployments.api.openapi import describe_api
from deployments.messages import FinishReason
from deployments.receipts import Attempt, DecodeReceipt, EngineTimes, HandoffReceipt, PrefillReceipt, Receipt
from tests.api.fakes import (
    CHAT,
    COMPLETIONS,
    INFO,
    FakeBackend,
    Recorder,
    body_of,
    build_codec,
    client_of,
    events_of,
    playing,
)

RESPONSES = "/v1/responses"
SHAPES = {COMPLETIONS: "Completion", CHAT: "ChatCompletion", RESPONSES: "Response"}
API = json.loads(json.dumps(describe_api()["components"]))
HEADERS = {"x-kvrelay-receipt": "1"}
TIMES = EngineTimes(0.25, 0.5, 0.0, 0.125, 16, 0)
GUESSED = replace(TIMES, num_drafted_tokens=9, num_accepted_tokens=4)
RECEIPT = (
    Attempt("d1", "only: d1", None, 0.5, 3, None, "EngineDeadError: dead"),
    Attempt(
        "d2",
        "load: d2",
        "cache: p1",
        0.75,
        4,
        DecodeReceipt(
            "d2",
            GUESSED,
            (PrefillReceipt(error="lost"), PrefillReceipt("p1", TIMES, HandoffReceipt(4096, 0.5, 0.125))),
        ),
        "",
    ),
)


def saying() -> FakeBackend:
    backend = playing("a", "b", FinishReason.STOP)
    backend.receipt = RECEIPT
    return backend


async def ask(path: str, headers: dict[str, str], **fields: Any) -> Any:
    body = {"input": "hi"} | fields if path == RESPONSES else body_of(path, **fields)
    async with client_of(build_app(saying(), build_codec(), INFO)) as client:
        return await client.post(path, json=body, headers=headers)


def check(receipt: Any) -> None:
    (choice,) = receipt["choices"]
    assert 0 <= receipt["ingress_s"] <= choice["ttft_s"]
    lost, served = choice["attempts"]
    assert (lost["decode"], lost["error"]) == ({"replica": "d1", "reason": "only: d1"}, "EngineDeadError: dead")
    assert lost["num_tokens"] == 3 and lost["handoff"] is None and lost["prefill"] == []
    assert served["decode"]["replica"] == "d2" and served["decode"]["cached_tokens"] == 16
    failed, computed = served["prefill"]
    assert failed["error"] == "lost" and (computed["replica"], computed["reason"]) == ("p1", "cache: p1")
    assert (computed["queued_s"], computed["next_token_s"]) == (0.25, 0.125)
    assert (served["decode"]["drafted_tokens"], served["decode"]["accepted_tokens"]) == (9, 4)
    assert "drafted_tokens" not in computed
    assert served["handoff"] == {"bytes": 4096, "hidden_s": 0.5, "exposed_s": 0.125}


@pytest.mark.parametrize("path", SHAPES)
async def test_a_whole_answer_has_a_receipt_if_the_header_asks_for_it(path: str) -> None:
    told = (await ask(path, HEADERS)).json()
    check(told["receipt"])
    shape = {"$ref": f"#/components/schemas/{SHAPES[path]}", "components": API}
    Draft202012Validator(shape).validate(told)
    for headers in ({}, {"x-kvrelay-receipt": "0"}):
        assert "receipt" not in (await ask(path, headers)).json()


@pytest.mark.parametrize("by_header", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stream_has_it_in_the_chunk_with_the_usage(path: str, by_header: bool) -> None:
    fields: dict[str, Any] = {} if by_header else {"stream_options": {"include_receipt": True}}
    answer = await ask(path, HEADERS if by_header else {}, stream=True, **fields)
    *others, last, done = events_of(answer.content)
    check(last["receipt"])
    assert done == "[DONE]" and last["usage"]["completion_tokens"] == 2 and last["choices"] == []
    assert not any("receipt" in event for event in others)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_chunks_say_which_pool_drew_their_tokens_to_who_asks(path: str) -> None:
    backend = playing("a", "b", "c", FinishReason.LENGTH)
    backend.receipt, backend.num_prefilled = RECEIPT, 1
    async with client_of(build_app(backend, build_codec(), INFO)) as client:
        told = [await client.post(path, json=body_of(path, stream=True), headers=headers) for headers in (HEADERS, {})]
    choices = [[c for event in [*events_of(one.content)][:-1] for c in event["choices"]] for one in told]
    pools = [choice["pool"] for choice in choices[0] if choice.get("text") or choice.get("delta", {}).get("content")]
    assert pools == ["prefill", "decode", "decode"]
    assert not [choice for choice in choices[1] if "pool" in choice]


@pytest.mark.parametrize("by_header", [False, True])
async def test_a_stream_of_a_response_has_it_in_its_last_event(by_header: bool) -> None:
    fields: dict[str, Any] = {} if by_header else {"stream_options": {"include_receipt": True}}
    answer = await ask(RESPONSES, HEADERS if by_header else {}, stream=True, **fields)
    frames = [frame.partition("data: ")[2] for frame in answer.text.strip().split("\n\n")]
    responses = [event["response"] for event in map(json.loads, frames[:-1]) if "response" in event]
    assert ["receipt" in response for response in responses] == [False, False, True]
    check(responses[-1]["receipt"])


async def test_each_choice_has_its_own() -> None:
    told = (await ask(COMPLETIONS, HEADERS, n=3)).json()["receipt"]
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]


async def test_a_header_that_says_something_else_is_refused() -> None:
    answer = await ask(CHAT, {"x-kvrelay-receipt": "yes"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "x-kvrelay-receipt"


async def test_the_log_is_told_of_a_call_whose_caller_did_not_ask() -> None:
    observer = Recorder(wants_receipts=True)
    headers = {"x-request-id": "mine"}
    async with client_of(build_app(saying(), build_codec(), INFO, observer=observer)) as client:
        answer = await client.post(CHAT, json=body_of(CHAT, user="u", metadata={"team": "a"}), headers=headers)
    assert "receipt" not in answer.json()
    (ended,) = observer.ended
    assert (ended.path, ended.outcome, ended.status, ended.request_id) == (CHAT, Outcome.OK, HTTPStatus.OK, "mine")
    assert (ended.user, ended.labels) == ("u", {"metadata": {"team": "a"}})
    usage = answer.json()["usage"]
    assert (ended.num_prompt_tokens, ended.num_generated_tokens) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert ended.ttft_s is not None and 0 < ended.ttft_s <= ended.seconds
    assert ended.receipt is not None
    check(ended.receipt)


async def test_the_log_waits_for_what_a_replica_says_behind_the_last_token() -> None:
    backend, observer = saying(), Recorder(wants_receipts=True)
    whole, backend.receipt = backend.receipt, backend.receipt[:1]
    told: list[Callable[[Receipt], None]] = []
    backend.on_told = told.append
    async with client_of(build_app(backend, build_codec(), INFO, observer=observer)) as client:
        await client.post(CHAT, json=body_of(CHAT))
        assert observer.outcomes == [Outcome.OK] and observer.ended == []
        told[0](whole)
    (ended,) = observer.ended
    assert ended.receipt is not None
    check(ended.receipt)


async def test_the_log_is_told_of_calls_that_never_came_to_the_pools() -> None:
    observer = Recorder(wants_receipts=True)
    async with client_of(build_app(saying(), build_codec(), INFO, observer=observer)) as client:
        await client.post(CHAT, json=body_of(CHAT, max_tokens=-1))
    (ended,) = observer.ended
    assert (ended.outcome, ended.status, ended.receipt) == (Outcome.INVALID, HTTPStatus.BAD_REQUEST, None)
    assert (ended.num_prompt_tokens, ended.num_generated_tokens, ended.ttft_s) == (0, 0, None)
