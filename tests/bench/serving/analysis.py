"""From replies and the engine's trace to figures. Pure functions."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

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
