"""API keys: the file or the variable that holds them, and whose a key is.

Owns the form of that file, and that a key is never shown: errors name places, not values. Whoever asks has only a hash
of a key (`caller.py`). `guard.py` asks for each request; the ingress has the file read again when it changes.
"""

import asyncio
import hashlib
import logging
import os
import re
import secrets
import stat
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from deployments.api.accounts import Account, Sharers, Terms
from deployments.errors import KvRelayError
from deployments.messages import Priority

logger = logging.getLogger(__name__)

# Before the name of an environment variable, where keys are not in a file.
VARIABLE_PREFIX = "env:"
_VARIABLE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
# Of a caller; it goes into logs.
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
# What a header can carry. Whoever guesses has no chance with 16 random characters.
_KEY = re.compile(r"[!-~]{16,512}")
# How long a new key may take to be good, and a withdrawn one to be bad.
_WATCH_PERIOD_S = 1.0
_FORMS = "a key is 16 to 512 printable ASCII characters without spaces, or sha256: and 64 hexadecimal digits"


class KeysError(KvRelayError):
    """The API keys cannot be read; the message names the place, and no key."""


class UnauthorizedError(KvRelayError):
    """The request has no key, or one that is not good.

    Args:
        message: says which.
        is_wrong: there is one.
    """

    def __init__(self, message: str, is_wrong: bool = False) -> None:
        super().__init__(message, is_wrong)
        self.message = message
        self.is_wrong = is_wrong

    def __str__(self) -> str:
        return self.message


class ForbiddenError(KvRelayError):
    """The key is good, but not for this."""


def check_source(source: str) -> str:
    """Return a setting that says where keys are: the absolute path of a file, or `env:` and a variable's name.

    Raises:
        ValueError: it is neither.
    """
    if not (source.startswith("/") or _VARIABLE.fullmatch(source)):
        raise ValueError("must be the absolute path of a file, or env:NAME for a variable of the ingress")
    return source


class _Entry(BaseModel):
    """A table of the file: one caller.

    `key` is one or several, all of which are good, so that one can replace another. `cache` names what the caller
    shares with others of the same cache; else it has one for itself. High priority is for those whose `max_priority`
    says so; `priority` is that of calls which ask for none.
    """

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    key: str | list[str]
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    metrics: bool = False
    cache: str | None = Field(default=None, min_length=1, max_length=64)
    max_priority: Literal["low", "normal", "high"] = "normal"
    priority: Literal["low", "normal", "high"] | None = None

    def digests(self) -> list[bytes]:
        """SHA-256 of each key.

        Raises:
            ValueError: one has not the form of a key.
        """
        keys = [self.key] if isinstance(self.key, str) else self.key
        if not keys:
            raise ValueError("key: there is none")
        return [_digest_of(key) for key in keys]

    def terms(self, name: str) -> Terms:
        cache = name if self.cache is None else self.cache
        most = Priority[self.max_priority.upper()]
        usual = min(Priority.NORMAL, most) if self.priority is None else Priority[self.priority.upper()]
        return Terms(self.requests_per_minute, self.tokens_per_minute, self.metrics, cache, most, usual)

    @model_validator(mode="after")
    def _check_priority(self) -> Self:
        if self.priority is not None and Priority[self.priority.upper()] > Priority[self.max_priority.upper()]:
            raise PydanticCustomError("priority", "priority is above max_priority")
        return self


def _digest_of(key: str) -> bytes:
    if hashed := _HASHED.fullmatch(key):
        return bytes.fromhex(hashed[1])
    if key.startswith("sha256:") or not _KEY.fullmatch(key):
        raise ValueError(f"key: {_FORMS}")
    return hashlib.sha256(key.encode()).digest()


def parse_keys(text: str) -> dict[str, _Entry]:
    """Read the text of a file of keys, by name.

    Raises:
        ValueError: what is wrong and where; without what stands there, for it may be a key.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at .*\)$", str(error))
        raise ValueError(f"it is not valid TOML {place[0] if place else ''}".rstrip()) from None
    entries: dict[str, _Entry] = {}
    for number, (name, table) in enumerate(tables.items(), 1):
        if not _NAME.fullmatch(name) or not isinstance(table, dict):
            raise ValueError(f"entry {number} is not a table [NAME] with a name of up to 64 letters, digits or ._@-")
        try:
            entries[name] = _Entry.model_validate(table)
            entries[name].digests()
        except ValidationError as error:
            raise ValueError(f"[{name}] {_explain(error)}") from None
        except ValueError as error:
            raise ValueError(f"[{name}] {error}") from None
    return entries


def _explain(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if fault["type"] == "extra_forbidden":
        return f"has a field that is none of {', '.join(_Entry.model_fields)}"
    return f"{fault['loc'][0]}: {fault['msg']}" if fault["loc"] else fault["msg"]


@dataclass(frozen=True, slots=True)
class _Held:
    """What a file said when it was read; replaced as a whole."""

    accounts: dict[str, Account]
    by_digest: dict[bytes, Account]


class KeyRing:
    """Whose a key is.

    Args:
        source: as `check_source` takes it.
        sharers: the ingress replicas that count for the same limits.
        clock: of the limits, monotonic seconds.

    Raises:
        KeysError: the keys cannot be read, or there are none.
    """

    def __init__(
        self, source: str, sharers: Sharers | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._source = check_source(source)
        self._sharers = sharers or Sharers()
        self._clock = clock
        # Keys are found by a hash that nobody outside can compute: how long that takes tells nothing of how much of a
        # key is right, and it costs the same with one key and with thousands.
        self._pepper = secrets.token_bytes(32)
        self._seen = self._mark()
        self._held = self._read(_Held({}, {}))
        self._warn_if_readable()

    def find(self, digest: bytes) -> Account | None:
        """The account of a key.

        Args:
            digest: SHA-256 of the key, or anything else, which nobody has.
        """
        return self._held.by_digest.get(self._blinded(digest))

    def refresh(self) -> None:
        """Read the file again if it has changed; one that cannot be read changes nothing, and is complained of once."""
        mark = self._mark()
        if mark == self._seen:
            return
        self._seen = mark
        try:
            self._held = self._read(self._held)
        except KeysError as error:
            logger.error("%s; the keys that were read before stay good", error)
        else:
            logger.info("read API keys from %s anew: %d names", self._source, len(self._held.accounts))

    async def watch(self, period_s: float = _WATCH_PERIOD_S) -> None:
        """Refresh again and again, until cancelled; a file may lie on a disk that makes one wait."""
        while True:
            await asyncio.sleep(period_s)
            await asyncio.to_thread(self.refresh)

    def _mark(self) -> object:
        """Differs when the file does."""
        if self._source.startswith(VARIABLE_PREFIX):
            return None
        try:
            status = os.stat(self._source)
        except OSError as error:
            return type(error)
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self, before: _Held) -> _Held:
        try:
            entries = parse_keys(self._text())
            if not entries:
                raise ValueError("there are none")
            held = _Held({}, {})
            for name, entry in entries.items():
                account = before.accounts.get(name) or self._open(name, entry)
                held.accounts[name] = account
                for digest in entry.digests():
                    if held.by_digest.setdefault(self._blinded(digest), account) is not account:
                        raise ValueError(f"[{name}] key: another name has the same")
        except ValueError as error:
            raise KeysError(f"API keys in {self._source}: {error}") from None
        # Only now, for a file that is wrong at its end changes nothing.
        for name, entry in entries.items():
            held.accounts[name].change(entry.terms(name))
        return held

    def _warn_if_readable(self) -> None:
        """Once, for who mounts a file of secrets may have no choice."""
        if self._source.startswith(VARIABLE_PREFIX):
            return
        with suppress(OSError):
            if not os.stat(self._source).st_mode & (stat.S_IRGRP | stat.S_IROTH):
                return
            logger.warning("other users of this machine can read the API keys in %s: chmod 600 it", self._source)

    def _open(self, name: str, entry: _Entry) -> Account:
        return Account(name, entry.terms(name), self._sharers, self._clock)

    def _text(self) -> str:
        if self._source.startswith(VARIABLE_PREFIX):
            text = os.environ.get(self._source.removeprefix(VARIABLE_PREFIX))
            if text is None:
                raise ValueError("the variable is not set where the ingress runs")
            return text
        try:
            return Path(self._source).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8 text") from None
        except OSError as error:
            raise ValueError(error.strerror or type(error).__name__) from None

    def _blinded(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._pepper, digest_size=32).digest()
