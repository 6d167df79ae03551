"""Where the reuse went that one cache for all would have had, by what became of each request. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from load_tests.schedule import Planned
from tests.bench.serving.client import Reply

NOT_YET, ELSEWHERE, FORGOTTEN = "not computed yet", "elsewhere", "forgotten"
KINDS = (NOT_YET, ELSEWHERE, FORGOTTEN)


@dataclass(frozen=True, slots=True)
class Told:
    """One request, of which all times are on one clock.

    Attributes:
        prompt: its token ids.
        sent_s: when it was sent.
        first_s: when its first token came: its KV was there.
        num_cached: tokens that nobody computed.
        replicas: that computed its prompt or were given its KV.
    """

    prompt: tuple[int, ...]
    sent_s: float
    first_s: float
    num_cached: int
    replicas: tuple[str, ...]


def told_of(sent: Iterable[tuple[Planned, Reply]]) -> list[Told]:
    """Requests that were asked for receipts and have ended well."""
    found = []
    for request, reply in sent:
        events = reply.events() if reply.done.is_set() and reply.body.startswith(b"HTTP/1.1 200") else []
        first_s = next((at_s for at_s, event in events if event.get("choices")), None)
        receipt = next((event["receipt"] for _, event in events if event.get("receipt")), None)
        usage = next((event["usage"] for _, event in events if event.get("usage")), None)
        if first_s is None or receipt is None or usage is None:
            continue
        attempt = receipt["choices"][0]["attempts"][-1]
        replicas = (attempt["decode"]["replica"], *(one["replica"] for one in attempt["prefill"]))
        num_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        found.append(Told(request.prompt, reply.sent_s, first_s, num_cached, replicas))
    return sorted(found, key=lambda one: one.sent_s)


def losses(told: Sequence[Told], block_size: int) -> dict[str, int]:
    """Tokens that were computed though somebody had asked for them before, in order of sending.

    `NOT_YET`: nobody had computed them when they were asked for. `ELSEWHERE`: a replica had, to which the request did
    not go. `FORGOTTEN`: the request's own had.
    """
    lost = dict.fromkeys(KINDS, 0)
    readies: dict[str, dict[tuple[int, ...], float]] = defaultdict(dict)  # by replica: since when a beginning is there
    known: set[tuple[int, ...]] = set()
    for one in told:
        beginnings = [one.prompt[:end] for end in range(block_size, len(one.prompt) + 1, block_size)]
        usable = beginnings[: (len(one.prompt) - 1) // block_size]

        def depth(names: Iterable[str], one: Told = one, usable: Sequence[tuple[int, ...]] = usable) -> int:
            return max((_leading(usable, readies[name], one.sent_s) for name in names), default=0) * block_size

        asked = next((i for i, beginning in enumerate(usable) if beginning not in known), len(usable)) * block_size
        ready = max(one.num_cached, depth(list(readies)))
        own = max(one.num_cached, depth(one.replicas))
        lost[NOT_YET] += max(0, asked - ready)
        lost[ELSEWHERE] += ready - own
        lost[FORGOTTEN] += own - one.num_cached
        known.update(beginnings)
        for name in one.replicas:
            for beginning in beginnings:
                readies[name].setdefault(beginning, one.first_s)
    return lost


def _leading(beginnings: Sequence[tuple[int, ...]], ready: dict[tuple[int, ...], float], at_s: float) -> int:
    late = (i for i, beginning in enumerate(beginnings) if ready.get(beginning, at_s) >= at_s)
    return next(late, len(beginnings))
