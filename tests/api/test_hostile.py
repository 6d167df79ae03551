"""What is sent to do harm, and what each gets: a refusal in OpenAI's form, at once, and nobody else notices."""

import asyncio
import logging
from dataclasses import replace
from typing import Any

import orjson
import pytest

from deployments.api.http import build_app
from deployments.api.text import TextCodec
from deployments.errors import EngineDeadError
from deployments.messages import FinishReason
from tests.api.ambiguous import AMBIGUOUS, HEAD
from tests.api.fakes import (
    CHAT,
    COMPLETIONS,
    INFO,
    FakeBackend,
    Hang,
    Recorder,
    body_of,
    build_codec,
    build_tokenizer,
    client_at,
    client_of,
    playing,
    serving,
)
from tests.call_lines import kept_lines, logging_observer
from tests.waiting import PATIENCE_S, until

LENGTH = FinishReason.LENGTH
MEBIBYTE = 2**20
NESTED = b"[" * 100_000 + b"]" * 100_000


def completion(field: bytes, value: bytes) -> bytes:
    """A body with one field written as it is."""
    return b'{"model":"%s","prompt":"abc",%s:%s}' % (INFO.name.encode(), orjson.dumps(field.decode()), value)


def chat(part: bytes) -> bytes:
    return b'{"model":"%s","messages":[{"role":"user","content":[%s]}]}' % (INFO.name.encode(), part)


def deep(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


HOSTILE: dict[str, tuple[str, bytes, int, str]] = {
    "10 MB of JSON": (COMPLETIONS, b'{"prompt":"' + b"a" * (10 * MEBIBYTE) + b'"}', 413, "at most 4194304 bytes"),
    "nested 100,000 times": (COMPLETIONS, NESTED, 400, "65536 lists"),
    "a field nested 100,000 times": (COMPLETIONS, completion(b"x", NESTED), 400, "65536 lists"),
    "a field nested 60,000 times": (COMPLETIONS, completion(b"x", deep(60_000)), 400, "not valid JSON"),
    "objects nested 100,000 times": (COMPLETIONS, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "65536 lists"),
    "a field nested as deep as may be read": (COMPLETIONS, completion(b"prompt", deep(1000)), 400, "prompt"),
    "an unknown field nested as deep": (COMPLETIONS, completion(b"x", deep(1000)), 400, "unknown field 'x'"),
    "a million lists": (COMPLETIONS, completion(b"prompt", b"[" + b"[]," * MEBIBYTE + b"[]]"), 400, "65536 lists"),
    "a million objects": (COMPLETIONS, completion(b"x", b"[" + b"{}," * MEBIBYTE + b"{}]"), 400, "65536 lists"),
    "nests of nests": (COMPLETIONS, b"[" + (deep(900) + b",") * 2000 + b"0]", 400, "65536 lists"),
    "NaN": (COMPLETIONS, completion(b"temperature", b"NaN"), 400, "not valid JSON"),
    "infinity": (COMPLETIONS, completion(b"temperature", b"-Infinity"), 400, "not valid JSON"),
    "more than any float": (COMPLETIONS, completion(b"temperature", b"1e999"), 400, "out of range"),
    "a number of 100,000 digits": (COMPLETIONS, completion(b"seed", b"9" * 100_000), 400, "out of range"),
    "half a surrogate pair": (COMPLETIONS, completion(b"prompt", rb'"\ud800"'), 400, "not valid JSON"),
    "the other half": (CHAT, chat(rb'{"type":"text","text":"a\udc00b"}'), 400, "not valid JSON"),
    "a surrogate as bytes": (COMPLETIONS, completion(b"prompt", b'"\xed\xa0\x80"'), 400, "not UTF-8"),
    "bytes that are no text": (COMPLETIONS, b"\xff\xfe{}", 400, "not UTF-8"),
    "a NUL in a string, as it is": (COMPLETIONS, completion(b"user", b'"a\x00b"'), 400, "not valid JSON"),
    "two values": (COMPLETIONS, b"{}{}", 400, "not valid JSON"),
    "an empty body": (COMPLETIONS, b"", 400, "not valid JSON"),
    "a huge n": (COMPLETIONS, completion(b"n", b"1000000000"), 400, "n"),
    "a huge best_of": (COMPLETIONS, completion(b"best_of", b"9223372036854775807"), 400, "best_of"),
    "a huge max_tokens": (COMPLETIONS, completion(b"max_tokens", b"18446744073709551615"), 400, "max_tokens"),
    "too many prompts": (COMPLETIONS, completion(b"prompt", orjson.dumps(["a"] * 1025)), 400, "at most 1024 prompts"),
    "too many stops": (COMPLETIONS, completion(b"stop", orjson.dumps(["a"] * 33)), 400, "at most 32 strings"),
    "a stop of a megabyte": (COMPLETIONS, completion(b"stop", b'"' + b"a" * MEBIBYTE + b'"'), 400, "1 to 1024"),
    "too many stop ids": (COMPLETIONS, completion(b"stop_token_ids", orjson.dumps([1] * 129)), 400, "at most 128"),
    "a prompt of megabytes": (COMPLETIONS, completion(b"prompt", b'"' + b"a" * 3 * MEBIBYTE + b'"'), 400, "too long"),
    "a token id below zero": (COMPLETIONS, completion(b"prompt", b"[-1]"), 400, "token ids must be 0 to 256"),
    "a token id beyond any": (COMPLETIONS, completion(b"prompt", b"[18446744073709551615]"), 400, "token ids must be"),
    "a name of a megabyte": (COMPLETIONS, completion(b"a" * MEBIBYTE, b"1"), 400, "unknown field"),
    "a model of a megabyte": (COMPLETIONS, b'{"prompt":"a","model":"' + b"m" * MEBIBYTE + b'"}', 404, "does not exist"),
    "a path for a model": (COMPLETIONS, b'{"prompt":"a","model":"../../../etc/passwd"}', 404, "does not exist"),
    "what others would evaluate": (COMPLETIONS, completion(b"prompt", b'{"__class__":"os.system"}'), 400, "prompt"),
    "an image on another server": (
        CHAT,
        chat(b'{"type":"image_url","image_url":{"url":"http://10.0.0.1/"}}'),
        400,
        "image_url",
    ),
    "a file of this one": (CHAT, chat(b'{"type":"file","file":{"file_id":"/etc/passwd"}}'), 400, "'file'"),
}


@pytest.mark.parametrize(("path", "body", "status", "message"), HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_body_is_refused_in_few_words_and_reaches_no_engine(
    path: str, body: bytes, status: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = playing("a", LENGTH)
    async with client_of(build_app(backend, build_codec(), INFO)) as client:
        answer = await client.post(path, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
        assert message in answer.json()["error"]["message"]
        assert len(answer.content) < 1000
        assert (await client.post(COMPLETIONS, json=body_of(COMPLETIONS))).status_code == 200
    assert len(backend.calls) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# Knows contents as parts alone, and writes all that is in them.
WRITES_PARTS = (
    "{% for m in messages %}{% for part in m.content %}{{ part.text + part | tojson }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("depth", [200, 1000])
async def test_a_part_as_deep_as_may_be_read_breaks_no_template_that_writes_it(depth: int) -> None:
    info = replace(INFO, max_model_len=10_000)
    async with client_of(build_app(playing("a", LENGTH), TextCodec(build_tokenizer(WRITES_PARTS)), info)) as client:
        answer = await client.post(CHAT, content=chat(b'{"type":"text","text":"x","a":%s}' % deep(depth)))
    assert answer.status_code in (200, 400), "the caller's fault, if any"
    if answer.status_code == 200:
        assert answer.json()["usage"]["prompt_tokens"] > 2 * depth


@pytest.mark.parametrize("data", AMBIGUOUS.values(), ids=AMBIGUOUS)
async def test_a_request_whose_end_is_ambiguous_has_nothing_smuggled_in_it(data: bytes) -> None:
    backend = playing("a", LENGTH)
    async with serving(build_app(backend, build_codec(), INFO)) as url:
        answer = await send_raw(url, data)
    assert b'"object":"list"' not in answer, "the smuggled request was answered"
    assert answer.startswith(b"HTTP/1.1 400 ") or not answer
    assert not backend.calls


async def send_raw(url: str, data: bytes) -> bytes:
    """All that comes back until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    async with asyncio.timeout(PATIENCE_S):
        answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize("num_bytes", [0, 1, 50])
async def test_a_body_that_trickles_is_ended_in_time_and_its_connection_with_it(num_bytes: int) -> None:
    recorder = Recorder()
    app = build_app(playing(), build_codec(), INFO, observer=recorder, body_timeout_s=0.2)
    async with serving(app) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(HEAD + b"Content-Length: 100\r\n\r\n")

        async def trickle() -> None:
            for _ in range(num_bytes):
                writer.write(b" ")
                await asyncio.sleep(0.01)

        sending = asyncio.create_task(trickle())
        async with asyncio.timeout(PATIENCE_S):
            answer = await reader.readuntil(b"\r\n\r\n")
        sending.cancel()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()


async def test_many_who_leave_at_every_moment_leave_nothing_behind() -> None:
    backend, recorder = playing("a", Hang()), Recorder()
    data = orjson.dumps(body_of(COMPLETIONS, stream=True))
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data
    async with serving(build_app(backend, build_codec(), INFO, observer=recorder)) as url:
        host, port = url.removeprefix("http://").split(":")
        for length in range(1, len(whole) + 1, 7):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(whole[:length])
            await writer.drain()
            writer.close()
        async with client_at(url) as client:
            assert (await client.get("/health")).status_code == 200
        await until(lambda: len(recorder.outcomes) >= recorder.num_started and not backend.running)
    assert all(outcome.value == "aborted" for outcome in recorder.outcomes)
    assert all(ticket.is_closed for ticket in backend.tickets)


SECRET = "swordfish"


@pytest.mark.parametrize(
    "backend",
    [playing("a", LENGTH), playing(RuntimeError("broken")), playing("a", EngineDeadError("dead"))],
    ids=["answered", "failed", "broken off"],
)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stream": True},
        {"stop": SECRET},
        {"temperature": SECRET},
        {SECRET: 1},
        {"prompt": [SECRET], "max_tokens": 1000},
        {"messages": [{"role": "tool", "content": SECRET}]},
        {"messages": [{"role": SECRET, "content": ""}]},
    ],
    ids=str,
)
async def test_no_log_holds_what_a_caller_wrote(
    backend: FakeBackend, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    app = build_app(backend, build_codec(), INFO, observer=logging_observer())
    with kept_lines() as kept:
        async with client_of(app) as client:
            await client.post(COMPLETIONS, json=body_of(COMPLETIONS, **({"prompt": SECRET} | fields)))
            messages = [{"role": "user", "content": SECRET}]
            await client.post(CHAT, json=body_of(CHAT, **({"messages": messages} | fields)))
            await client.post(COMPLETIONS, content=f'{{"prompt": "{SECRET}", '.encode())
        await until(lambda: len(kept) == 3)
    assert caplog.records
    assert SECRET not in caplog.text
    assert not [line for line in kept if SECRET in repr(vars(line))]


async def test_what_a_caller_says_of_itself_cannot_forge_a_line_of_the_log() -> None:
    app = build_app(playing("a", LENGTH), build_codec(), INFO, observer=logging_observer())
    with kept_lines() as kept:
        async with client_of(app) as client:
            await client.post(COMPLETIONS, json=body_of(COMPLETIONS, user="eve\nINFO forged"))
            await client.post(COMPLETIONS, json=body_of(COMPLETIONS), headers={"x-request-id": "a\tb forged"})
        await until(lambda: len(kept) == 2)
    lines = [record.getMessage() for record in kept]
    assert not [line for line in lines if "\n" in line or "\t" in line]
