"""What a caller may use per minute, how much of it is left, and how it is told so.

Owns the arithmetic of the limits and OpenAI's `x-ratelimit-*` headers. Knows nothing of keys or HTTP: `keys.py` opens
the accounts, `guard.py` counts requests with them, `exchange.py` tokens. Used from one event loop; only new terms may
come from another thread.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.errors import KvRelayError
from deployments.messages import Priority

_MINUTE_S = 60.0


class RateLimitedError(KvRelayError):
    """A key has used what it may use per minute.

    Args:
        message: gives the numbers.
        unit: `requests` or `tokens`.
        retry_after_s: when the same request can be let in, if the key is not used meanwhile.
    """

    def __init__(self, message: str, unit: str, retry_after_s: float) -> None:
        super().__init__(message, unit, retry_after_s)
        self.message = message
        self.unit = unit
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Terms:
    """What an account may do; for the limits None means as much as there is.

    Attributes:
        requests_per_minute: requests of any kind.
        tokens_per_minute: tokens of prompts, cached or not, and generated ones.
        reads_metrics: may read the numbers of the whole service.
        cache: accounts of the same one find each other's KV; empty: that of all who have no account.
        max_priority: that its calls may have.
        priority: of calls that say nothing; no more than that.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    reads_metrics: bool = False
    cache: str = ""
    max_priority: Priority = Priority.HIGH
    priority: Priority = Priority.NORMAL

    @property
    def usual_priority(self) -> Priority:
        """Of calls that say nothing."""
        return min(self.priority, self.max_priority)


@dataclass(slots=True)
class Sharers:
    """The ingress replicas that let calls of the same keys in, each for itself.

    Attributes:
        count: how many run; each counts what it serves so many times, as if every other had served as much.
    """

    count: int = 1


class Bucket:
    """A limit per minute: it fills evenly, holds a minute's worth, and may be in debt.

    Args:
        per_minute: the limit, at least 1.
        now_s: monotonic seconds, as in all methods.
    """

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_s = now_s

    def level(self, now_s: float) -> float:
        """What is left; negative: what was used in advance."""
        grown = (now_s - self._filled_s) * self.per_minute / _MINUTE_S
        self._level = min(self._level + grown, float(self.per_minute))
        self._filled_s = now_s
        return self._level

    def missing_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much is there, 0 if it is. For more than it ever holds, until it is full.

        So the largest request can be let in at some time; the debt that it makes is waited for afterwards.
        """
        missing = min(amount, float(self.per_minute)) - self.level(now_s)
        return max(0.0, missing * _MINUTE_S / self.per_minute)

    def take(self, amount: float, now_s: float) -> None:
        """Use so much, whether it is there or not."""
        self._level = self.level(now_s) - amount

    def resize(self, per_minute: int, now_s: float) -> None:
        """Change the limit; what was used stays used."""
        if per_minute == self.per_minute:
            return
        used = self.per_minute - self.level(now_s)
        self.per_minute = per_minute
        self._level = per_minute - used


class Account:
    """One caller by name, on its terms, with what is left of its limits.

    Args:
        name: for the operator's log; no key.
        terms: what it may do.
        sharers: who else counts for it.
        clock: monotonic seconds.

    Attributes:
        terms: as they are now.
    """

    def __init__(self, name: str, terms: Terms, sharers: Sharers, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._sharers = sharers
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self.change(terms)

    @property
    def key(self) -> bytes:
        """Tells the account from others where calls share what there is; empty: there is none."""
        return self.name.encode()

    def change(self, terms: Terms) -> None:
        """Go by other terms from now on; what was used stays used."""
        now_s = self._clock()
        # A new mapping: the event loop may be going over the old one.
        buckets: dict[str, Bucket] = {}
        for unit, limit in (("requests", terms.requests_per_minute), ("tokens", terms.tokens_per_minute)):
            if limit is None:
                continue
            buckets[unit] = bucket = self._buckets.get(unit) or Bucket(limit, now_s)
            bucket.resize(limit, now_s)
        self._buckets = buckets
        self.terms = terms

    def take_request(self) -> None:
        """Count a request.

        Raises:
            RateLimitedError: there were too many; this one does not count.
        """
        self._check("requests", 1)
        self._take("requests", 1)

    def check_tokens(self, amount: int) -> None:
        """Nothing is counted yet.

        Raises:
            RateLimitedError: a prompt of so many tokens cannot be let in now.
        """
        self._check("tokens", amount)

    def take_tokens(self, amount: int) -> None:
        """Count tokens of a prompt, or generated ones; negative: they were counted and not used."""
        if self._buckets:
            self._take("tokens", amount)

    def headers(self) -> dict[str, str]:
        """OpenAI's headers, for each limit that there is."""
        now_s, headers = self._clock(), dict[str, str]()
        for unit, bucket in self._buckets.items():
            level = bucket.level(now_s)
            reset_s = (bucket.per_minute - level) * _MINUTE_S / bucket.per_minute
            headers[f"x-ratelimit-limit-{unit}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{unit}"] = str(max(0, math.floor(level)))
            headers[f"x-ratelimit-reset-{unit}"] = format_duration(reset_s)
        return headers

    def _check(self, unit: str, amount: int) -> None:
        bucket = self._buckets.get(unit)
        if bucket is None:
            return
        now_s = self._clock()
        missing_s = bucket.missing_s(amount * self._sharers.count, now_s)
        if missing_s > 0:
            left = max(0, math.floor(bucket.level(now_s)))
            raise RateLimitedError(
                f"the key {self.name!r} may use {bucket.per_minute} {unit} per minute; {left} are left and {amount} "
                f"were asked for, which is possible in {format_duration(missing_s)}",
                unit,
                missing_s,
            )

    def _take(self, unit: str, amount: int) -> None:
        if bucket := self._buckets.get(unit):
            bucket.take(amount * self._sharers.count, self._clock())


def format_duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `8.64s`, `6m0s`; rounded up, so that whoever waits so long has waited enough."""
    milliseconds = math.ceil(round(seconds * 1000, 6))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    shown = f"{rest / 1000:g}s"
    return f"{minutes}m{shown}" if minutes else shown


# Of all who call a service that has no keys.
NO_ACCOUNT = Account("", Terms(), Sharers())
