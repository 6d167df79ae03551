"""The application as a client sees it, over a scripted backend."""

import asyncio
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from starlette.types import Message

from deployments.api.chat_template import BRIEF_LIMITS
from deployments.api.http import build_app
from deployments.api.observer import Outcome
from deployments.api.text import TextCodec
from deployments.errors import (
    InvalidRequestError,
    OverloadedError,
    TransferError,
)
from deployments.messages import FinishReason
from tests.api.fakes import (
    CHAT,
    COMPLETIONS,
    END_ID,
    INFO,
    FakeBackend,
    Hang,
    Recorder,
    body_of,
    build_codec,
    build_tokenizer,
    client_of,
    events_of,
    playing,
    post,
)
from tests.call_lines import kept_lines, logging_observer
from tests.waiting import until

LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP


async def test_a_completion_has_openais_shape():
    backend = playing("Hel", "lo", [END_ID], STOP)
    backend.num_cached_tokens = 2
    answer = await post(backend, COMPLETIONS)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    body = answer.json()
    assert body.pop("id") == f"cmpl-{answer.headers['x-request-id']}"
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": INFO.name,
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 6,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_of_the_tokens_that_are_said_to_be_cached_the_least_count():
    engine_was_lost = asyncio.Event()
    backend = playing("a", engine_was_lost, "b", LENGTH)
    backend.num_cached_tokens = 2
    call = asyncio.create_task(post(backend, COMPLETIONS))
    while not backend.num_outputs.total():  # noqa: ASYNC110  # it tells nobody of an output
        await asyncio.sleep(0)
    backend.num_cached_tokens = 1
    engine_was_lost.set()
    assert (await call).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_a_chat_completion_has_openais_shape():
    answer = await post(playing("Hi", LENGTH), CHAT)
    body = answer.json()
    assert body.pop("id") == f"chatcmpl-{answer.headers['x-request-id']}"
    assert isinstance(body.pop("created"), int)
    message = {"role": "assistant", "content": "Hi", "refusal": None}
    assert body == {
        "object": "chat.completion",
        "model": INFO.name,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 2,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_prompts_of_one_call_run_at_once_and_each_has_its_choice():
    everyone = asyncio.Event()
    backend = FakeBackend(lambda r: [everyone, chr(r.prompt_token_ids[0]).upper(), LENGTH])
    call = asyncio.create_task(post(backend, COMPLETIONS, prompt=["a", "b", "c"]))
    await backend.until(lambda: len(backend.running) == 3)
    everyone.set()
    body = (await call).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "A"), (1, "B"), (2, "C")]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 3)


async def test_a_completion_streams_in_openais_shape():
    answer = await post(playing("He", "y", [END_ID], STOP), COMPLETIONS, stream=True)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, done = events_of(answer.content)
    assert done == "[DONE]"
    for chunk in chunks:
        assert chunk.pop("id") == f"cmpl-{answer.headers['x-request-id']}"
        assert isinstance(chunk.pop("created"), int)
    assert chunks == [
        {
            "object": "text_completion",
            "model": INFO.name,
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}],
        }
        for text, reason in [("He", None), ("y", None), ("", "stop")]
    ]


async def test_a_chat_streams_in_openais_shape_with_usage_at_the_end():
    options = {"include_usage": True}
    answer = await post(playing("He", "y", LENGTH), CHAT, stream=True, stream_options=options)
    *chunks, done = events_of(answer.content)
    assert done == "[DONE]"
    deltas: list[tuple[object, str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "He"}, None),
        ({"content": "y"}, None),
        ({}, "length"),
    ]
    for chunk in chunks:
        assert chunk.pop("id") == f"chatcmpl-{answer.headers['x-request-id']}"
        assert isinstance(chunk.pop("created"), int)
    common = {"object": "chat.completion.chunk", "model": INFO.name}
    usage = {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert chunks == [
        *(
            common | {"choices": [{"index": 0, "delta": d, "logprobs": None, "finish_reason": reason}], "usage": None}
            for d, reason in deltas
        ),
        common | {"choices": [], "usage": usage},
    ]


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize(("path", "opening", "ending"), [(COMPLETIONS, [], []), (CHAT, [0], [4])])
async def test_continuous_usage_counts_what_the_chunks_have_shown(
    path: str, opening: list[int], ending: list[int], include_usage: bool
):
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    answer = await post(playing("a", "bc", "d", LENGTH), path, stream=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in events_of(answer.content) if chunk != "[DONE]"]
    # A chat opens with a chunk of the role alone, and ends with one of the finish reason.
    assert counts == [*opening, 1, 3, 4, *ending, *([4] if include_usage else [])]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_token_ids_come_beside_the_text_where_asked_for(path: str, stream: bool):
    answer = await post(playing("He", "y", [END_ID], STOP), path, stream=stream, return_token_ids=True)
    parts = [e for e in events_of(answer.content) if e != "[DONE]"] if stream else [answer.json()]
    choices = [choice for part in parts for choice in part["choices"]]
    assert [t for choice in choices for t in choice.get("token_ids", [])] == [*map(ord, "Hey"), END_ID]
    prompts = [holder["prompt_token_ids"] for holder in [*parts, *choices] if "prompt_token_ids" in holder]
    expected = [ord(c) for c in "abc"] if path == COMPLETIONS else None
    assert len(prompts) == 1, "once, however many chunks there are"
    assert expected is None or prompts[0] == expected


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_token_ids_are_left_out_where_not_asked_for(path: str):
    assert b"token_ids" not in (await post(playing("a", LENGTH), path)).content
    assert b"token_ids" not in (await post(playing("a", LENGTH), path, stream=True)).content


async def test_streamed_prompts_of_one_call_carry_their_index():
    backend = FakeBackend(lambda r: [chr(r.prompt_token_ids[0]).upper() + "1", "2", LENGTH])
    answer = await post(backend, COMPLETIONS, prompt=["a", "b"], stream=True)
    texts = {0: "", 1: ""}
    for chunk in events_of(answer.content):
        if chunk != "[DONE]":
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "A12", 1: "B12"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stop_string_across_outputs_ends_the_request(path: str, stream: bool):
    backend = playing("one\n", "\nt", Hang())
    answer = await post(backend, path, stop=["\n\n"], stream=stream)
    assert answer.status_code == 200
    assert not backend.running
    if stream:
        text, reasons = "", []
        for chunk in events_of(answer.content):
            if chunk != "[DONE]":
                choice = chunk["choices"][0]
                text += choice.get("text") or choice.get("delta", {}).get("content", "")
                reasons.append(choice["finish_reason"])
        assert (text, reasons[-1]) == ("one", "stop")
    else:
        choice = answer.json()["choices"][0]
        assert (choice.get("text") or choice["message"]["content"], choice["finish_reason"]) == ("one", "stop")
        assert answer.json()["usage"]["completion_tokens"] == 5


async def test_headers_wait_for_the_first_token():
    release, sent = asyncio.Event(), asyncio.Queue[Message]()
    backend = playing(release, "a", LENGTH)
    app = build_app(backend, build_codec(), INFO)
    body = orjson.dumps(body_of(COMPLETIONS, stream=True))
    incoming = asyncio.Queue[Message]()
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
    call = asyncio.create_task(app(scope_of(COMPLETIONS), incoming.get, sent.put))
    await backend.until(lambda: bool(backend.running))
    assert sent.empty()
    release.set()
    await call
    assert (await sent.get())["type"] == "http.response.start"


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_the_server_closes_the_request_and_is_not_swallowed(stream: bool):
    backend, recorder = playing("a", Hang()), Recorder()
    app = build_app(backend, build_codec(), INFO, observer=recorder)
    incoming, sent = asyncio.Queue[Message](), asyncio.Queue[Message]()
    body = orjson.dumps(body_of(CHAT, stream=stream))
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
    call = asyncio.create_task(app(scope_of(CHAT), incoming.get, sent.put))
    await backend.until(lambda: bool(backend.running))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert not backend.running
    assert recorder.outcomes == [Outcome.ABORTED]


async def test_a_server_that_says_the_client_is_gone_ends_the_request():
    backend, recorder = playing("a", "b", Hang()), Recorder()
    app = build_app(backend, build_codec(), INFO, observer=recorder)
    incoming = asyncio.Queue[Message]()
    body = orjson.dumps(body_of(COMPLETIONS, stream=True))
    incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})

    async def broken_send(_: Message) -> None:
        raise OSError("gone")

    await app(scope_of(COMPLETIONS), incoming.get, broken_send)
    assert not backend.running
    assert recorder.outcomes == [Outcome.ABORTED]


def scope_of(path: str) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}


async def test_models_are_listed_and_found_by_a_name_with_a_slash():
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        listed = (await client.get("/v1/models")).json()
        found = (await client.get(f"/v1/models/{INFO.name}")).json()
    assert listed == {"object": "list", "data": [found]}
    assert (found["id"], found["object"], found["max_model_len"]) == (INFO.name, "model", 64)


async def test_a_long_name_of_a_model_that_is_not_served_is_not_repeated_whole():
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        answer = await client.get("/v1/models/" + "a" * 12_000)
    assert answer.status_code == 404
    assert len(answer.content) < 300


async def test_health_is_the_backends():
    backend = playing()
    async with client_of(build_app(backend, build_codec(), INFO)) as client:
        assert (await client.get("/health")).status_code == 200
        backend.healthy = (False, "no decode replica")
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["reason"]) == (503, "no decode replica")
        backend.healthy = RuntimeError("secret")
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")
        assert "x-request-id" in answer.headers


async def test_metrics_are_the_backends():
    async with client_of(build_app(playing(), build_codec(), INFO)) as client:
        answer = await client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.content == b"# TYPE up gauge\nup 1\n"


@pytest.mark.parametrize(("length", "is_inline"), [(10, True), (10_000, False)])
async def test_only_long_bodies_are_read_in_another_thread(length: int, is_inline: bool):
    threads: list[int] = []

    class Spy(TextCodec):
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            threads.append(threading.get_ident())
            return [1]

    async with client_of(build_app(playing("a", LENGTH), Spy(build_tokenizer()), INFO)) as client:
        await client.post(COMPLETIONS, json=body_of(COMPLETIONS, prompt="x" * length))
    assert (threads == [threading.get_ident()]) == is_inline


async def test_a_template_that_takes_long_with_a_short_body_is_rendered_in_another_thread(
    monkeypatch: pytest.MonkeyPatch,
):
    # However fast the machine is, a loop takes longer.
    monkeypatch.setattr("deployments.api.text.BRIEF_LIMITS", replace(BRIEF_LIMITS, cpu_s=0.0))
    threads: list[int] = []

    class Spy(TextCodec):
        def encode_chat(self, *args: Any, **kwargs: Any) -> list[int]:
            threads.append(threading.get_ident())
            return super().encode_chat(*args, **kwargs)

    slow = "{% for i in range(300) %}{% endfor %}{{ messages[0].content }}"
    async with client_of(build_app(playing("a", LENGTH), Spy(build_tokenizer(slow)), INFO)) as client:
        answer = await client.post(CHAT, json=body_of(CHAT))
    assert answer.status_code == 200
    first, second = threads
    assert first == threading.get_ident() != second


@pytest.mark.parametrize("stream", [False, True])
async def test_the_observer_is_told_what_the_client_sees(stream: bool):
    recorder = Recorder()
    await post(playing("a", "bcd", LENGTH), COMPLETIONS, recorder, stream=stream)
    assert recorder.num_started == 1
    assert recorder.outcomes == [Outcome.OK]
    assert len(recorder.first_s) == 1
    assert [num_tokens for _, num_tokens in recorder.gaps] == [3]


async def test_time_to_first_token_and_gaps_cover_the_call_and_no_more(monkeypatch):
    now_s = 100.0
    monkeypatch.setattr("deployments.api.observer.time", SimpleNamespace(perf_counter=lambda: now_s))
    recorder, first, second = Recorder(), asyncio.Event(), asyncio.Event()
    backend = playing(first, "a", second, "bc", LENGTH)
    call = asyncio.create_task(post(backend, COMPLETIONS, recorder, stream=True))
    await backend.until(lambda: bool(backend.running))
    now_s += 3.0
    first.set()
    while not recorder.first_s:  # noqa: ASYNC110  # it tells nobody
        await asyncio.sleep(0)
    now_s += 4.0
    second.set()
    await call
    assert recorder.first_s == [3.0]
    # Both tokens of the second output together took as long as the output did.
    assert recorder.gaps == [(2.0, 2)]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OverloadedError(""), Outcome.OVERLOADED),
        (InvalidRequestError(""), Outcome.INVALID),
        (TransferError(""), Outcome.FAILED),
    ],
)
async def test_the_observer_learns_how_a_call_ended(error: Exception, outcome: Outcome):
    recorder = Recorder()
    await post(playing(error), COMPLETIONS, recorder)
    await post(playing("a", error), COMPLETIONS, recorder, stream=True)
    assert recorder.outcomes == [outcome, outcome]


async def test_the_operators_log_names_the_user():
    with kept_lines() as kept:
        async with client_of(
            build_app(playing("a", LENGTH), build_codec(), INFO, observer=logging_observer())
        ) as client:
            answer = await client.post(COMPLETIONS, json=body_of(COMPLETIONS, user="alice"))
        await until(lambda: kept)
    (line,) = (record.getMessage() for record in kept)
    assert f" user=alice request_id={answer.headers['x-request-id']}" in line


def test_importing_the_api_loads_nothing_heavy():
    script = (
        "import sys, deployments.api.http;"
        "print({'torch', 'ray', 'transformers', 'tokenizers', 'deployments.engine'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
