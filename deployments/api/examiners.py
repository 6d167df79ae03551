"""Where grammars are tried before an engine is given one: here, or in a process of its own that can be ended.

llguidance cannot be broken off, and what it takes for a short schema has no bound: `allOf` with two references to a
schema of the same kind, thirty levels deep, takes hours. So the ingress tries grammars where that harms nobody, and
engines get what has passed. Called by `grammar_check.py`, in its thread.
"""

import os
import resource
import signal
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Protocol

import msgspec

from deployments.grammars import GrammarError, Vocabularies, Vocabulary, VocabularyError
from deployments.messages import Grammar

# Of the process, with the vocabulary in it: that of gpt-oss, 201,088 tokens, is 0.45 GiB (2026-11-28).
MAX_MEMORY_BYTES = 4 << 30
_MAX_KEPT = 1024
_LENGTH = struct.Struct("<Q")
_NO_GRAMMAR, _NO_VOCABULARY = "grammar", "vocabulary"

MakeVocabulary = Callable[[tuple[int, ...]], Vocabulary]


class Examiner(Protocol):
    """Of one model. Used in one thread."""

    def prepare(self, end_token_ids: tuple[int, ...]) -> None:
        """Do what grammars with these end tokens need and are not to blame for.

        Raises:
            VocabularyError: no grammar can be followed with this model.
        """

    def examine(self, grammar: Grammar) -> None:
        """Return if it can be followed, at least from its beginning.

        Raises:
            GrammarError: it cannot; says why.
        """


class Here:
    """In this process, for as long as it takes.

    Args:
        make: from end tokens, the vocabulary that grammars are compiled for.
    """

    def __init__(self, make: MakeVocabulary) -> None:
        self._vocabularies = Vocabularies(make)

    def prepare(self, end_token_ids: tuple[int, ...]) -> None:
        self._vocabularies.of(end_token_ids)

    def examine(self, grammar: Grammar) -> None:
        self._vocabularies.compile(grammar).mask()


class Apart:
    """In a process of its own, which is started when it is needed and ends itself when a grammar takes too long.

    Args:
        tokenizer_json: what `tokenizer.json` holds.
        vocab_size: of the model.
        timeout_s: for one grammar.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, timeout_s: float) -> None:
        self._settings = (tokenizer_json, vocab_size, timeout_s)
        self._process: subprocess.Popen[bytes] | None = None
        self._prepared: set[tuple[int, ...]] = set()
        self._passed: OrderedDict[tuple[tuple[int, ...], str], None] = OrderedDict()

    def prepare(self, end_token_ids: tuple[int, ...]) -> None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        if end_token_ids not in self._prepared:
            self._ask(end_token_ids, None)
            self._prepared.add(end_token_ids)

    def examine(self, grammar: Grammar) -> None:
        key = (grammar.end_token_ids, grammar.source)
        if key in self._passed:
            self._passed.move_to_end(key)
            return
        try:
            self._ask(*key)
        except EOFError:
            raise GrammarError("compiling it takes too long, or too much memory") from None
        self._passed[key] = None
        if len(self._passed) > _MAX_KEPT:
            self._passed.popitem(last=False)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None

    def _start(self) -> None:
        self.close()
        self._prepared.clear()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "deployments.api.examiners"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._send(self._settings)

    def _ask(self, end_token_ids: tuple[int, ...], source: str | None) -> None:
        """Raises `EOFError` if the process ends."""
        self._send((end_token_ids, source))
        assert self._process is not None and self._process.stdout is not None
        told = _receive(self._process.stdout)
        if told is None:
            self._process.wait()
            raise EOFError(f"the process that tries grammars ended with status {self._process.returncode}")
        kind, message = msgspec.msgpack.decode(told, type=tuple[str, str])
        if kind:
            raise (VocabularyError if kind == _NO_VOCABULARY else GrammarError)(message)

    def _send(self, value: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            _send(self._process.stdin, value)
        except BrokenPipeError:
            raise EOFError("the process that tries grammars has ended") from None


def _send(stream: IO[bytes], value: object) -> None:
    data = msgspec.msgpack.encode(value)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> bytes | None:
    """The next message; None: there will be none."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    data = stream.read(length)
    return data if len(data) == length else None


def _serve(commands: IO[bytes], answers: IO[bytes]) -> None:
    """The other process: try what comes until nothing more does."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings = _receive(commands)
    if settings is None:
        return
    tokenizer_json, vocab_size, timeout_s = msgspec.msgpack.decode(settings, type=tuple[str, int, float])
    examiner = Here(lambda end_token_ids: Vocabulary(tokenizer_json, vocab_size, end_token_ids))
    while (command := _receive(commands)) is not None:
        end_token_ids, source = msgspec.msgpack.decode(command, type=tuple[tuple[int, ...], str | None])
        _send(answers, _try(examiner, end_token_ids, source, timeout_s))


def _try(examiner: Here, end_token_ids: tuple[int, ...], source: str | None, timeout_s: float) -> tuple[str, str]:
    try:
        examiner.prepare(end_token_ids)
        if source is not None:
            # By the signal's own doing, which needs no turn of the interpreter's, the process ends amid a compilation.
            signal.setitimer(signal.ITIMER_REAL, timeout_s)
            examiner.examine(Grammar(source, end_token_ids, ""))
    except GrammarError as error:
        return _NO_GRAMMAR, str(error)
    except VocabularyError as error:
        return _NO_VOCABULARY, str(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "", ""


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
