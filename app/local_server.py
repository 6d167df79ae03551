"""The process behind `python -m app.local up`: a private Ray on this machine, the application on it, until SIGTERM.

Owns Ray and Serve for its lifetime; both are its children. Says where it is in lines that begin with `STAGE_MARK`,
which `app/local.py`, its only caller, finds in the log. Nobody else's Ray cluster is touched or found.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.serve import Application
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from app.config import AppConfig
from app.haproxy import REPLICA_KEEP_ALIVE_S
from app.ports import HOST
from app.ray_agents import choose_ports
from deployments.engine.model.files import REFUSED

APP = "app:graph"
STAGE_MARK = "[kvrelay] "
RUNS = "every replica runs"
# The status with which the process ends where engines could never start (EX_UNAVAILABLE); its last stage says why.
NO_ROOM = 69
# Begins the stage that says why Ray did not come up, and the status with which the process then ends (EX_TEMPFAIL).
NO_RAY_MARK = "Ray did not start"
NO_RAY = 75
CHECK = "deployments.engine.model.check"
_MAX_REASON = 300
_POLL_S = 1.0
# Without news a waiting user is told again how it stands.
_PATIENCE_S = 30.0
_SIGNAL_POLL_S = 0.5
# Ray Serve's own; `down` waits no longer.
_STOP_TIMEOUT_S = 30.0


class NotUpError(Exception):
    """Ray or Serve did not come up; the message is theirs. On a busy machine it may be different the next time."""


def _reason(error: NotUpError) -> str:
    """One line; of what failed in another process the last one, behind its traceback."""
    text = str(error).strip()
    if isinstance(error.__cause__, RayError) and text:
        text = text.splitlines()[-1]
    return " ".join(text.split())[:_MAX_REASON]


def say(stage: str) -> None:
    """Tell the foreground what happens now."""
    print(f"{STAGE_MARK}{stage}", flush=True)


def load_builder(import_path: str) -> Callable[[AppConfig], Application]:
    """Find the function that builds the application; `module:name`, as `serve run` takes it."""
    module, _, name = import_path.partition(":")
    builder: Callable[[AppConfig], Application] = getattr(import_module(module), name)
    return builder


def http_options(port: int) -> dict[str, object]:
    """Of Serve."""
    return {"host": HOST, "port": port, "keep_alive_timeout_s": REPLICA_KEEP_ALIVE_S}


def start_check(config: AppConfig) -> subprocess.Popen[bytes]:
    """Look at the models' files in a process of its own: that loads torch, which this one would keep."""
    engines = [config.engine_config(pool) for pool in ("prefill", "decode")]
    # Its names and shapes alone, of what is here: without a question to the hub.
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    guessing = engines[1].speculation  # those that compute prompts guess none
    drafter = [guessing.model] if guessing.model else []
    kind = ["--eagle3"] if guessing.method == "eagle3" else []
    rounding = ["--fp8"] if any(engine.quantization == "fp8" for engine in engines) else []
    return subprocess.Popen([sys.executable, "-m", CHECK, config.model, *drafter, *kind, *rounding], env=environment)


def finish_check(check: subprocess.Popen[bytes]) -> None:
    """Wait for the verdict, and end where the model is refused, of which the log says why.

    A process that ended in any other way has judged nothing; engines will.
    """
    if check.wait() == REFUSED:
        sys.exit(REFUSED)


def start_ray(port: int, num_cpus: int, temp_dir: Path) -> None:
    """Start Ray, and Serve on it.

    Raises:
        NotUpError: they did not come up; what of them did ends with this process.
    """
    say("starting Ray")
    choose_ports()
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            # The engines' own messages, such as that of a model's conversion, belong in the log.
            logging_config=ray.LoggingConfig(encoding="TEXT", log_level="INFO"),
            # Its own folder, so that `ray status` and `serve run` of others do not take this cluster for theirs.
            _temp_dir=str(temp_dir),
            runtime_env={"worker_process_setup_hook": "app.loopback.bind_replicas_to_loopback"},
        )
        say("starting Serve")
        serve.start(http_options=http_options(port))
    except Exception as error:  # Ray has no type of its own for what did not come in time
        raise NotUpError(str(error)) from error


def check_room(config: AppConfig) -> None:
    """End where Ray has not what the engines ask for: replicas would wait for it for ever."""
    if (lack := config.what_lacks(ray.cluster_resources())) is not None:
        say(lack)
        sys.exit(NO_ROOM)


def start(application: Application) -> None:
    """Start the application and return when every deployment has its replicas.

    Raises:
        NotUpError: Serve's proxy did not come up.
        RuntimeError: Serve gave up; the message holds what the replicas died of.
    """
    say("starting the replicas")
    stopped = threading.Event()
    reporter = threading.Thread(target=_report_replicas, args=(stopped,), daemon=True)
    reporter.start()
    try:
        serve.run(application)
    except TimeoutError as error:
        raise NotUpError(str(error)) from error
    except RuntimeError as error:
        raise RuntimeError("\n\n".join([str(error), *_complaints()])) from None
    finally:
        stopped.set()
        reporter.join()


def _complaints() -> list[str]:
    applications = serve.status().applications.values()
    return [
        f"{name}: {deployment.message}"
        for application in applications
        for name, deployment in application.deployments.items()
        if deployment.status != "HEALTHY"
    ]


def _report_replicas(stopped: threading.Event) -> None:
    told: set[str] = set()
    told_s = time.monotonic()
    while not stopped.wait(_POLL_S):
        lines = _states_of_replicas()
        if news := [line for line in lines if line not in told]:
            told.update(news)
            told_s = time.monotonic()
            for line in news:
                say(line)
        elif time.monotonic() - told_s > _PATIENCE_S:
            told_s = time.monotonic()
            say(f"still so: {'; '.join(lines)}")


def _states_of_replicas() -> list[str]:
    lines = []
    for application in serve.status().applications.values():
        for name, deployment in application.deployments.items():
            states = ", ".join(f"{count} {state.lower()}" for state, count in deployment.replica_states.items())
            lines.append(f"{name}: {states or 'waiting for resources'}")
    return lines


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def wait_for_signal() -> NoReturn:
    """Wait until a signal's handler raises.

    Not in one wait: the system may give a signal to any thread, and then nothing wakes this one, which runs handlers.
    """
    while True:
        time.sleep(_SIGNAL_POLL_S)


def stop_serve() -> None:
    """Have Serve take its replicas down in order, and wait for it.

    As `serve.shutdown()`, but that has Ray ask a controller for ever which dies of the question, and say in the log
    that this failed (2.60).
    """
    with suppress(ValueError):  # there is none yet
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        with suppress(RayActorError, GetTimeoutError):
            ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_STOP_TIMEOUT_S)


def main() -> None:
    """Serve until SIGTERM, then take everything down in order."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--app", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--num-cpus", type=int, required=True)
    parser.add_argument("--temp-dir", type=Path, required=True)
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    arguments = dict(argument.split("=", 1) for argument in options.arguments)
    try:
        say("loading the code")
        config = AppConfig.model_validate(arguments)
        # What another application does with the name, only it knows.
        check = start_check(config) if options.app == APP else None
        application = load_builder(options.app)(config)
        if check is not None:
            say("checking the model")
            finish_check(check)
        start_ray(options.port, options.num_cpus, options.temp_dir)
        if options.app == APP:
            check_room(config)
        start(application)
        # Only now: ray.init sets a handler of its own, and until here `down` ends the whole session by force.
        signal.signal(signal.SIGTERM, _exit)
        say(RUNS)
        wait_for_signal()
    except NotUpError as error:
        traceback.print_exc()
        say(f"{NO_RAY_MARK}: {_reason(error)}")
        os._exit(NO_RAY)  # nothing of it is up that could be taken down in order
    finally:
        # Not without the question: with no Ray of our own, Serve would look for another to shut down.
        if ray.is_initialized():
            stop_serve()
            ray.shutdown()


if __name__ == "__main__":
    main()
