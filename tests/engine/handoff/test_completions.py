"""Calls behind events that the test lets happen."""

import threading
import weakref
from typing import Any

from deployments.engine.handoff.completions import Completions
from tests.waiting import PATIENCE_S, wait_until


class FakeEvent:
    """Happens when the test says so."""

    def __init__(self) -> None:
        self.has_happened = threading.Event()

    def synchronize(self) -> None:
        assert self.has_happened.wait(PATIENCE_S)


def call_after(completions: Completions, event: FakeEvent | None, calls: list[str], name: str) -> None:
    any_event: Any = event
    completions.call_after(any_event, lambda: calls.append(name))


def test_calls_come_in_order_behind_their_events_and_nobody_is_held_up() -> None:
    completions, calls = Completions(), list[str]()
    events = [FakeEvent() for _ in range(3)]
    for name, event in zip("abc", events, strict=True):
        call_after(completions, event, calls, name)
    assert calls == []
    events[1].has_happened.set()
    events[0].has_happened.set()
    wait_until(lambda: calls == ["a", "b"], PATIENCE_S)
    call_after(completions, None, calls, "at once")
    assert calls == ["a", "b", "at once"]
    events[2].has_happened.set()
    wait_until(lambda: calls[-1] == "c", PATIENCE_S)


def call_once(completions: Completions) -> None:
    event, calls = FakeEvent(), list[str]()
    call_after(completions, event, calls, "call")
    event.has_happened.set()
    wait_until(lambda: bool(calls), PATIENCE_S)


def test_who_is_dropped_is_gone_once_there_is_nothing_to_wait_for() -> None:
    completions = Completions()
    call_once(completions)
    call_once(completions)
    dropped = weakref.ref(completions)
    del completions
    wait_until(lambda: dropped() is None, PATIENCE_S, lambda: "its thread waits on")
