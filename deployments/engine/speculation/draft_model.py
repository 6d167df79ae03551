"""Guesses by a smaller model with the same vocabulary. Called by the speculator, in the engine's thread.

Owns the small model's KV. It lies in blocks of the same numbers as the large model's, a pool beside the pool, so it
comes and goes with them: where a sequence loses its blocks, rolls back or ends, nothing is to be done. KV that is
missing, of a prompt that was handed over or found in the cache, is computed here from the tokens, some of them before
each step. Nobody is told of KV that has become wrong: it costs guesses that are wrong, and no answer.

The small model draws as the large one does, with the noise of the same seed and place (`sampling/`). So where both
hold the same tokens for likely, chance makes the same choice among them.
"""

import time
from array import array
from dataclasses import dataclass, replace

from torch import Tensor

from deployments.engine.execution.base import LaunchedStep, Runner
from deployments.engine.scheduling.ids import token_array
from deployments.engine.scheduling.positions import FIXED, PositionRule
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.speculation.base import Prospect, Wish
from deployments.engine.speculation.curve import StepCurve
from deployments.messages import Draws, GenerateRequest


@dataclass(slots=True)
class _Progress:
    """How far the small model has come with a sequence.

    Attributes:
        request: of the sequence, as the small model is to draw for it.
        num_preemptions: of the sequence; with another number its blocks are others.
        position_offset: of the small model's KV.
        num_computed: leading tokens whose KV is there.
        num_held: leading blocks that whoever finds them in the prefix cache finds filled.
        tried: guesses behind the computed tokens whose KV is there as well; right ones need not be computed again.
    """

    request: GenerateRequest
    num_preemptions: int
    position_offset: int
    num_computed: int
    num_held: int
    tried: "array[int]"

    def follow(self, tokens: "array[int]") -> None:
        """The sequence has these tokens now: what was guessed right is computed, and always but the newest one."""
        longest = min(len(self.tried), len(tokens) - self.num_computed)
        for place in range(longest):
            if tokens[self.num_computed] != self.tried[place]:
                break
            self.num_computed += 1
        self.tried = self.tried[:0]
        self.num_computed = min(self.num_computed, len(tokens) - 1)


@dataclass(slots=True)
class _Follower:
    """One wish, being fulfilled.

    Attributes:
        wish: it.
        progress: of its sequence.
        copy: of its sequence, which the small model continues.
        num_known: tokens of the sequence itself.
        first_block: that is written to.
    """

    wish: Wish
    progress: _Progress
    copy: Sequence
    num_known: int
    first_block: int

    @property
    def wants_more(self) -> bool:
        """Whether its newest token is in no step yet, and one more behind it is wanted."""
        copy = self.copy
        return copy.num_remaining_tokens == 1 and copy.num_tokens - self.num_known < self.wish.num_tokens

    def guessed(self) -> tuple[int, ...]:
        """What was drawn; nothing behind a token that ends the answer."""
        drawn = tuple(self.copy.token_ids[self.num_known :])
        stops = self.wish.sequence.request.sampling.stop_token_ids
        end = next((number for number, token in enumerate(drawn, 1) if token in stops), len(drawn))
        return drawn[:end]


class DraftModel:
    """See the module; a `Drafter`.

    Args:
        runner: of the small model.
        max_model_len: tokens of a sequence that it can follow.
        max_num_batched_tokens: that one step of it computes at most; at least one for each sequence.
        positions: of the small model.
    """

    num_kinds = 1

    def __init__(
        self, runner: Runner, max_model_len: int, max_num_batched_tokens: int, positions: PositionRule = FIXED
    ) -> None:
        self._runner = runner
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._positions = positions
        self._is_pipelined = runner.cache.blocks.device.type == "cuda"
        self._curve = StepCurve()
        self._progress: dict[str, _Progress] = {}
        self._held: dict[int, tuple[bytes, int]] = {}  # of what, and with which offset, a block's KV is

    def look(self, wish: Wish) -> Prospect | None:
        num_tokens = min(wish.num_tokens, self._max_model_len - wish.sequence.num_tokens)
        return Prospect(num_tokens) if num_tokens > 0 else None

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        ended_s = time.monotonic()
        followers = [self._follower(wish) for wish in wishes]
        items = self._first_runs(followers)
        in_flight: LaunchedStep | None = None
        while items or in_flight is not None:
            ending = launched = self._launch(items) if items else None
            if self._is_pipelined:
                ending, in_flight = in_flight, launched
            if ending is not None:
                ended_s = self._conclude(ending, ended_s)
            items = [ScheduledSequence.decode(f.copy) for f in followers if f.wants_more]
        for follower in followers:
            self._note(follower)
        return [follower.guessed() for follower in followers]

    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None) -> None:
        """Tokens are all that it goes by."""

    def seconds(self, num_sequences: int) -> float:
        return self._curve.seconds(num_sequences)

    def drop(self, request_id: str) -> None:
        self._progress.pop(request_id, None)

    def _launch(self, items: list[ScheduledSequence]) -> LaunchedStep:
        launched = self._runner.launch(items)
        for item in items:
            item.sequence.begin(item)
            item.sequence.release()  # what may follow a guess by a grammar is asked later
        return launched

    def _conclude(self, ending: LaunchedStep, begun_s: float) -> float:
        """Wait for a step: what it drew joins the copies. Tells when that was."""
        for run, draws in ending.collect():
            run.sequence.conclude(run, draws)
        now_s = time.monotonic()
        self._curve.add(sum(item.num_tokens for item in ending.items), now_s - begun_s)
        return now_s

    def _first_runs(self, followers: list[_Follower]) -> list[ScheduledSequence]:
        """What is missing, of those first that miss little; who misses more than there is room for guesses later."""
        items, room = [], self._max_num_batched_tokens
        for follower in sorted(followers, key=lambda f: f.copy.num_remaining_tokens):
            num_tokens = min(follower.copy.num_remaining_tokens, room)
            if num_tokens:
                items.append(ScheduledSequence.of(follower.copy, num_tokens))
            room -= num_tokens
        return items

    def _follower(self, wish: Wish) -> _Follower:
        sequence = wish.sequence
        progress = self._progress_with(sequence)
        copy = Sequence(
            progress.request,
            Role.LOCAL,
            sequence.arrival_s,
            token_ids=sequence.token_ids[:],
            tables=sequence.tables,
            num_computed_tokens=progress.num_computed,
            position_offset=progress.position_offset,
            mask=sequence.mask,
        )
        block_size = self._runner.cache.block_size
        return _Follower(wish, progress, copy, len(sequence.token_ids), progress.num_computed // block_size)

    def _progress_with(self, sequence: Sequence) -> _Progress:
        """How far it has come, with what has become of the last guesses."""
        offset = self._positions.offset(len(sequence.request.prompt_token_ids), sequence.num_tokens)
        place = sequence.num_preemptions, offset
        progress = self._progress.get(sequence.request_id)
        if progress is None or (progress.num_preemptions, progress.position_offset) != place:
            num_held = self._num_held(sequence, offset)
            num_computed = num_held * self._runner.cache.block_size
            progress = _Progress(_as_drafted(sequence.request), *place, num_computed, num_held, token_array())
            self._progress[sequence.request_id] = progress
        progress.follow(sequence.token_ids)
        return progress

    def _num_held(self, sequence: Sequence, offset: int) -> int:
        """Leading blocks whose KV was computed for another sequence that began alike."""
        found = zip(sequence.block_table, sequence.block_hashes, strict=False)
        return next(
            (number for number, (block, name) in enumerate(found) if self._held.get(block) != (name, offset)),
            min(len(sequence.block_table), len(sequence.block_hashes)),
        )

    def _note(self, follower: _Follower) -> None:
        """What the steps have computed; and which blocks hold the KV of what."""
        progress, sequence, num_launched = follower.progress, follower.wish.sequence, follower.copy.num_launched_tokens
        progress.num_computed = min(num_launched, follower.num_known)
        progress.tried = follower.copy.token_ids[follower.num_known : num_launched]
        block_size, table, hashes = self._runner.cache.block_size, sequence.block_table, sequence.block_hashes
        for index in range(follower.first_block, -(-num_launched // block_size)):
            self._held.pop(table[index], None)
        num_held = min(progress.num_computed // block_size, len(hashes))
        for index in range(progress.num_held, num_held):
            self._held[table[index]] = hashes[index], progress.position_offset
        progress.num_held = max(progress.num_held, num_held)


def _as_drafted(request: GenerateRequest) -> GenerateRequest:
    """Drawn alike, and told without logprobs."""
    sampling = replace(request.sampling, num_logprobs=None)
    return replace(request, sampling=sampling, num_prompt_logprobs=None)
