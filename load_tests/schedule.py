"""From a scenario to the requests of one run: when each is sent, with which prompt, for how many tokens.

Pure and deterministic: a seed fixes every instant and every token, so that deployments compared with each other get the
same traffic. Knows nothing of HTTP or of the generator. A multiplier `load` scales arrivals, never lengths.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from zlib import crc32

from load_tests.scenario import Scenario, Tokens, TrafficClass
from load_tests.trace import PREFIX_BLOCK_TOKENS, TraceRow, read_trace

# No stream answers faster than this per token and request; bounds how many turns a stream is given in advance.
_LEAST_TOKEN_S, _LEAST_REQUEST_S = 0.002, 0.1
IDLE_OUTPUT_TOKENS = 64
# Requests with as many leading prefix blocks in common are of one conversation; the first is often everybody's.
_SAME_CONVERSATION = 2


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send.

    Attributes:
        request_class: its class of traffic.
        session: requests of one session are sent one after the other.
        turn: position in the session, from 0.
        at_s: when, since the start of the run; None: `delay_s` after the turn before ended.
        delay_s: see `at_s`.
        prompt: token ids.
        output_tokens: exactly as many are generated.
    """

    request_class: str
    session: str
    turn: int
    at_s: float | None
    delay_s: float
    prompt: tuple[int, ...]
    output_tokens: int


class _Prompts:
    """Draws prompts: every token is new but for the shared prefixes."""

    def __init__(self, seed: str, token_ids: tuple[int, int]) -> None:
        self._seed = seed
        self._bounds = token_ids
        self._rng = random.Random(seed)

    def fresh(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._rng.choices(range(*self._bounds), k=num_tokens))

    def shared(self, name: str, num_tokens: int) -> tuple[int, ...]:
        """The prefix of that name: the same whenever it is asked for, in this run."""
        return tuple(random.Random(f"{self._seed}/{name}").choices(range(*self._bounds), k=num_tokens))


def build_schedule(scenario: Scenario, seed: str, load: float = 1.0) -> list[Planned]:
    """Plan a run: warm-up and steady state, in order of sending within each session.

    Raises:
        TraceError: the scenario's trace cannot be read.
    """
    planned = [
        request
        for name, traffic in scenario.classes.items()
        for request in _plan_class(scenario, name, traffic, f"{seed}/{name}", load)
    ]
    if scenario.trace is not None:
        planned += _plan_trace(scenario, f"{seed}/trace", load)
    return planned


def build_idle_schedule(scenario: Scenario, seed: str, count: int) -> list[Planned]:
    """Plan `count` requests of each class, one after the other: what the system does when nothing else is asked.

    Answers are cut at `IDLE_OUTPUT_TOKENS`: more of them says no more about the gap between two.
    """
    firsts: dict[str, list[Planned]] = {}
    stretched = scenario.model_copy(update={"duration_s": scenario.duration_s * 20})
    for request in build_schedule(stretched, seed):
        if request.turn == 0 or request.at_s is None:
            firsts.setdefault(request.request_class, []).append(request)
    return [
        Planned(request.request_class, "idle", turn, 0.0 if turn == 0 else None, 0.5, *_what(request))
        for turn, request in enumerate(request for kind in firsts.values() for request in kind[:count])
    ]


def _what(request: Planned) -> tuple[tuple[int, ...], int]:
    return request.prompt, min(request.output_tokens, IDLE_OUTPUT_TOKENS)


def _plan_class(scenario: Scenario, name: str, traffic: TrafficClass, seed: str, load: float) -> Iterator[Planned]:
    rng = random.Random(seed)
    prompts = _Prompts(seed, scenario.token_ids)
    end_s = scenario.warmup_s + scenario.duration_s
    if traffic.arrivals.streams is not None:
        num_streams = max(1, round(traffic.arrivals.streams * load))
        for stream in range(num_streams):
            yield from _plan_stream(scenario, name, traffic, stream, num_streams, rng, prompts)
        return
    for index, at_s in enumerate(_arrivals(traffic, scenario.warmup_s, end_s, load, rng)):
        yield from _plan_session(name, f"{name}-{index}", traffic, at_s, rng, prompts)


def _arrivals(traffic: TrafficClass, warmup_s: float, end_s: float, load: float, rng: random.Random) -> Iterator[float]:
    arrivals = traffic.arrivals
    if arrivals.poisson_per_s is not None:
        now = rng.expovariate(arrivals.poisson_per_s * load)
        while now < end_s:
            yield now
            now += rng.expovariate(arrivals.poisson_per_s * load)
    elif arrivals.bursts is not None:
        every_s = arrivals.bursts.every_s / load
        # The first one in the middle of an interval: a beginning is no burst.
        for burst in range(math.ceil(end_s / every_s - 0.5)):
            yield from [(burst + 0.5) * every_s] * arrivals.bursts.size
    else:
        assert arrivals.times_s is not None
        times = (warmup_s + time_s / load for time_s in sorted(arrivals.times_s))
        yield from (time_s for time_s in times if 0 <= time_s < end_s)


def _plan_session(
    name: str, session: str, traffic: TrafficClass, at_s: float, rng: random.Random, prompts: _Prompts
) -> Iterator[Planned]:
    prompt = _first_prompt(traffic, rng, prompts)
    for turn in range(traffic.turns):
        output_tokens = _draw(traffic.output_tokens, rng)
        yield Planned(name, session, turn, at_s if turn == 0 else None, traffic.pause_s, prompt, output_tokens)
        prompt += prompts.fresh(output_tokens + _draw(traffic.turn_tokens, rng))


def _plan_stream(
    scenario: Scenario,
    name: str,
    traffic: TrafficClass,
    stream: int,
    num_streams: int,
    rng: random.Random,
    prompts: _Prompts,
) -> Iterator[Planned]:
    # Staggered over the warm-up, so that streams do not begin and end together.
    at_s = scenario.warmup_s * stream / num_streams
    left_s = scenario.warmup_s + scenario.duration_s - at_s
    turn = 0
    while left_s > 0:
        output_tokens = _draw(traffic.output_tokens, rng)
        prompt = _first_prompt(traffic, rng, prompts)
        start = at_s if turn == 0 else None
        yield Planned(name, f"{name}-{stream}", turn, start, traffic.pause_s, prompt, output_tokens)
        left_s -= traffic.pause_s + max(_LEAST_REQUEST_S, output_tokens * _LEAST_TOKEN_S)
        turn += 1


def _first_prompt(traffic: TrafficClass, rng: random.Random, prompts: _Prompts) -> tuple[int, ...]:
    own = prompts.fresh(_draw(traffic.prompt_tokens, rng))
    if traffic.shared_prefix is None:
        return own
    group = rng.randrange(traffic.shared_prefix.groups)
    return prompts.shared(str(group), traffic.shared_prefix.tokens) + own


def _plan_trace(scenario: Scenario, seed: str, load: float) -> Iterator[Planned]:
    assert scenario.trace is not None
    shrink = scenario.trace.shrink
    prompts = _Prompts(seed, scenario.token_ids)
    for index, row in enumerate(read_trace(scenario.trace.path)):
        at_s = row.arrival_s / (scenario.trace.speed * load)
        if at_s >= scenario.warmup_s + scenario.duration_s:
            return
        if _conversation(row, index) % scenario.trace.thin:
            continue
        size = PREFIX_BLOCK_TOKENS // shrink
        shared = [token for block in row.prefix_ids for token in prompts.shared(str(block), size)]
        num_tokens = -(-row.prompt_tokens // shrink)
        own = prompts.fresh(max(0, num_tokens - len(shared)))
        prompt = (*shared, *own)[:num_tokens]
        yield Planned("trace", f"trace-{index}", 0, at_s, 0.0, prompt, -(-row.output_tokens // shrink))


def _conversation(row: TraceRow, index: int) -> int:
    """A number that requests of one conversation have in common; a request without blocks is one of its own."""
    return crc32(repr(row.prefix_ids[:_SAME_CONVERSATION] or index).encode())


def _draw(tokens: Tokens, rng: random.Random) -> int:
    return tokens if isinstance(tokens, int) else rng.randint(*tokens)
