"""The thread an engine lives in. Others leave commands in its inbox and are told of events as they happen.

Knows no Ray. One step runs at a time; commands are carried out between steps, so an abort takes effect within one step.
"""

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from deployments.engine.engine import Engine
from deployments.errors import EngineDeadError
from deployments.messages import EngineEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Command:
    run: Callable[[Engine], Any]
    future: "Future[Any]"

    def carry_out(self, engine: Engine) -> None:
        if not self.future.set_running_or_notify_cancel():
            return  # the caller no longer wants it
        try:
            self.future.set_result(self.run(engine))
        except Exception as error:
            self.future.set_exception(error)


class EngineLoop:
    """Runs an engine in a thread of its own.

    Args:
        engine: from now on touched by that thread only, but for its thread-safe methods.
        emit: called from that thread with the events of each step; must not block.
    """

    def __init__(self, engine: Engine, emit: Callable[[list[EngineEvent]], None]) -> None:
        self.engine = engine
        self._emit = emit
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # orders "is it closed?" and "put": no command is left in a dead inbox
        self._death: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._death is None

    def submit(self, command: Callable[[Engine], T]) -> "Future[T]":
        """Have a command carried out between two steps.

        Returns:
            Its result, or what it raised; `EngineDeadError` if the loop has ended or ends before.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._death is None:
                self._inbox.put(_Command(command, future))
                return future
        future.set_exception(self._death)
        return future

    def call(self, command: Callable[[Engine], T], timeout_s: float | None = None) -> T:
        """`submit` and wait."""
        return self.submit(command).result(timeout_s)

    def emit(self, events: list[EngineEvent]) -> None:
        """Tell of events that a command produced; from within a command only, so that their order is kept."""
        if events:
            self._emit(events)

    def stop(self) -> None:
        """End the thread after the current step; what is still asked of it fails with `EngineDeadError`."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        reason = "it was stopped"
        try:
            while self._carry_out_commands():
                if self.engine.has_work:
                    self.emit(self.engine.begin_step())
                    self.emit(self.engine.finish_step())
        except BaseException as error:
            logger.exception("the engine's loop ended")
            reason = repr(error)  # not the error itself: its traceback would hold the step's tensors
        finally:
            self._close(EngineDeadError(f"the engine's loop ended: {reason}"))

    def _carry_out_commands(self) -> bool:
        """Run what is in the inbox, waiting for it while there is nothing else to do; False on stop."""
        while True:
            has_work, pause_s = self.engine.has_work, self.engine.pause_s
            try:
                timeout_s = pause_s if has_work else self.engine.next_expiry_s
                command = self._inbox.get(block=not has_work or pause_s > 0, timeout=timeout_s)
            except queue.Empty:
                if has_work and pause_s:
                    continue
                return True
            if command is None:
                return False
            command.carry_out(self.engine)
            if self.engine.has_work and not self.engine.pause_s and self._inbox.empty():
                return True

    def _close(self, death: EngineDeadError) -> None:
        with self._lock:
            self._death = death
        while not self._inbox.empty():
            command = self._inbox.get()
            if command is not None and command.future.set_running_or_notify_cancel():
                command.future.set_exception(death)
