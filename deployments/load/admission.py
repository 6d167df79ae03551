"""Whether a call may join the queues now, so that a service of which too much is asked does in time what it can do.

One `Admission` lives in each ingress replica; it is told how the pools are, about once a second, and asked once per
call. Pure: no Ray, no HTTP. The time to first token of a prompt that comes now is taken to be

    wait + cost(own + min(own, queued)),     wait = max(cost(queued) / engines, beyond * held / seats)

- `own`: its tokens. They count twice where others wait, for shorter prompts may overtake it by as many tokens.
- `queued`: prompt tokens in front of the engines that will compute it, as last read, and as this replica's own part of
  them has changed since (`own_share.py`).
- `cost`: seconds that one engine takes for so many prompt tokens in full steps, learned from its steps
  (`step_cost.py`); tokens found in its cache count, as they do in the queue.
- `beyond`: sequences without a seat in a decode engine, by `max_num_seqs` or by KV blocks; its own count twice where
  others wait, as above; `held`: the mean time that a seat is held. Both queues are passed at once, so the slower one
  decides.

A short prompt waits less than that. Which pool computes a prompt is told from its length, since what a decode engine
has cached is not known here, and by the routers where they decide it.

A call is refused if even the optimistic end of this estimate exceeds its share of `max_ttft_s`: what was measured too
little to be sure is not held against the caller. Or if more than its share of `max_queued_tokens` would be queued; or,
once half of either share is used, if its API key would have more waiting than an equal part of it for each key of the
last minute. The share of low priority is half of both bounds, of normal 80%: what is left is room for high priority,
and for errors of the estimate. Where nothing waits everybody is let in, for waiting would help nobody. Before a cost
was measured only `max_queued_tokens` holds; without readings what this replica let in stands for the queue.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from deployments.errors import OverloadedError, RequestTooLargeError
from deployments.load.outlook import MAX_AGE_S, Outlook, PoolReadings
from deployments.load.own_share import Entry, OwnShare
from deployments.load.reading import DECODE, PREFILL, Reading
from deployments.load.step_cost import Estimate
from deployments.messages import Priority

SHARES = {Priority.LOW: 0.5, Priority.NORMAL: 0.8, Priority.HIGH: 1.0}
# Of what a call may use of either bound; with less in use nobody is in anybody's way.
_FAIR_ABOVE = 0.5
# A key counts as active for so long after its last call.
_KEY_MEMORY_S = 60.0
# A reading that is no older tells of the other ingress replicas as they are.
_FRESH_S = 0.1
# What a client is told to wait while no cost was measured.
_UNKNOWN_RETRY_S = 1.0


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


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A prompt that was let in and is not computed yet, as far as is known."""

    pool: str
    entry: Entry


@dataclass(eq=False, slots=True)
class Ticket:
    """A call that was let in. Its holder says when each first token came, and closes it, whatever happens."""

    admission: "Admission"
    key: bytes
    sequences: Entry | None
    waiting: dict[int, _Waiting]

    def first_token(self, index: int) -> None:
        """The prompt at that place in the call is computed."""
        if index in self.waiting:
            self.admission._leave(self.key, self.waiting.pop(index), is_computed=True)

    def close(self) -> None:
        """The call has ended. Again: nothing happens."""
        while self.waiting:
            self.admission._leave(self.key, self.waiting.popitem()[1], is_computed=False)
        if self.sequences is not None:
            self.admission._free_seats(self.sequences)
            self.sequences = None


class Admission:
    """Lets calls in or refuses them; see the module. Not thread-safe.

    Args:
        bounds: what it keeps.
        clock: monotonic seconds.
        is_remote: whether the prefill pool computes a prompt of so many tokens that comes now; None: by the bounds.

    Attributes:
        pools: what was read of the pools that compute prompts, by name.
        own_tokens: prompt tokens that this replica has waiting there, likewise.
        own_sequences: its calls' sequences, until they end.
        waiting: its prompt tokens, by pool and key.
        refusals: calls that were refused.
    """

    def __init__(
        self,
        bounds: Bounds,
        clock: Callable[[], float] = time.monotonic,
        is_remote: Callable[[int], bool] | None = None,
    ) -> None:
        self.bounds = bounds
        self._clock = clock
        self._is_remote = is_remote
        is_colocated = bounds.min_remote_tokens is None
        self._decode = PoolReadings(counts_hits=is_colocated)
        self.pools = {DECODE: self._decode}
        if not is_colocated:
            self.pools[PREFILL] = PoolReadings(counts_hits=True)
        self.own_tokens = {pool: OwnShare() for pool in self.pools}
        self.own_sequences = OwnShare()
        self.waiting: Counter[tuple[str, bytes]] = Counter()
        self._last_call_s: dict[bytes, float] = {}  # by key; the one that called last is at the end
        self.refusals: Counter[tuple[Reason, Priority]] = Counter()
        self.num_readings = 0

    @property
    def active_keys(self) -> Collection[bytes]:
        """Of the calls of the last minute, the one that called last at the end."""
        return self._last_call_s.keys()

    def update(self, reading: Reading) -> None:
        """Take a reading, on the clock of this object."""
        now_s = self._clock()
        for name, engines in reading.pools.items():
            self.pools[name].update(engines, reading.as_of_s)
        for own in self._all_own:
            own.note_reading(reading.as_of_s, now_s)
        self.num_readings += 1

    def admit(self, sizes: Sequence[int], priority: Priority, key: bytes) -> Ticket:
        """Let a call in.

        Args:
            sizes: tokens of each of its prompts.
            priority: of the call.
            key: who calls; calls of one key share what a key may have.

        Raises:
            OverloadedError: it has to be asked again later; gives the numbers.
            RequestTooLargeError: its prompts are more than may ever be queued.
        """
        now_s = self._clock()
        self._forget_old(now_s)
        self._last_call_s.pop(key, None)
        self._last_call_s[key] = now_s
        pools = [self._pool_of(size) for size in sizes]
        if refusal := self._refusal(sizes, pools, priority, key):
            self.refusals[refusal.reason, priority] += 1
            raise refusal
        waiting = {
            index: _Waiting(pool, self.own_tokens[pool].enter(size, now_s))
            for index, (pool, size) in enumerate(zip(pools, sizes, strict=True))
        }
        for prompt in waiting.values():
            self.waiting[prompt.pool, key] += prompt.entry.amount
        return Ticket(self, key, self.own_sequences.enter(len(sizes), now_s), waiting)

    def is_in_doubt(self, sizes: Sequence[int], priority: Priority, key: bytes) -> bool:
        """Whether a call would be refused for what others had queued a while ago: a fresh reading may show otherwise.

        Others are the other ingress replicas; what this one's own callers have done is known here at once.
        """
        age_s = self._clock() - min(readings.as_of_s for readings in self.pools.values())
        is_old = self._num_ingresses > 1 and age_s > _FRESH_S
        return is_old and self._refusal(sizes, [self._pool_of(size) for size in sizes], priority, key) is not None

    def outlook(self, pool: str, num_sequences: int = 1) -> Outlook:
        """What the last of so many prompts meets that come to a pool now."""
        now_s = self._clock()
        readings, own = self.pools[pool], self.own_tokens[pool]
        is_known = readings.is_known(now_s) and self._decode.is_known(now_s)
        queued = float(own.total * self._num_ingresses)
        num_open = float(self.own_sequences.total)
        if is_known:
            seen = readings.own_tokens + (self._decode.remote_tokens if pool == PREFILL else 0)
            queued = own.whole(seen, readings.drained_tokens(now_s), self._num_ingresses)
            # Serve may hold back what no engine has seen; what this replica has open it knows for sure.
            known = self.own_sequences.whole(self._decode.num_sequences, 0.0, self._num_ingresses)
            num_open = max(known, num_open)
        seat_wait = self._decode.seat_wait(num_open, num_sequences)
        return Outlook(queued, readings.num_engines, readings.cost, readings.tokens_per_step, seat_wait)

    @property
    def _num_ingresses(self) -> int:
        return self._decode.num_ingresses

    @property
    def _all_own(self) -> Iterable[OwnShare]:
        return [*self.own_tokens.values(), self.own_sequences]

    def _pool_of(self, size: int) -> str:
        threshold = self.bounds.min_remote_tokens
        if threshold is None:
            return DECODE
        is_remote = size >= threshold if self._is_remote is None else self._is_remote(size)
        return PREFILL if is_remote else DECODE

    def _refusal(self, sizes: Sequence[int], pools: Sequence[str], priority: Priority, key: bytes) -> "Refusal | None":
        """Why a call may not come in, if so; its prompts are for these pools."""
        for pool in self.pools:
            if own := [size for of, size in zip(pools, sizes, strict=True) if of == pool]:
                part = _Part(pool, sum(own), max(own), priority, key, self.outlook(pool, len(own)))
                if refusal := self._check(part):
                    return refusal
        return None

    def _check(self, part: "_Part") -> "Refusal | None":
        bound = self.bounds.max_queued_tokens * part.ahead.num_engines
        if part.own_tokens > bound:
            raise RequestTooLargeError(
                f"the call has {part.own_tokens} prompt tokens, of which at most {bound} may ever be queued", "prompt"
            )
        queued = max(part.ahead.queued_tokens, self.own_tokens[part.pool].total)
        total, max_tokens = queued + part.own_tokens, part.share * bound
        if queued > 0 and total > max_tokens:
            retry_after_s = part.drain_s(min(queued, total - max_tokens))
            return Refusal(
                part, Reason.QUEUED_TOKENS, f"at most {max_tokens:.0f} prompt tokens may wait", retry_after_s
            )
        ttft, max_ttft_s = part.ttft, part.share * self.bounds.max_ttft_s
        if refusal := self._check_ttft(part, ttft, max_ttft_s):
            return refusal
        return self._check_fair(part, total, max(total / max_tokens, ttft.low / max_ttft_s))

    def _check_ttft(self, part: "_Part", ttft: Estimate, max_ttft_s: float) -> "Refusal | None":
        if not part.ahead.is_queue or ttft.low <= max_ttft_s:
            return None
        message = (
            f"the first token may take {ttft.best:.1f} s, {ttft.low:.1f} s by the optimistic end of the estimate; "
            f"at most {max_ttft_s:.1f} s are allowed"
        )
        return Refusal(part, Reason.TTFT, message, part.relief_s(ttft.low - max_ttft_s))

    def _check_fair(self, part: "_Part", total: float, fullness: float) -> "Refusal | None":
        """Once the queue is half full, no key that has something waiting gets more of it than every other could."""
        held, num_keys = self.waiting[part.pool, part.key], len(self.active_keys)
        if fullness <= _FAIR_ABOVE or num_keys == 1 or held == 0:
            return None
        fair = total / fullness / self._num_ingresses / num_keys
        if held + part.own_tokens > fair:
            message = f"this API key has {held} prompt tokens waiting, each of {num_keys} keys may have {fair:.0f}"
            return Refusal(part, Reason.FAIR_SHARE, message, part.drain_s(min(held, held + part.own_tokens - fair)))
        return None

    def _forget_old(self, now_s: float) -> None:
        for own in self._all_own:
            own.forget_before(now_s - MAX_AGE_S)  # nobody looks at them: there is no reading
        while self._last_call_s and now_s - next(iter(self._last_call_s.values())) > _KEY_MEMORY_S:
            del self._last_call_s[next(iter(self._last_call_s))]

    def _leave(self, key: bytes, prompt: _Waiting, *, is_computed: bool) -> None:
        """A prompt waits no longer."""
        self.own_tokens[prompt.pool].leave(prompt.entry, self._clock(), is_drained=is_computed)
        self.waiting[prompt.pool, key] -= prompt.entry.amount
        if not self.waiting[prompt.pool, key]:
            del self.waiting[prompt.pool, key]

    def _free_seats(self, sequences: Entry) -> None:
        self.own_sequences.leave(sequences, self._clock(), is_drained=False)


class _Part(msgspec.Struct, frozen=True, gc=False):
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
    def ttft(self) -> Estimate:
        """Of the last of the prompts, in seconds; the formula of the module."""
        return self.ahead.first_token(max(self.longest, self.own_tokens / self.ahead.num_engines))

    def drain_s(self, num_tokens: float) -> float:
        """How long the engines take for so many prompt tokens."""
        return self.ahead.drain(num_tokens).best or _UNKNOWN_RETRY_S

    def relief_s(self, excess_s: float) -> float:
        """How long until the optimistic end of the estimate is lower by so much, if nobody else comes."""
        wait = self.ahead.wait
        return min(wait.best, excess_s * wait.best / wait.low) if wait.low > 0 else _UNKNOWN_RETRY_S

    def describe(self) -> str:
        ahead, speed = self.ahead, self.ahead.speed
        known = "of unmeasured speed"
        if speed is not None:
            known = f"of {speed:.0f} tokens/s (by {ahead.cost.evidence_s:.1f} s of work)"
        return (
            f"the call has {self.own_tokens} prompt tokens and {self.priority.name.lower()} priority; before it wait "
            f"{ahead.queued_tokens:.0f} prompt tokens for {ahead.num_engines} engine(s) {known}, and "
            f"{ahead.seat_wait.best:.1f} s until a decode engine has room"
        )


class Refusal(OverloadedError):
    """A call that may not come in.

    Attributes:
        reason: which rule it is.
    """

    def __init__(self, part: _Part, reason: Reason, message: str, retry_after_s: float) -> None:
        super().__init__(f"overloaded: {message}; {part.describe()}", retry_after_s)
        self.reason = reason
