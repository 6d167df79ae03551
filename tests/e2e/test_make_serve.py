"""The server as `make serve` starts it, with API keys: two ingress replicas, HAProxy, the real model."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from app.config import AppConfig
from app.local_process import RunFolder, Server
from app.ports import free_ports
from tests.docs.pages import ROOT, commands
from tests.e2e.conftest import ANSWER_TIMEOUT_S, ENGINE_PATIENCE, MODEL_NAME, Service
from tests.e2e.greedy import Reference, complete
from tests.e2e.processes import engine_of, title_of
from tests.local.commands import is_alive
from tests.waiting import wait_until

BUNDLED_NAME = AppConfig().served_model_name
PROMPT_NAMES = ("plain-1", "plain-33", "plain-300", "plain-511", "chat-0", "chat-1", "chat-3")
STOP_TIMEOUT_S = 240.0
KEY, LIMITED_KEY = "sk-tests-0123456789", "sk-limited-0123456789"
LIMIT = 6000
KEYS = f"""
[tests]
key = "{KEY}"
metrics = true
[limited]
key = "{LIMITED_KEY}"
requests_per_minute = {LIMIT}
"""
HEAD = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n".encode()
# The connection ends behind its answer, if it gets one.
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

HELD = ("running_sequences", "waiting_sequences", "reserved_sequences", "kv_blocks_used", "exported_blocks")


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(KEYS)
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, keys_file: Path) -> Iterator[Server]:
    (port,) = free_ports(1)
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    pairs = ["ingress.min_replicas=2", "ingress.max_replicas=2", f"served_model_name={MODEL_NAME}"]
    # Nothing shall be refused or given up for being slow on cores that others use, too.
    pairs += ["ingress.max_ttft_s=600", "ingress.resume_timeout_s=600"]
    pairs += [f"engine.{name}={seconds}" for name, seconds in ENGINE_PATIENCE.items()]
    pairs.append("engine.num_blocks=512")  # and not what is free just now of a machine that others use, too
    pairs.append("min_remote_prefill_tokens=256")  # so that tests know which engine computes their prompts
    pairs.append(f"ingress.api_keys={keys_file}")
    command = [sys.executable, "-m", "app.local", "--run-dir", str(folder.path), "up", "--port", str(port), *pairs]
    subprocess.run(command, check=True, timeout=800)
    server = folder.server()
    assert server is not None
    yield server
    process = psutil.Process(server.pid)
    process.terminate()
    process.wait(STOP_TIMEOUT_S)  # by its own order
    server.stop()


@pytest.fixture
def local(server: Server) -> Service:
    return Service("disaggregated", server.url)


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=300, headers=bearing(KEY)) as client:
        yield client


def bearing(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def processes(server: Server, name: str) -> list[psutil.Process]:
    return [process for process in server.processes() if re.search(name, title_of(process))]


def metrics_of(client: httpx.Client, local: Service) -> str:
    """All of them; asked again while a replica is gone."""

    def ask() -> str | None:
        answer = client.get(f"{local.url}/metrics")
        return answer.text if answer.status_code == httpx.codes.OK else None

    return wait_until(ask, ANSWER_TIMEOUT_S)


def total(client: httpx.Client, local: Service, *names: str) -> float:
    """Sum of some metrics over both pools."""
    text = metrics_of(client, local)
    return sum(
        float(value) for name in names for value in re.findall(rf"^kvrelay_{name}{{.*}} (.*)$", text, re.MULTILINE)
    )


def held(client: httpx.Client, local: Service) -> float:
    """How much both pools hold for requests."""
    return total(client, local, *HELD)


def generated(client: httpx.Client, local: Service) -> float:
    """Tokens, so far."""
    return total(client, local, "generated_tokens_total")


def test_the_processes_are_those_that_the_settings_name(server: Server) -> None:
    assert len(processes(server, "Ingress")) == 2
    assert processes(server, "haproxy$")
    maps = Path(f"/proc/{processes(server, 'Ingress')[0].pid}/maps").read_text()
    assert "uvloop" in maps
    assert "httptools" in maps


def test_every_socket_of_it_listens_on_loopback_alone(server: Server) -> None:
    listening = []
    for process in server.processes():
        with suppress(psutil.NoSuchProcess):  # ended since
            listening += [c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
            listening += [c.laddr.ip for c in process.net_connections("udp") if c.laddr]
    assert len(listening) > 10
    assert [ip for ip in listening if not is_loopback(ip)] == []


def test_a_benchmark_joins_its_ray(server: Server) -> None:
    # In a process of its own: a driver has one Ray, and that of other tests is another.
    program = (
        "from app.local_process import Server; from tests.bench.chaos import cluster; "
        f"cluster.join({server!r}); "
        "print(sum(actor['ActorClassName'] == 'EngineActor' for actor in cluster.live_actors()))"
    )
    joined = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert joined.stdout.split() == ["2"], joined.stderr


def is_loopback(ip: str) -> bool:
    address = ip_address(ip)
    # Python 3.11 takes ::ffff:127.0.0.1, which sockets of both families have, for no loopback address.
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_tokens_equal_transformers_through_both_ingress_replicas(
    client: httpx.Client,
    local: Service,
    prompts: dict[str, list[int]],
    reference: Reference,
) -> None:
    names = PROMPT_NAMES * 2
    with ThreadPoolExecutor(len(names)) as pool:
        answers = pool.map(lambda name: complete(client, local, name, prompts[name]), names)
        for name, tokens in zip(names, answers, strict=True):
            reference.assert_same(name, tokens)


def test_the_request_of_the_readme_is_answered(local: Service) -> None:
    (command,) = [command for command in commands((ROOT / "README.md").read_text()) if command.startswith("curl ")]
    words = shlex.split(command.replace("http://127.0.0.1:8000", local.url).replace(BUNDLED_NAME, MODEL_NAME))
    words += ["-sS", "--fail-with-body", "-H", f"authorization: {bearing(KEY)['authorization']}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] <= 32


def test_openai_client_streams_what_it_gets_whole(local: Service) -> None:
    with openai.OpenAI(base_url=f"{local.url}/v1", api_key=KEY, max_retries=0) as client:
        options: dict[str, Any] = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 12,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        assert (
            "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        )
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("num_prompt_tokens", [90, 3000])
def test_a_client_that_leaves_ends_the_work_for_it(
    client: httpx.Client, local: Service, num_prompt_tokens: int
) -> None:
    until_free(client, local)
    before = generated(client, local)
    body = {
        "model": MODEL_NAME,
        "prompt": list(range(2000, 2000 + num_prompt_tokens)),
        "max_tokens": 2000,
        "stream": True,
        "ignore_eos": True,
    }
    with client.stream("POST", f"{local.url}/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        for _ in range(6):
            next(lines)
        assert held(client, local) > 0
    until_free(client, local)
    assert generated(client, local) - before < 1000, "half of what was asked for"


def until_free(client: httpx.Client, local: Service) -> None:
    wait_until(lambda: held(client, local) == 0, 120)


def until_held(client: httpx.Client, local: Service, sockets: Sequence[socket.socket]) -> None:
    wait_until(lambda: held(client, local), 120, lambda: f"the clients got {[received(one) for one in sockets]}")


def received(one: socket.socket) -> bytes:
    """What has come so far."""
    one.setblocking(False)
    try:
        return one.recv(4096)
    except BlockingIOError:
        return b"nothing"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("num_prompt_tokens", "num_clients"), [(8, 1), (8, 16), (8000, 1)])
def test_clients_that_leave_before_an_answer_free_both_pools(
    client: httpx.Client, local: Service, num_prompt_tokens: int, num_clients: int, stream: bool
) -> None:
    """Headers and body in two sends."""
    until_free(client, local)
    before = generated(client, local)
    max_tokens = 150 if num_prompt_tokens > 1000 else 2000
    fields = {
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
        "model": MODEL_NAME,
    }
    sockets = []
    for index in range(num_clients):
        prompt = [1000 + index, *range(2000, 2000 + num_prompt_tokens - 1)]
        data = json.dumps(fields | {"prompt": prompt}).encode()
        one = socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2])))
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(data))
        time.sleep(0.005)
        one.sendall(data)
        sockets.append(one)
    until_held(client, local, sockets)
    for one in sockets:
        one.close()
    until_free(client, local)
    assert generated(client, local) - before < num_clients * max_tokens / 2, "half of what was asked for"


def test_openais_client_that_has_no_patience_frees_both_pools(client: httpx.Client, local: Service) -> None:
    options: Any = {"model": MODEL_NAME, "prompt": "Once upon a time", "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=f"{local.url}/v1", api_key=KEY, max_retries=0, timeout=0.5) as impatient:
        for _ in range(3):
            before = generated(client, local)
            with pytest.raises(openai.APITimeoutError):
                impatient.completions.create(**options, max_tokens=2000)
            until_free(client, local)
            assert generated(client, local) - before < 1000, "half of what was asked for"


def test_health_runs_no_model_and_every_answer_has_one_request_id(client: httpx.Client, local: Service) -> None:
    until_free(client, local)
    num_before = total(client, local, "engine_steps_total")
    for _ in range(50):
        until_healthy(client, local)
    assert total(client, local, "engine_steps_total") == num_before
    for path in ("/health", "/v1/models", "/nowhere"):
        for headers in ({}, {"x-request-id": "mine"}):
            answer = client.get(local.url + path, headers=headers)
            (request_id,) = answer.headers.get_list("x-request-id")
            assert (request_id == "mine") is bool(headers)


def until_healthy(client: httpx.Client, local: Service) -> None:
    """Both pools have answered in the last seconds, if the machine lets them."""
    wait_until(lambda: client.get(f"{local.url}/health").json() == {"status": "ok"}, ANSWER_TIMEOUT_S)


def test_a_stranger_gets_nothing_but_the_health(local: Service) -> None:
    with httpx.Client(base_url=local.url, timeout=300) as stranger:
        until_healthy(stranger, local)
        for headers in ({}, bearing("sk-nobody-0123456789")):
            for method, path in (
                ("GET", "/v1/models"),
                ("POST", "/v1/completions"),
                ("GET", "/metrics"),
                ("GET", "/live"),
                ("GET", "/x"),
            ):
                answer = stranger.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"].startswith("Bearer")


def test_both_ingress_replicas_count_for_one_limit(local: Service) -> None:
    def num_left() -> int:
        answer = httpx.get(f"{local.url}/v1/models", headers=bearing(LIMITED_KEY), timeout=300)
        assert answer.headers["x-ratelimit-limit-requests"] == str(LIMIT)
        return int(answer.headers["x-ratelimit-remaining-requests"])

    # Each counts what it serves twice, once it knows of the other, and fills 100 a second.
    wait_until(lambda: num_left() == LIMIT - 2, 120)


def test_what_clients_of_both_ingress_replicas_saw_is_on_one_page(client: httpx.Client, local: Service) -> None:
    def live() -> Any:
        return client.get(f"{local.url}/live").raise_for_status().json()

    def num_seen() -> int:
        count: int = live()["latency"]["ttft_s"]["count"]
        return count

    wait_until(lambda: live()["ingresses"] == {"asked": 2, "answered": 2}, ANSWER_TIMEOUT_S)
    before, num_calls = num_seen(), 10
    for _ in range(num_calls):  # HAProxy spreads them over both
        body = {"model": MODEL_NAME, "prompt": "One,", "max_tokens": 1}
        client.post(f"{local.url}/v1/completions", json=body).raise_for_status()
    wait_until(lambda: num_seen() >= before + num_calls, ANSWER_TIMEOUT_S)
    assert httpx.get(f"{local.url}/").status_code == 200, "the page itself needs no key"
    assert httpx.get(f"{local.url}/live", headers=bearing(LIMITED_KEY)).status_code == 403


def test_kv_is_found_by_the_key_that_left_it_and_by_no_other(local: Service) -> None:
    body = {"model": MODEL_NAME, "prompt": list(range(3000, 3400)), "max_tokens": 1}

    def num_cached(key: str) -> int:
        answer = httpx.post(f"{local.url}/v1/completions", json=body, headers=bearing(key), timeout=300).json()
        cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        return cached

    assert num_cached(KEY) == 0
    assert num_cached(KEY) > 300
    assert num_cached(LIMITED_KEY) == 0, "neither its engines nor its router know of the other's"
    assert num_cached(LIMITED_KEY) > 300


def test_a_key_is_good_and_bad_again_without_a_restart(local: Service, keys_file: Path) -> None:
    new = "sk-new-0123456789"

    def statuses() -> set[int]:
        asked = [httpx.get(f"{local.url}/v1/models", headers=bearing(new), timeout=300) for _ in range(6)]
        return {answer.status_code for answer in asked}

    assert statuses() == {401}
    draft = keys_file.with_suffix(".draft")
    for text, status in ((f'{KEYS}\n[new]\nkey = "{new}"\n', 200), (KEYS, 401)):
        draft.write_text(text)
        draft.replace(keys_file)
        wait_until(lambda: statuses() == {status}, 120)  # noqa: B023


@pytest.mark.parametrize(
    "rest",
    [
        b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
        b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"content-length: 0\r\ncontent-length: 60\r\n\r\n",
        b"content-length : 0\r\n\r\n",
        b"x: a\x00b\r\ncontent-length: 0\r\n\r\n",
        b"x: " + b"a" * 100_000 + b"\r\ncontent-length: 0\r\n\r\n",
        b"".join(b"x-%d: a\r\n" % number for number in range(1000)) + b"content-length: 0\r\n\r\n",
    ],
    ids=["length and chunks", "chunks and length", "unknown coding", "two lengths", "space", "NUL", "long", "many"],
)
def test_nothing_rides_on_the_key_of_a_request_before_it(local: Service, rest: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(local.url.rpartition(":")[2])), timeout=20) as one:
        one.sendall(HEAD + rest + SMUGGLED)
        answers = b""
        with suppress(TimeoutError, ConnectionResetError):
            one.settimeout(3)
            while data := one.recv(65536):
                answers += data
    statuses = re.findall(rb"HTTP/1\.[01] (\d+)", answers)
    # The second is one of its own for all who read it, or it is nobody's.
    assert statuses in ([], [b"400"], [b"408"], [b"422"], [b"431"], [b"501"], [b"400", b"401"]), answers
    assert b'"object":"list"' not in answers


def test_the_service_describes_itself(local: Service, client: httpx.Client) -> None:
    with httpx.Client(base_url=local.url, timeout=300) as stranger:
        assert "/v1/completions" in stranger.get("/openapi.json").json()["paths"]
        assert stranger.get("/docs").headers["content-security-policy"].startswith("default-src 'none'")
        wait_until(lambda: stranger.get("/ping").status_code == 200, ANSWER_TIMEOUT_S)
    (model,) = client.get(f"{local.url}/v1/models").json()["data"]
    assert (model["id"], model["root"]) == (MODEL_NAME, "smollm2-135m-instruct")
    tokens = client.post(f"{local.url}/tokenize", json={"prompt": "Hello 👋 <|im_end|>"}).json()["tokens"]
    text = client.post(f"{local.url}/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "Hello 👋 <|im_end|>"


def test_no_log_holds_a_key(server: Server) -> None:
    logs = [path for path in Path(server.temp_dir).rglob("*") if path.suffix in (".log", ".out", ".err")]
    assert len(logs) > 5
    keys = KEY.encode(), LIMITED_KEY.encode()
    assert [path for path in logs if any(key in path.read_bytes() for key in keys)] == []


def front_and_engine(server: Server, pool: str) -> tuple[psutil.Process, psutil.Process]:
    """The one replica of a pool, and its engine."""
    (front,) = processes(server, pool)
    return front, engine_of(front)


def cpu_s(process: psutil.Process) -> float:
    """What it has used of a core so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def test_a_decode_engine_that_dies_is_replaced_and_its_streams_go_on_where_they_were(
    client: httpx.Client, local: Service, server: Server
) -> None:
    sampling = {"max_tokens": 150, "ignore_eos": True, "seed": 5}
    body = {"model": MODEL_NAME, "prompt": "Once upon a time"} | sampling
    front, engine = front_and_engine(server, "Decode")
    with client.stream("POST", f"{local.url}/v1/completions", json=body | {"stream": True}) as stream:
        lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: "))
        told = [next(lines) for _ in range(6)]
        os.kill(engine.pid, signal.SIGKILL)
        told += lines
    assert told.pop() == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["text"] for line in told)
    wait_until(lambda: not is_alive(front), 60)
    undisturbed = client.post(f"{local.url}/v1/completions", json=body).json()
    assert text == undisturbed["choices"][0]["text"]


def test_a_prefill_engine_that_dies_amid_a_prompt_costs_only_time(
    client: httpx.Client, local: Service, server: Server
) -> None:
    body = {
        "model": MODEL_NAME,
        "prompt": list(range(1000, 4000)),
        "max_tokens": 8,
        "ignore_eos": True,
        "temperature": 0,
    }
    _, engine = front_and_engine(server, "Prefill")
    until_free(client, local)
    before_s = cpu_s(engine)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(client.post, f"{local.url}/v1/completions", json=body)
        wait_until(lambda: held(client, local) and cpu_s(engine) > before_s + 0.2, 120)
        os.kill(engine.pid, signal.SIGKILL)
        assert not pending.done(), "the engine was to die amid the prompt"
        response = pending.result()
    assert response.status_code == 200
    undisturbed = client.post(f"{local.url}/v1/completions", json=body)
    assert response.json()["choices"][0]["text"] == undisturbed.json()["choices"][0]["text"]
