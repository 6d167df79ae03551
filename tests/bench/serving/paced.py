"""An engine without a model: one token per sequence at a fixed pace. Everything around it is the product.

The pace is that of the request that came last: its `seed`, in microseconds per step. When a request ends, the times at
which its tokens left are written to the file that `TRACE_VARIABLE` names, one JSON object per line.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

from transformers import AutoTokenizer

from deployments.engine.config import EngineConfig
from deployments.engine.model.resolve import resolve_model
from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats
from deployments.engine_builder import BuiltEngine
from deployments.engine_info import EngineInfo
from deployments.errors import InvalidRequestError
from deployments.messages import EngineEvent, FinishReason, GenerateRequest, Placed, TokenOutput

TRACE_VARIABLE = "KVRELAY_BENCH_TRACE"
MAX_MODEL_LEN = 200_000
MAX_PERIOD_US = 10_000_000
_TEXT = (
    "Serving a language model has two phases that want opposite hardware. Prefill reads the whole prompt in one pass; "
    "decode makes one token at a time and reads the whole cache for each. On one machine they fight, and the last to "
    "wait is the reader of the answer. "
)


@dataclass
class TokenLoop:
    """The tokens that every answer consists of, again and again.

    Attributes:
        ids: of one round.
        ends: characters from the start of the round to the end of each token.
    """

    ids: list[int]
    ends: list[int]

    @classmethod
    def load(cls, path: str) -> "TokenLoop":
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = cast(list[int], tokenizer(_TEXT)["input_ids"])
        return cls(ids, list(accumulate(len(cast(str, tokenizer.decode([token_id]))) for token_id in ids)))

    def num_tokens(self, num_characters: int) -> int:
        """Tokens that make a text of that length."""
        rounds, rest = divmod(num_characters, self.ends[-1])
        return rounds * len(self.ids) + sum(end <= rest for end in self.ends)


@dataclass
class _Sequence:
    request: GenerateRequest
    times_s: list[float] = field(default_factory=list)


class PacedEngine:
    """Looks like `Engine` to its loop and its actor, as far as requests without a hand-off need it."""

    def __init__(self, loop: TokenLoop) -> None:
        self._ids = loop.ids
        self._period_s = 0.0
        self._last_step_s = 0.0
        self._running: dict[str, _Sequence] = {}
        self._placed: list[EngineEvent] = []
        self._stats = EngineStats(num_blocks=1)

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    @property
    def pause_s(self) -> float:
        return 0.0

    @property
    def next_expiry_s(self) -> float | None:
        return None

    def run_canary(self) -> bool:
        return False

    def when_released(self, call: Callable[[], object]) -> None:
        """Never: it hands nothing over."""

    def check(self, request: GenerateRequest) -> None:
        """Refuse what no benchmark has meant: without a seed one is drawn, and the first step would take for ever."""
        if request.sampling.seed > MAX_PERIOD_US:
            message = (
                f"the seed is a step's microseconds here, {MAX_PERIOD_US} at most, and it is {request.sampling.seed}"
            )
            raise InvalidRequestError(message, "seed")

    def add(self, request: GenerateRequest, remote_threshold: int | None = None) -> None:
        self._period_s = request.sampling.seed * 1e-6
        self._running[request.request_id] = _Sequence(request)
        self._placed.append(Placed(request.request_id, False, 0))

    def abort(self, request_id: str) -> None:
        sequence = self._running.pop(request_id, None)
        if sequence is not None:
            self._trace(sequence)

    def begin_step(self) -> list[EngineEvent]:
        placed, self._placed = self._placed, []
        return placed

    def finish_step(self) -> list[EngineEvent]:
        now_s = time.monotonic()
        due_s = max(self._last_step_s + self._period_s, now_s - self._period_s)
        time.sleep(max(0.0, due_s - now_s))
        self._last_step_s = due_s
        now_s = time.monotonic()
        events: list[EngineEvent] = [self._next(sequence, now_s) for sequence in list(self._running.values())]
        self._stats.steps += 1
        self._stats.generated_tokens += len(events)
        return events

    def stats(self) -> EngineStats:
        self._stats.num_running = len(self._running)
        return self._stats.copy()

    def cache_changes(self, read: Position | None) -> CacheEvents:
        return CacheEvents(Position(0, 0), ())

    def _next(self, sequence: _Sequence, now_s: float) -> TokenOutput:
        request, index = sequence.request, len(sequence.times_s)
        sequence.times_s.append(now_s)
        reason = None
        if index + 1 == request.sampling.max_tokens:
            reason = FinishReason.LENGTH
            self.abort(request.request_id)
        return TokenOutput(request.request_id, index, (self._ids[index % len(self._ids)],), reason)

    def _trace(self, sequence: _Sequence) -> None:
        if path := os.environ.get(TRACE_VARIABLE):
            line = json.dumps({"id": sequence.request.request_id, "times_s": sequence.times_s})
            with open(path, "a") as file:
                file.write(line + "\n")


def build_paced(config: EngineConfig) -> BuiltEngine:
    """Stands in for `build_engine`; the tokenizer is the default model's."""
    path = resolve_model(config.model)
    info = EngineInfo(
        path,
        MAX_MODEL_LEN,
        49_152,
        (),
        block_size=16,
        bytes_per_block=0,
        lease_s=15.0,
        pid=os.getpid(),
        num_blocks=MAX_MODEL_LEN // 16,
    )
    engine: Any = PacedEngine(TokenLoop.load(path))
    return BuiltEngine(engine, info, None, "cpu")
