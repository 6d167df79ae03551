"""HAProxy as Ray Serve configures it and `kvrelay-haproxy` changes it, in front of the API: no Ray runs.

Ray's own code writes the configuration, the installed HAProxy runs it; only how long it waits is shortened.
"""

import asyncio
import contextlib
import csv
import io
import json
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig, get_haproxy_binary
from ray.serve._private.http_util import RequestIdMiddleware
from ray.serve.config import HTTPOptions
from starlette.types import ASGIApp

from app.haproxy import (
    _REQUEST_ID,
    LOOPBACK_RULES,
    LOOPBACK_VARIABLE,
    RULES,
    Rule,
    TemplateError,
    change,
    prepare,
)
from app.local import SERVE_SETTINGS, read_settings
from deployments.api.asgi import REQUEST_ID
from deployments.api.http import build_app
from deployments.messages import FinishReason
from tests.api.ambiguous import AMBIGUOUS
from tests.api.fakes import INFO, FakeBackend, Hang, Recorder, Step, build_codec, playing, serving

PROGRAM = Path(sys.executable).with_name("kvrelay-haproxy")
CLIENT_TIMEOUT_S = 2
HEADERS_TIMEOUT_S = 1
WEBSOCKET = (
    b"GET /app/v1/completions HTTP/1.1\r\nhost: x\r\nconnection: upgrade, close\r\nupgrade: WebSocket\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)
# A generous limit for what happens at once.
SOON_S = 10


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_config(folder: Path, port: int, server_port: int) -> Path:
    """As Ray Serve writes it for one application at `/app` with one replica."""
    config = HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        nbthread=1,
        log_target=str(folder / "log.sock"),  # as app/local.py has it
        stats_port=free_port(),
        metrics_port=free_port(),
        timeout_client_s=CLIENT_TIMEOUT_S,
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
    )
    backend = BackendConfig(
        name="http-default",
        path_prefix="/app",
        app_name="default",
        ingress_deployment_name="Ingress",
        http_health_check_path="/app/v1/models",
        servers=[ServerConfig(name="replica", host="127.0.0.1", port=server_port)],
    )
    path = folder / "haproxy.cfg"
    HAProxyApi(config, {backend.name: backend}, str(path))._generate_config_file_internal()
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path, free_port(), free_port())


def check(binary: Path, config: Path) -> list[str]:
    """Warnings about a configuration, which has to be valid."""
    checked = subprocess.run([binary, "-c", "-f", config], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    return re.findall(r"^\[WARNING\] +\(\d+\) : (.*)", checked.stderr, flags=re.MULTILINE)


def test_every_rule_finds_its_place_in_rays_template_and_haproxy_accepts_the_whole(config: Path) -> None:
    before = config.read_text()
    of_ray = check(Path(get_haproxy_binary()), config)
    assert check(PROGRAM, config) == of_ray, "no warning beside those that Ray's own has"
    after = config.read_text()
    for gone in ("splice-request", "text/plain lf-string", "/500.http"):
        assert gone in before and gone not in after
    assert "option abortonclose" in after
    assert not [name for name in config.parent.iterdir() if name.suffix == ".changed"]


def test_a_configuration_is_changed_once(config: Path) -> None:
    changed = change(config.read_text(), config.parent)
    assert change(changed, config.parent) == changed


def test_for_one_machine_alone_the_pages_of_haproxy_itself_listen_on_loopback(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOOPBACK_VARIABLE, "1")
    check(PROGRAM, config)
    addresses = re.findall(r"^\s*bind (\S+):\d+", config.read_text(), re.MULTILINE)
    assert addresses == ["127.0.0.1"] * 3


@pytest.mark.parametrize("rule", RULES + LOOPBACK_RULES, ids=lambda rule: rule.pattern[:40])
def test_a_template_of_ray_that_a_rule_does_not_fit_is_refused(
    config: Path, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOOPBACK_VARIABLE, "1")
    without = re.sub(rf"^[ \t]*{rule.pattern}[ \t]*\n", "", config.read_text(), flags=re.MULTILINE)
    config.write_text(without)
    with pytest.raises(TemplateError, match=re.escape(repr(rule.pattern))):
        prepare(config)
    assert config.read_text() == without


def test_a_template_of_ray_that_has_changed_ends_the_start_and_says_why(config: Path) -> None:
    config.write_text(config.read_text().replace("option splice-request", "option splice-auto"))
    started = subprocess.run([PROGRAM, "-c", "-f", config], capture_output=True, text=True)
    assert started.returncode == 1
    assert "has no 'option splice-request' now" in started.stderr


def test_the_proxy_and_the_api_allow_the_same_request_ids() -> None:
    assert f"^{REQUEST_ID.pattern}$" == _REQUEST_ID


def test_serve_env_bounds_the_time_in_which_a_client_does_nothing() -> None:
    assert 0 < int(read_settings(SERVE_SETTINGS)["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) <= 300


@dataclass
class Proxy:
    """HAProxy in front of the API.

    Attributes:
        port: of HAProxy.
        pid: of what Ray would have started.
        admin: path of its socket.
    """

    port: int
    pid: int
    admin: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/app"

    async def ask(self, command: str) -> str:
        reader, writer = await asyncio.open_unix_connection(str(self.admin))
        writer.write(f"{command}\n".encode())
        answer = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return answer

    async def until_replica_is_up(self) -> None:
        def is_up(table: str) -> bool:
            rows = csv.DictReader(io.StringIO(table.removeprefix("# ")))
            return any(row["svname"] == "replica" and row["status"] == "UP" for row in rows)

        async with asyncio.timeout(SOON_S):
            while True:
                with contextlib.suppress(OSError):  # it is not there yet
                    if is_up(await self.ask("show stat")):
                        return
                await asyncio.sleep(0.02)

    async def connect(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        return reader, writer

    async def say(self, data: bytes) -> bytes:
        """Send something, and nothing more; what comes until HAProxy closes."""
        reader, writer = await self.connect(data)
        async with asyncio.timeout(SOON_S):
            answer = await reader.read()
        writer.close()
        return answer


@asynccontextmanager
async def proxied(app: ASGIApp, folder: Path) -> AsyncIterator[Proxy]:
    """The API at `/app` behind HAProxy and what Serve puts between, started as Ray starts it."""

    async def at_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope = scope | {"root_path": "/app"}
        await RequestIdMiddleware(app)(scope, receive, send)

    async with serving(at_app) as url:  # type: ignore[arg-type]
        port = free_port()
        path = write_config(folder, port, int(url.rpartition(":")[2]))
        prepare(path)
        text = path.read_text()
        assert text.count("timeout http-request 30s") == 1
        path.write_text(text.replace("timeout http-request 30s", f"timeout http-request {HEADERS_TIMEOUT_S}s"))
        process = await asyncio.create_subprocess_exec(PROGRAM, "-db", "-f", path, "-dR", stderr=subprocess.DEVNULL)
        proxy = Proxy(port, process.pid, folder / "admin.sock")
        try:
            await proxy.until_replica_is_up()
            yield proxy
        finally:
            process.kill()
            await process.wait()


def api(backend: FakeBackend, **options: Any) -> ASGIApp:
    return build_app(backend, build_codec(), INFO, server_sends_ids=True, **options)


def request(**fields: Any) -> tuple[bytes, bytes]:
    """Headers and body of a completion."""
    body = orjson.dumps({"model": INFO.name, "prompt": "abc"} | fields)
    head = f"POST /app/v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode(), body


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of a whole answer, which has to be in OpenAI's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode().lower().split("\r\n")
    assert "content-type: application/json" in fields
    error: dict[str, Any] = json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])["error"]  # it may be chunked
    assert error.keys() == {"message", "type", "param", "code"}
    return int(status.split()[1]), error


async def test_the_process_that_ray_starts_becomes_haproxy(tmp_path: Path) -> None:
    async with proxied(api(playing("a", FinishReason.LENGTH)), tmp_path) as proxy:
        info = await proxy.ask("show info")
        assert f"Pid: {proxy.pid}\n" in info
        assert psutil.Process(proxy.pid).net_connections("udp") == []
        # Ray finds its HAProxy among all processes by the path of the configuration.
        assert str(tmp_path / "haproxy.cfg") in psutil.Process(proxy.pid).cmdline()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_clients_that_leave_end_their_requests(tmp_path: Path, stream: bool) -> None:
    backend = playing(Hang())
    head, body = request(stream=stream)

    async def ask(apart_s: float) -> asyncio.StreamWriter:
        _, writer = await proxy.connect(head if apart_s else head + body)
        if apart_s:
            await asyncio.sleep(apart_s)
            writer.write(body)
        return writer

    async with proxied(api(backend), tmp_path) as proxy:
        for apart_s, num_clients in ((0, 1), (0, 16), (0.005, 1), (0.005, 16)):
            writers = await asyncio.gather(*(ask(apart_s) for _ in range(num_clients)))
            await backend.until(lambda: len(backend.running) == num_clients, SOON_S)  # noqa: B023
            for writer in writers:
                writer.close()
            await backend.until(lambda: not backend.running, SOON_S)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_openais_client_that_has_no_patience_ends_its_request(tmp_path: Path, stream: bool) -> None:
    backend = playing(Hang())
    async with (
        proxied(api(backend), tmp_path) as proxy,
        openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0, timeout=0.5) as client,
    ):
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(model=INFO.name, prompt="abc", stream=stream)
        assert len(backend.requests) == 1
        await backend.until(lambda: not backend.running, SOON_S)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_may_wait_in_silence_for_longer_than_it_may_be_idle(tmp_path: Path, stream: bool) -> None:
    release = asyncio.Event()
    steps: list[Step] = ["a", release, "b", FinishReason.LENGTH] if stream else [release, "ab", FinishReason.LENGTH]
    async with proxied(api(playing(*steps)), tmp_path) as proxy, httpx.AsyncClient(timeout=SOON_S) as client:
        body = {"model": INFO.name, "prompt": "abc", "stream": stream}
        pending = asyncio.create_task(client.post(f"{proxy.url}/v1/completions", json=body))
        await asyncio.sleep(1.5 * max(CLIENT_TIMEOUT_S, HEADERS_TIMEOUT_S))  # what is tested is that nothing happens
        release.set()
        answer = await pending
    assert answer.status_code == 200
    assert answer.text.count('"finish_reason":"length"') == 1


async def test_a_connection_that_says_nothing_is_closed_without_a_word(tmp_path: Path) -> None:
    async with proxied(api(playing()), tmp_path) as proxy:
        assert await proxy.say(b"") == b""


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (request()[0] + b'{"mod', 400, "bad_request"),
        (b"GET /other HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 404, "not_found"),
        (WEBSOCKET, 400, "bad_request"),
        (b"FETCH /app/health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 501, "not_implemented"),
    ],
    ids=["a body that never ends", "no application", "a WebSocket", "no method"],
)
async def test_what_haproxy_answers_by_itself_has_openais_form(
    tmp_path: Path, data: bytes, status: int, code: str
) -> None:
    async with proxied(api(playing()), tmp_path) as proxy:
        answer = await proxy.say(data)
    answered, error = error_of(answer)
    assert (answered, error["code"]) == (status, code)
    assert answer.count(b"x-request-id: ") == 1


async def test_what_never_becomes_a_request_is_refused_and_closed_in_haproxys_own_words(tmp_path: Path) -> None:
    """HAProxy 2.8 has these answers built in, and no setting changes them."""
    async with proxied(api(playing()), tmp_path) as proxy:
        for data, status in (
            (b"POST /app/v1/completions HTTP/1.1\r\nho", 408),
            (b"hello\r\n\r\n", 400),
            (b"GET /app/health HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", 400),
            (b"GET /app/health HTTP/1.1\r\nhost: x\r\ncontent-length: abc\r\n\r\n", 400),
        ):
            assert (await proxy.say(data)).startswith(b"HTTP/1.1 %d " % status)


# HAProxy writes headers anew, in one form: it and the API read them alike, whatever they were.
REWRITTEN = ("a header that goes on in a second line", "a line break without a return")


async def test_requests_that_could_be_read_in_two_ways_are_refused_and_what_is_behind_them_is_not_answered(
    tmp_path: Path,
) -> None:
    backend = playing("a", FinishReason.LENGTH)
    async with proxied(api(backend), tmp_path) as proxy:
        for name, data in AMBIGUOUS.items():
            if name not in REWRITTEN:
                answer = await proxy.say(data.replace(b" /v1/", b" /app/v1/"))
                assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1, name
    assert not backend.calls


async def test_a_flood_of_headers_is_refused_unread(tmp_path: Path) -> None:
    async with proxied(api(playing()), tmp_path) as proxy:
        for count in (150, 20_000):
            headers = b"".join(b"x%d: a\r\n" % number for number in range(count))
            answer = await proxy.say(b"GET /app/health HTTP/1.1\r\nhost: x\r\n" + headers + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 400 ")


async def test_requests_that_are_sent_at_once_are_answered_in_turn(tmp_path: Path) -> None:
    backend = FakeBackend(lambda asked: (f"{asked.sampling.max_tokens}", FinishReason.LENGTH))
    *first, (head, body) = [request(max_tokens=number) for number in (1, 2, 3)]
    last = head.replace(b"host: x", b"host: x\r\nconnection: close") + body
    async with proxied(api(backend), tmp_path) as proxy:
        answer = await proxy.say(b"".join(head + body for head, body in first) + last)
    assert re.findall(rb'"text":"(.)"', answer) == [b"1", b"2", b"3"]


async def test_a_body_that_does_not_end_in_time_is_refused_by_the_api(tmp_path: Path) -> None:
    head, body = request()
    async with proxied(api(playing(), body_timeout_s=0.2), tmp_path) as proxy:
        status, error = error_of(await proxy.say(head + body[:5]))
    assert status == 408
    assert error["message"] == "the body was not complete after 0.2 s"


@pytest.mark.parametrize("path", ["/app/nowhere", "/app/v1/models", "/app/v1/completions"])
async def test_a_body_that_goes_on_behind_its_answer_keeps_no_connection(tmp_path: Path, path: str) -> None:
    """A byte at a time would keep it for as long as the client likes."""
    method = "POST" if path.endswith("completions") else "GET"
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n".encode()
    async with proxied(api(playing(), body_timeout_s=0.2), tmp_path) as proxy:
        reader, writer = await proxy.connect(head)
        answer = asyncio.create_task(reader.read())
        async with asyncio.timeout(SOON_S):
            with contextlib.suppress(ConnectionError):
                while not answer.done():
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.wait([answer], timeout=0.1)
                await answer
        writer.close()


async def test_without_a_replica_the_answer_is_503_in_openais_form(tmp_path: Path) -> None:
    async with proxied(api(playing()), tmp_path) as proxy:
        await proxy.ask("disable server http-default/replica")
        answer = await proxy.say(b"GET /app/health HTTP/1.1\r\nhost: x\r\n\r\n")
    status, error = error_of(answer)
    assert (status, error["code"]) == (503, "service_unavailable")


async def test_a_client_that_closes_its_sending_half_counts_as_one_that_left(tmp_path: Path) -> None:
    """Clients that leave and those that only have nothing more to say look the same; docs/log.md says why it is so."""
    backend = playing(Hang())
    async with proxied(api(backend), tmp_path) as proxy:
        reader, writer = await proxy.connect(b"".join(request()))
        await backend.until(lambda: len(backend.running) == 1, SOON_S)
        writer.write_eof()
        async with asyncio.timeout(SOON_S):
            status, error = error_of(await reader.read())
        await backend.until(lambda: not backend.running, SOON_S)
        writer.close()
    assert status == 400
    assert "sending half" in error["message"]


async def test_every_answer_has_one_request_id_and_it_is_the_callers_if_that_is_well_formed(tmp_path: Path) -> None:
    backend = playing("a", FinishReason.LENGTH)
    backend.healthy = RuntimeError("nobody thought of it")
    body = {"model": INFO.name, "prompt": "abc"}
    well, badly = ("job-7/Root=1", "a" * 128), ("", "a" * 129, 'no "quotes"', "no, commas", "ä".encode("latin-1"))
    async with proxied(api(backend), tmp_path) as proxy, httpx.AsyncClient(base_url=proxy.url) as client:
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


async def test_the_logs_name_a_request_as_the_answer_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recorder = Recorder()
    app = api(playing("a", FinishReason.LENGTH), observer=recorder)
    async with proxied(app, tmp_path) as proxy, httpx.AsyncClient() as client:
        body = {"model": INFO.name, "prompt": "abc"}
        for headers in ({}, {"x-request-id": "mine"}):
            answer = await client.post(f"{proxy.url}/v1/completions", json=body, headers=headers)
            name = f"X-Request-Id {answer.headers['x-request-id']}"
            async with asyncio.timeout(SOON_S):
                await recorder.has_finished.wait()  # and in the same turn of the loop it is logged
            recorder.has_finished.clear()
            assert any(answer.json()["id"] in line and name in line for line in caplog.messages)
