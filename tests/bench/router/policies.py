"""Ways to choose an engine: the project's router, and those it is compared with. Each is asked once per prompt."""

import random
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from deployments.routing.hashes import PromptHashes
from deployments.routing.router import Report, Routed, Router
from deployments.routing.settings import RoutingSettings
from tests.bench.router.engines import ModelledEngine
from tests.bench.router.trace import BLOCK_SIZE, Arrival

Engines = Sequence[ModelledEngine]


class Policy(Protocol):
    """Chooses an engine for each prompt."""

    def choose(self, number: int, arrival: Arrival, engines: Engines, now_s: float) -> int: ...

    def done(self, number: int, now_s: float) -> None:
        """The first token of a prompt has come."""
        ...

    def tick(self, engines: Engines, now_s: float) -> None:
        """Time passes; called in the period of the replay."""
        ...


class Stateless:
    """What those have in common that learn nothing."""

    def done(self, number: int, now_s: float) -> None:
        """Learn nothing."""

    def tick(self, engines: Engines, now_s: float) -> None:
        """Learn nothing."""


class RandomChoice(Stateless):
    """Any engine."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, number: int, arrival: Arrival, engines: Engines, now_s: float) -> int:
        return self._random.randrange(len(engines))


class RoundRobin(Stateless):
    """One after the other."""

    def choose(self, number: int, arrival: Arrival, engines: Engines, now_s: float) -> int:
        return number % len(engines)


class TwoChoices(Stateless):
    """Of two, the one with fewer open prompts, which it sees as they are: Serve's own way."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, number: int, arrival: Arrival, engines: Engines, now_s: float) -> int:
        return min(self._random.sample(range(len(engines)), 2), key=lambda i: engines[i].num_open)


class BoundedHash(Stateless):
    """Consistent hashing of the first blocks, past engines that have too many open prompts, which it sees as they are.

    Args:
        num_engines: on the ring.
        num_blocks: of a prompt, that are hashed.
        factor: of the mean number of open prompts, that an engine may have.

    Source: Consistent Hashing with Bounded Loads (Mirrokni, Thorup, Zadimoghaddam, 2018).
    """

    def __init__(self, num_engines: int, num_blocks: int, factor: float = 1.25, num_points: int = 100) -> None:
        points = [
            (_point(f"{engine}/{i}".encode()), engine) for engine in range(num_engines) for i in range(num_points)
        ]
        self._ring = sorted(points)
        self._num_blocks = num_blocks
        self._factor = factor

    def choose(self, number: int, arrival: Arrival, engines: Engines, now_s: float) -> int:
        total = sum(engine.num_open for engine in engines) + 1
        bound = -(-self._factor * total // len(engines))
        key = b"".join(arrival.chain[: self._num_blocks]) or str(number).encode()
        at = bisect_left(self._ring, (_point(key), 0))
        for i in range(len(self._ring)):
            engine = self._ring[(at + i) % len(self._ring)][1]
            if engines[engine].num_open + 1 <= bound:
                return engine
        raise AssertionError("every engine is above the mean")


def _point(key: bytes) -> int:
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")


class Routers:
    """The project's router, in several processes that do not talk.

    Args:
        settings: of each.
        num_routers: prompts go to them in turn.
        delay_s: from the moment that a report tells of until it is read.
    """

    def __init__(self, settings: RoutingSettings, num_routers: int, delay_s: float) -> None:
        self.routers = [Router.for_prefill(settings) for _ in range(num_routers)]
        self._delay_s = delay_s
        self._open: dict[int, Routed] = {}
        self._coming: deque[tuple[float, Router, dict[str, Report]]] = deque()

    def choose(self, number: int, arrival: Arrival, engines: Engines, now_s: float) -> int:
        self._deliver(now_s)
        router = self.routers[number % len(self.routers)]
        prompt = PromptHashes.known(arrival.num_tokens, {BLOCK_SIZE: list(arrival.chain)})
        routed = router.route(prompt, now_s, among=[str(i) for i in range(len(engines))])
        self._open[number] = routed
        return int(routed.replica)

    def done(self, number: int, now_s: float) -> None:
        routed = self._open.pop(number)
        routed.computed(now_s)
        routed.ended(now_s)

    def tick(self, engines: Engines, now_s: float) -> None:
        self._deliver(now_s)
        stats = [engine.read(now_s) for engine in engines]
        for router in self.routers:
            positions = router.positions()
            reports = {
                str(i): Report(stats[i], BLOCK_SIZE, engine.blocks.cache_log.since(positions.get(str(i))))
                for i, engine in enumerate(engines)
            }
            self._coming.append((now_s, router, reports))
        self._deliver(now_s)

    def _deliver(self, now_s: float) -> None:
        while self._coming and self._coming[0][0] + self._delay_s <= now_s:
            as_of_s, router, reports = self._coming.popleft()
            router.update(reports, as_of_s, now_s, len(self.routers))
