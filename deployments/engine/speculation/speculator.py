"""Proposes drafts before each step, and learns from what became of them. Called by the engine, in its thread.

An answer is the same with and without: what is drawn depends on seed, place and logits alone, and a draft counts only
where it is what was drawn. So all that is decided here is time.
"""

import time
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor

from deployments.engine.config import EngineLimits, SpeculationConfig
from deployments.engine.execution.rehearsal import build_rehearsed, build_rehearsed_head, drafter_limits
from deployments.engine.grammar.guides import Guides
from deployments.engine.model.load import LoadedModel
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.scheduler import MAX_VERIFIED_TOKENS, Scheduler
from deployments.engine.scheduling.sequence import Sequence, Status
from deployments.engine.speculation.acceptance import Acceptance, Tried
from deployments.engine.speculation.base import Drafter, Prospect, Wish
from deployments.engine.speculation.curve import StepCurve
from deployments.engine.speculation.draft_model import DraftModel
from deployments.engine.speculation.eagle3 import Eagle3Drafter
from deployments.engine.speculation.lengths import choose_lengths
from deployments.engine.speculation.lookup import LookupDrafter
from deployments.engine.speculation.patience import Patience
from deployments.engine.stats import EngineStats
from deployments.messages import Draws


class _Ended(NamedTuple):
    """A step: its runs with the draws that count, the kinds of its drafts by their sequence; see `note_end`.

    Attributes:
        drafting_s: of its seconds, those of guessing.
    """

    collected: list[tuple[ScheduledSequence, Draws]]
    kinds: dict[str, int]
    seconds: float
    drafting_s: float
    is_late: bool


class Speculator:
    """See the module.

    Args:
        drafter: what guesses; None: nothing does.
        config: how far.
        stats: where counts go.
        drafted_sizes: see `StepCurve`.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        config: SpeculationConfig,
        stats: EngineStats,
        drafted_sizes: tuple[int, ...] = (),
    ) -> None:
        self._drafter = drafter
        self._config = config
        self._stats = stats
        self._acceptance = Acceptance(0 if drafter is None else drafter.num_kinds)
        self.drafted_sizes = drafted_sizes
        self._curve = StepCurve(MAX_VERIFIED_TOKENS, drafted_sizes)
        self._patience = Patience()
        self._kinds: dict[str, int] = {}  # of the drafts that were proposed last
        self._drafting_s = 0.0  # that guessing took before the step that has not ended
        self._goes_on = False  # the step that ended last had drafts, and was waited for
        self._ended: _Ended | None = None  # nothing was learned from it yet
        self._is_behind_decodes = False  # the step that was learned from last had no prompt

    @property
    def is_on(self) -> bool:
        """Whether anything is ever guessed."""
        return self._drafter is not None

    def waits_for(self, items: list[ScheduledSequence]) -> bool:
        """Whether a step with these is to be concluded before the next one is chosen, so that this may guess."""
        return self.is_on and self._patience.waits_for(items)

    def hurries(self, items: list[ScheduledSequence]) -> bool:
        """Whether a step of these is to be launched before anything is told of the one before, which was waited for.

        Not if there are prompts in it: those take the host long to launch.
        """
        return self.is_on and all(item.is_decode for item in items)

    def propose(self, scheduler: Scheduler, guides: Guides) -> None:
        """Guess for the sequences that the next step continues, where that is expected to pay.

        Beside prompts nothing is tried: there each token costs what a prompt's does, and is taken from them. Nor where
        blocks are short: a draft shall take none that somebody's newest token needs.
        """
        if self._drafter is None or scheduler.can_admit:
            return
        going = [sequence for sequence in scheduler.running if sequence.has_work]
        if not all(sequence.is_decoding for sequence in going) or not scheduler.make_room(going):
            return
        wishes, kinds = self._choose(self._drafter, going)
        wishes = [wish for wish in wishes if scheduler.make_room_for_drafts(*wish)]
        if not wishes:
            return
        begun_s = time.monotonic()
        drafts = self._drafter.draft(wishes)
        if self._drafter.seconds(len(wishes)):  # else it is a part of what the step takes
            self._drafting_s = time.monotonic() - begun_s
        for (sequence, _), tokens in zip(wishes, drafts, strict=True):
            masks = () if sequence.mask is None else _masks_behind(sequence, tokens, guides)
            if tokens and (masks or sequence.mask is None):
                self._kinds[sequence.request_id] = kinds[sequence.request_id]
                sequence.propose(tokens, masks)

    def note_end(
        self, collected: list[tuple[ScheduledSequence, Draws]], states: Tensor | None, seconds: float, *, is_late: bool
    ) -> None:
        """A step has ended: what `learn` will learn from.

        Args:
            collected: its runs, each with those draws that count, one more than drafts that were right. No draws have
                joined their sequences yet.
            states: see `LaunchedStep`.
            seconds: that it took, with the guesses before it.
            is_late: it could have been launched before the end of the one before, and was not, so that it might guess.
        """
        if self._drafter is None:
            return
        self._drafter.learn(collected, states)
        self._ended = _Ended(collected, self._kinds, seconds, self._drafting_s, is_late)
        self._goes_on, self._kinds, self._drafting_s = is_late and bool(self._kinds), {}, 0.0

    def learn(self) -> None:
        """From the step that ended last; not needed for the next one, so a GPU shall not wait for it."""
        if self._ended is None:
            return
        (collected, kinds, seconds, drafting_s, is_late), self._ended = self._ended, None
        is_of_decodes = all(run.is_decode for run, _ in collected)
        if is_of_decodes:
            self._learn_seconds(collected, seconds, drafting_s, is_late=is_late)
        self._is_behind_decodes = is_of_decodes
        guessed = [(run, len(draws) - 1) for run, draws in collected if run.drafts]
        for run, num_right in guessed:
            self._stats.drafted_tokens.observe(len(run.drafts))
            self._stats.accepted_tokens.observe(num_right)
        self._learn_guesses(guessed, kinds)

    def _learn_seconds(
        self, collected: list[tuple[ScheduledSequence, Draws]], seconds: float, drafting_s: float, *, is_late: bool
    ) -> None:
        """From a step of decodes alone: what such steps take, and what drafts won by it or a wait for them lost."""
        if not seconds > 0:
            return
        num_tokens = sum([run.num_tokens for run, _ in collected])
        has_drafts = num_tokens > len(collected)
        if self._config.is_adaptive and self._curve.is_known(len(collected)):
            plain_s = self._curve.seconds(len(collected))
            if not has_drafts and is_late and self._is_behind_decodes:  # else it was a prompt that was waited for
                self._patience.note_vain(seconds / plain_s - 1.0)
            elif not has_drafts:
                self._patience.note_plain()
            elif self._curve.is_judged(num_tokens):  # before, it is tried out
                num_drawn = sum([len(draws) for _, draws in collected])
                self._patience.note_drafts(num_drawn / len(collected) - seconds / plain_s)
        if has_drafts or not is_late:  # one that was waited for in vain does not tell what those that overlap take
            self._curve.add(num_tokens, seconds - drafting_s, has_drafts=has_drafts)

    def _learn_guesses(self, guessed: list[tuple[ScheduledSequence, int]], kinds: dict[str, int]) -> None:
        """From runs with drafts, and how many of these were right; nothing is kept of sequences that are over."""
        tried = [
            Tried(run.sequence.request_id, kinds[run.sequence.request_id], num_right, len(run.drafts))
            for run, num_right in guessed
            if run.sequence.status is not Status.FINISHED
        ]
        if tried:
            self._acceptance.add(tried)

    def drop(self, request_id: str) -> None:
        """The sequence is over; unknown ids are no error."""
        if self._drafter is None:
            return
        self._drafter.drop(request_id)
        self._acceptance.drop(request_id)

    def _choose(self, drafter: Drafter, going: list[Sequence]) -> tuple[list[Wish], dict[str, int]]:
        """How many tokens to guess of which sequences, and of which kind each one's are."""
        wishes: list[Wish] = []
        prospects: list[Prospect] = []
        max_drafts = self._config.max_drafts
        for sequence in going:
            num_left = sequence.max_num_tokens - sequence.num_tokens - 1
            if sequence.num_pending_tokens or num_left <= 0:  # who has one token left to draw needs no drafts
                continue
            wish = Wish(sequence, num_left if num_left < max_drafts else max_drafts)
            if (prospect := drafter.look(wish)) is not None:
                wishes.append(wish)
                prospects.append(prospect)
        if not wishes:
            return [], {}
        request_ids = [sequence.request_id for sequence, _ in wishes]
        lengths = self._lengths(drafter, request_ids, prospects, len(going))
        chosen = [Wish(sequence, length) for (sequence, _), length in zip(wishes, lengths, strict=True) if length]
        return chosen, {name: kind for name, (_, kind) in zip(request_ids, prospects, strict=True)}

    def _lengths(
        self, drafter: Drafter, request_ids: list[str], prospects: list[Prospect], num_sequences: int
    ) -> list[int]:
        counts, kinds = zip(*prospects, strict=True)
        if not self._config.is_adaptive:
            return list(counts)
        if self._patience.is_overdrawn or not self._curve.is_known(num_sequences):
            return [0] * len(counts)  # until steps without drafts say what one takes
        rates = self._acceptance.rates(request_ids, kinds, counts)
        plain_s, drafted_s = self._curve.seconds(num_sequences), self._curve.drafted_seconds
        return choose_lengths(
            rates, num_sequences, plain_s, drafted_s, drafter.seconds, self._config.max_step_s, goes_on=self._goes_on
        )


def _masks_behind(sequence: Sequence, drafts: tuple[int, ...], guides: Guides) -> tuple[bytes, ...]:
    """What may follow each draft by the sequence's grammar, up to the first that may not come or ends the answer."""
    stops = sequence.request.sampling.stop_token_ids
    return guides.look_ahead(sequence, tuple(takewhile(lambda token: token not in stops, drafts)))


def build_speculator(
    config: SpeculationConfig, stats: EngineStats, loaded: LoadedModel, limits: EngineLimits
) -> Speculator:
    """As the settings say; on a GPU the steps of a model that guesses are tried beside the engine's pool.

    Raises:
        ValueError: that model is not loaded, or its steps do not fit into the GPU's memory.
    """
    drafter = _build_drafter(config, loaded, limits)
    if drafter is not None:
        _compile()
    return Speculator(drafter, config, stats, _drafted_sizes(loaded, limits))


def _compile() -> None:
    """Have numba compile what chooses, or fetch it from its cache, before the first request needs it."""
    acceptance, curve = Acceptance(1), StepCurve(MAX_VERIFIED_TOKENS)
    acceptance.add([Tried("", 0, 1, 1)])
    curve.add(1, 1.0)
    for seconds in (curve.drafted_seconds, StepCurve(MAX_VERIFIED_TOKENS, (2,)).drafted_seconds):
        choose_lengths(acceptance.rates([""], [0], [1]), 1, curve.seconds(1), seconds)


def _drafted_sizes(loaded: LoadedModel, limits: EngineLimits) -> tuple[int, ...]:
    """Of the graphs that verify drafts; none where there are none."""
    if not loaded.has_cuda_layers:
        return ()
    from deployments.engine.execution.verification import verification_sizes  # Triton is there only where a GPU is

    return tuple(sorted({num_tokens for _, num_tokens in verification_sizes(limits)}))


def _build_drafter(config: SpeculationConfig, loaded: LoadedModel, limits: EngineLimits) -> Drafter | None:
    if config.method == "off":
        return None
    if config.method == "ngram":
        return LookupDrafter()
    if loaded.head is not None:
        return Eagle3Drafter(build_rehearsed_head(loaded, limits))
    if loaded.drafter is None:
        raise ValueError(f"speculation.model is {config.model!r}, and no such model was loaded beside {loaded.path!r}")
    own = drafter_limits(limits, loaded.drafter)
    runner = build_rehearsed(loaded.drafter, own)
    return DraftModel(runner, own.max_model_len, own.max_num_batched_tokens, loaded.drafter.positions)
