"""The server on one machine: `python -m app.local up`, `down`, `status`; what `make serve` and `make stop` call.

Starts `app/local_server.py` in a session of its own, tells what it is doing until it answers, and stops it again.
Never talks to Ray: it watches the log and asks `/health`.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import psutil

from app.arguments import ConfigError, list_arguments
from app.config import AppConfig
from app.haproxy import LOOPBACK_VARIABLE
from app.local_checks import (
    TEMP_PREFIX,
    LocalError,
    check_models,
    check_port,
    check_temp_folder,
    positive,
    tell_of_memory,
)
from app.local_download import Downloads
from app.local_process import RUN_FOLDER, RunFolder, Server, interrupt_once, whole_lines
from app.local_server import APP, NO_RAY, NO_RAY_MARK, NO_ROOM, RUNS, STAGE_MARK
from app.local_status import add_arguments, show_status
from app.ports import free_ports
from deployments.api.keys import KeyRing, KeysError
from deployments.errors import UnsupportedModelError

SERVE_SETTINGS = Path(__file__).with_name("serve.env")
# What deployments/engine/model/resolve.py logs; its one step that takes a minute.
_CONVERSION = re.compile(r"converting \S+ to \S+ \(once\)")
# Why a model, or these settings, cannot be served, without the fields that Ray adds; Serve would try twice more.
_REFUSAL = re.compile(r"deployments\.errors\.(?:UnsupportedModel|Limits)Error: (.*?)(?: job_id=\w+ worker_id=.*)?\n")
# What a shell has of its own.
_SHELL_VARIABLES = {"PATH", "PWD", "OLDPWD", "SHLVL", "_"}
_POLL_S = 0.3
_NUM_ERROR_LINES = 30


class NoRayError(LocalError):
    """Ray did not come up, which on a busy machine may be different the next time."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What `up` was asked to start.

    Attributes:
        app: import path of the graph.
        pairs: its arguments, each as key=value.
        deadline_s: when to give up, on the monotonic clock.
        downloads: of its models.
    """

    app: str
    port: int
    num_cpus: int
    pairs: list[str]
    began_s: float
    deadline_s: float
    downloads: Downloads


def parse_arguments(pairs: list[str]) -> AppConfig:
    """Read `key=value` pairs.

    Raises:
        ConfigError: one is malformed, unknown or out of bounds.
    """
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise ConfigError(f"{pair!r} is not of the form key=value")
    return AppConfig.model_validate(dict(pair.split("=", 1) for pair in pairs))


def up(folder: RunFolder, app: str, port: int, num_cpus: int | None, timeout_s: float, pairs: list[str]) -> None:
    """Start the server and return when it answers; on any failure nothing of it is left.

    Raises:
        ConfigError: an argument is wrong; nothing was started.
        UnsupportedModelError: there is no such model, it is not whole, or cannot be served.
        KeysError: the API keys cannot be read; nothing was started.
        LocalError: it runs already, the port is taken, there is no room, or it did not start.
    """
    config = parse_arguments(pairs)
    models = check_models(config) if app == APP else []  # what another one does with the name, only it knows
    if app == APP and config.ingress.api_keys is not None:
        KeyRing(config.ingress.api_keys)
    check_temp_folder()
    if (told := tell_of_memory()) is not None:
        print(told, flush=True)
    num_cpus = num_cpus or max(os.cpu_count() or 1, math.ceil(config.max_num_cpus()))
    began_s = time.monotonic()
    launch = Launch(app, port, num_cpus, pairs, began_s, began_s + timeout_s, Downloads(models, began_s))
    server = _launch(folder, launch)
    print(f"\n{config.served_model_name} is served at {server.url} (log: {folder.log}; stop by: {folder.stop}). Try:\n")
    print(f"  {_curl(server, config.served_model_name, needs_key=config.ingress.api_keys is not None)}\n")


def _launch(folder: RunFolder, launch: Launch) -> Server:
    """Start the server, once more if Ray did not come up: its own patience is short where a machine is busy."""
    try:
        return _launch_once(folder, launch)
    except NoRayError as error:
        print(f"{error}; trying once more", flush=True)
        folder.set_log_aside()
    try:
        return _launch_once(folder, launch)
    except NoRayError as error:
        load, num_cpus = os.getloadavg()[0], os.cpu_count()
        busy = f"the load of this machine is {load:.0f} on {num_cpus} CPUs: try again when it has less to do"
        raise LocalError(f"{error}, twice; {busy} (the log: {folder.log})") from None


def _launch_once(folder: RunFolder, launch: Launch) -> Server:
    with folder.locked():
        if (running := folder.server()) is not None:
            raise LocalError(f"a server already runs at {running.url} (pid {running.pid}); stop it first: make stop")
        check_port(launch.port)
        server, process = _spawn(folder, launch)
        folder.remember(server)
    try:
        _wait_until_healthy(folder, server, process, launch)
    except BaseException:  # KeyboardInterrupt too: what was started is stopped
        server.stop()
        process.poll()  # it has ended, and somebody has waited for it
        folder.forget()
        raise
    return server


def _spawn(folder: RunFolder, launch: Launch) -> tuple[Server, subprocess.Popen[bytes]]:
    # Short: Ray puts Unix sockets under it, see `check_temp_folder`.
    temp_dir = tempfile.mkdtemp(prefix=TEMP_PREFIX)
    command = [sys.executable, "-m", "app.local_server", "--app", launch.app, "--port", str(launch.port)]
    command += ["--num-cpus", str(launch.num_cpus), "--temp-dir", temp_dir, "--", *launch.pairs]
    environment = serve_environment(temp_dir) | os.environ
    environment.pop("RAY_ADDRESS", None)
    process = _start_detached(command, environment, folder.log)
    return Server(process.pid, psutil.Process(process.pid).create_time(), launch.port, temp_dir), process


def _start_detached(command: list[str], environment: dict[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a session of its own, which neither reads from this terminal nor writes to it."""
    with open(log_path, "wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def read_settings(path: Path) -> dict[str, str]:
    """Have a shell read a file of settings; the programs of this Python's environment come first in its PATH."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    command = ["sh", "-c", 'set -a; . "$1"; exec env -0', "sh", str(path.absolute())]
    printed = subprocess.run(command, env={"PATH": search}, capture_output=True, text=True, check=True).stdout
    variables = dict(line.split("=", 1) for line in printed.split("\0") if line)
    return {name: value for name, value in variables.items() if name not in _SHELL_VARIABLES}


def serve_environment(temp_dir: str) -> dict[str, str]:
    """For the processes of the server, where the user's environment does not say otherwise."""
    settings = read_settings(SERVE_SETTINGS)
    # HAProxy's files and ports are fixed, so two servers on one machine would share them. Short names: see above.
    folder = Path(temp_dir, "h")
    stats_port, metrics_port, waiting_port, grpc_port = free_ports(4)
    settings |= {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        # HAProxy sends requests there while no ingress replica runs; if it is another server's, to that.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(waiting_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc_port),
        # And not to UDP port 514, by a socket on all addresses. Listen with `socat -u UNIX-RECV:that-path -`.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log.sock"),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # With HAProxy an ingress replica waits half a minute for load balancers to notice that it goes; here are none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }
    return settings | {
        # Nothing of it is for other machines. On Windows and macOS Ray takes no other address than 127.0.0.1, and
        # listens there alone; this has it do the same on Linux. `ray.init(_node_ip_address="127.0.0.1")` would not:
        # Ray 2.60 turns it into the machine's address. app/loopback.py does the rest.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "NCCL_SOCKET_IFNAME": "lo",
        LOOPBACK_VARIABLE: "1",
        # Ray starts a worker per core of the machine beforehand, without the hook that `start_ray` sets, so that nobody
        # can use them: 79 MB each and 0.3 to 0.5 % of a core for as long as the server runs (2 cores, 2026-11-29).
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONUNBUFFERED": "1",
        # A local try-out reports nothing to anybody.
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _wait_until_healthy(folder: RunFolder, server: Server, process: subprocess.Popen[bytes], launch: Launch) -> None:
    stages: list[str] = []
    with open(folder.log, errors="replace") as log:
        while True:
            ended = process.poll() is not None  # before its last words are read
            stages += _print_stages(log, launch.began_s)
            launch.downloads.tell(launch.began_s)
            elapsed = time.monotonic() - launch.began_s
            if ended:
                raise _end_of(process.returncode, stages, folder)
            # Not before: Serve would hold the question until there is somebody to ask.
            if RUNS in stages and server.is_healthy():
                print(f"{elapsed:6.1f} s  ready", flush=True)
                return
            if time.monotonic() > launch.deadline_s:
                raise LocalError(f"not ready after {elapsed:.0f} s:\n\n{_last_lines(folder.log)}")
            time.sleep(_POLL_S)


def _end_of(status: int, stages: list[str], folder: RunFolder) -> LocalError:
    """Why a server that ended did so."""
    if status == NO_RAY:
        return NoRayError(next((stage for stage in reversed(stages) if stage.startswith(NO_RAY_MARK)), NO_RAY_MARK))
    if status == NO_ROOM and stages:
        return LocalError(stages[-1])
    return LocalError(f"the server ended with status {status}:\n\n{_last_lines(folder.log)}")


def _print_stages(log: TextIO, started: float) -> list[str]:
    """What new log lines tell, which is printed."""
    stages = []
    for stage in _stages(whole_lines(log)):
        print(f"{time.monotonic() - started:6.1f} s  {stage}", flush=True)
        stages.append(stage)
    return stages


def _stages(lines: Iterator[str]) -> Iterator[str]:
    """Pick out of new log lines what a waiting user wants to know.

    Raises:
        UnsupportedModelError: one says that the model cannot be served.
    """
    for line in lines:
        if (refusal := _REFUSAL.search(line)) is not None:
            raise UnsupportedModelError(refusal[1])
        if line.startswith(STAGE_MARK):
            yield line.removeprefix(STAGE_MARK).strip()
        elif _CONVERSION.search(line):
            yield "converting the model (the first time only)"


def _last_lines(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join([*lines[-_NUM_ERROR_LINES:], f"\n(the whole log: {log})"])


def _curl(server: Server, model: str, needs_key: bool) -> str:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    body = json.dumps({"model": model, "messages": messages, "max_tokens": 32, "temperature": 0})
    headers = ["Content-Type: application/json", *(["Authorization: Bearer YOUR_KEY"] if needs_key else [])]
    options = " ".join(f"-H {shlex.quote(header)}" for header in headers)
    return f"curl {server.url}/v1/chat/completions {options} -d {shlex.quote(body)}"


def down(folder: RunFolder) -> None:
    """Stop the server and all its processes.

    Raises:
        LocalError: none runs.
    """
    with folder.locked():
        server = folder.server()
        if server is None:
            folder.forget()
            raise LocalError("no server runs")
        server.stop()
        folder.forget()
    print(f"stopped the server at {server.url} (pid {server.pid})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m app.local",
        description="Serve on this machine, in the background.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"arguments of `up`, each as key=value:\n\n{list_arguments(AppConfig)}",
    )
    parser.add_argument("--run-dir", type=Path, default=RUN_FOLDER, help="log and state (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start the server and wait until it answers")
    start.add_argument("--port", type=int, default=8000, help="of the API on 127.0.0.1 (default: %(default)s)")
    start.add_argument(
        "--num-cpus", type=positive(int), help="CPUs that Ray may hand out (default: what the arguments need)"
    )
    start.add_argument("--timeout", type=positive(float), default=1800, help="seconds to wait (default: %(default)s)")
    start.add_argument("--app", default=APP, help="import path of the graph (default: %(default)s)")
    start.add_argument("arguments", nargs="*", metavar="key=value", help="see python -m app.local --help")
    commands.add_parser("down", help="stop the server")
    add_arguments(commands.add_parser("status", help="say whether it runs, and show what it does"))
    return parser


def _run(options: argparse.Namespace, folder: RunFolder) -> None:
    if options.command == "up":
        up(folder, options.app, options.port, options.num_cpus, options.timeout, options.arguments)
    elif options.command == "down":
        down(folder)
    else:
        show_status(folder, options.url, watch=options.watch)


def main() -> int:
    """Run one command; 0 when done, 1 when it could not be, 130 after Ctrl-C."""
    options = _parser().parse_args()
    folder = RunFolder(options.run_dir)
    # `kill` on a waiting `up` stops what it started, as Ctrl-C does.
    interrupt_once()
    try:
        _run(options, folder)
    except (ConfigError, KeysError, LocalError, UnsupportedModelError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
