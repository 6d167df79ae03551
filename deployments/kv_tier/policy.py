"""What is given up, what is asked for, what is fetched, and how much time copies may take. Pure: no clock, no threads.

A fetch is worth it if it takes less time than to compute the same tokens. Both are measured, by the engine that asks.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

# Of the budget that is freed at once, so that the next objects find room without another look at all of them.
_FREED_SHARE = 0.05

# Half lives of what was measured.
_COMPUTED_TOKENS = 8192.0
_FETCHED_BYTES = float(256 << 20)
_LOOKUPS = 16.0
# Tokens that were looked for; of short prompts some hundred.
_LOOKED_FOR_TOKENS = 65_536.0
# That something is found is never taken to be less likely than this: else nobody would learn that it now is.
_LEAST_FOUND_SHARE = 0.05
# A fetch that was refused makes the next one look as much faster: what was slow once is tried again.
_FORGIVENESS = 0.98
# What did not come in time is taken to need as many times longer.
_LATE = 2.0
# For the ends of steps: one to reserve blocks, one to have them found.
_WAITS = 2.0
# Bounds of the wait for a fetch: to know more than a few objects takes so long, and no prompt shall wait for longer.
_MIN_PATIENCE_S, _MAX_PATIENCE_S = 0.1, 10.0
_UNMEASURED_PATIENCE_S = 2.0
# An index that did not answer is asked again after so long, and each time in vain after twice as long.
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Kept:
    """What matters of an object when room is needed.

    Attributes:
        num_bytes: of it.
        last_use_s: when it was last stored, found, or offered again.
        depth: blocks of its sequence up to its end.
    """

    num_bytes: int
    last_use_s: float
    depth: int


def choose_victims(kept: Mapping[K, Kept], num_bytes: int, now_s: float) -> list[K]:
    """Objects to give up for so many bytes: first those that have kept most bytes for longest.

    Among equals the deepest: the end of a prompt is of no use without its beginning. All, if that is not enough.
    """

    def worth(key: K) -> tuple[float, int]:
        one = kept[key]
        return -(now_s - one.last_use_s) * one.num_bytes, -one.depth

    victims: list[K] = []
    for key in sorted(kept, key=worth) if num_bytes > 0 else ():
        if num_bytes <= 0:
            break
        victims.append(key)
        num_bytes -= kept[key].num_bytes
    return victims


def room_to_make(num_kept_bytes: int, num_new_bytes: int, max_bytes: int) -> int:
    """Bytes to give up for new ones; 0: they fit. Then more than needed, so that it is not done for each."""
    if num_kept_bytes + num_new_bytes <= max_bytes:
        return 0
    return num_kept_bytes + num_new_bytes - max_bytes + int(max_bytes * _FREED_SHARE)


def pause_after(copy_s: float, share: float) -> float:
    """How long copies rest after one that took so long, to take no more than this share of the time."""
    return copy_s * (1.0 / share - 1.0)


class Mean:
    """Of what was added lately.

    Args:
        half_life: count after which what was added before counts half.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._total = self._count = 0.0

    @property
    def value(self) -> float | None:
        """None: nothing was added."""
        return self._total / self._count if self._count else None

    def add(self, total: float, count: float) -> None:
        """So much, over so many more. Without any of them: nothing."""
        if count > 0 and total >= 0:
            keep = 0.5 ** (count / self._half_life)
            self._total, self._count = keep * self._total + total, keep * self._count + count

    def shrink(self, factor: float) -> None:
        """It was less, by this factor."""
        self._total *= factor


class FetchPolicy:
    """What one engine has measured, and what follows from it. What was never measured is taken to be worth a try."""

    def __init__(self) -> None:
        self._token_s = Mean(_COMPUTED_TOKENS)
        self._byte_s = Mean(_FETCHED_BYTES)
        self._lookup_s = Mean(_LOOKUPS)
        self._wait_s = Mean(_LOOKUPS)
        self._found = Mean(_LOOKED_FOR_TOKENS)
        self._num_computed, self._computing_s = 0, 0.0
        self._rest_s = 0.0  # 0: the index answers
        self._rests_until_s = 0.0

    def note_computed(self, num_tokens: int, seconds: float) -> None:
        """Prompt tokens that the engine has computed since its start, in so many seconds."""
        self._token_s.add(seconds - self._computing_s, num_tokens - self._num_computed)
        self._num_computed, self._computing_s = num_tokens, seconds

    def note_lookup(self, seconds: float, num_tokens: int, num_found_tokens: int) -> None:
        """The index was asked for so many tokens, and knew of some."""
        self._lookup_s.add(seconds, 1)
        self._found.add(num_found_tokens, num_tokens)
        self._rest_s = 0.0

    def note_silence(self, now_s: float) -> None:
        """The index has not answered, or is gone; of several that asked at once the first one counts."""
        if now_s >= self._rests_until_s:
            self._rest_s = min(max(_FIRST_REST_S, 2 * self._rest_s), _LONGEST_REST_S)
            self._rests_until_s = now_s + self._rest_s

    def rests(self, now_s: float) -> bool:
        """Whether to leave an index alone that has not answered."""
        return self._rest_s > 0 and now_s < self._rests_until_s

    def note_wait(self, seconds: float) -> None:
        """A fetch has waited so long for the end of a step."""
        self._wait_s.add(seconds, 1)

    def note_fetch(self, seconds: float, num_bytes: int, num_late_bytes: int) -> None:
        """So much was fetched in so many seconds, waits apart, and some more was given up."""
        self._byte_s.add(seconds * (_LATE if num_late_bytes else 1.0), num_bytes + num_late_bytes)

    def asks(self, num_tokens: int) -> bool:
        """Whether to ask the index for so many tokens: what is likely to be saved is more than the question takes."""
        token_s, lookup_s, found = self._token_s.value, self._lookup_s.value, self._found.value
        if token_s is None or lookup_s is None or found is None:
            return num_tokens > 0
        return max(found, _LEAST_FOUND_SHARE) * num_tokens * token_s > lookup_s

    def fetches(self, num_tokens: int, num_bytes: int, num_before: int = 0) -> bool:
        """Whether to fetch so many tokens, rather than compute them behind so many others that wait in the engine."""
        token_s, byte_s = self._token_s.value, self._byte_s.value
        if token_s is None or byte_s is None:
            return num_tokens > 0
        if _WAITS * (self._wait_s.value or 0.0) + byte_s * num_bytes < token_s * (num_before + num_tokens):
            return True
        self._byte_s.shrink(_FORGIVENESS)
        self._wait_s.shrink(_FORGIVENESS)
        return False

    def patience_s(self, num_tokens: int) -> float:
        """How long to wait for so many tokens: as long as to compute them."""
        token_s = self._token_s.value
        if token_s is None:
            return _UNMEASURED_PATIENCE_S
        return min(max(token_s * num_tokens, _MIN_PATIENCE_S), _MAX_PATIENCE_S)
