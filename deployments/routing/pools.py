"""Chooses the replicas of both pools for each request. One lives in each ingress replica.

Both are chosen at once, for one depends on the other: what of the prompt a decode replica lacks it computes itself, or
has a prefill replica compute, and what that takes depends on which prefill replicas have it. Told how the pools are
about once a second, with what admission goes by; asks nobody. A choice that is out of date costs time, never an answer:
who is not there is replaced by Serve (`request_router.py`), and engines look into their caches themselves.

Not thread-safe: lives in the event loop of the ingress.
"""

import logging
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
from deployments.routing.hashes import PromptHashes
from deployments.routing.router import Report, Routed, Router
from deployments.routing.scoring import Choice, Costs, Elsewhere, Reason
from deployments.routing.settings import RoutingSettings

logger = logging.getLogger(__name__)

Clock = Callable[[], float]


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
        min_remote_tokens: decode has prompts with so many uncached tokens computed by the prefill pool; None: there is
            none.
        positions: of the model, see `EngineInfo`.
        clock: that of the readings; monotonic seconds.
    """

    def __init__(
        self,
        settings: RoutingSettings,
        min_remote_tokens: int | None,
        positions: PositionRule = FIXED,
        clock: Clock = time.monotonic,
    ) -> None:
        self._is_on = settings.by_prefix
        self._min_remote_tokens = min_remote_tokens
        self._positions = positions
        self._clock = clock
        self._decode = Router.for_decode(settings, Costs(UNMEASURED_TOKEN_S))
        self._prefill = None if min_remote_tokens is None else Router.for_prefill(settings)
        self._routers = {DECODE: self._decode} | ({} if self._prefill is None else {PREFILL: self._prefill})
        self._costs = DecodeCosts()
        self._tier = TierCost()
        self.choices: Counter[tuple[str, Reason]] = Counter()
        self.promised_tokens = dict.fromkeys(self._routers, 0)
        self.seconds = 0.0

    def positions(self, pool: str) -> Positions | None:
        """What to ask the replicas of a pool with; None: there is nothing to choose, so what they have is all one."""
        return self._routers[pool].positions() if self._has_choice else None

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
        num_routers = max([1, *(replica.engine.num_receivers for replica in decode.values())])
        for pool, replicas in pools.items():
            self._routers[pool].update(_reports(replicas), reading.as_of_s, now_s, num_routers)
        handoffs = {name: replica.handoff for name, replica in prefill.items()}
        engines = {name: replica.engine for name, replica in decode.items()}
        block_size = max([0, *(engine.block_size for engine in engines.values())])
        self._costs.update(engines, handoffs, block_size, reading.as_of_s)
        self._decode.costs = self._costs.costs(None if self._prefill is None else self._prefill.costs.token_s)
        self._tier.update({name: replica.engine for name, replica in (decode | prefill).items()})
        for router in self._routers.values():
            router.costs = replace(router.costs, tier_token_s=self._tier.token_s)

    def route(self, request: GenerateRequest) -> RoutedRequest:
        """Choose the replicas for a request; it counts as sent there. Where there is one of each, that is no choice."""
        if not self._has_choice:
            return RoutedRequest(ANYWHERE, (), self._clock)
        begun_s = time.perf_counter()
        offset = self._positions.offset(len(request.prompt_token_ids), request.num_given_tokens)
        prompt = PromptHashes(request.given_token_ids, offset, request.cache_salt)
        routed = self.route_prompt(request.request_id, prompt, request.max_new_tokens)
        self.seconds += time.perf_counter() - begun_s
        return routed

    def route_prompt(self, request_id: str, prompt: PromptHashes, max_new_tokens: int) -> RoutedRequest:
        """`route`, of a prompt that is hashed."""
        if not self._has_choice or not self._decode.replicas:
            return RoutedRequest(ANYWHERE, (), self._clock)
        now_s = self._clock()
        num_new_tokens = self._costs.num_new_tokens(max_new_tokens)
        elsewhere, prefill = self._look_elsewhere(prompt, now_s)
        decode = self._decode.choose(prompt, now_s, num_new_tokens=num_new_tokens, elsewhere=elsewhere)
        routed = [self._decode.send(prompt, decode, now_s, num_new_tokens=num_new_tokens)]
        self._note(DECODE, request_id, decode)
        num_left = prompt.num_tokens - decode.score.cached_tokens
        if self._prefill is not None and prefill is not None and elsewhere and num_left >= elsewhere.min_tokens:
            routed.append(self._prefill.send(prompt, prefill, now_s))
            self._note(PREFILL, request_id, prefill)
        # Also where decode is to compute the prompt: should it have forgotten it, the choice is made.
        route = Route(decode.replica, prefill.replica if prefill is not None else "")
        return RoutedRequest(route, tuple(routed), self._clock)

    @property
    def _has_choice(self) -> bool:
        return self._is_on and any(len(router.replicas) > 1 for router in self._routers.values())

    def lost(self, route: Route) -> None:
        """The decode replica that a request was sent to is gone, until it is heard of again."""
        self._decode.leave(route.decode)

    def _look_elsewhere(self, prompt: PromptHashes, now_s: float) -> tuple[Elsewhere | None, Choice | None]:
        """What the prefill pool would take for a prompt, and which of its replicas."""
        if self._prefill is None or self._min_remote_tokens is None or not self._prefill.replicas:
            return None, None
        choice = self._prefill.choose(prompt, now_s)
        computing_s = choice.score.wait_s + choice.score.own_s
        handoff_s = self._costs.handoff_token_s(self._prefill.costs.token_s)
        return Elsewhere(self._min_remote_tokens, computing_s, handoff_s), choice

    def _note(self, pool: str, request_id: str, choice: Choice) -> None:
        self.choices[pool, choice.reason] += 1
        self.promised_tokens[pool] += choice.score.cached_tokens
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s replica %s", request_id, pool, choice.describe())


def _is_heard(replica: ReplicaStats) -> bool:
    """Whether its engine has said anything, and not too long ago: one that hangs is given nothing more."""
    return replica.engine.block_size > 0 and replica.age_s <= MAX_AGE_S


def _reports(replicas: Mapping[str, ReplicaStats]) -> dict[str, Report]:
    return {
        name: Report(replica.engine, replica.engine.block_size, replica.cache) for name, replica in replicas.items()
    }
