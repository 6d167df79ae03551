"""HAProxy as Ray Serve configures it and `kvrelay-haproxy` changes it, in front of the API: no Ray runs.

Ray's own code writes the configuration, the installed HAProxy runs it; only how long it waits is shortened.
"""

import asyncio
import contextlib
import csv
import io
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve._private.http_util import RequestIdMiddleware
from ray.serve.config import HTTPOptions
from starlette.types import ASGIApp

from app.haproxy import REPLICA_KEEP_ALIVE_S, prepare
from deployments.api.http import build_app
from tests.api.fakes import INFO, FakeBackend, build_codec, serving

PROGRAM = Path(sys.executable).with_name("kvrelay-haproxy")
# Of a client that says nothing more; else it has `SOON_S`.
CLIENT_TIMEOUT_S = 2
HEADERS_TIMEOUT_S = 1
KEEP_ALIVE_S = 1
# A generous limit for what happens at once, on a machine that others keep busy too.
SOON_S = 60
_NUM_STARTS = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_config(folder: Path, port: int, server_port: int, client_timeout_s: int = CLIENT_TIMEOUT_S) -> Path:
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
        timeout_client_s=client_timeout_s,
        http_options=HTTPOptions(host="127.0.0.1", port=port, keep_alive_timeout_s=REPLICA_KEEP_ALIVE_S),
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


@dataclass
class Proxy:
    """HAProxy in front of the API.

    Attributes:
        port: of HAProxy.
        process: what Ray would have started.
        admin: path of its socket.
    """

    port: int
    process: asyncio.subprocess.Process
    admin: Path

    @property
    def pid(self) -> int:
        return self.process.pid

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

    async def until_replica_is_up(self) -> bool:
        """Return once requests are answered, or HAProxy has ended: which of both."""

        def is_up(table: str) -> bool:
            rows = csv.DictReader(io.StringIO(table.removeprefix("# ")))
            return any(row["svname"] == "replica" and row["status"] == "UP" for row in rows)

        async with asyncio.timeout(SOON_S):
            while self.process.returncode is None:
                with contextlib.suppress(OSError):  # it is not there yet
                    if is_up(await self.ask("show stat")):
                        return True
                await asyncio.sleep(0.02)
        return False

    async def connect(self, data: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        return reader, writer

    async def say(self, data: bytes) -> bytes:
        """Send something, and nothing more; what comes until HAProxy closes, be that before it has read all."""
        loop, answer = asyncio.get_running_loop(), b""
        with socket.socket() as one:
            one.setblocking(False)
            async with asyncio.timeout(SOON_S):
                await loop.sock_connect(one, ("127.0.0.1", self.port))
                sending = asyncio.ensure_future(loop.sock_sendall(one, data))
                # A stream of asyncio's would lose what came before a reset.
                with contextlib.suppress(ConnectionError):
                    while piece := await loop.sock_recv(one, 65536):
                        answer += piece
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        return answer


@asynccontextmanager
async def proxied(app: ASGIApp, folder: Path, *, without: str = "", is_impatient: bool = False) -> AsyncIterator[Proxy]:
    """The API at `/app` behind HAProxy and what Serve puts between.

    Args:
        app: the API.
        folder: for HAProxy's files.
        without: an option that is taken out.
        is_impatient: clients that say nothing more have a second or two, and not a minute.
    """

    async def at_app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope = scope | {"root_path": "/app"}
        await RequestIdMiddleware(app)(scope, receive, send)

    async with serving(at_app) as url:  # type: ignore[arg-type]
        proxy = await start_haproxy(folder, int(url.rpartition(":")[2]), without, is_impatient)
        try:
            yield proxy
        finally:
            proxy.process.kill()
            await proxy.process.wait()


async def start_haproxy(folder: Path, server_port: int, without: str, is_impatient: bool) -> Proxy:
    """Start it as Ray does; again where it ends, since others may take ports that were free a moment ago."""
    timeouts = (
        ("http-request", 30, HEADERS_TIMEOUT_S if is_impatient else SOON_S),
        ("http-keep-alive", 90, KEEP_ALIVE_S),
    )
    for _ in range(_NUM_STARTS):
        port = free_port()
        path = write_config(folder, port, server_port, CLIENT_TIMEOUT_S if is_impatient else SOON_S)
        prepare(path)
        text = path.read_text()
        for timeout, seconds, other in timeouts:
            assert text.count(f"timeout {timeout} {seconds}s") == 1
            text = text.replace(f"timeout {timeout} {seconds}s", f"timeout {timeout} {other}s")
        path.write_text(text.replace(f"option {without}\n", ""))
        process = await asyncio.create_subprocess_exec(PROGRAM, "-db", "-f", path, "-dR", stderr=subprocess.DEVNULL)
        proxy = Proxy(port, process, folder / "admin.sock")
        if await proxy.until_replica_is_up():
            return proxy
    raise AssertionError(f"HAProxy ended with status {process.returncode}, {_NUM_STARTS} times")


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
