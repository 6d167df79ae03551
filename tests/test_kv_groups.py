"""The description of KV: its arithmetic for several groups of layers, and what engines keep of them."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.errors import UnsupportedModelError
from deployments.kv_groups import (
    FP8,
    KV_FORMS,
    KVGroup,
    bytes_per_block,
    bytes_per_token,
    differences,
    num_blocks_of,
    only_group,
)

WINDOWED, FULL = KVGroup((0, 2, 4), 2, 128, window=512), KVGroup((1, 3), 4, 64)
BF16 = KV_FORMS["bfloat16"]
SIZES = st.integers(1, 64)
GROUPS = st.builds(KVGroup, st.lists(SIZES, max_size=8, unique=True).map(tuple), SIZES, SIZES)


@given(st.lists(GROUPS, min_size=1, max_size=3).map(tuple), SIZES, st.sampled_from(list(KV_FORMS.values())))
def test_a_block_of_every_group_takes_what_its_chunk_does(groups, block_size, form):
    num_bytes = sum(prod(group.chunk_shape(1, block_size, form)) for group in groups) * form.element_bytes
    assert bytes_per_block(groups, block_size, form) == num_bytes
    assert bytes_per_token(groups, form) * block_size == num_bytes


def test_a_chunk_holds_its_own_layers_alone():
    assert WINDOWED.chunk_shape(5, 16, BF16) == (3, 2, 5, 16, 2, 128)
    assert FULL.chunk_shape(7, 16, BF16) == (2, 2, 7, 16, 4, 64)


def test_numbers_in_fp8_have_a_scale_for_each_token_and_head():
    assert FULL.bytes_per_token(FP8) == 2 * 2 * 4 * (64 + 4)
    assert FULL.chunk_shape(7, 16, FP8) == (2, 2, 7, 16, 4, 64 + 4)


def test_a_shape_tells_the_blocks_of_its_chunk():
    assert num_blocks_of(FULL.chunk_shape(7, 16, BF16)) == 7
    assert num_blocks_of((3, 3)) == 0


def test_differences_come_in_order_and_name_their_group():
    theirs = WINDOWED, KVGroup((1, 3), 8, 32)
    assert list(differences((WINDOWED, FULL), (WINDOWED, FULL))) == []
    assert list(differences((WINDOWED, FULL), theirs)) == [
        "num_kv_heads of group 1: ours 4, theirs 8",
        "head_dim of group 1: ours 64, theirs 32",
    ]
    assert list(differences((FULL,), theirs)) == ["groups of layers: ours 1, theirs 2"]


@pytest.mark.parametrize("group", [FULL, WINDOWED])
def test_one_group_is_what_engines_keep(group):
    assert only_group((group,)) is group


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((KVGroup((0, 2, 4), 2, 128), FULL), r"layers \[0, 2, 4\]: 2 heads of 128; layers \[1, 3\]: 4 heads of 64"),
        ((), "found"),
    ],
)
def test_kv_that_no_pool_keeps_is_refused_with_its_groups(groups, message):
    with pytest.raises(UnsupportedModelError, match=message):
        only_group(groups)
