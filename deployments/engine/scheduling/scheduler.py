"""Which tokens run in the next step. Continuous batching, chunked prefill, preemption by recomputation.

Every running sequence that decodes gets its token first; prompts share what is left of the token budget, those of the
highest priority first, and among them the one with fewest tokens left, so that a short prompt does not wait behind a
long one. Nor does it wait beside one: where nothing decodes, a step in which a prompt ends has no part of another. No
prompt is overtaken by more tokens than it has itself, or 16 times as many of higher priority. A sequence that is held
keeps its blocks and its place, and is left out. Knows blocks and sequences, nothing of tensors. Called by the engine,
once per step.

Source: Sarathi-Serve (Agrawal et al., OSDI 2024) for chunked prefill beside decodes; shortest remaining time first.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from deployments.engine.config import EngineLimits
from deployments.engine.scheduling.block_manager import BlockManager
from deployments.engine.scheduling.place import Place
from deployments.engine.scheduling.positions import FIXED, PositionRule
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Sequence, Status
from deployments.messages import Placed

# Share of the pool that a new sequence must leave free, so that it does not preempt its elders at once.
_WATERMARK = 0.01
# Tokens of higher priority that overtake a prompt count one in so many.
_URGENCY = 16

# Of a step, over all its prompts: the logits of each are of the whole vocabulary, 150 MB in bfloat16 of 150,000 tokens.
MAX_SCORED_TOKENS = 512
# Of a step with drafts, for the same reason; on a GPU no larger one is recorded either.
MAX_VERIFIED_TOKENS = 512

_RUNNING = Status.RUNNING  # asked of each sequence in every step; see `sequence.py`


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step: what runs, and which sequences were given blocks for the first time."""

    scheduled: list[ScheduledSequence]
    placed: list[Placed]


class Scheduler:
    """Owns every unfinished sequence of an engine; each is in exactly one of waiting, reserved and running.

    Args:
        blocks: the pool.
        limits: of the engine.
        positions: of the model; a sequence that grows out of its KV by this rule is computed anew.
    """

    def __init__(self, blocks: BlockManager, limits: EngineLimits, positions: PositionRule = FIXED) -> None:
        self._blocks = blocks
        self._limits = limits
        self._positions = positions
        self._num_spare_blocks = int(blocks.num_blocks * _WATERMARK)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of admission
        self.reserved: dict[str, Sequence] = {}
        self._by_id: dict[str, Sequence] = {}
        self._arrivals = itertools.count()
        self.num_preemptions = 0
        self.num_finished = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __getitem__(self, request_id: str) -> Sequence:
        return self._by_id[request_id]

    @property
    def num_sequences(self) -> int:
        return len(self._by_id)

    @property
    def num_queued_prompt_tokens(self) -> int:
        """Tokens that wait to be computed here, by sequences without blocks and by unfinished prompts."""
        waiting = sum(s.num_tokens for s in self.waiting)
        return waiting + sum(s.num_remaining_tokens for s in self.running if not s.is_decoding)

    @property
    def num_remote_prompt_tokens(self) -> int:
        """Those of them that a prefill engine will compute once there are blocks; what is cached is not known yet."""
        return sum(s.num_tokens for s in self.waiting if _is_remote(s))

    @property
    def has_work(self) -> bool:
        """Whether another step could make progress without a message from outside."""
        return any(s.has_work for s in self.running) or self.can_admit

    def add(self, sequence: Sequence) -> None:
        assert sequence.request_id not in self._by_id, f"{sequence.request_id} is already here"
        self._by_id[sequence.request_id] = sequence
        sequence.enter(next(self._arrivals), self._offset(sequence, sequence.num_tokens))
        self.waiting.append(sequence)

    def schedule(self) -> Schedule:
        """Choose the next step; sequences get their blocks here, and lose them if they must."""
        runnable = [s for s in self.running if s.has_work]
        decoding = [s for s in runnable if s.is_decoding]
        scheduled, num_sent_back = self._schedule_decodes(decoding)
        budget = self._limits.max_num_batched_tokens - sum([item.num_tokens for item in scheduled])
        num_running = len(self.running)
        placed = [] if num_sent_back else self._admit(budget)
        # Prompts, and whatever was resumed just now.
        others = [s for s in self.running[num_running:] if s.has_work]
        if len(decoding) < len(runnable):
            others += [s for s in runnable if s.status is _RUNNING and not s.is_decoding]
        num_scores_left, ends = MAX_SCORED_TOKENS, False
        for sequence in sorted(others, key=_precedence):
            num_tokens = self._blocks.extend(sequence, min(sequence.num_remaining_tokens, budget))
            if budget == 0 or (ends and not decoding and num_tokens < sequence.num_remaining_tokens):
                break
            if sequence.wants_scores:
                num_tokens = min(num_tokens, num_scores_left)
                num_scores_left -= num_tokens
            if num_tokens == 0:
                continue
            scheduled.append(ScheduledSequence.of(sequence, num_tokens))
            ends |= num_tokens == sequence.num_remaining_tokens
            budget -= num_tokens
        if others and not scheduled:
            self._make_way()
        return Schedule(scheduled, placed)

    def make_room(self, going: list[Sequence]) -> bool:
        """Give sequences that decode the blocks of their newest tokens before the step; False: not to all of them."""
        return all(self._blocks.append(sequence) for sequence in going)

    def make_room_for_drafts(self, sequence: Sequence, num_drafts: int) -> bool:
        """Give a sequence blocks for drafts behind its newest token; False: there is no room for them.

        Nor is there where their KV would be of no use, because the sequence is to be computed anew with them.
        """
        if self._positions is not FIXED:
            offset = self._offset(sequence, sequence.num_tokens + num_drafts)
            if offset != sequence.position_offset:
                return False
        return self._blocks.append(sequence, num_drafts)

    def activate(self, sequence: Sequence) -> None:
        """A reserved sequence has what it waited for: from now on it runs here."""
        del self.reserved[sequence.request_id]
        sequence.activate()
        self.running.append(sequence)

    def compute_here(self, sequence: Sequence) -> None:
        """A reserved sequence waits no longer: what is missing of its prompt is computed here.

        All of it, if what was not to come would be seen now.
        """
        self.activate(sequence)
        if self._blocks.lacks_passed(sequence):
            self._send_back(sequence)

    def remove(self, request_id: str) -> Sequence | None:
        """Forget a sequence, whatever its state, and free its blocks; None if there is none of that id."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return None
        self.num_finished += sequence.status is not Status.WAITING
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is Status.RESERVED:
            del self.reserved[request_id]
        else:
            self.running.remove(sequence)
        self._blocks.free(sequence)
        sequence.finish()
        return sequence

    def check_integrity(self) -> None:
        """Assert that sequences and blocks agree."""
        states = {Status.WAITING: self.waiting, Status.RUNNING: self.running, Status.RESERVED: self.reserved.values()}
        seen = [s.request_id for group in states.values() for s in group]
        assert sorted(seen) == sorted(self._by_id), f"tables disagree: {seen} and {list(self._by_id)}"
        for status, group in states.items():
            for s in group:
                assert s.status is status, f"{s.request_id} is {s.status} among the {status}"
                s.check_integrity(self._blocks.block_size)
        self._blocks.check_integrity([*self.running, *self.reserved.values()])

    def _schedule_decodes(self, decoding: list[Sequence]) -> tuple[list[ScheduledSequence], int]:
        """Runs of the newest token, with drafts behind it, and how many sequences gave their blocks away."""
        scheduled: list[ScheduledSequence] = []
        num_sent_back = self._send_back_outgrown(decoding)
        room = min(self._limits.max_num_batched_tokens, MAX_VERIFIED_TOKENS) - len(decoding)
        for sequence in decoding:
            drafts = self._choose_drafts(sequence, room) if sequence.drafts and sequence.status is _RUNNING else ()
            while not drafts and sequence.status is _RUNNING and not self._blocks.append(sequence):
                self._preempt(self._least_of(self.running[self.running.index(sequence) :]))
                num_sent_back += 1
            if sequence.status is _RUNNING:
                scheduled.append(ScheduledSequence.decode(sequence, drafts))
                room -= len(drafts)
        return scheduled, num_sent_back

    def _send_back_outgrown(self, decoding: list[Sequence]) -> int:
        """Have those computed anew that grew out of their KV; tells how many."""
        if self._positions is FIXED:
            return 0
        outgrown = [s for s in decoding if self._offset(s, s.num_tokens) != s.position_offset]
        for sequence in outgrown:
            self._send_back(sequence)
        return len(outgrown)

    def _choose_drafts(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """As many as may become tokens, without taking anything from others: budget, blocks, or the lead in length."""
        if sequence.num_pending_tokens:
            return ()
        drafts, most = sequence.drafts, min(room, sequence.max_num_tokens - sequence.num_tokens - 1)
        if len(drafts) > most:
            drafts = drafts[: max(0, most)]
        if sequence.mask is not None:  # behind a draft other tokens may be drawn than behind the newest one
            drafts = drafts[: len(sequence.draft_masks)]
        return drafts if self.make_room_for_drafts(sequence, len(drafts)) else ()

    @staticmethod
    def _least_of(candidates: list[Sequence]) -> Sequence:
        """Who gives way: the newest of the lowest priority, at or behind one that needs a block.

        None before it, so that nothing scheduled is undone.
        """
        return min(reversed(candidates), key=lambda s: s.priority)

    def _make_way(self) -> None:
        """No prompt could be given a block: one gives its blocks away, unless a step in flight brings some back."""
        if not any(s.num_in_flight_tokens for s in self.running):
            self._preempt(self._least_of(self.running))

    def _preempt(self, sequence: Sequence) -> None:
        self._send_back(sequence)
        self.num_preemptions += 1

    def _send_back(self, sequence: Sequence) -> None:
        """Have a running sequence wait, first of all, and be computed again from its first token."""
        self.running.remove(sequence)
        self._blocks.free(sequence)
        sequence.send_back(self._offset(sequence, sequence.num_tokens))
        self.waiting.appendleft(sequence)

    def _offset(self, sequence: Sequence, num_tokens: int) -> int:
        return self._positions.offset(len(sequence.request.prompt_token_ids), num_tokens)

    @property
    def _has_seat(self) -> bool:
        return bool(self.waiting) and len(self.running) + len(self.reserved) < self._limits.max_num_seqs

    @property
    def _num_spare(self) -> int:
        # With nothing else here the watermark would lock out a sequence that needs the whole pool.
        return self._num_spare_blocks if self.running or self.reserved else 0

    @property
    def can_admit(self) -> bool:
        """Whether a sequence that waits would get blocks now."""
        if not self._has_seat:
            return False
        sequence = min(self.waiting, key=_precedence)
        return self._blocks.can_admit(sequence, self._num_spare, _threshold_of(sequence))

    def _running_prompts(self) -> Iterator[Sequence]:
        return (s for s in self.running if not s.is_decoding)

    def _admit(self, budget: int) -> list[Placed]:
        placed: list[Placed] = []
        while self._has_seat:
            sequence = min(self.waiting, key=_precedence)
            threshold = _threshold_of(sequence)
            if threshold is None and self._num_tokens_before(sequence) >= budget:
                break
            place = self._blocks.admit(sequence, self._num_spare, threshold)
            if place is None:
                break
            self.waiting.remove(sequence)
            self._count_overtaken(sequence)
            if sequence.num_preemptions == 0:
                sequence.find_cached(self._blocks.num_found_tokens(sequence))
                placed.append(self._placed(sequence, place))
            if place.is_awaited:
                sequence.reserve()
                self.reserved[sequence.request_id] = sequence
            else:
                sequence.start()
                self.running.append(sequence)
        return placed

    def _placed(self, sequence: Sequence, place: Place) -> Placed:
        num_tokens, num_found = sequence.num_computed_tokens, place.num_found * self._blocks.block_size
        return Placed(sequence.request_id, place.is_awaited, num_tokens, num_tokens - num_found)

    def _num_tokens_before(self, sequence: Sequence) -> int:
        """Tokens of running prompts that would get the budget before a waiting one."""
        own = _precedence(sequence)
        prompts = (s for s in self._running_prompts() if s.has_work)
        return sum(s.num_remaining_tokens for s in prompts if _precedence(s) < own)

    def _count_overtaken(self, sequence: Sequence) -> None:
        """A sequence was admitted: older prompts that it goes before remember by how much."""
        for other in itertools.chain(self.waiting, self._running_prompts()):
            if other.arrival_number < sequence.arrival_number and _precedence(sequence) < _precedence(other):
                weight = _URGENCY if sequence.priority > other.priority else 1
                other.overtake(-(-sequence.num_remaining_tokens // weight))


def _threshold_of(sequence: Sequence) -> int | None:
    """With how many uncached tokens a prefill engine computes the prompt of a sequence; None: with none."""
    return sequence.remote_threshold if sequence.num_preemptions == 0 else None


def _is_remote(sequence: Sequence) -> bool:
    """Whether a prefill engine computes the prompt of a sequence, if nothing of it is cached."""
    threshold = _threshold_of(sequence)
    return threshold is not None and sequence.num_tokens >= threshold


def _precedence(prompt: Sequence) -> tuple[bool, int, int, int]:
    """Sort key of prompts: by priority, then fewest uncomputed tokens first, but none may be overtaken for ever.

    One that gave its blocks away, or was overtaken by as many tokens as it has, comes before all others.
    """
    if prompt.num_preemptions or prompt.num_overtaken_tokens >= prompt.num_tokens:
        return False, prompt.arrival_number, 0, 0
    return True, -prompt.priority, prompt.num_remaining_tokens, prompt.arrival_number
