"""Deployments that are compared: how to bring each up on the same hardware, one after the other, and where it answers.

Owns the form of the deployments file and the start and stop of what it names, by shell commands. Knows nothing of what
the commands do: any OpenAI-compatible service will serve.
"""

import contextlib
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

_POLL_S = 0.5
# The one before may still be going.
_FREE_TIMEOUT_S = 30.0


class DeploymentError(Exception):
    """The file is wrong, or a deployment did not come up or go; the message says which and why."""


class Deployment(BaseModel):
    """One way to use the same engines.

    Attributes:
        num_prefill: engines that only compute prompts; 0: colocated.
        num_decode: engines that generate.
        start: shell command that brings it up; it may return before the service answers. It and `stop` find the
            numbers in the variables NUM_PREFILL and NUM_DECODE.
        stop: shell command that takes it down.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_prefill: int = Field(ge=0)
    num_decode: int = Field(ge=1)
    start: str
    stop: str

    @property
    def is_colocated(self) -> bool:
        return self.num_prefill == 0


class Deployments(BaseModel):
    """A deployments file.

    Attributes:
        url: where every deployment answers, once it is up.
        model: its name in the API; else the first that the service names.
        ready_timeout_s: how long after `start` the service may take to answer.
        deployments: by name; all with the same number of engines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    ready_timeout_s: float = Field(default=1800.0, gt=0)
    deployments: dict[str, Deployment] = Field(min_length=1)


def load_deployments(path: Path) -> Deployments:
    """Read a deployments file.

    Raises:
        DeploymentError: it cannot be read, says what it may not, or its deployments differ in their number of engines.
    """
    try:
        found = Deployments.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise DeploymentError(f"{path}: {error}") from None
    sizes = {name: one.num_prefill + one.num_decode for name, one in found.deployments.items()}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise DeploymentError(f"{path}: engines differ ({counts}); only equal resources compare")
    return found


@contextlib.contextmanager
def running(name: str, deployment: Deployment, url: str, timeout_s: float, log: Path) -> Iterator[None]:
    """Bring a deployment up, and down again whatever happens.

    Raises:
        DeploymentError: a command failed, the service did not answer in time, or another one answers in its place; the
            log holds what they said.
    """
    _wait_until_free(name, url)
    try:
        _shell(f"{name}: start", deployment.start, deployment, log)
        _wait_until_ready(name, url, timeout_s, log)
        yield
    finally:
        _shell(f"{name}: stop", deployment.stop, deployment, log)


def _shell(what: str, command: str, deployment: Deployment, log: Path) -> None:
    numbers = {"NUM_PREFILL": str(deployment.num_prefill), "NUM_DECODE": str(deployment.num_decode)}
    with open(log, "ab") as output:
        output.write(f"\n$ {command}\n".encode())
        output.flush()
        status = subprocess.run(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | numbers,
        ).returncode
    if status:
        raise DeploymentError(f"{what}: ended with status {status}: {command}\n(its output: {log})")


def _health(url: str) -> str | None:
    """What is wrong with the service; None: it is ready."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=10):
            return None
    except (OSError, ValueError) as error:
        return str(error)


def _wait_until_free(name: str, url: str) -> None:
    """Else what is measured would be whatever answers there already."""
    deadline = time.monotonic() + _FREE_TIMEOUT_S
    while _health(url) is None:
        if time.monotonic() > deadline:
            raise DeploymentError(f"{name}: a service answers at {url} before this one was started: stop it first")
        time.sleep(_POLL_S)


def _wait_until_ready(name: str, url: str, timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while (problem := _health(url)) is not None:
        if time.monotonic() > deadline:
            raise DeploymentError(f"{name}: {url}/health: {problem} after {timeout_s:g} s (log: {log})")
        time.sleep(_POLL_S)
