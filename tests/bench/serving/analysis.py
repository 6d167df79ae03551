"""From replies and the engine's trace to figures. Pure functions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles

from tests.bench.serving.client import Reply
from tests.bench.serving.paced import TokenLoop


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of all are not above; nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def request_id_of(reply: Reply) -> str:
    return str(reply.events()[0][1]["id"]) + "-0"


def token_times(reply: Reply, loop: TokenLoop) -> list[float]:
    """When each token arrived; those that shared an event have the same time."""
    times: list[float] = []
    num_characters = 0
    for at_s, event in reply.events():
        if event["choices"]:
            num_characters += len(event["choices"][0]["text"])
            times += [at_s] * (loop.num_tokens(num_characters) - len(times))
    return times


def gaps(times_s: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(times_s)]


def added_gaps(client_s: Sequence[float], engine_s: Sequence[float]) -> list[float]:
    """How much longer each gap was at the client than at the engine, in seconds; negative where it was shorter."""
    return [client - engine for client, engine in zip(gaps(client_s), gaps(engine_s), strict=False)]


def largest_gap_between(times_s: Sequence[float], start_s: float, end_s: float) -> float:
    """The longest wait of a reader that ended within a window."""
    return max(after - before for before, after in pairwise(times_s) if start_s <= after < end_s)


@dataclass(frozen=True, slots=True)
class Paired:
    """Two things that were measured in turn, each with its neighbour in time.

    Attributes:
        first: median of one.
        second: median of the other.
        more: median of the pairs' differences, the first less the second.
        ratio: median of the pairs' ratios, the first over the second.
        low: of the ratios, a quarter is below this.
        high: and a quarter above that.
        count: of pairs.
    """

    first: float
    second: float
    more: float
    ratio: float
    low: float
    high: float
    count: int


def pair_up(pairs: Sequence[tuple[float, float]]) -> Paired:
    """What pairs say together."""
    ratios = [first / second for first, second in pairs]
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    firsts, seconds = zip(*pairs, strict=True)
    more = median(first - second for first, second in pairs)
    return Paired(median(firsts), median(seconds), more, median(ratios), low, high, len(pairs))
