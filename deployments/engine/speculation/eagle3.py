"""Guesses by an EAGLE-3 head of the model itself. Called by the speculator, in the engine's thread.

The head goes by what the model's layers made of each token, which steps hand out (`LaunchedStep.states`). A position's
KV is of these states and of the token behind it, so it can be computed once that one is known. States are brought
together at once, and kept until the head's next step: before guesses, or when many of them wait, as of a prompt.

Its KV lies in blocks of the same numbers as the model's, a pool beside the pool, as that of a smaller model does
(`draft_model.py`): where a sequence loses its blocks, rolls back or ends, nothing is to be done. Of tokens that this
engine did not compute, behind a hand-off or a prefix of others, there are no states. The head sees nothing of them: its
view of a sequence begins with the first block whose KV it has, and it guesses from the first step in it on. Handing its
KV over would take a head, and its steps, in prefill engines as well. What it does not see costs guesses, and no answer.
"""

import time
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from deployments.engine.attention.paged import compile_kernels, has_kernels
from deployments.engine.attention.sdpa import SdpaStep
from deployments.engine.batch.arrays import StepArrays
from deployments.engine.config import EngineLimits
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.slots import slots
from deployments.engine.model.eagle3 import Eagle3Head
from deployments.engine.sampling.masking import Masking
from deployments.engine.sampling.sampler import SamplingPreparation, sample
from deployments.engine.scheduling.ids import token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Sequence, Status
from deployments.engine.speculation.base import Prospect, Wish
from deployments.engine.speculation.curve import StepCurve
from deployments.engine.upload import upload
from deployments.messages import Draws, SamplingParams

# States of one sequence that wait for guesses; with more, the head computes the KV of all but the newest at once.
_MOST_WAITING = 64


@dataclass(slots=True)
class _Progress:
    """How far the head has come with a sequence.

    Attributes:
        num_preemptions: of the sequence; with another number its blocks are others.
        first_block: of the sequence where the head's view begins.
        num_seen: leading tokens of which states came last; of others before them perhaps none did.
        num_computed: leading tokens whose KV is there, as far as they are in view.
        num_held: leading blocks that are known to hold KV that others may use.
        states: (N, hidden_size) of the tokens behind the computed ones.
        tokens: the ones behind these.
    """

    num_preemptions: int
    first_block: int
    num_seen: int
    num_computed: int
    num_held: int
    states: Tensor
    tokens: "array[int]" = field(default_factory=token_array)

    def add(self, states: Tensor, tokens: "array[int]") -> None:
        """Of the next tokens; those in front of the view count for nothing."""
        ahead = max(0, min(self.num_computed - self.num_seen, len(tokens)))
        self.num_seen += len(tokens)
        self.states = torch.cat((self.states, states[ahead:]))
        self.tokens += tokens[ahead:]


@dataclass(slots=True)
class _Row:
    """What one step of the head computes of one sequence.

    Attributes:
        wish: whose; of no tokens where only KV is wanted.
        progress: of its sequence.
        start: tokens in view before.
        states: (N, hidden_size).
        tokens: the ones behind these.
        guessed: what was guessed in the steps before.
    """

    wish: Wish
    progress: _Progress
    start: int
    states: Tensor
    tokens: "array[int]"
    guessed: "array[int]" = field(default_factory=token_array)


class Eagle3Drafter:
    """See the module; a `Drafter`.

    Args:
        head: of the model.
        limits: of the engine.
        device: of both.
    """

    num_kinds = 1

    def __init__(self, head: Eagle3Head, limits: EngineLimits, device: torch.device) -> None:
        self._head = head
        self._cache = KVCache(head.kv_shape, limits.num_blocks, limits.block_size, device)
        if has_kernels(self._cache):
            compile_kernels(self._cache)
        self._sampling = SamplingPreparation()
        self._curve = StepCurve()
        self._progress: dict[str, _Progress] = {}
        self._held: dict[int, bytes] = {}  # of which tokens a block holds KV

    @torch.inference_mode()
    def learn(self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None) -> None:
        assert states is not None, "the runner hands out no states"
        fused, row, waiting = self._head.fuse(states), 0, []
        for run, draws in collected:
            sequence, num_kept = run.sequence, run.num_tokens - run.num_draws + len(draws)
            kept, row = fused[row : row + num_kept], row + run.num_tokens
            if sequence.status is not Status.RUNNING:
                continue  # it is over, or has lost its blocks
            tokens = sequence.token_ids[run.start + 1 : run.start + num_kept + 1]
            tokens.extend(draw.token_id for draw in draws)
            progress = self._progress_with(sequence, run.start, kept[:0])
            progress.add(kept, tokens)
            if len(progress.tokens) > _MOST_WAITING:
                waiting.append(self._row(Wish(sequence, 0), progress, len(progress.tokens) - 1))
        if waiting:
            self._compute(waiting)

    def look(self, wish: Wish) -> Prospect | None:
        sequence = wish.sequence
        progress = self._progress.get(sequence.request_id)
        if progress is None or progress.num_preemptions != sequence.num_preemptions or not progress.tokens:
            return None
        return Prospect(wish.num_tokens) if progress.num_seen == sequence.num_tokens - 1 else None

    @torch.inference_mode()
    def draft(self, wishes: list[Wish]) -> list[tuple[int, ...]]:
        rows = [self._row(wish, progress := self._of(wish), len(progress.tokens)) for wish in wishes]
        going = rows
        while going:
            begun_s, num_tokens = time.monotonic(), sum(len(row.tokens) for row in going)
            going = self._guess(going)
            self._curve.add(num_tokens, time.monotonic() - begun_s)
        return [tuple(row.guessed) for row in rows]

    def seconds(self, num_sequences: int) -> float:
        return self._curve.seconds(num_sequences)

    def drop(self, request_id: str) -> None:
        self._progress.pop(request_id, None)

    def _of(self, wish: Wish) -> _Progress:
        return self._progress[wish.sequence.request_id]

    def _progress_with(self, sequence: Sequence, start: int, nothing: Tensor) -> _Progress:
        """How far it has come with a sequence of which tokens from here on were computed."""
        progress = self._progress.get(sequence.request_id)
        if progress is None or (progress.num_preemptions, progress.num_seen) != (sequence.num_preemptions, start):
            num_held = first = start // self._cache.block_size
            if start % self._cache.block_size:
                num_held = first = first + 1
            else:
                while first and self._holds(sequence, first - 1):
                    first -= 1
            num_computed = max(start, first * self._cache.block_size)
            progress = _Progress(sequence.num_preemptions, first, start, num_computed, num_held, nothing)
            self._progress[sequence.request_id] = progress
        return progress

    def _holds(self, sequence: Sequence, index: int) -> bool:
        """Whether a block of it holds KV that was computed for another sequence that began alike."""
        hashes = sequence.block_hashes[index : index + 1]
        return bool(hashes) and self._held.get(sequence.block_table[index]) == hashes[0]

    def _row(self, wish: Wish, progress: _Progress, count: int) -> _Row:
        """The next tokens of those that wait; they count as computed from now on."""
        start = progress.num_computed - progress.first_block * self._cache.block_size
        row = _Row(wish, progress, start, progress.states[:count], progress.tokens[:count])
        progress.states, progress.tokens = progress.states[count:], progress.tokens[count:]
        self._note(wish, progress, count)
        return row

    def _note(self, wish: Wish, progress: _Progress, count: int) -> None:
        """So many more tokens are computed, and guesses behind them; which blocks hold the KV of what."""
        block_size, sequence = self._cache.block_size, wish.sequence
        end = progress.num_computed + count + max(0, wish.num_tokens - 1)
        for index in range(progress.num_computed // block_size, -(-end // block_size)):
            self._held.pop(sequence.block_table[index], None)
        progress.num_computed += count
        num_held = min(progress.num_computed // block_size, len(sequence.block_hashes))
        for index in range(progress.num_held, num_held):
            self._held[sequence.block_table[index]] = sequence.block_hashes[index]
        progress.num_held = max(progress.num_held, num_held)

    def _compute(self, rows: list[_Row]) -> Tensor:
        """One step of the head: (T, hidden_size), row by row as they come, single tokens first."""
        rows.sort(key=lambda row: len(row.tokens) > 1)
        arrays = _arrays(rows, self._cache.block_size)
        device = self._cache.blocks.device
        ids, positions = upload(arrays.token_ids, device), upload(arrays.positions, device)
        states = torch.cat([row.states for row in rows])
        out: Tensor = self._head(states, ids, positions, SdpaStep(self._cache, arrays))
        return out

    def _guess(self, rows: list[_Row]) -> list[_Row]:
        """Guess one more token of each; those of which more are wanted."""
        rows = rows[:]
        out = self._compute(rows)
        ends = np.cumsum([len(row.tokens) for row in rows])
        last = out[upload(ends - 1, out.device)]
        places = np.array([row.wish.sequence.num_tokens + len(row.guessed) for row in rows])
        batch = self._sampling.prepare([_as_guessed(row) for row in rows], places)
        logits = self._head.logits(last)
        if (masking := _masking(rows)) is not None:
            logits = masking.apply(logits)
        for row, state, token in zip(rows, last.split(1), sample(logits, batch).tolist(), strict=True):
            row.start += len(row.tokens)
            row.states, row.tokens = state, token_array((token,))
            row.guessed.append(token)
        return [row for row in rows if _wants_more(row)]


def _as_guessed(row: _Row) -> SamplingParams:
    """As the answer is drawn, so that chance makes the same choice; logits are taken as the head gives them."""
    return replace(row.wish.sequence.request.sampling, num_logprobs=None, adjustments=None)


def _wants_more(row: _Row) -> bool:
    """Nothing is behind a token that ends the answer."""
    stops = row.wish.sequence.request.sampling.stop_token_ids
    return len(row.guessed) < row.wish.num_tokens and row.guessed[-1] not in stops


def _masking(rows: list[_Row]) -> Masking | None:
    """What grammars allow for first guesses; of later ones it is asked when they are tried."""
    found = [
        (number, row.wish.sequence.mask)
        for number, row in enumerate(rows)
        if not row.guessed and row.wish.sequence.mask is not None
    ]
    if not found:
        return None
    draws, masks = zip(*found, strict=True)
    return Masking(np.array(draws), np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1))


def _arrays(rows: list[_Row], block_size: int) -> StepArrays:
    """One step of the head, whose sequences begin where its view does; all last tokens count as drawing."""
    starts, counts = _column(row.start for row in rows), _column(len(row.tokens) for row in rows)
    tables = _tables(rows, -(-(starts + counts) // block_size))
    ends, owners = np.cumsum(counts), np.repeat(np.arange(len(rows)), counts)
    positions = np.arange(len(owners)) + (starts - ends + counts)[owners]
    return StepArrays(
        token_ids=np.concatenate([np.frombuffer(row.tokens, np.uint32) for row in rows]).astype(np.int64),
        sources=np.full((counts == 1).sum(), -1),
        positions=positions,
        slots=slots(tables, owners, positions, block_size),
        starts=starts,
        counts=counts,
        tables=tables,
        num_singles=int((counts == 1).sum()),
        draw_rows=ends - 1,
        draw_positions=positions[ends - 1] + 1,
    )


def _tables(rows: list[_Row], num_blocks: np.ndarray) -> np.ndarray:
    """(1, R, B), of each row so many blocks of its view."""
    tables = np.zeros((1, len(rows), int(num_blocks.max())), np.int64)
    for table, row, count in zip(tables[0], rows, num_blocks.tolist(), strict=True):
        first = row.progress.first_block
        table[:count] = row.wish.sequence.block_table[first : first + count]
    return tables


def _column(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int64)
