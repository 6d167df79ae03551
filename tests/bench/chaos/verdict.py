"""What became of every request, and whether the service kept its promises. Pure.

`load.py` says what clients saw, `faults.py` what was done; here both become counts, and the counts are held against
their bounds.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from tests.bench.chaos.load import FOREIGN, Ending, Record
from tests.bench.chaos.storm import Done, Kind

# Of the requests whose clients stayed, those that failed through no fault of theirs.
MAX_FAILED_SHARE = 0.005
# A killed ingress closes its connections at once; what ends later ended for another reason.
INGRESS_WINDOW_S = 1.0

_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500
# By pool and replica: gauge to value.
_Holdings = Mapping[tuple[str, str], Mapping[str, float]]


class Outcome(StrEnum):
    """What became of a request."""

    FINISHED = "finished"
    LEFT = "client left"
    REFUSED = "refused"
    INGRESS = "its ingress was killed"
    FAILED = "failed"
    LOST = "lost without an answer"


@dataclass(frozen=True, slots=True)
class Reference:
    """What probes are answered without faults.

    Attributes:
        answers: tokens of each time that it was asked, by number of the probe.
    """

    answers: Mapping[int, Sequence[Sequence[int]]]

    @property
    def unstable(self) -> tuple[int, ...]:
        """Probes that were not answered the same each time; either answer is right then."""
        return tuple(number for number, (first, *others) in self.answers.items() if any(o != first for o in others))


@dataclass(frozen=True, slots=True)
class Difference:
    """An answer, whole or not, with other tokens than the same request gets in calm.

    Attributes:
        probe: number of the probe.
        at: first token that differs, counted from 0.
        sent_s: when it was sent.
        outcome: what became of it.
    """

    probe: int
    at: int
    sent_s: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Recovery:
    """How a kind of fault was survived; quantiles by nearest rank, in seconds.

    Attributes:
        num: faults of the kind that were carried out.
        p50_s: median time until the pool was whole again; None: it never lacked a replica.
        p99_s: of the same.
        longest_wait_s: a client's longest wait for its next token around any of them.
    """

    num: int
    p50_s: float | None
    p99_s: float | None
    longest_wait_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """All counts of a storm.

    Attributes:
        outcomes: how many requests ended how, those of clients who left included.
        failed: failed requests by what their clients saw.
        unstable: probes that were not answered the same twice without faults.
        differences: answers during the storm with other tokens than without faults.
        leaks: per engine what it still held at the end.
        num_silent: engines that did not say what they hold.
        num_planned: faults that were to be.
        num_faults: those that were carried out and recovered from.
        unrecovered: the others, and why.
        recoveries: by kind of fault.
    """

    outcomes: dict[Outcome, int]
    failed: dict[str, int]
    unstable: tuple[int, ...]
    differences: tuple[Difference, ...]
    leaks: dict[str, dict[str, float]]
    num_silent: int
    num_planned: int
    num_faults: int
    unrecovered: tuple[str, ...]
    recoveries: dict[Kind, Recovery]

    @property
    def num_sent(self) -> int:
        return sum(self.outcomes.values())

    @property
    def failed_share(self) -> float:
        """Of the requests whose clients stayed, those that failed or were lost."""
        stayed = self.num_sent - self.outcomes[Outcome.LEFT]
        return (self.outcomes[Outcome.FAILED] + self.outcomes[Outcome.LOST]) / max(1, stayed)

    def problems(self) -> list[str]:
        """In words what is beyond its bound; nothing if every promise was kept."""
        lost, share = self.outcomes[Outcome.LOST], self.failed_share
        found: dict[str, object] = {
            f"{len(self.unstable)} probes differ without faults already": self.unstable,
            f"{len(self.differences)} answers with different tokens, 0 allowed": self.differences,
            f"{len(self.leaks)} engines hold something when all is over, 0 allowed": self.leaks,
            f"{self.num_silent} engines do not say what they hold": self.num_silent,
            f"{lost} requests lost without an answer, 0 allowed": lost,
            f"{share:.2%} of requests failed through no fault of their clients, {MAX_FAILED_SHARE:.1%} allowed": (
                share > MAX_FAILED_SHARE
            ),
            f"no recovery: {'; '.join(self.unrecovered)}": self.unrecovered,
            f"{self.num_faults} of {self.num_planned} faults carried out": self.num_faults < self.num_planned,
        }
        return [words for words, holds in found.items() if holds]


def decide(
    records: Sequence[Record],
    reference: Reference,
    faults: Sequence[Done],
    num_planned: int,
    holdings: _Holdings,
    num_engines: int,
) -> Verdict:
    """Judge a storm.

    Args:
        records: of every request during it.
        reference: what their tokens should be.
        faults: what was done.
        num_planned: faults that were to be.
        holdings: what each engine holds when all requests have ended.
        num_engines: engines that there should be by then.
    """
    kills_s = [done.at_s for done in faults if done.fault.kind is Kind.INGRESS_KILL]
    judged = [(record, judge(record, kills_s)) for record in records]
    survived = [done for done in faults if done.error is None]
    return Verdict(
        outcomes={outcome: sum(own is outcome for _, own in judged) for outcome in Outcome},
        failed=dict(Counter(describe(record) for record, own in judged if own is Outcome.FAILED)),
        unstable=reference.unstable,
        differences=tuple(find_differences(judged, reference)),
        leaks=find_leaks(holdings),
        num_silent=max(0, num_engines - len(holdings)),
        num_planned=num_planned,
        num_faults=len(survived),
        unrecovered=tuple(f"{done.fault.kind}, {done.victim}: {done.error}" for done in faults if done.error),
        recoveries=summarise(survived, records),
    )


def judge(record: Record, ingress_kills_s: Iterable[float]) -> Outcome:
    """Say what became of a request.

    An error of the connection, or one that a proxy made up, is excused where an ingress was killed: the request was
    under way then and ended within `INGRESS_WINDOW_S`. Nobody outside knows whether it was at that ingress.
    """
    if record.ending is Ending.WHOLE:
        return Outcome.FINISHED
    if record.ending is Ending.LEFT:
        return Outcome.LEFT
    if record.ending is Ending.NO_ANSWER:
        return Outcome.LOST
    if record.status == _TOO_MANY_REQUESTS:
        return Outcome.REFUSED
    is_cut = record.ending is Ending.CONNECTION or ((record.status or 0) >= _SERVER_ERROR and record.error == FOREIGN)
    if is_cut and any(_died_with_it(record, kill_s) for kill_s in ingress_kills_s):
        return Outcome.INGRESS
    return Outcome.FAILED


def _died_with_it(record: Record, kill_s: float) -> bool:
    assert record.end_s is not None, "a request that is judged has ended"
    return record.sent_s <= kill_s <= record.end_s <= kill_s + INGRESS_WINDOW_S


def describe(record: Record) -> str:
    """How a failure looked to its client."""
    status = f" {record.status}" if record.ending is Ending.HTTP_ERROR else ""
    return f"{record.ending}{status}, {record.error}"


def first_difference(found: Sequence[int], expected: Sequence[int], is_whole: bool) -> int | None:
    """Place of the first token that differs; a whole answer must also be as long."""
    for at, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return at
    too_long, too_short = len(found) > len(expected), is_whole and len(found) < len(expected)
    return min(len(found), len(expected)) if too_long or too_short else None


def find_differences(judged: Iterable[tuple[Record, Outcome]], reference: Reference) -> Iterator[Difference]:
    """Compare every token that came, also those of answers that were cut."""
    for record, outcome in judged:
        probe, is_whole = record.call.probe.number, outcome is Outcome.FINISHED
        places = [first_difference(record.token_ids, answer, is_whole) for answer in reference.answers[probe]]
        known = [at for at in places if at is not None]
        if len(known) == len(places):
            yield Difference(probe, max(known), record.sent_s, outcome)


def find_leaks(holdings: _Holdings) -> dict[str, dict[str, float]]:
    """What engines hold that should hold nothing."""
    held = {
        f"{pool} {replica}": {name: value for name, value in gauges.items() if value}
        for (pool, replica), gauges in holdings.items()
    }
    return {engine: gauges for engine, gauges in held.items() if gauges}


def summarise(faults: Sequence[Done], records: Sequence[Record]) -> dict[Kind, Recovery]:
    """Recovery by kind of fault, of kinds that came."""
    found = {}
    for kind in Kind:
        mine = [done for done in faults if done.fault.kind is kind]
        times_s = sorted(done.recovery_s for done in mine if done.recovery_s is not None)
        quantiles = [_quantile(times_s, share) if times_s else None for share in (0.5, 0.99)]
        waits = [longest_wait_s(records, done.at_s, done.end_s) for done in mine]
        if mine:
            found[kind] = Recovery(len(mine), quantiles[0], quantiles[1], max(waits))
    return found


def longest_wait_s(records: Iterable[Record], start_s: float, end_s: float) -> float:
    """A stream's longest wait for its next token that lay, in part at least, within a time."""
    longest_s = 0.0
    for record in records:
        if record.call.stream and record.call.leaves_after_s is None and record.end_s is not None:
            for before_s, after_s in pairwise([record.sent_s, *record.times_s, record.end_s]):
                if before_s <= end_s and after_s >= start_s:
                    longest_s = max(longest_s, after_s - before_s)
    return longest_s


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
