"""Names of blocks: no salt, wherever it comes from, makes one prompt pass for another."""

from array import array

import hypothesis.strategies as st
from hypothesis import example, given

from deployments.engine.scheduling.block_hash import hash_block, hash_chain, root_of

SIZE = 4
# Tokens whose bytes are a string that a caller could send.
TOKENS = st.lists(st.integers(0x20202020, 0x7A7A7A7A), min_size=SIZE, max_size=SIZE)


def spelled(token_ids: list[int]) -> str:
    return array("I", token_ids).tobytes().decode("latin-1")


@given(TOKENS, TOKENS)
@example([0x61616161] * SIZE, [7] * SIZE)
def test_a_salt_that_reads_like_a_first_block_is_not_that_block(first: list[int], then: list[int]) -> None:
    salted = hash_chain(root_of(0, spelled(first)), then, SIZE)
    plain = hash_chain(root_of(0), first + then, SIZE)
    assert not set(salted) & set(plain)
    assert root_of(0, spelled(first)) != hash_block(root_of(0), first)


def test_salts_and_positions_have_roots_of_their_own() -> None:
    roots = {root_of(offset, salt) for offset in (0, 1, 512) for salt in ("", "a", "b", "1:a")}
    assert len(roots) == 12
