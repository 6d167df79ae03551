"""Whether a call may join the queues now, so that a service of which too much is asked does in time what it can do.

One `Admission` lives in each ingress replica; it is told how the pools are, about once a second, and asked once per
call. Pure: no Ray, no HTTP, no clock of its own. The time to first token of a prompt that comes now is taken to be

    wait + (own + min(own, queued)) / speed,     wait = max(queued / (speed * engines), beyond * held / seats)

- `own`: its tokens. They count twice where others wait, for shorter prompts may overtake it by as many tokens.
- `queued`: prompt tokens in front of the engines that will compute it. Those that this replica let in since the last
  reading are among them, times the number of replicas that do the same.
- `speed`: prompt tokens that one engine is measured to compute per second; those found in its cache count, as they do
  in the queue.
- `beyond`: sequences without a seat in a decode engine, by `max_num_seqs` or by KV blocks; `held`: the mean time that
  a seat is held. Both queues are passed at once, so the slower one decides.

A short prompt waits less than that. Which pool computes a prompt is told from its length, since what a decode engine
has cached is not known here.

A call is refused if this estimate exceeds its share of `max_ttft_s`, or if more than its share of `max_queued_tokens`
would be queued; or, once half of either share is used, if its API key would have more waiting than an equal part of it
for each key of the last minute. The share of low priority is half of both bounds, of normal 80%: what is left is room
for high priority, and for errors of the estimate. Where nothing waits everybody is let in, for waiting would help
nobody. Before a speed was measured only `max_queued_tokens` holds; without readings what this replica let in stands
for the queue.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from deployments.engine.stats import EngineStats
from deployments.errors import OverloadedError, RequestTooLargeError
from deployments.messages import Priority
from deployments.outlook import MAX_AGE_S, Outlook, PoolReadings

SHARES = {Priority.LOW: 0.5, Priority.NORMAL: 0.8, Priority.HIGH: 1.0}
# Of what a call may use of either bound; with less in use nobody is in anybody's way.
_FAIR_ABOVE = 0.5
# A key counts as active for so long after its last call.
_KEY_MEMORY_S = 60.0
# What a client is told to wait while no speed was measured.
_UNKNOWN_RETRY_S = 1.0

PREFILL, DECODE = "prefill", "decode"


class Reason(StrEnum):
    """Which rule refused a call."""

    QUEUED_TOKENS = "queued_tokens"
    TTFT = "ttft"
    FAIR_SHARE = "fair_share"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What admission keeps.

    Attributes:
        max_ttft_s: longest estimated time to first token.
        max_queued_tokens: prompt tokens that may wait, per engine that computes prompts.
        min_remote_tokens: prompts of at least so many tokens are computed by the prefill pool; None: there is none.
    """

    max_ttft_s: float
    max_queued_tokens: int
    min_remote_tokens: int | None


@dataclass(eq=False, slots=True)
class Ticket:
    """A call that was let in. Its holder says when each first token came, and closes it, whatever happens."""

    admission: "Admission"
    key: bytes
    admitted_s: float
    num_sequences: int
    waiting: dict[int, tuple[str, int]]

    def first_token(self, index: int) -> None:
        """The prompt at that place in the call is computed."""
        if index in self.waiting:
            pool, num_tokens = self.waiting.pop(index)
            self.admission._count_waiting(pool, self.key, -num_tokens)

    def close(self) -> None:
        """The call has ended. Again: nothing happens."""
        for index in list(self.waiting):
            self.first_token(index)
        self.admission._forget(self)

    def num_waiting_tokens(self, pool: str) -> int:
        """Tokens of its prompts that a pool has not computed yet, as far as is known."""
        return sum(num_tokens for of, num_tokens in self.waiting.values() if of == pool)


class Admission:
    """Lets calls in or refuses them; see the module. Not thread-safe.

    Args:
        bounds: what it keeps.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        is_colocated = bounds.min_remote_tokens is None
        self._decode = PoolReadings(counts_hits=is_colocated)
        self._pools = {DECODE: self._decode}
        if not is_colocated:
            self._pools[PREFILL] = PoolReadings(counts_hits=True)
        self._open: set[Ticket] = set()
        self._recent: deque[Ticket] = deque()  # those that a reading may not contain, in the order of admission
        self._num_open_sequences = 0
        self._waiting: Counter[tuple[str, bytes]] = Counter()  # tokens by pool and key
        self._waiting_in: Counter[str] = Counter()
        self._last_call_s: dict[bytes, float] = {}  # by key; the one that called last is at the end
        self.refusals: Counter[tuple[Reason, Priority]] = Counter()

    @property
    def pools(self) -> Iterable[str]:
        """Names of the pools that compute prompts."""
        return self._pools

    def update(self, pools: Mapping[str, Mapping[str, EngineStats]], taken_s: float) -> None:
        """Take a reading.

        Args:
            pools: for each pool its engines, by the name of their replica.
            taken_s: when the reading began, on the clock of `admit`.
        """
        for name, engines in pools.items():
            self._pools[name].update(engines, taken_s)
        while self._recent and self._decode.has_seen(self._recent[0].admitted_s):
            self._recent.popleft()

    def admit(self, sizes: Sequence[int], priority: Priority, key: bytes, now_s: float) -> Ticket:
        """Let a call in.

        Args:
            sizes: tokens of each of its prompts.
            priority: of the call.
            key: who calls; calls of one key share what a key may have.
            now_s: the time; never goes back.

        Raises:
            OverloadedError: it has to be asked again later; gives the numbers.
            RequestTooLargeError: its prompts are more than may ever be queued.
        """
        self._forget_old(now_s)
        self._last_call_s.pop(key, None)
        self._last_call_s[key] = now_s
        waiting = {index: (self._pool_of(size), size) for index, size in enumerate(sizes)}
        for pool in self._pools:
            if own := [size for of, size in waiting.values() if of == pool]:
                self._check(_Part(pool, sum(own), max(own), priority, key, self.outlook(pool, now_s, len(own))))
        ticket = Ticket(self, key, now_s, len(sizes), waiting)
        for pool, size in waiting.values():
            self._count_waiting(pool, key, size)
        self._open.add(ticket)
        self._recent.append(ticket)
        self._num_open_sequences += len(sizes)
        return ticket

    def outlook(self, pool: str, now_s: float, num_sequences: int = 1) -> Outlook:
        """What the last of so many prompts meets that come to a pool now."""
        readings = self._pools[pool]
        is_known = readings.is_known(now_s) and self._decode.is_known(now_s)
        queued = self._queued_tokens(pool, now_s) if is_known else self._waiting_in[pool] * self._num_ingresses
        # Serve may hold back what no engine has seen; what this replica has open it knows for sure.
        num_open = max(self._num_known_sequences() if is_known else 0, self._num_open_sequences)
        seat_wait_s = self._decode.seat_wait_s(num_open + num_sequences)
        return Outlook(queued, readings.num_engines, readings.speed, seat_wait_s)

    @property
    def _num_ingresses(self) -> int:
        return self._decode.num_ingresses

    def _pool_of(self, size: int) -> str:
        threshold = self.bounds.min_remote_tokens
        return DECODE if threshold is None or size < threshold else PREFILL

    def _queued_tokens(self, pool: str, now_s: float) -> float:
        readings = self._pools[pool]
        seen = readings.own_tokens + (self._decode.remote_tokens if pool == PREFILL else 0)
        unseen = sum(t.num_waiting_tokens(pool) for t in self._recent if not readings.has_seen(t.admitted_s))
        return max(0.0, seen - readings.drained_tokens(now_s)) + unseen * self._num_ingresses

    def _num_known_sequences(self) -> int:
        unseen = sum(t.num_sequences for t in self._recent if t in self._open)
        return self._decode.num_sequences + unseen * self._num_ingresses

    def _check(self, part: "_Part") -> None:
        bound = self.bounds.max_queued_tokens * part.ahead.num_engines
        if part.own_tokens > bound:
            raise RequestTooLargeError(
                f"the call has {part.own_tokens} prompt tokens, of which at most {bound} may ever be queued", "prompt"
            )
        queued = max(part.ahead.queued_tokens, self._waiting_in[part.pool])
        total, max_tokens = queued + part.own_tokens, part.share * bound
        if queued > 0 and total > max_tokens:
            retry_after_s = part.drain_s(min(queued, total - max_tokens))
            self._refuse(part, Reason.QUEUED_TOKENS, f"at most {max_tokens:.0f} prompt tokens may wait", retry_after_s)
        max_ttft_s = part.share * self.bounds.max_ttft_s
        if part.ahead.wait_s > 0 and part.ttft_s > max_ttft_s:
            retry_after_s = min(part.ahead.wait_s, part.ttft_s - max_ttft_s)
            message = f"the first token would take about {part.ttft_s:.1f} s, at most {max_ttft_s:.1f} s are allowed"
            self._refuse(part, Reason.TTFT, message, retry_after_s)
        self._check_fair(part, total, max(total / max_tokens, part.ttft_s / max_ttft_s))

    def _check_fair(self, part: "_Part", total: float, fullness: float) -> None:
        """Once the queue is half full, no key that has something waiting gets more of it than every other could."""
        held, num_keys = self._waiting[part.pool, part.key], len(self._last_call_s)
        if fullness <= _FAIR_ABOVE or num_keys == 1 or held == 0:
            return
        fair = total / fullness / self._num_ingresses / num_keys
        if held + part.own_tokens > fair:
            message = f"this API key has {held} prompt tokens waiting, each of {num_keys} keys may have {fair:.0f}"
            self._refuse(part, Reason.FAIR_SHARE, message, part.drain_s(min(held, held + part.own_tokens - fair)))

    def _refuse(self, part: "_Part", reason: Reason, message: str, retry_after_s: float) -> None:
        self.refusals[reason, part.priority] += 1
        raise OverloadedError(f"overloaded: {message}; {part.describe()}", retry_after_s)

    def _forget_old(self, now_s: float) -> None:
        while self._recent and now_s - self._recent[0].admitted_s > MAX_AGE_S:
            self._recent.popleft()  # nobody looks at them: there is no reading
        while self._last_call_s and now_s - next(iter(self._last_call_s.values())) > _KEY_MEMORY_S:
            del self._last_call_s[next(iter(self._last_call_s))]

    def _count_waiting(self, pool: str, key: bytes, num_tokens: int) -> None:
        self._waiting_in[pool] += num_tokens
        self._waiting[pool, key] += num_tokens
        if not self._waiting[pool, key]:
            del self._waiting[pool, key]

    def _forget(self, ticket: Ticket) -> None:
        if ticket in self._open:
            self._open.remove(ticket)
            self._num_open_sequences -= ticket.num_sequences


@dataclass(frozen=True, slots=True)
class _Part:
    """The prompts of a call that one pool would compute, and what they meet there.

    Attributes:
        pool: its name.
        own_tokens: of all these prompts.
        longest: tokens of the longest one.
        priority: of the call.
        key: who calls.
        ahead: what they meet.
    """

    pool: str
    own_tokens: int
    longest: int
    priority: Priority
    key: bytes
    ahead: Outlook

    @property
    def share(self) -> float:
        """Of both bounds, that the call may use."""
        return SHARES[self.priority]

    @property
    def ttft_s(self) -> float:
        """Of the last of the prompts; the formula of the module."""
        if self.ahead.speed is None:
            return self.ahead.wait_s
        own = max(self.longest, self.own_tokens / self.ahead.num_engines)
        return self.ahead.wait_s + (own + min(own, self.ahead.queued_tokens)) / self.ahead.speed

    def drain_s(self, num_tokens: float) -> float:
        """How long the engines take for so many prompt tokens."""
        return num_tokens / self.ahead.rate if self.ahead.rate else _UNKNOWN_RETRY_S

    def describe(self) -> str:
        ahead = self.ahead
        speed = "of unmeasured speed" if ahead.speed is None else f"of {ahead.speed:.0f} tokens/s"
        return (
            f"the call has {self.own_tokens} prompt tokens and {self.priority.name.lower()} priority; before it wait "
            f"{ahead.queued_tokens:.0f} prompt tokens for {ahead.num_engines} engine(s) {speed}, and "
            f"{ahead.seat_wait_s:.1f} s until a decode engine has room"
        )
