"""A sequence goes on as it did before: what stood behind the same tokens last time is guessed."""

from array import array

import hypothesis.strategies as st
from hypothesis import given, settings

from deployments.engine.scheduling.ids import token_array
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.engine.speculation import lookup
from deployments.engine.speculation.base import Wish
from deployments.engine.speculation.lookup import SIZES, Index, LookupDrafter
from deployments.messages import GenerateRequest, SamplingParams


def sequence_of(*tokens: int, max_tokens: int = 50) -> Sequence:
    return Sequence(GenerateRequest("r", tokens, SamplingParams(max_tokens=max_tokens)), Role.LOCAL, 0.0)


def brute_force(tokens: "array[int]") -> int | None:
    """Where the longest n-gram at the end was followed by a token, the last time."""
    end = len(tokens)
    for size in SIZES:
        for place in range(end - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[end - size :]:
                return place
    return None


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 3), max_size=90), max_size=6))
def test_what_is_found_is_the_last_place_of_the_longest_match_however_the_tokens_came(parts: list[list[int]]) -> None:
    tokens, index = token_array(), Index()
    for part in parts:
        tokens.extend(part)
        assert index.take(tokens)
        found = index.find(tokens)
        assert (None if found is None else found[0]) == brute_force(tokens)
        if found is not None:
            place, length = found
            assert tokens[place - length : place] == tokens[len(tokens) - length :]


def guess(drafter: LookupDrafter, sequence: Sequence, num_tokens: int) -> tuple[int, ...] | None:
    wish = Wish(sequence, num_tokens)
    if (prospect := drafter.look(wish)) is None:
        return None
    assert prospect.num_tokens == num_tokens
    (tokens,) = drafter.draft([wish])
    return tokens


def test_what_stood_behind_the_same_tokens_is_guessed() -> None:
    assert guess(LookupDrafter(), sequence_of(7, 8, 1, 2, 3, 4, 9, 7, 8), 3) == (1, 2, 3)


def test_a_loop_is_guessed_beyond_its_end() -> None:
    assert guess(LookupDrafter(), sequence_of(5, 1, 2, 3, 1, 2, 3), 8) == (1, 2, 3, 1, 2, 3, 1, 2)


def test_longer_matches_are_of_a_kind_of_their_own() -> None:
    drafter, kinds = LookupDrafter(), []
    for length in (2, 4, 8, 16, 30):
        repeated = range(100, 100 + length)
        sequence = sequence_of(*repeated, 1, *repeated)
        assert guess(drafter, sequence, 1) == (1,)
        prospect = drafter.look(Wish(sequence, 1))
        assert prospect is not None
        kinds.append(prospect.kind)
        drafter.drop("r")
    assert kinds == [0, 1, 2, 3, 3] and max(kinds) < LookupDrafter.num_kinds


def test_nothing_is_guessed_of_tokens_that_never_came_before() -> None:
    assert guess(LookupDrafter(), sequence_of(*range(40)), 5) is None
    assert guess(LookupDrafter(), sequence_of(1), 5) is None


def test_a_long_prompt_is_taken_in_by_parts() -> None:
    sequence, drafter = sequence_of(*range(lookup._TAKEN_AT_ONCE), 0, 1), LookupDrafter()
    assert guess(drafter, sequence, 2) is None
    assert guess(drafter, sequence, 2) == (2, 3)
