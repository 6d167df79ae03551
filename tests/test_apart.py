"""A function called in a process of its own: its result and its errors come back, what it loads does not."""

import os
import sys

import pytest

from deployments.apart import ApartError, call_apart
from deployments.errors import InvalidRequestError


def describe(*names: str) -> dict[str, object]:
    print("this is no answer")
    return {"pid": os.getpid(), "loaded": [name for name in names if sys.modules.get(name)], "arguments": names}


def import_wave() -> None:
    import wave  # noqa: F401  # which nothing else imports


def refuse() -> None:
    raise InvalidRequestError("no", "field")


def raise_what_does_not_travel() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("of here alone")


def die() -> None:
    os._exit(3)


def environment(name: str) -> str | None:
    return os.environ.get(name)


def test_the_result_comes_from_another_process() -> None:
    answer = call_apart(describe, "torch", "json")
    assert answer["pid"] != os.getpid()
    assert answer["arguments"] == ("torch", "json")


def test_a_module_that_shall_be_missing_cannot_be_imported() -> None:
    call_apart(import_wave)
    with pytest.raises(ImportError, match="wave"):
        call_apart(import_wave, without=["wave"])


def test_the_environment_is_ours_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    assert call_apart(environment, "OURS") == "1"
    assert call_apart(environment, "ADDED", environment={"ADDED": "2"}) == "2"


def test_an_error_of_ours_is_raised_as_it_was() -> None:
    with pytest.raises(InvalidRequestError, match="no") as raised:
        call_apart(refuse)
    assert raised.value.param == "field"


def test_an_error_that_cannot_travel_is_told() -> None:
    with pytest.raises(ApartError, match="LocalError: of here alone"):
        call_apart(raise_what_does_not_travel)


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(ApartError, match="die: its process ended with status 3"):
        call_apart(die)
