"""Guesses by an EAGLE-3 head of the model itself. Called by the speculator, in the engine's thread.

The head goes by what the model's layers made of each token, which steps hand out (`LaunchedStep.states`). A position's
KV is of these states and of the token behind it, so it is computed once that one is known: of all tokens of a step when
it has ended. Guesses go on from the newest token, whose states are kept until the next step has ended.

Its KV lies in blocks of the same numbers as the model's, a pool beside the pool, as that of a smaller model does
(`draft_model.py`): where a sequence loses its blocks, rolls back or ends, nothing is to be done. Of tokens that this
engine did not compute, behind a hand-off or a prefix of others, there are no states. The head sees nothing of them: its
view of a sequence begins with the first token whose states came, and lies in blocks as if that were the first one of
its block. Handing its KV over would take a head, and its steps, in prefill engines as well. What it does not see costs
guesses, and no answer.
"""

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from deployments.engine.execution.heads import HeadRunner, KnownTokens, NewestTokens
from deployments.engine.kv.slots import slots
from deployments.engine.sampling.guessing import GuessDraws
from deployments.engine.sampling.sampler import SamplingPreparation
from deployments.engine.scheduling.ids import block_array, token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Sequence, Status
from deployments.engine.speculation.base import Prospect, Wish
from deployments.engine.speculation.curve import StepCurve
from deployments.messages import Draws, SamplingParams


@dataclass(slots=True)
class _Progress:
    """How far the head has come with a sequence.

    Attributes:
        num_preemptions: of the sequence; with another number its blocks are others.
        begin: tokens in front of the head's view.
        num_seen: leading tokens of which states came, but for those in front.
        num_held: leading blocks that are known to hold KV that others may use.
        step: that the newest states came of.
        place: of these among that step's.
        token_id: behind the newest of these tokens.
        sampling: how guesses are drawn.
    """

    num_preemptions: int
    begin: int
    num_seen: int
    num_held: int
    sampling: SamplingParams
    step: int = 0
    place: int = 0
    token_id: int = 0

    @property
    def num_in_view(self) -> int:
        return self.num_seen - self.begin


class _Seen(NamedTuple):
    """Tokens of one sequence whose states came.

    Attributes:
        place: of the first one in the step.
        start: tokens of the view before them.
        token_ids: those behind each.
        blocks: that their KV goes into.
    """

    place: int
    start: int
    token_ids: "array[int]"
    blocks: "array[int]"


class Eagle3Drafter:
    """See the module; a `Drafter`.

    Args:
        runner: of the head.
    """

    num_kinds = 1

    def __init__(self, runner: HeadRunner) -> None:
        self._runner = runner
        self._block_size = runner.cache.block_size
        self._sampling = SamplingPreparation()
        self._curve = StepCurve()
        self._num_steps = 0
        self._states: Tensor | None = None  # of the last step
        self._progress: dict[str, _Progress] = {}
        self._held: dict[int, bytes] = {}  # of which tokens a block holds KV

    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None) -> None:
        assert states is not None, "the runner hands out no states"
        self._num_steps += 1
        self._states, place, seen = states, 0, []
        for run, draws in collected:
            if run.sequence.status is Status.RUNNING:  # it is not over, and has not lost its blocks
                seen.append(self._see(run, draws, place))
            place += run.num_tokens
        if seen:
            self._runner.learn(states, _known(seen, self._block_size))

    def look(self, wish: Wish) -> Prospect | None:
        sequence = wish.sequence
        progress = self._progress.get(sequence.request_id)
        if progress is None or progress.num_preemptions != sequence.num_preemptions:
            return None
        is_newest = progress.step == self._num_steps and progress.num_seen == sequence.num_tokens - 1
        return Prospect(wish.num_tokens) if is_newest else None

    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        assert self._states is not None, "no step has ended"
        begun_s, order = time.monotonic(), sorted(range(len(wishes)), key=lambda number: -wishes[number].num_tokens)
        asked = [wishes[number] for number in order]
        guessed = self._runner.guess(self._states, self._newest(asked), self._draws(asked))
        self._curve.add(len(wishes), (time.monotonic() - begun_s) / asked[0].num_tokens)
        drafts: list[tuple[int, ...]] = [()] * len(wishes)
        for number, wish, tokens in zip(order, asked, guessed, strict=False):
            drafts[number] = _up_to_end(tokens, wish.sequence)
        return drafts

    def seconds(self, num_sequences: int) -> float:
        return self._curve.seconds(num_sequences)

    def drop(self, request_id: str) -> None:
        self._progress.pop(request_id, None)

    def _of(self, wish: Wish) -> _Progress:
        return self._progress[wish.sequence.request_id]

    def _see(self, run: ScheduledSequence, draws: Draws, place: int) -> _Seen:
        """Take note of the tokens of a run that count: what its draws, which have not joined the sequence, confirm."""
        sequence, num_kept = run.sequence, run.num_tokens - run.num_draws + len(draws)
        tokens = sequence.token_ids[run.start + 1 : run.start + num_kept + 1]
        tokens.extend(draw.token_id for draw in draws)
        progress = self._progress_with(sequence, run.start)
        start = max(progress.num_in_view, min(self._unseen(sequence, progress), progress.num_in_view + num_kept - 1))
        lost = start - progress.num_in_view
        progress.num_seen += num_kept
        progress.step, progress.place, progress.token_id = self._num_steps, place + num_kept - 1, tokens[-1]
        blocks = self._written(sequence, progress, start, progress.num_in_view)
        self._hold(sequence, progress)
        return _Seen(place + lost, start, tokens[lost:], blocks)

    def _unseen(self, sequence: Sequence, progress: _Progress) -> int:
        """Leading tokens of the view whose blocks were given back: where all layers of the model have a window."""
        return max(0, sequence.tables.num_unread - progress.begin // self._block_size) * self._block_size

    def _progress_with(self, sequence: Sequence, start: int) -> _Progress:
        """How far it has come with a sequence of which tokens from here on were computed."""
        progress = self._progress.get(sequence.request_id)
        if progress is None or (progress.num_preemptions, progress.num_seen) != (sequence.num_preemptions, start):
            begin, num_held = start, start // self._block_size
            if not start % self._block_size:
                while begin and self._holds(sequence, begin // self._block_size - 1):
                    begin -= self._block_size
            sampling = replace(sequence.request.sampling, num_logprobs=None, adjustments=None)
            progress = _Progress(sequence.num_preemptions, begin, start, num_held, sampling)
            self._progress[sequence.request_id] = progress
        return progress

    def _holds(self, sequence: Sequence, index: int) -> bool:
        """Whether a block of it holds KV that was computed for another sequence that began alike."""
        hashes = sequence.block_hashes[index : index + 1]
        return bool(hashes) and self._held.get(sequence.block_table[index]) == hashes[0]

    def _hold(self, sequence: Sequence, progress: _Progress) -> None:
        """Take note of blocks full of KV; of a view that begins within one they hold that of other tokens."""
        if progress.begin % self._block_size:
            return
        num_held = min(progress.num_seen // self._block_size, len(sequence.block_hashes))
        for index in range(max(progress.num_held, sequence.tables.num_unread), num_held):
            self._held[sequence.block_table[index]] = sequence.block_hashes[index]
        progress.num_held = max(progress.num_held, num_held)

    def _written(self, sequence: Sequence, progress: _Progress, start: int, end: int) -> "array[int]":
        """The blocks that KV of these tokens of the view goes into; they hold nothing else any more."""
        first = progress.begin // self._block_size
        blocks = sequence.block_table[first + start // self._block_size : first - (-end // self._block_size)]
        for block in blocks:
            self._held.pop(block, None)
        return blocks

    def _newest(self, asked: list[Wish]) -> NewestTokens:
        """What guesses go on from; they write over nothing but what stands behind the newest tokens."""
        tables, unseen = [], []
        for sequence, length in asked:
            progress = self._progress[sequence.request_id]
            end = progress.num_in_view + length - 1
            self._written(sequence, progress, progress.num_in_view, end)
            begin = progress.begin // self._block_size
            passed = min(self._unseen(sequence, progress), progress.num_in_view - 1) // self._block_size
            unseen.append(passed * self._block_size)
            tables.append(sequence.block_table[begin + passed : begin - (-end // self._block_size)])
        found = [self._of(wish) for wish in asked]
        return NewestTokens(
            _column(progress.place for progress in found),
            _column(progress.token_id for progress in found),
            _column(progress.num_in_view - 1 for progress in found),
            _column(unseen),
            _padded(tables),
            _column(wish.num_tokens for wish in asked),
        )

    def _draws(self, asked: list[Wish]) -> GuessDraws:
        """As the answers are drawn, from the head's logits as they are."""
        sampling = [self._of(wish).sampling for wish in asked]
        places = _column(wish.sequence.num_tokens for wish in asked)
        return GuessDraws(self._sampling, sampling, places, [wish.sequence.mask for wish in asked])


def _up_to_end(tokens: list[int], sequence: Sequence) -> tuple[int, ...]:
    """Nothing is behind a token that ends the answer."""
    stops = sequence.request.sampling.stop_token_ids
    end = next((number for number, token in enumerate(tokens, 1) if token in stops), len(tokens))
    return tuple(tokens[:end])


def _known(seen: list[_Seen], block_size: int) -> KnownTokens:
    """The tokens of all sequences behind each other."""
    counts, starts = _column(len(part.token_ids) for part in seen), _column(part.start for part in seen)
    owners = np.repeat(np.arange(len(seen)), counts)
    inside = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
    token_ids = token_array()
    for part in seen:
        token_ids += part.token_ids
    in_blocks = (starts % block_size)[owners] + inside
    return KnownTokens(
        _column(part.place for part in seen)[owners] + inside,
        np.frombuffer(token_ids, np.uint32).astype(np.int64),
        starts[owners] + inside,
        slots(_padded([part.blocks for part in seen]), owners, in_blocks, block_size),
    )


def _padded(tables: list["array[int]"]) -> np.ndarray:
    """(R, B) int64, with zeros behind those that are shorter."""
    sizes, flat = _column(map(len, tables)), block_array()
    for table in tables:
        flat += table
    padded = np.zeros((len(tables), int(sizes.max())), np.int64)
    padded[np.arange(padded.shape[1]) < sizes[:, None]] = np.frombuffer(flat, np.int32)
    return padded


def _column(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int64)
