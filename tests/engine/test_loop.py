"""The loop carries commands out in order, tells of events in order, and leaves nobody waiting when it ends."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from deployments.engine.engine import Engine
from deployments.engine.loop import EngineLoop
from deployments.errors import EngineDeadError, InvalidRequestError
from deployments.messages import EngineEvent, TokenOutput
from tests.engine.driving import build_engine, greedy
from tests.engine.families import load, random_prompt, reference
from tests.engine.insides import num_commands
from tests.waiting import PATIENCE_S, wait_until


class Outbox:
    """Where the loop's events go."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()

    def until_finished(self, num_requests: int) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        while sum(isinstance(e, TokenOutput) and e.finish_reason is not None for e in events) < num_requests:
            events += self.batches.get(timeout=PATIENCE_S)
        return events


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture
def loop(outbox: Outbox) -> Iterator[EngineLoop]:
    running = EngineLoop(build_engine(load("llama")), outbox.batches.put)
    yield running
    running.stop()


class Gate:
    """A command that keeps the loop busy until it is opened."""

    def __init__(self, loop: EngineLoop) -> None:
        self.opened, self._entered = threading.Event(), threading.Event()
        self.result = loop.submit(self._wait)
        assert self._entered.wait(PATIENCE_S)

    def _wait(self, engine: Engine) -> None:
        self._entered.set()
        assert self.opened.wait(PATIENCE_S)


def test_requests_submitted_from_many_threads_are_all_answered(loop: EngineLoop, outbox: Outbox) -> None:
    prompts = {f"r{i}": random_prompt(5 + i, seed=i) for i in range(12)}

    def submit(name: str) -> None:
        loop.call(lambda engine: engine.add(greedy(name, prompts[name], 6)), PATIENCE_S)

    threads = [threading.Thread(target=submit, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    for event in outbox.until_finished(len(prompts)):
        if isinstance(event, TokenOutput):
            assert event.index == len(tokens[event.request_id])
            tokens[event.request_id] += event.token_ids
    for name, prompt in prompts.items():
        assert tuple(tokens[name]) == reference("llama", prompt, 6)
    for thread in threads:
        thread.join(PATIENCE_S)


def test_commands_are_carried_out_in_the_order_of_their_submission(loop: EngineLoop) -> None:
    order: list[int] = []

    def note(i: int) -> Callable[[Engine], int]:
        def command(engine: Engine) -> int:
            order.append(i)
            return i

        return command

    results = [loop.submit(note(i)) for i in range(100)]
    assert [future.result(PATIENCE_S) for future in results] == list(range(100)) == order


def test_events_of_a_command_come_before_those_of_the_next_step(loop: EngineLoop, outbox: Outbox) -> None:
    told = TokenOutput("told", 0, (1,))

    def command(engine: Engine) -> None:
        engine.add(greedy("r", random_prompt(5), 2))
        loop.emit([told])
        loop.emit([])  # nothing to tell

    loop.call(command, PATIENCE_S)
    events = outbox.until_finished(1)
    assert events[0] is told and {e.request_id for e in events[1:]} == {"r"}


def test_a_command_that_fails_fails_alone(loop: EngineLoop, outbox: Outbox) -> None:
    with pytest.raises(InvalidRequestError, match="the prompt is empty"):
        loop.call(lambda engine: engine.add(greedy("bad", (), 2)), PATIENCE_S)
    loop.call(lambda engine: engine.add(greedy("good", (1, 2), 2)), PATIENCE_S)
    assert {e.request_id for e in outbox.until_finished(1)} == {"good"}


def test_a_command_cancelled_by_its_caller_is_not_carried_out_and_ends_nothing(loop: EngineLoop) -> None:
    gate = Gate(loop)
    carried_out: list[str] = []
    cancelled = loop.submit(lambda engine: carried_out.append("cancelled"))
    later = loop.submit(lambda engine: carried_out.append("later"))
    assert cancelled.cancel()
    gate.opened.set()
    later.result(PATIENCE_S)
    assert carried_out == ["later"] and loop.is_alive


def test_a_step_that_raises_ends_the_loop_and_fails_pending_and_later_commands(
    loop: EngineLoop, caplog: pytest.LogCaptureFixture
) -> None:
    carried_out: list[str] = []
    pending: list[Future[None]] = []

    def fatal_step() -> list[EngineEvent]:
        pending.append(loop.submit(lambda engine: carried_out.append("pending")))
        raise RuntimeError("the device is gone")

    def doom(engine: Engine) -> None:
        engine.finish_step = fatal_step  # type: ignore[method-assign]  # the fault to be injected
        engine.add(greedy("r", (1, 2), 2))

    loop.call(doom, PATIENCE_S)
    wait_until(lambda: not loop.is_alive)
    assert not loop.is_alive
    for future in (*pending, loop.submit(lambda engine: carried_out.append("later"))):
        with pytest.raises(EngineDeadError, match="the device is gone"):
            future.result(PATIENCE_S)
    assert len(pending) == 1 and carried_out == []
    assert "the engine's loop ended" in caplog.text


def test_a_listener_that_raises_ends_the_loop_too() -> None:
    def emit(events: list[EngineEvent]) -> None:
        raise ConnectionError("nobody listens")

    loop = EngineLoop(build_engine(load("llama")), emit)
    loop.call(lambda engine: engine.add(greedy("r", (1, 2), 2)), PATIENCE_S)
    wait_until(lambda: not loop.is_alive)
    with pytest.raises(EngineDeadError, match="nobody listens"):
        loop.call(lambda engine: None, PATIENCE_S)


def test_after_a_stop_commands_are_refused_and_pending_ones_fail() -> None:
    loop = EngineLoop(build_engine(load("llama")), lambda events: None)
    gate = Gate(loop)
    stopper = threading.Thread(target=loop.stop)
    before = loop.submit(lambda engine: engine.num_sequences)
    stopper.start()
    while num_commands(loop) < 2:  # the stop is behind the command
        stopper.join(0.001)
    cancelled, after = loop.submit(lambda engine: "cancelled"), loop.submit(lambda engine: "after")
    cancelled.cancel()
    gate.opened.set()
    stopper.join(PATIENCE_S)
    assert before.result(PATIENCE_S) == 0, "what was asked before the stop is still done"
    for future in (after, loop.submit(lambda engine: "later")):
        with pytest.raises(EngineDeadError, match="it was stopped"):
            future.result(PATIENCE_S)
    loop.stop()  # again is harmless


def test_many_threads_submitting_while_the_loop_dies_all_get_an_answer() -> None:
    def die(engine: Engine) -> None:
        raise SystemExit("now")  # more than a command's own failure

    for _ in range(20):
        loop = EngineLoop(build_engine(load("llama"), num_blocks=4), lambda events: None)
        answers: queue.SimpleQueue[object] = queue.SimpleQueue()

        def hammer(loop: EngineLoop = loop, answers: "queue.SimpleQueue[object]" = answers) -> None:
            for _ in range(50):
                try:
                    answers.put(loop.call(lambda engine: engine.num_sequences, PATIENCE_S))
                except EngineDeadError as error:
                    answers.put(error)

        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        loop.submit(die)
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a command was left without an answer"
        assert answers.qsize() == 200
        loop.stop()
