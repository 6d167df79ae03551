"""What this replica has in one queue of a pool, and what follows from it for the whole queue since the last reading.

A reading says how long the queue was, never whose it is, and it is old when it arrives: meanwhile more was let in, some
was given up, some is done. This replica knows its own part of that to the token, at once. Owns that part, and how the
two are put together without counting anything twice. Called by `admission.py`, which has one for each queue. Pure: no
clock.
"""

import math
from collections import deque
from dataclasses import dataclass

# Between here and an engine: what entered or was given up that shortly before a reading began may not be seen in it.
_ON_THE_WAY_S = 0.25


@dataclass(eq=False, slots=True)
class Entry:
    """Something that was let in.

    Attributes:
        amount: in the queue: prompt tokens, or sequences.
        entered_s: when.
        left_s: when it was done or given up; infinite: it is there.
        is_drained: it left because the engines were done with it.
        is_noted: a reading may not contain it yet.
    """

    amount: int
    entered_s: float
    left_s: float = math.inf
    is_drained: bool = False
    is_noted: bool = True


class OwnShare:
    """This replica's part of one queue, in any unit."""

    def __init__(self) -> None:
        self.total = 0
        self._entries: deque[Entry] = deque()  # in the order of entry; what a reading surely contains is let go
        self._left: deque[Entry] = deque()  # in the order of leaving; likewise
        self._read_s = -math.inf
        self._in_reading = 0  # at most
        # Sums of the above, for they are asked for with every request: what is there of `_entries`; what of `_left` was
        # given up that the last reading may contain.
        self._unseen = self._given_up = 0

    @property
    def num_noted(self) -> int:
        """What is remembered of what entered and left, for readings that may not know of it yet."""
        return len(self._entries) + len(self._left)

    def enter(self, amount: int, now_s: float) -> Entry:
        """Something is let in now; the caller keeps what comes back, and says when it leaves."""
        entry = Entry(amount, now_s)
        self.total += amount
        self._unseen += amount
        self._entries.append(entry)
        return entry

    def leave(self, entry: Entry, now_s: float, *, is_drained: bool) -> None:
        """It is not queued any more, once."""
        assert entry.left_s == math.inf, f"{entry} has left before"
        entry.left_s, entry.is_drained = now_s, is_drained
        self.total -= entry.amount
        if entry.is_noted:
            self._unseen -= entry.amount
        self._given_up += self._may_be_read(entry)
        self._left.append(entry)

    def note_reading(self, as_of_s: float, now_s: float) -> None:
        """A reading of the engines has come.

        Args:
            as_of_s: what it says was true then or later.
            now_s: and not later than now.
        """
        self._forget(as_of_s - _ON_THE_WAY_S)
        self._read_s = now_s
        self._given_up = sum(map(self._may_be_read, self._left))
        # What the engines had drained by then is not in it; of what was given up they may not have heard.
        self._in_reading = self.total + sum(e.amount for e in self._left if e.left_s > as_of_s or not e.is_drained)

    def forget_before(self, at_s: float) -> None:
        """There are no readings: what entered or left before is of no interest any more."""
        self._forget(at_s)

    def whole(self, seen: float, drained: float, num_replicas: int) -> float:
        """How much is in the queue now, of everybody.

        Args:
            seen: in the last reading.
            drained: since then by the engines, at most.
            num_replicas: that let in; the others are taken to do as this one does.
        """
        unseen = self._unseen
        left, of_others = seen - self._given_up - drained, seen - self._in_reading
        counted = left + unseen if left > 0 else float(unseen)
        # A reading may contain what entered while it was made, and what it contains may be done since: but of what is
        # this replica's own there is no more than it has.
        most = of_others + self.total if of_others > 0 else float(self.total)
        return (counted if counted < most else most) + unseen * (num_replicas - 1)

    def _forget(self, at_s: float) -> None:
        while self._entries and self._entries[0].entered_s <= at_s:
            entry = self._entries.popleft()
            entry.is_noted = False
            if entry.left_s == math.inf:
                self._unseen -= entry.amount
        while self._left and self._left[0].left_s <= at_s:
            self._given_up -= self._may_be_read(self._left.popleft())

    def _may_be_read(self, entry: Entry) -> int:
        """What of an entry that has left may be in the last reading, though it was given up."""
        return 0 if entry.is_drained or entry.entered_s > self._read_s else entry.amount
