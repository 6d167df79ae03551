"""What came of a play: how many requests kept the bounds, and what it cost."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deployments.simulator.requests import Request
from deployments.simulator.service import Scaler, Service, Setup

# Of a request's gaps, that may exceed the bound.
_GAPS_THAT_MAY = 0.05


@dataclass(frozen=True, slots=True)
class Result:
    """Of one play.

    Attributes:
        num_requests: that came.
        num_good: that kept both bounds.
        num_refused: by admission, or as no engine's KV pool holds them.
        seconds: from the beginning to the last arrival; 1 at least.
        gpu_hours: of both pools, replicas that start or leave among them.
        cost: of these.
        ttft_s: of those that had a first token, in order.
        itl_s: the median of the gaps between tokens, and what 99% of them did not exceed.
        history: of each pool, by its name: when how many replicas it was to have, and how many served.
    """

    num_requests: int
    num_good: int
    num_refused: int
    seconds: float
    gpu_hours: float
    cost: float
    ttft_s: Sequence[float]
    itl_s: tuple[float, float]
    history: dict[str, list[tuple[float, int, int]]]

    @property
    def goodput(self) -> float:
        """Requests per second that kept both bounds."""
        return self.num_good / self.seconds

    @property
    def attainment(self) -> float:
        """Share of the requests that did."""
        return self.num_good / self.num_requests

    @property
    def per_gpu_hour(self) -> float:
        """Good requests per GPU-hour."""
        return self.num_good / self.gpu_hours

    @property
    def mean_gpus(self) -> float:
        return self.gpu_hours * 3600 / self.seconds

    def ttft(self, share: float) -> float:
        """Seconds that so great a share of the first tokens did not exceed."""
        return self.ttft_s[min(len(self.ttft_s) - 1, int(share * len(self.ttft_s)))] if self.ttft_s else float("nan")

    def figures(self) -> dict[str, float]:
        """For JSON."""
        return {
            "attainment": self.attainment,
            "goodput": self.goodput,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "per_gpu_hour": self.per_gpu_hour,
            "num_refused": self.num_refused,
            "ttft_p50_s": self.ttft(0.5),
            "ttft_p90_s": self.ttft(0.9),
            "ttft_p99_s": self.ttft(0.99),
            "itl_p50_s": self.itl_s[0],
            "itl_p99_s": self.itl_s[1],
        }


def is_good(request: Request, ttft_s: float) -> bool:
    """Whether a request has ended and kept both bounds: TTFT, and 95% of its gaps."""
    if request.end_s is None or request.ttft_s is None or request.ttft_s > ttft_s:
        return False
    return request.gaps_over <= _GAPS_THAT_MAY * (request.output_tokens - 1)


class Outcome:
    """What became of the requests that have ended, in a few bytes each: a day has millions.

    Args:
        ttft_s: bound of the time to first token.
    """

    def __init__(self, ttft_s: float) -> None:
        self._bound_s = ttft_s
        self.num_requests = self.num_good = self.num_refused = 0
        self.ttft_s = array("d")

    def note(self, request: Request) -> None:
        """It has ended, or was refused."""
        self.num_requests += 1
        self.num_good += is_good(request, self._bound_s)
        self.num_refused += request.is_refused
        if request.ttft_s is not None:
            self.ttft_s.append(request.ttft_s)


def play(trace: Iterable[Request], setup: Setup, scaler: Scaler) -> Result:
    """Play a trace, of which the requests are left as they are."""
    requests = (Request(r.at_s, r.prompt_tokens, r.output_tokens, r.chain) for r in trace)
    outcome = Outcome(setup.ttft_s)
    service = Service(setup, scaler, outcome.note)
    seconds = service.play(requests)
    p50_s, p99_s = service.gaps.quantiles((0.5, 0.99))
    hours = {name: pool.gpu_s / 3600 for name, pool in service.pools.items()}
    return Result(
        outcome.num_requests,
        outcome.num_good,
        outcome.num_refused,
        seconds,
        sum(hours.values()),
        sum(hours[name] * pool.setup.cost for name, pool in service.pools.items()),
        array("d", sorted(outcome.ttft_s)),
        (p50_s, p99_s),
        {name: pool.history for name, pool in service.pools.items()},
    )
