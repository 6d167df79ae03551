"""Chooses a replica of one pool for each request. One lives in each process that sends requests to that pool.

Brings together what is cached where (`index.py`), what waits where (`load.py`) and what that costs (`scoring.py`). It
is told how the pool is, in batches, and asked once per request; it never asks anybody. What it chose counts at once.
Knows names and numbers, not how reports come and requests go. No clock of its own, not thread-safe.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import msgspec

from deployments.engine.scheduling.cache_log import CacheEvents, Position
from deployments.engine.stats import EngineStats
from deployments.load.outlook import PoolReadings
from deployments.routing.costs import UNMEASURED_TOKEN_S
from deployments.routing.hashes import PromptHashes
from deployments.routing.heat import Heat, worth
from deployments.routing.index import PrefixIndex
from deployments.routing.load import ReplicaLoad, Sent
from deployments.routing.scoring import (
    Candidate,
    Choice,
    Costs,
    Elsewhere,
    Score,
    Sizes,
    choose,
    score_decode,
    score_prefill,
)
from deployments.routing.settings import DecodeWeights, PrefillWeights, RoutingSettings


class Rule(Protocol):
    """How replicas of a pool are scored."""

    @property
    def tie(self) -> float:
        """See `PrefillWeights.tie`."""
        ...

    def see(self, name: str, cached_tokens: int, load: ReplicaLoad, at: "Moment") -> Candidate:
        """A replica, with what the score needs of it: most of what a decision takes is to find that out."""
        ...

    @property
    def hot_asks(self) -> float | None:
        """See `PrefillWeights.hot_asks`; None: how often a prefix is asked for makes no difference."""
        ...

    def score(self, request: Sizes, candidate: Candidate, costs: Costs) -> Score:
        """What a request costs at a replica."""
        ...


class Moment(msgspec.Struct, frozen=True):
    """When replicas are looked at, and by what light.

    Attributes:
        now_s: the time.
        tokens_per_s: that an engine computes.
        num_routers: that send to the pool as much as this one does.
        block_sizes: tokens per block, of each replica of which they are known.
        parts: of the prompt, by size of blocks; see `heat.worth`.
        hot_asks: likewise.
    """

    now_s: float
    tokens_per_s: float
    num_routers: int
    block_sizes: Mapping[str, int]
    parts: Mapping[int, Sequence[tuple[int, float, int]]]
    hot_asks: float

    def worth(self, name: str, cached_tokens: int) -> float:
        """Of what a replica has cached of the prompt, in tokens."""
        size = self.block_sizes[name]
        return worth(cached_tokens // size, self.parts[size], self.hot_asks) * size


@dataclass(frozen=True, slots=True)
class PrefillRule:
    """Of a prefill pool."""

    weights: PrefillWeights

    @property
    def tie(self) -> float:
        return self.weights.tie

    def see(self, name: str, cached_tokens: int, load: ReplicaLoad, at: Moment) -> Candidate:
        queued_tokens = load.queued_tokens(at.now_s, at.tokens_per_s, at.num_routers)
        kept_tokens = at.worth(name, cached_tokens) if cached_tokens else 0.0
        return Candidate(name, cached_tokens, kept_tokens, queued_tokens, load.recent_tokens(at.now_s))

    @property
    def hot_asks(self) -> float | None:
        return self.weights.hot_asks

    def score(self, request: Sizes, candidate: Candidate, costs: Costs) -> Score:
        return score_prefill(request.num_tokens, candidate, costs, self.weights, request.shared_tokens)


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """Of a decode pool."""

    weights: DecodeWeights

    @property
    def tie(self) -> float:
        return self.weights.tie

    def see(self, name: str, cached_tokens: int, load: ReplicaLoad, at: Moment) -> Candidate:
        return Candidate(
            name,
            cached_tokens,
            queued_tokens=load.queued_tokens(at.now_s, at.tokens_per_s, at.num_routers),
            num_sequences=load.num_sequences(at.now_s, at.num_routers),
            max_sequences=max(1, load.stats.max_num_seqs),
            num_free_blocks=load.num_free_blocks(at.now_s, at.num_routers),
            num_blocks=max(1, load.stats.num_blocks),
            block_size=at.block_sizes.get(name, 1),
            step_tokens=max(1, load.stats.max_num_batched_tokens),
            held=load.held,
        )

    @property
    def hot_asks(self) -> float | None:
        return None

    def score(self, request: Sizes, candidate: Candidate, costs: Costs) -> Score:
        num_new_tokens, elsewhere, shared = request.num_new_tokens, request.elsewhere, request.shared_tokens
        return score_decode(request.num_tokens, num_new_tokens, candidate, costs, self.weights, elsewhere, shared)


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica tells of itself.

    Attributes:
        stats: of its engine.
        block_size: tokens per KV block.
        events: what changed in its prefix cache; None: nothing that is told now.
    """

    stats: EngineStats
    block_size: int
    events: CacheEvents | None = None


@dataclass(eq=False, slots=True)
class Routed:
    """A request that was given a replica. Its holder says when the prompt is computed, and that it has ended.

    Attributes:
        replica: its name.
        choice: why it.
    """

    replica: str
    choice: Choice
    _router: "Router"
    _prompt: PromptHashes
    _load: ReplicaLoad
    _sent: Sent | None

    @property
    def cached_tokens(self) -> int:
        """Leading prompt tokens that the replica is believed to have, or to have soon."""
        return self.choice.score.cached_tokens

    def computed(self, now_s: float) -> None:
        """The prompt is computed there."""
        if self._sent is not None:
            self._load.computed(self._sent, now_s)

    def ended(self, now_s: float, *, is_lost: bool = False) -> None:
        """The request is done with; again: nothing happens.

        Args:
            now_s: the time.
            is_lost: its prompt was not computed there, so its blocks are not to come.
        """
        if self._sent is None:
            return
        self._load.ended(self._sent, now_s)
        self._sent = None
        if is_lost:
            self._router._index.disappoint(self.replica, self._prompt)


class Router:
    """Chooses replicas of one pool.

    Args:
        settings: weights and bounds.
        rule: how they are scored.
        costs: of the pool, until they are measured.
        readings: learns from reports what a prompt token costs; None: `costs` are set by the owner.
    """

    def __init__(self, settings: RoutingSettings, rule: Rule, costs: Costs, readings: PoolReadings | None) -> None:
        self.rule = rule
        self.costs = costs
        self._index = PrefixIndex(settings.max_blocks_per_replica, settings.expected_for_s)
        self._heat = Heat()
        self._key_tie = settings.key_tie
        self._loads: dict[str, ReplicaLoad] = {}
        self._readings = readings
        self._num_routers = 1

    @classmethod
    def for_prefill(cls, settings: RoutingSettings) -> "Router":
        """Of a prefill pool; it learns what a token costs there."""
        return cls(settings, PrefillRule(settings.prefill), Costs(UNMEASURED_TOKEN_S), PoolReadings(counts_hits=False))

    @classmethod
    def for_decode(cls, settings: RoutingSettings, costs: Costs) -> "Router":
        """Of a decode pool, of which the costs are told."""
        return cls(settings, DecodeRule(settings.decode), costs, None)

    @property
    def replicas(self) -> Collection[str]:
        return self._loads.keys()

    @property
    def num_open(self) -> int:
        """Requests that this router has sent and that have not ended, at the replicas that are there."""
        return sum(load.num_open for load in self._loads.values())

    def positions(self) -> dict[str, Position | None]:
        """How far the changes of each replica's cache were read; None: all that it has is to be told."""
        return {name: self._index.position(name) for name in self._index.replicas}

    def update(self, reports: Mapping[str, Report], as_of_s: float, now_s: float, num_routers: int = 1) -> None:
        """Take what the replicas tell; those that are not among them are gone.

        Args:
            reports: by the name of the replica.
            as_of_s: what they say was true then or later.
            now_s: the time.
            num_routers: that send to this pool as much as this one does.
        """
        self._num_routers = max(1, num_routers)
        for name in self._loads.keys() - reports.keys():
            self.leave(name)
        for name, report in reports.items():
            self._load_of(name, now_s).update(report.stats, as_of_s, now_s)
            self._index.join(name, report.block_size, report.stats.num_blocks)
            if report.events is not None:
                self._index.apply(name, report.events)
        if self._readings is not None:
            self._learn_costs(self._readings, reports, as_of_s)

    def _learn_costs(self, readings: PoolReadings, reports: Mapping[str, Report], as_of_s: float) -> None:
        readings.update({name: report.stats for name, report in reports.items()}, as_of_s)
        tokens = readings.tokens_per_step
        if token_s := readings.cost.seconds(1.0, tokens).best / tokens:
            self.costs = replace(self.costs, token_s=token_s)

    def leave(self, name: str) -> None:
        """A replica is gone."""
        self._loads.pop(name, None)
        self._index.leave(name)

    def route(
        self, prompt: PromptHashes, now_s: float, *, num_new_tokens: int = 0, among: Collection[str] | None = None
    ) -> Routed:
        """Choose a replica for a request, and count the request as sent there; see `choose`."""
        choice = self.choose(prompt, now_s, num_new_tokens=num_new_tokens, among=among)
        return self.send(prompt, choice, now_s, num_new_tokens=num_new_tokens)

    def longest(self, prompt: PromptHashes, now_s: float) -> int:
        """Leading tokens of a prompt that some replica has, or will have soon."""
        return max(self._index.match(prompt, now_s).values(), default=0)

    def choose(
        self,
        prompt: PromptHashes,
        now_s: float,
        *,
        num_new_tokens: int = 0,
        elsewhere: Elsewhere | None = None,
        shared_tokens: int = 0,
        among: Collection[str] | None = None,
    ) -> Choice:
        """Choose a replica for a request.

        Args:
            prompt: the request's.
            now_s: the time.
            num_new_tokens: that it is expected to generate.
            elsewhere: see `score_decode`.
            shared_tokens: see `Sizes`; those of this pool count in any case.
            among: replicas that may be chosen, also such as no report has come of; None: all that were told of. At
                least one.
        """
        names = self._loads.keys() if among is None else among
        cached = self._index.match(prompt, now_s)
        costs, rule, sizes = self.costs, self.rule, self._index.block_sizes
        parts, hot_asks = {}, rule.hot_asks
        if hot_asks is not None:
            parts = {size: self._parts(prompt.of(size), now_s) for size in set(sizes.values())}
        at = Moment(now_s, 1.0 / costs.token_s, self._num_routers, sizes, parts, hot_asks or 0.0)
        request = Sizes(prompt.num_tokens, num_new_tokens, elsewhere, max([shared_tokens, *cached.values()]))
        candidates = [rule.see(name, cached.get(name, 0), self._load_of(name, now_s), at) for name in names]
        scores = [rule.score(request, candidate, costs) for candidate in candidates]
        longest = max(scores, key=lambda score: score.cached_tokens)
        key = prompt.key_after(longest.cached_tokens, sizes.get(longest.replica))
        whole_s = prompt.num_tokens * costs.token_s
        return choose(scores, rule.tie * whole_s, key, prompt.meeting_key, self._key_tie * whole_s)

    def send(
        self, prompt: PromptHashes, choice: Choice, now_s: float, *, num_new_tokens: int = 0, computes: bool = True
    ) -> Routed:
        """A request goes to the replica that was just chosen for it: it counts there from now on.

        Args:
            prompt: the request's.
            choice: of the replica.
            now_s: the time.
            num_new_tokens: that the request is expected to generate.
            computes: the replica computes what it lacks of the prompt.
        """
        sizes, name, load = self._index.block_sizes, choice.replica, self._loads[choice.replica]
        if self.rule.hot_asks is not None:
            for size in set(sizes.values()):
                self._heat.ask(prompt.of(size), now_s)
        num_left = prompt.num_tokens - choice.score.cached_tokens
        num_blocks = load.blocks_held(num_left + num_new_tokens, sizes.get(name, 1))
        sent = load.send(num_left if computes else 0, num_blocks, now_s)
        self._index.expect(name, prompt, now_s)
        return Routed(name, choice, self, prompt, load, sent)

    def _parts(self, chain: list[bytes], now_s: float) -> list[tuple[int, float, int]]:
        looked = self._heat.look(chain, now_s)
        return [(end, asks * self._num_routers, self._index.copies(chain[end - 1])) for end, asks in looked]

    def _load_of(self, name: str, now_s: float) -> ReplicaLoad:
        load = self._loads.get(name)
        if load is None:
            load = ReplicaLoad()
            if self._loads:
                others = [other.recent_tokens(now_s) for other in self._loads.values()]
                load.start_at(sum(others) / len(others), now_s)
            self._loads[name] = load
        return load
