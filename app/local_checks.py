"""What is looked at before a server starts: options, models, its port, room for its files. Refused in one line each.

Knows where Ray keeps its files, and does not start it. Called by `local.py`.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from app.config import AppConfig
from app.ports import MAX_PORT, free_ports, why_not
from deployments.engine.model.files import check_model
from deployments.engine.model.tokenizer_files import check_tokenizer

TEMP_PREFIX = "kvrelay-"
SHARED_MEMORY = Path("/dev/shm")
# Logs, sockets and code of a day take some 100 MiB; a Ray without room hangs, and does not say why.
MIN_TEMP_BYTES = 512 * 2**20
# Of less Ray makes files in its folder, and KV on its way to another engine lies in them.
MIN_SHARED_BYTES = 2**30
# Of a Unix socket's path. Ray's are KVRELAY-FOLDER/session_DATE_TIME_MICROSECONDS_PID/sockets/plasma_store.
_MAX_SOCKET_PATH = 107
_RAYS_PART = f"/{TEMP_PREFIX}12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"


class LocalError(Exception):
    """The server cannot be started or stopped as was asked; the message says why and what would help."""


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Type of an option for argparse: numbers above 0."""

    def number(text: str) -> float:
        if not (value := kind(text)) > 0:  # nan neither
            raise argparse.ArgumentTypeError(f"{text} must be more than 0")
        return value

    number.__name__ = kind.__name__  # which argparse tells of what is no number
    return number


def check_models(config: AppConfig) -> list[str]:
    """Look at the files of all models that engines are to load, and say which these are.

    Raises:
        UnsupportedModelError: there is no such model, it is not whole, or cannot be served.
    """
    guessing = config.engine_config("decode").speculation
    models = [model for model in (config.model, guessing.model) if model]
    for model in models:
        has_tokenizer = model != guessing.model or guessing.method != "eagle3"
        check_model(model, has_tokenizer=has_tokenizer)
        if has_tokenizer:
            check_tokenizer(model)
    return models


def check_port(port: int) -> None:
    """Raises LocalError where the API could not listen."""
    if not 1 <= port <= MAX_PORT:  # to the system, 0 is any port, and to HAProxy none
        raise LocalError(f"port {port}: must be from 1 to {MAX_PORT}")
    if (reason := why_not(port)) is not None:
        another = free_ports(1)[0]
        raise LocalError(
            f"port {port} cannot be listened on ({reason}); choose another: PORT={another} (--port {another})"
        )


def check_temp_folder() -> None:
    """Raises LocalError where Ray's files would not fit."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LocalError(f"no folder for Ray's files can be written to ({error.strerror}); set TMPDIR") from None
    if (longest := _MAX_SOCKET_PATH - len(_RAYS_PART)) < len(os.fsencode(folder)):
        raise LocalError(
            f"the folder for Ray's files, {folder}, has a path of {len(os.fsencode(folder))} bytes, and Ray's sockets "
            f"in it allow {longest}; set TMPDIR to another: TMPDIR=/tmp"
        )
    if (free := shutil.disk_usage(folder).free) < MIN_TEMP_BYTES:
        raise LocalError(
            f"{free >> 20} MiB are free in {folder}, and Ray's files need {MIN_TEMP_BYTES >> 20}; make room, or set "
            "TMPDIR to another folder"
        )


def tell_of_memory() -> str | None:
    """What a user should know of the shared memory; None if there is enough."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    if free >= MIN_SHARED_BYTES:
        return None
    return (
        f"{free >> 20} MiB are free in {SHARED_MEMORY}: KV goes from engine to engine through files in "
        f"{tempfile.gettempdir()}, which is slower (in Docker: --shm-size=2g)"
    )
