"""Chooses the replicas of both pools for each request. One lives in each ingress replica.

Both are chosen at once, for one depends on the other: what of the prompt a decode replica lacks it computes itself, or
has a prefill replica compute, and what that takes depends on which prefill replicas have it. Told how the pools are
about once a second, with what admission goes by; asks nobody. A choice that is out of date costs time, never an answer:
who is not there is replaced by Serve (`request_router.py`), and engines look into their caches themselves.

Not thread-safe: lives in the event loop of the ingress.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from deployments.engine.scheduling.positions import FIXED, PositionRule
from deployments.load.outlook import MAX_AGE_S
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.messages import ANYWHERE, GenerateRequest, Route
from deployments.replica_stats import Positions, ReplicaStats
from deployments.routing.costs import UNMEASURED_TOKEN_S, DecodeCosts, TierCost
from deployments.routing.crossover import Crossover, Gaps, Here, There
from deployments.routing.hashes import PromptHashes
from deployments.routing.router import Report, Routed, Router
from deployments.routing.scoring import Choice, Costs, Elsewhere, Reason
from deployments.routing.settings import RoutingSettings

logger = logging.getLogger(__name__)

Clock = Callable[[], float]

# What is told to admission of where prompts are computed is that old at most.
_LOOK_S = 0.05


@dataclass(eq=False, slots=True)
class RoutedRequest:
    """A request that was given its replicas. Its holder says when its first token came, and that it has ended.

    Attributes:
        route: where it is to go.
    """

    route: Route
    _routed: tuple[Routed, ...]
    _clock: Clock
    _is_computed: bool = False

    @property
    def reasons(self) -> list[str]:
        """Why these replicas, in words: of decode, then of prefill where it is to compute the prompt."""
        return [f"{routed.choice.reason}: {routed.choice.describe()}" for routed in self._routed]

    def first_token(self) -> None:
        """Its prompt is computed."""
        self._is_computed = True
        for routed in self._routed:
            routed.computed(self._clock())

    def ended(self) -> None:
        """It is done with, in whatever way. Again: nothing happens."""
        for routed in self._routed:
            routed.ended(self._clock(), is_lost=not self._is_computed)


class PoolRouters:
    """See the module.

    Args:
        settings: weights and bounds.
        crossover: which prompts decode has computed by the prefill pool; None: there is none.
        positions: of the model, see `EngineInfo`.
        clock: that of the readings; monotonic seconds.
    """

    def __init__(
        self,
        settings: RoutingSettings,
        crossover: Crossover | None,
        positions: PositionRule = FIXED,
        clock: Clock = time.monotonic,
    ) -> None:
        self._is_on = settings.by_prefix
        self._crossover = crossover
        self._positions = positions
        self._clock = clock
        self._decode = Router.for_decode(settings, Costs(UNMEASURED_TOKEN_S))
        self._prefill = None if crossover is None else Router.for_prefill(settings)
        self._routers = {DECODE: self._decode} | ({} if self._prefill is None else {PREFILL: self._prefill})
        self._peers: frozenset[str] = frozenset()  # replicas of the decode pool that compute prompts for others
        self._costs = DecodeCosts() if crossover is None else DecodeCosts(crossover.goals.itl_s)
        self._tier = TierCost()
        self.choices: Counter[tuple[str, Reason]] = Counter()
        self.promised_tokens = dict.fromkeys(self._routers, 0)
        self.seconds = 0.0
        self._looked_s, self._seen = -math.inf, self._look(0.0)

    def positions(self, pool: str) -> Positions | None:
        """What to ask the replicas of a pool with; None: there is nothing to choose, so what they have is all one."""
        if not self._has_choice:
            return None
        positions = self._routers[pool].positions()
        if pool == DECODE and self._peers:
            elsewhere = self._routers[PREFILL].positions()
            positions |= {name: read for name, read in elsewhere.items() if name in self._peers}
        return positions

    @property
    def num_open(self) -> int:
        """Requests that were routed and have not ended, counted once for each pool."""
        return sum(router.num_open for router in self._routers.values())

    def update(self, reading: Reading) -> None:
        """Take a reading, on the clock of this object."""
        now_s = self._clock()
        pools = {
            pool: {replica.replica: replica for replica in replicas if _is_heard(replica)}
            for pool, replicas in reading.replicas.items()
        }
        decode, prefill = pools[DECODE], pools.get(PREFILL, {})
        self._peers = frozenset(name for name, replica in prefill.items() if replica.engine.is_flipped)
        num_routers = max([1, *(replica.engine.num_receivers for replica in decode.values())])
        pools = {pool: self._without_moved_caches(pool, replicas) for pool, replicas in pools.items()}
        for pool, replicas in pools.items():
            self._routers[pool].update(_reports(replicas), reading.as_of_s, now_s, num_routers)
        self._learn_costs(decode, prefill, reading.as_of_s)
        self._tier.update({name: replica.engine for name, replica in (decode | prefill).items()})
        for router in self._routers.values():
            router.costs = replace(router.costs, tier_token_s=self._tier.token_s)

    def _without_moved_caches(self, pool: str, replicas: dict[str, ReplicaStats]) -> dict[str, ReplicaStats]:
        """What a replica has cached that does another pool's work now is told anew: what came is what had changed."""
        others = {name for other, router in self._routers.items() if other != pool for name in router.replicas}
        return {name: replace(replica, cache=None) if name in others else replica for name, replica in replicas.items()}

    def _learn_costs(
        self, decode: Mapping[str, ReplicaStats], prefill: Mapping[str, ReplicaStats], as_of_s: float
    ) -> None:
        handoffs = {name: replica.handoff for name, replica in prefill.items()}
        engines = {name: replica.engine for name, replica in decode.items()}
        block_size = max([0, *(engine.block_size for engine in engines.values())])
        self._costs.update(engines, handoffs, block_size, as_of_s)
        self._decode.costs = self._costs.costs(None if self._prefill is None else self._prefill.costs.token_s)

    def route(self, request: GenerateRequest) -> RoutedRequest:
        """Choose the replicas for a request; it counts as sent there. Where there is one of each, that is no choice."""
        if not self._has_choice:
            return RoutedRequest(ANYWHERE, (), self._clock)
        begun_s = time.perf_counter()
        offset = self._positions.offset(len(request.prompt_token_ids), request.num_given_tokens)
        prompt = PromptHashes(request.given_token_ids, offset, request.cache_salt, gathers=request.gathers)
        routed = self.route_prompt(request.request_id, prompt, request.max_new_tokens)
        self.seconds += time.perf_counter() - begun_s
        return routed

    def route_prompt(self, request_id: str, prompt: PromptHashes, max_new_tokens: int) -> RoutedRequest:
        """`route`, of a prompt that is hashed."""
        if not self._has_choice or not self._decode.replicas:
            return RoutedRequest(ANYWHERE, (), self._clock)
        now_s = self._clock()
        num_new_tokens = self._costs.num_new_tokens(max_new_tokens)
        shared = self._shared_tokens(prompt, now_s)
        elsewhere, prefill = self._look_elsewhere(prompt, now_s, num_new_tokens, shared)
        decode = self._decode.choose(
            prompt, now_s, num_new_tokens=num_new_tokens, elsewhere=elsewhere, shared_tokens=shared
        )
        threshold = _threshold(prompt, decode, elsewhere)
        computes = threshold is None or prompt.num_tokens - decode.score.cached_tokens < threshold
        routed = [self._decode.send(prompt, decode, now_s, num_new_tokens=num_new_tokens, computes=computes)]
        self._note(DECODE, request_id, decode)
        if self._prefill is not None and prefill is not None and not computes:
            routed.append(self._prefill.send(prompt, prefill, now_s))
            self._note(PREFILL, request_id, prefill)
        # Also where decode is to compute the prompt: should it have forgotten it, the choice is made.
        name = prefill.replica if prefill is not None else ""
        route = Route(decode.replica, name, threshold, by_peer=name in self._peers)
        return RoutedRequest(route, tuple(routed), self._clock)

    def is_remote(self, num_tokens: int) -> bool:
        """Whether the prefill pool would compute a prompt that comes now, of which nothing is cached; for admission."""
        if self._crossover is None or self._prefill is None:
            return False
        if self._crossover.may_lack_pool and not self._prefill.replicas:
            return False
        if self._crossover.min_tokens is not None:
            return num_tokens >= self._crossover.min_tokens
        now_s = self._clock()
        if now_s - self._looked_s > _LOOK_S:
            self._looked_s, self._seen = now_s, self._look(now_s)
        if self._seen is None:
            return num_tokens >= self._crossover.default_tokens
        here, there, gaps = self._seen
        computing_s = there.computing_s + num_tokens * self._routers[PREFILL].costs.token_s
        return self._crossover.is_remote(num_tokens, here, there.taking(computing_s), gaps)

    def _look(self, now_s: float) -> tuple[Here, There, Gaps] | None:
        """What a prompt without a token would meet."""
        if not self._decode.replicas:
            return None
        nothing = PromptHashes(())
        elsewhere, _ = self._look_elsewhere(nothing, now_s, 0, 0)
        here = self._decode.choose(nothing, now_s, elsewhere=elsewhere).score.here
        return None if elsewhere is None or here is None else (here, elsewhere.there, elsewhere.gaps)

    @property
    def _has_choice(self) -> bool:
        crossover = self._crossover
        decides_pool = crossover is not None and (crossover.min_tokens is None or crossover.may_lack_pool)
        is_choice = decides_pool or self._peers or any(len(router.replicas) > 1 for router in self._routers.values())
        return self._is_on and bool(is_choice)

    def lost(self, route: Route) -> None:
        """The decode replica that a request was sent to is gone, until it is heard of again."""
        self._decode.leave(route.decode)

    def _shared_tokens(self, prompt: PromptHashes, now_s: float) -> int:
        """Leading tokens that the tier likely has, since an engine of either pool has them; 0 without a tier."""
        if self._tier.token_s is None:
            return 0
        return max(router.longest(prompt, now_s) for router in self._routers.values())

    def _look_elsewhere(
        self, prompt: PromptHashes, now_s: float, num_new_tokens: int, shared_tokens: int
    ) -> tuple[Elsewhere | None, Choice | None]:
        """What the prefill pool would take for a prompt, and which of its replicas."""
        if self._prefill is None or self._crossover is None or not self._prefill.replicas:
            return None, None
        choice = self._prefill.choose(prompt, now_s, shared_tokens=shared_tokens)
        there = self._costs.there(choice.score.wait_s + choice.score.own_s, self._prefill.costs.token_s)
        return Elsewhere(self._crossover, there, self._costs.gaps(num_new_tokens)), choice

    def _note(self, pool: str, request_id: str, choice: Choice) -> None:
        self.choices[pool, choice.reason] += 1
        self.promised_tokens[pool] += choice.score.cached_tokens
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s replica %s", request_id, pool, choice.describe())


def _threshold(prompt: PromptHashes, decode: Choice, elsewhere: Elsewhere | None) -> int | None:
    """How much the chosen decode replica has to lack for the prompt to be computed by the prefill pool."""
    here = decode.score.here
    if elsewhere is None or here is None:
        return None
    return elsewhere.crossover.threshold(prompt.num_tokens, here, elsewhere.there, elsewhere.gaps)


def _is_heard(replica: ReplicaStats) -> bool:
    """Whether its engine has said anything, and not too long ago: one that hangs is given nothing more."""
    return replica.engine.block_size > 0 and replica.age_s <= MAX_AGE_S


def _reports(replicas: Mapping[str, ReplicaStats]) -> dict[str, Report]:
    return {
        name: Report(replica.engine, replica.engine.block_size, replica.cache) for name, replica in replicas.items()
    }
