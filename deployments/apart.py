"""Calls a function in a process of its own, so that what it imports and the memory it needs are gone with it.

For work that is done once by a process that lives long and must stay light: the ingress reads its tokenizer so. Knows
nothing of what is called.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from deployments.errors import brief

T = TypeVar("T")


class ApartError(Exception):
    """The process ended without an answer, or with an error that cannot travel; what it wrote stands in our own log."""


def call_apart(
    function: Callable[..., T],
    *arguments: object,
    without: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> T:
    """Call a function in a new interpreter and wait for it.

    Args:
        function: found there by its module and name; its arguments and its result can be pickled.
        arguments: of it.
        without: modules that cannot be imported there, as if they were not installed.
        environment: set there besides what is set here.

    Raises:
        ApartError: see there.
        Exception: what the function raised.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.run(
        [sys.executable, "-m", "deployments.apart", *without],
        input=pickle.dumps((function, arguments)),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
        check=False,
    )
    if process.returncode != 0:
        raise ApartError(f"{function.__name__}: its process ended with status {process.returncode}")
    error, result = pickle.loads(process.stdout)
    if error is not None:
        raise error
    answer: T = result
    return answer


def _answer(without: Sequence[str]) -> None:
    """The other process: do what the standard input says."""
    for module in without:
        sys.modules[module] = None  # type: ignore[assignment]  # for Python: it is not there
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what is printed is no answer
    function, arguments = pickle.load(sys.stdin.buffer)
    try:
        answer = pickle.dumps((None, function(*arguments)))
    except Exception as error:
        answer = pickle.dumps((_portable(error), None))
    answers.write(answer)


def _portable(error: Exception) -> Exception:
    """The error itself, or if it does not survive pickling what it says."""
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return ApartError(brief(error))
    return copy


if __name__ == "__main__":
    # Under its own name, so that its errors are those that the caller knows.
    from deployments.apart import _answer as answer

    answer(sys.argv[1:])
