"""Records what an engine's steps take, on the host and on the device, while a whole service runs.

`recorded:graph` builds engines with it. One row of `COLUMNS` per step goes to `POOL-PID.steps`, and one per batch of
tokens to `POOL-PID.sent`: when the loop handed it to the thread that sends it, and when that had written it. Both are
float64, written behind a second's steps; `timeline_table.py` reads them. Per step it costs two events on the device,
whose times are asked for once it is over, and some tens of microseconds of the host.
"""

import gc
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deployments import engine_host
from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.execution.base import LaunchedStep, Runner
from deployments.engine.execution.graphs import padded_batch
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine_builder import BuiltEngine, build_engine
from deployments.messages import ChunkReady, EngineEvent, TokenOutput
from deployments.tokens.sender import TokenSender
from tests.engine.insides import replace_runner, runner_of, wrap_conclusions

# Seconds are monotonic times. What is counted "before" happened since the step before was launched.
COLUMNS = (
    "begun_s",  # the loop began to choose the step
    "launch_s",  # it began to launch it
    "launched_s",
    "awaited_s",  # it began to wait for it
    "told_s",  # it knew what was drawn
    "concluded_s",
    "idle_ms",  # of the device, from the end of the step before to its beginning, imports included; NaN: no device
    "device_ms",
    "import_device_ms",  # of chunks that came before it
    "num_seqs",
    "num_rows",  # as padded for a graph
    "num_prompt_tokens",
    "num_context_tokens",  # of all its sequences
    "max_context_tokens",
    "num_imports",  # before it, as all that follows
    "num_blocks",
    "import_s",  # of the host
    "num_activated",
    "gc_s",
)
SENT_COLUMNS = ("handed_s", "written_s")
STEPS, SENT = ".steps", ".sent"
FLUSH_S = 1.0


_has_device = cache(torch.cuda.is_available)


def _timed_event() -> "torch.cuda.Event | None":
    """What the device does next, on its clock; None: there is no device."""
    if not _has_device():
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_ms(begun: "torch.cuda.Event | None", ended: "torch.cuda.Event | None") -> float:
    return float("nan") if begun is None or ended is None else begun.elapsed_time(ended)


@dataclass(slots=True)
class _Row:
    """A step, until it is written down; times and counts as `COLUMNS`."""

    begun_s: float
    launch_s: float
    num_seqs: int
    num_rows: int
    num_prompt_tokens: int
    contexts: list[int]
    before: "_Before"
    begins: "torch.cuda.Event | None"
    ends: "torch.cuda.Event | None" = None
    launched_s: float = 0.0
    awaited_s: float = 0.0
    told_s: float = 0.0
    concluded_s: float = 0.0

    def values(self, step_before: "_Row | None") -> tuple[float, ...]:
        """Once the device is done with it."""
        before = self.before
        return (
            *(self.begun_s, self.launch_s, self.launched_s, self.awaited_s, self.told_s, self.concluded_s),
            _between_ms(None if step_before is None else step_before.ends, self.begins),
            _between_ms(self.begins, self.ends),
            sum(_between_ms(*spans) for spans in before.spans),
            *(self.num_seqs, self.num_rows, self.num_prompt_tokens, sum(self.contexts), max(self.contexts, default=0)),
            *(len(before.spans), before.num_blocks, before.import_s, before.num_activated, before.gc_s),
        )


@dataclass(slots=True)
class _Before:
    """What came since the last launch."""

    spans: "list[tuple[torch.cuda.Event | None, torch.cuda.Event | None]]" = field(default_factory=list)
    num_blocks: int = 0
    import_s: float = 0.0
    num_activated: int = 0
    gc_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _RecordedStep(LaunchedStep):
    row: "_Row | None" = None

    def collect(self) -> Any:
        assert self.row is not None
        self.row.awaited_s = time.monotonic()
        collected = LaunchedStep.collect(self)
        self.row.told_s = time.monotonic()
        return collected


class _RecordedRunner:
    """A runner whose steps are noted; see `Runner`."""

    def __init__(self, runner: Runner, recorder: "Recorder") -> None:
        self.cache = runner.cache
        self._runner, self._recorder = runner, recorder

    def launch(self, scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        row = self._recorder.begin(scheduled)
        step = self._runner.launch(scheduled, watch)
        row.ends, row.launched_s = _timed_event(), time.monotonic()
        return _RecordedStep(step.items, step.tokens, step.done, step.scores, step.states, row)


class Recorder:
    """Of one engine, for its thread.

    Args:
        engine: idle.
        path: of the files, without their endings.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self._max_batch = min(engine.limits.max_num_seqs, 512) if _has_device() else 0
        self._begun_s = self._gc_begun_s = 0.0
        self._before = _Before()
        # Concluded; the device may be a moment behind the event that says so.
        self._concluded: deque[_Row] = deque()
        self._last: _Row | None = None
        self._steps = _File(path.with_suffix(STEPS))
        self._begin_step, self._import = engine.begin_step, engine.import_chunk
        engine.begin_step = self._begin  # type: ignore[method-assign]
        engine.import_chunk = self._import_chunk  # type: ignore[method-assign]
        replace_runner(engine, _RecordedRunner(runner_of(engine), self))
        wrap_conclusions(engine, self._conclude)
        gc.callbacks.append(self._note_gc)

    def begin(self, scheduled: list[ScheduledSequence]) -> _Row:
        """A step is launched."""
        count = len(scheduled)
        before, self._before = self._before, _Before()
        return _Row(
            begun_s=self._begun_s,
            launch_s=time.monotonic(),
            num_seqs=count,
            num_rows=padded_batch(count, self._max_batch) if 0 < count <= self._max_batch else count,
            num_prompt_tokens=sum(item.num_prompt_tokens for item in scheduled if not item.is_decode),
            contexts=[item.start + item.num_tokens for item in scheduled],
            before=before,
            begins=_timed_event(),
        )

    def _begin(self) -> list[EngineEvent]:
        self._begun_s = time.monotonic()
        return self._begin_step()

    def _import_chunk(self, chunk: ChunkReady, tensor: Tensor) -> list[EngineEvent]:
        begun_s, begins = time.monotonic(), _timed_event()
        events = self._import(chunk, tensor)
        before = self._before
        before.spans.append((begins, _timed_event()))
        before.num_blocks += chunk.num_blocks
        before.num_activated += any(isinstance(event, TokenOutput) for event in events)
        before.import_s += time.monotonic() - begun_s
        return events

    def _conclude(self, conclude: Callable[[LaunchedStep], None], step: LaunchedStep) -> None:
        conclude(step)
        assert isinstance(step, _RecordedStep) and step.row is not None
        step.row.concluded_s = time.monotonic()
        self._concluded.append(step.row)
        if len(self._concluded) > 1:
            row = self._concluded.popleft()
            self._steps.add(row.values(self._last))
            self._last = row

    def _note_gc(self, phase: str, _: object) -> None:
        """Called in whichever thread it runs; the others wait for it."""
        if phase == "start":
            self._gc_begun_s = time.monotonic()
        else:
            self._before.gc_s += time.monotonic() - self._gc_begun_s


class _File:
    """Takes rows from one thread, and writes them from another, so that no step waits for a disk."""

    def __init__(self, path: Path) -> None:
        self._rows: deque[tuple[float, ...]] = deque()
        self._path = path
        threading.Thread(target=self._run, name="timeline", daemon=True).start()

    def add(self, row: tuple[float, ...]) -> None:
        self._rows.append(row)

    def _run(self) -> None:
        with self._path.open("wb") as file:
            while True:
                time.sleep(FLUSH_S)
                values = array("d")
                for _ in range(len(self._rows)):
                    values.extend(self._rows.popleft())
                values.tofile(file)
                file.flush()


def _recorded_sender(path: Path) -> type[TokenSender]:
    """Sends tokens as its base does, and notes when."""
    sent, handed = _File(path.with_suffix(SENT)), deque[float]()

    class RecordedSender(TokenSender):
        def send(self, outputs: Sequence[TokenOutput]) -> None:
            handed.append(time.monotonic())
            super().send(outputs)

        def _send(self, outputs: Sequence[TokenOutput]) -> None:
            super()._send(outputs)
            sent.add((handed.popleft(), time.monotonic()))

    return RecordedSender


def build_recorded(folder: Path, pool: str, config: EngineConfig) -> BuiltEngine:
    """An engine that records, in its process; the rest of it is an `EngineBuilder`."""
    built = build_engine(config)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{pool}-{built.info.pid}"
    Recorder(built.engine, path)
    setattr(engine_host, "TokenSender", _recorded_sender(path))  # noqa: B010  # a class has no other way in
    return built
