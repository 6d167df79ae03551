"""The choice of lengths against the best that is possible, with what steps of a GPU take and drafts of a set chance."""

import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.speculation.acceptance import Acceptance, Tried
from deployments.engine.speculation.curve import StepCurve
from deployments.engine.speculation.lengths import choose_lengths
from deployments.engine.speculation.patience import Patience
from deployments.messages import GenerateRequest, SamplingParams

MAX_DRAFTS = 7
PADDED = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
# Of a step of so many tokens of each sequence, over a plain one: Llama-3.1-8B's shape on an H200, 2026-11-29, with 8
# and 32 sequences (docs/measured.md). With one less than with 8; with 128 by the tokens, as 512 of 32 would have it.
RATIOS = {
    1: {1: 1.0, 2: 1.01, 4: 1.02, 8: 1.04},
    8: {1: 1.0, 2: 1.02, 4: 1.04, 8: 1.15},
    32: {1: 1.0, 2: 1.11, 4: 1.21, 8: 1.71},
    128: {1: 1.0, 2: 1.45, 4: 2.2},
}

# Of a step of so many tokens of 8 sequences in all, on two cores: SmolLM2-135M on an EPYC (Zen 3), 2026-11-30.
ON_TWO_CORES = {8: 1.0, 11: 1.4, 16: 1.95, 24: 2.9, 47: 5.0, 72: 6.5}


def on_two_cores_s(num_tokens: int) -> float:
    return float(np.interp(num_tokens, list(ON_TWO_CORES), list(ON_TWO_CORES.values())))


def step_s(batch: int, num_tokens: int) -> float:
    """Of a step, with a plain one for the unit; between the measured sizes by a straight line."""
    padded = batch if num_tokens == batch else next(size for size in PADDED if size >= num_tokens)
    points = [(batch * tokens, ratio) for tokens, ratio in RATIOS[batch].items()]
    for (low, before), (high, after) in itertools.pairwise(points):
        if padded <= high:
            return before + (after - before) * max(0, padded - low) / (high - low)
    return points[-1][1] * padded / points[-1][0]


@dataclass
class Drafts:
    """Chances of drafts: of the first one, and how much less each next one has."""

    chance: float
    fall: float = 0.0

    def at(self, place: int) -> float:
        return max(0.05, self.chance - place * self.fall)

    def expected(self, num_drafts: int) -> float:
        """Tokens of a step that tries so many."""
        expected = chance = 1.0
        for place in range(num_drafts):
            chance *= self.at(place)
            expected += chance
        return expected


@dataclass
class Played:
    """Some steps of a batch, learned from as an engine does. The first step of each size takes three times as long."""

    batch: int
    drafts: Drafts
    rng: random.Random
    acceptance: Acceptance = field(default_factory=lambda: Acceptance(1))
    curve: StepCurve = field(default_factory=lambda: StepCurve(512, PADDED))
    sizes: set[float] = field(default_factory=set)
    true_s: Callable[[int], float] | None = None

    def rate(self, num_tokens: int) -> float:
        """Tokens over time, until each sequence has so many on average, over that without drafts."""
        told, taken_s = 0, 0.0
        while told < num_tokens * self.batch:
            lengths = self.choose()
            right = [self.try_drafts(length) for length in lengths]
            if any(lengths):
                tried = zip(range(self.batch), right, lengths, strict=True)
                self.acceptance.add([Tried(str(row), 0, num, length) for row, num, length in tried if length])
            told += self.batch + sum(right)
            taken_s += self.step(sum(lengths))
        return told / taken_s / self.batch

    def choose(self, *, goes_on: bool = False) -> list[int]:
        if not self.curve.is_known(self.batch):
            return [0] * self.batch
        rates = self.acceptance.rates(list(map(str, range(self.batch))), [0] * self.batch, [MAX_DRAFTS] * self.batch)
        plain_s, drafted_s = self.curve.seconds(self.batch), self.curve.drafted_seconds
        return choose_lengths(rates, self.batch, plain_s, drafted_s, goes_on=goes_on)

    def try_drafts(self, length: int) -> int:
        right = 0
        while right < length and self.rng.random() < self.drafts.at(right):
            right += 1
        return right

    def step(self, num_drafts: int) -> float:
        """Learn from one; tells what it takes where nothing holds it up."""
        num_tokens = self.batch + num_drafts
        true_s = step_s(self.batch, num_tokens) if self.true_s is None else self.true_s(num_tokens)
        seconds = true_s * max(0.9, self.rng.gauss(1.0, 0.03)) * (1 if true_s in self.sizes else 3)
        self.sizes.add(true_s)
        if self.rng.random() < 0.01:
            seconds *= self.rng.uniform(1.5, 4.0)  # it was held up
        self.curve.add(self.batch + num_drafts, seconds, has_drafts=num_drafts > 0)
        return true_s


# With 128 sequences of Llama-3.1-8B's shape on an H200 an overlapping step takes 7.2 ms, 6.5 of which are those of
# `RATIOS`; where they do not overlap the host takes 1.9 more (2026-11-30).
OVERLAPPING, GAP = 1.11, 0.26


@dataclass
class Overlapping(Played):
    """As on a GPU: steps overlap but for those with drafts and those that were waited for in vain."""

    patience: Patience = field(default_factory=Patience)
    has_drafts: bool = False
    is_waiting: bool = False
    num_told: int = 0

    def choose(self, *, goes_on: bool = False) -> list[int]:
        self.is_waiting = self.patience.waits_for([run_of(1 if self.has_drafts else 0)])
        lengths = [0] * self.batch
        if self.is_waiting and not self.patience.is_overdrawn:
            lengths = super().choose(goes_on=self.has_drafts)
        self.has_drafts = any(lengths)
        return lengths

    def try_drafts(self, length: int) -> int:
        right = super().try_drafts(length)
        self.num_told += 1 + right
        return right

    def step(self, num_drafts: int) -> float:
        num_tokens, num_told, self.num_told = self.batch + num_drafts, self.num_told, 0
        true_s = waited_s(self.batch, num_tokens) if self.is_waiting else 1.0
        seconds = true_s * max(0.9, self.rng.gauss(1.0, 0.03))
        if self.rng.random() < 0.01:
            seconds *= self.rng.uniform(1.5, 4.0)  # it was held up
        if self.curve.is_known(self.batch):
            plain_s = self.curve.seconds(self.batch)
            if num_drafts and self.curve.is_judged(num_tokens):
                self.patience.note_drafts(num_told / self.batch - seconds / plain_s)
            elif not num_drafts and self.is_waiting:
                self.patience.note_vain(seconds / plain_s - 1)
            elif not num_drafts:
                self.patience.note_plain()
        if num_drafts or not self.is_waiting:
            self.curve.add(num_tokens, seconds, has_drafts=num_drafts > 0)
        return true_s


def waited_s(batch: int, num_tokens: int) -> float:
    """Of a step that does not overlap with the one before, with one that does for the unit."""
    return (step_s(batch, num_tokens) / OVERLAPPING if num_tokens > batch else 1.0) + GAP


def run_of(num_drafts: int) -> ScheduledSequence:
    request = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=9))
    return ScheduledSequence.decode(Sequence(request, Role.LOCAL, 0.0), (7,) * num_drafts)


def best(batch: int, drafts: Drafts) -> float:
    """The best that a fixed number of drafts brings, over none."""
    counts = [count for count in range(MAX_DRAFTS + 1) if batch * (1 + count) <= 512]
    return max(drafts.expected(count) / step_s(batch, batch * (1 + count)) for count in counts)


def share_of_possible(batch: int, drafts: Drafts) -> float:
    """Median of a few answers of 300 tokens each, of which the first 100 are learned from alone."""
    shares = []
    for seed in range(9 if batch < 128 else 5):
        played = Played(batch, drafts, random.Random(seed))
        played.rate(100)
        shares.append(played.rate(200) / best(batch, drafts))
    return statistics.median(shares)


@pytest.mark.parametrize("fall", [0.0, 0.1], ids=["alike", "falling"])
@pytest.mark.parametrize("chance", [0.6, 0.7, 0.8])
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_nine_tenths_of_what_is_possible_are_reached(batch: int, chance: float, fall: float) -> None:
    assert share_of_possible(batch, Drafts(chance, fall)) >= 0.9


@pytest.mark.parametrize("chance", [0.1, 0.3, 0.6, 0.8])
def test_a_large_batch_loses_nothing(chance: float) -> None:
    drafts = Drafts(chance)
    assert share_of_possible(128, drafts) * best(128, drafts) >= 0.99


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.8])
def test_cores_that_do_each_token_by_itself_lose_nothing_but_what_they_find_that_out_by(chance: float) -> None:
    rates = []
    for seed in range(5):
        curve = StepCurve(512)
        played = Played(8, Drafts(chance), random.Random(seed), curve=curve, true_s=on_two_cores_s)
        played.rate(50)
        rates.append(played.rate(400))
    assert statistics.median(rates) >= 0.99


def test_guesses_that_are_never_right_cost_next_to_nothing() -> None:
    for batch in (1, 8, 32):
        played = Played(batch, Drafts(-1.0), random.Random(1))
        played.rate(100)
        assert played.rate(400) >= 0.97


@pytest.mark.parametrize("chance", [0.2, 0.4, 0.5, 0.55, 0.6])
def test_drafts_that_just_do_not_pay_lose_nothing_though_a_gpu_has_to_wait_for_them(chance: float) -> None:
    rates = []
    for seed in range(5):
        played = Overlapping(128, Drafts(chance), random.Random(seed))
        played.rate(100)
        rates.append(played.rate(200))
    assert statistics.median(rates) >= 0.994


def test_drafts_that_pay_are_not_given_up_for_a_few_that_did_not() -> None:
    rates, (batch, drafts) = [], (128, Drafts(0.7))
    possible = max(drafts.expected(count) / waited_s(batch, batch * (1 + count)) for count in (1, 2, 3))
    for seed in range(5):
        played = Overlapping(batch, drafts, random.Random(seed))
        played.rate(100)
        rates.append(played.rate(200) / possible)
    assert statistics.median(rates) >= 0.96
