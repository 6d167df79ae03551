"""Which tokens the answers with a grammar may go on with, found in threads beside the engine's own.

A sequence with a grammar is held from its arrival until its first mask is there, and from each step that draws for it
until the mask behind the draw is. So it always draws by the right mask, and its last token is known before its next
step; other sequences go on meanwhile. What a guide knows is made of the tokens of its sequence alone: after a hand-off,
a preemption or a resumed request it is the same. Knows no tensor. Called by the engine in its thread.

Masks that are nearly there are waited for, a tenth of the time between two steps at most: else sequences would leave
their batch one by one.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence, Status
from deployments.errors import KvRelayError, TransferError, brief
from deployments.grammars import GrammarError, Guide, Vocabularies, explain, read_vocabulary
from deployments.messages import GivenUp, Grammar

logger = logging.getLogger(__name__)

_EXPORT, _FINISHED = Role.EXPORT, Status.FINISHED
# Of the time between two steps, and never longer than that.
_PATIENCE, _MAX_PATIENCE_S = 0.1, 0.01
# An engine with nothing else to do looks for messages so often.
_IDLE_WAIT_S = 0.002
_MAX_MASK_THREADS = 4
# By so much the compiler's thread is nicer than those of the steps: it gets a tenth of a core that both want.
_NICER, _NICEST = 10, 19


@dataclass(slots=True, eq=False)
class _Guided:
    """A sequence and its guide; None: it is being compiled."""

    sequence: Sequence
    grammar: Grammar
    guide: Guide | None = None
    is_busy: bool = True  # a thread works for it

    def unknown_tokens(self) -> list[int]:
        """Generated tokens that the guide has not taken."""
        num_known = len(self.sequence.request.prompt_token_ids) + (0 if self.guide is None else self.guide.num_tokens)
        return self.sequence.token_ids[num_known:].tolist()


_Work: TypeAlias = "Future[tuple[Guide, bytes]]"


class Guides:
    """Owns the guides of an engine's sequences.

    Args:
        folder: of the model.
        vocab_size: of the model.
    """

    def __init__(self, folder: str, vocab_size: int) -> None:
        self._by_id: dict[str, _Guided] = {}
        self._done: queue.SimpleQueue[tuple[_Guided, _Work]] = queue.SimpleQueue()
        self._num_compiling = 0
        self._num_masking = 0
        self._collected_s = time.monotonic()
        self._vocabularies = Vocabularies(partial(read_vocabulary, folder, vocab_size))
        # Apart, so that no mask waits for a grammar that takes long.
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler", initializer=_let_steps_go_first)
        self._maskers = ThreadPoolExecutor(min(_MAX_MASK_THREADS, os.cpu_count() or 1), "grammar-masks")

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_id)

    @property
    def is_busy(self) -> bool:
        """Whether something will be there to be collected."""
        return self._num_compiling + self._num_masking > 0

    def add(self, sequence: Sequence) -> None:
        """A sequence has come; one with a grammar is held until it may draw."""
        grammar = sequence.request.sampling.grammar
        if grammar is None:
            return
        sequence.hold()
        guided = self._by_id[sequence.request_id] = _Guided(sequence, grammar)
        self._num_compiling += 1
        self._watch(guided, self._compiler.submit(self._begin, grammar, guided.unknown_tokens()))

    def hold(self, scheduled: Iterable[ScheduledSequence]) -> None:
        """A step with these has been started."""
        for item in scheduled:
            if item.num_draws and item.sequence.request_id in self._by_id:
                item.sequence.hold()

    def advance(self, sequences: Iterable[Sequence]) -> None:
        """New tokens of these are known, perhaps."""
        for sequence in sequences:
            guided = self._by_id.get(sequence.request_id)
            if guided is None or sequence.status is _FINISHED or sequence.role is _EXPORT:
                continue
            sequence.hold()
            if not guided.is_busy:
                self._go_on(guided)

    def look_ahead(self, sequence: Sequence, token_ids: tuple[int, ...]) -> tuple[bytes, ...]:
        """The masks behind guesses of the next tokens, as far as they may come; of a sequence whose own mask is there.

        In the engine's thread, since a step waits for them.
        """
        guided = self._by_id[sequence.request_id]
        assert guided.guide is not None and not guided.is_busy, f"{sequence.request_id}: its guide is not here"
        return tuple(guided.guide.masks_behind(token_ids))

    def drop(self, request_id: str) -> None:
        """The sequence is over; unknown ids are no error."""
        self._by_id.pop(request_id, None)

    def collect(self, *, is_idle: bool) -> list[GivenUp]:
        """Release the sequences whose masks are there.

        Args:
            is_idle: there is nothing else to do.

        Returns:
            Those that cannot go on.
        """
        if not self.is_busy:
            return []
        now_s = time.monotonic()
        patience_s = min(_PATIENCE * (now_s - self._collected_s), _MAX_PATIENCE_S)
        until_s = now_s + (max(patience_s, _IDLE_WAIT_S) if is_idle else patience_s)
        lost = []
        while self._num_masking or is_idle or not self._done.empty():
            try:
                guided, work = self._done.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                break
            is_idle = False
            error = self._conclude(guided, work)
            if error is not None:
                lost.append(GivenUp(guided.sequence.request_id, error))
        self._collected_s = time.monotonic()
        return lost

    def _conclude(self, guided: _Guided, work: "_Work") -> KvRelayError | None:
        """A thread is done: the sequence may draw, or has tokens that the mask does not know, or why it is lost."""
        self._note_done(guided)
        if self._by_id.get(guided.sequence.request_id) is not guided:
            return None
        error = work.exception()
        if isinstance(error, GrammarError):
            return explain(guided.grammar, error)
        if error is not None:
            logger.error("%s: its grammar failed here", guided.sequence.request_id, exc_info=error)
            return TransferError(f"{guided.sequence.request_id}: its grammar failed: {brief(error)}")
        guided.guide, mask = work.result()
        if guided.unknown_tokens():
            self._go_on(guided)
        else:
            guided.sequence.release(mask)
        return None

    def _note_done(self, guided: _Guided) -> None:
        if guided.guide is None:
            self._num_compiling -= 1
        else:
            self._num_masking -= 1
        guided.is_busy = False

    def _go_on(self, guided: _Guided) -> None:
        assert guided.guide is not None, f"{guided.sequence.request_id} has no guide"
        guided.is_busy = True
        self._num_masking += 1
        self._watch(guided, self._maskers.submit(_take, guided.guide, guided.unknown_tokens()))

    def _watch(self, guided: _Guided, work: "_Work") -> None:
        work.add_done_callback(lambda done: self._done.put((guided, done)))

    def _begin(self, grammar: Grammar, token_ids: list[int]) -> tuple[Guide, bytes]:
        """Called in the compiler's thread, which alone has to do with vocabularies."""
        return _take(self._vocabularies.compile(grammar), token_ids)


def _let_steps_go_first() -> None:
    """Called in a thread; only Linux gives threads a priority of their own."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICER
    if niceness <= _NICEST:
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
    else:  # Ray's workers have 15: an idle thread weighs a twelfth of that
        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def _take(guide: Guide, token_ids: list[int]) -> tuple[Guide, bytes]:
    guide.take(token_ids)
    return guide, guide.mask()
