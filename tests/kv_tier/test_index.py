"""Every byte of the tier is counted once and within the budget, whatever comes in whatever order."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.kv_tier.index import Offer, TierIndex

MAX_BYTES = 100


def offer(name: int, num_bytes: int = 20, depth: int = 1) -> Offer:
    return Offer(bytes([name]), num_bytes, depth)


def filled(*offers: Offer) -> TierIndex[str]:
    """Stored one second after the other, from 1."""
    index = TierIndex[str](MAX_BYTES)
    for now_s, one in enumerate(offers, 1):
        assert index.accept([one], now_s) == [one]
        index.store(one, (None,), f"ref {one.key.hex()}", now_s)
    index.check_integrity()
    return index


def names(index: TierIndex[str], *asked: int) -> list[int]:
    return [found.key[0] for found in index.find([bytes([name]) for name in asked], 50.0)]


def test_an_object_is_fetched_once() -> None:
    index = TierIndex[str](MAX_BYTES)
    assert index.accept([offer(1), offer(1)], 0.0) == [offer(1)]
    assert index.accept([offer(1)], 0.0) == [], "it is on its way"
    index.store(offer(1), ("r",), "ref", 0.0)
    assert index.accept([offer(1)], 0.0) == [], "it is there"
    (found,) = index.find([bytes([1])], 0.0)
    assert (found.ref, found.origins, found.num_bytes) == ("ref", ("r",), 20)


def test_what_did_not_come_may_be_offered_again() -> None:
    index = TierIndex[str](MAX_BYTES)
    index.accept([offer(1)], 0.0)
    index.give_up(offer(1))
    assert index.accept([offer(1)], 0.0) == [offer(1)]
    index.check_integrity()


def test_what_was_used_least_lately_makes_room() -> None:
    index = filled(*map(offer, range(5)))
    names(index, 0)  # found, and so used
    index.accept([offer(1)], 60.0)  # somebody else has it as well: used, too
    assert index.accept([offer(9)], 70.0) == [offer(9)]
    assert index.counts().num_objects == 5, "it has not come yet"
    index.store(offer(9), (None,), "ref", 71.0)
    index.check_integrity()
    assert names(index, 0, 1, 2, 3, 4, 9) == [0, 1, 4, 9]


def test_offers_of_which_nothing_comes_take_nothing_from_others() -> None:
    index = filled(*map(offer, range(5)))
    offers = [offer(name, 5) for name in range(10, 40)]
    accepted = index.accept(offers, 6.0)
    assert accepted == offers[:20], "as much as the budget"
    assert index.accept([offer(2)], 7.0) == [] and names(index, *range(5)) == [*range(5)]
    for one in accepted:
        index.give_up(one)
    index.check_integrity()
    assert (index.counts().num_objects, index.counts().num_evicted) == (5, 0)


def test_what_is_larger_than_the_budget_or_what_is_on_its_way_leaves_is_refused() -> None:
    index = TierIndex[str](MAX_BYTES)
    assert index.accept([offer(1, 101)], 0.0) == []
    assert index.accept([offer(1, 60), offer(2, 60)], 0.0) == [offer(1, 60)]
    index.check_integrity()


def test_what_could_not_be_read_is_found_by_nobody_else() -> None:
    index = filled(offer(1), offer(2))
    index.lose([bytes([1]), bytes([7])])
    assert names(index, 1, 2) == [2]
    assert index.counts().num_lost == 1
    assert index.accept([offer(1)], 9.0) == [offer(1)]


def test_a_gap_is_told_as_it_is() -> None:
    assert names(filled(offer(1), offer(3)), 1, 2, 3) == [1, 3]


class Tier(RuleBasedStateMachine):
    """Beside the index: what must be there, if it was not evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.index = TierIndex[int](MAX_BYTES)
        self.now_s = 0.0
        self.on_the_way: list[Offer] = []
        self.stored: dict[bytes, int] = {}
        self.num_refs = 0

    @rule(offers=st.lists(st.builds(offer, st.integers(0, 12), st.integers(1, 60), st.integers(1, 4)), max_size=4))
    def offer(self, offers: list[Offer]) -> None:
        there = set(self.stored) & {found.key for found in self.index.find(list(self.stored), self.now_s)}
        accepted = self.index.accept(offers, self.now_s)
        known = there | {one.key for one in self.on_the_way}
        assert len({one.key for one in accepted}) == len(accepted)
        assert all(one.key not in known or one.key in there for one in accepted)
        self.on_the_way += accepted

    @rule(data=st.data(), is_there=st.booleans())
    def arrive(self, data: st.DataObject, is_there: bool) -> None:
        if self.on_the_way:
            one = data.draw(st.sampled_from(self.on_the_way))
            self.on_the_way.remove(one)
            if is_there:
                self.num_refs += 1
                self.index.store(one, (None,), self.num_refs, self.now_s)
                self.stored[one.key] = self.num_refs
            else:
                self.index.give_up(one)

    @rule(keys=st.lists(st.integers(0, 12), max_size=4))
    def find(self, keys: list[int]) -> None:
        for found in self.index.find([bytes([key]) for key in keys], self.now_s):
            assert self.stored[found.key] == found.ref, "the newest that was stored"

    @rule(keys=st.lists(st.integers(0, 12), max_size=2))
    def lose(self, keys: list[int]) -> None:
        self.index.lose([bytes([key]) for key in keys])
        assert not self.index.find([bytes([key]) for key in keys], self.now_s)

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def every_byte_is_counted(self) -> None:
        self.index.check_integrity()
        counts = self.index.counts()
        assert counts.num_pending_bytes == sum(one.num_bytes for one in self.on_the_way)

    def teardown(self) -> None:
        for one in self.on_the_way:
            self.index.give_up(one)
        self.index.clear()
        self.index.check_integrity()
        counts = self.index.counts()
        assert (counts.num_objects, counts.num_bytes, counts.num_pending, counts.num_pending_bytes) == (0, 0, 0, 0)


TestTier = Tier.TestCase
TestTier.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
