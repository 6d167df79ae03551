"""The description of KV: its arithmetic for several groups of layers, and what engines keep of them."""

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.errors import UnsupportedModelError
from deployments.kv_groups import (
    FP8,
    KV_FORMS,
    KVGroup,
    bytes_of_pool_block,
    bytes_per_block,
    bytes_per_token,
    differences,
    first_group,
    num_blocks_of,
    windows_of,
)

FULL, WINDOWED = KVGroup((0, 2, 4), 4, 64), KVGroup((1, 3), 4, 64, window=512)
BF16 = KV_FORMS["bfloat16"]
SIZES = st.integers(1, 64)
GROUPS = st.builds(KVGroup, st.lists(SIZES, max_size=8, unique=True).map(tuple), SIZES, SIZES)
FORMS = st.sampled_from(list(KV_FORMS.values()))


@given(GROUPS, st.integers(1, 3), SIZES, FORMS)
def test_blocks_of_a_pool_take_what_their_chunk_does(group, num_groups, block_size, form):
    groups = (group, *[replace(group, layers=group.layers[:1])] * (num_groups - 1))
    num_bytes = prod(group.chunk_shape(1, block_size, form)) * form.element_bytes
    assert bytes_of_pool_block(groups, block_size, form) == num_bytes
    assert bytes_per_block(groups, block_size, form) == num_groups * num_bytes


@given(GROUPS, SIZES, FORMS)
def test_a_block_of_a_model_with_one_group_takes_what_its_tokens_do(group, block_size, form):
    assert bytes_per_block((group,), block_size, form) == bytes_per_token((group,), form) * block_size


def test_a_place_that_no_layer_takes_is_no_kv_of_a_token():
    assert bytes_per_token((FULL, WINDOWED), BF16) == 5 * 2 * 4 * 64 * 2
    assert bytes_per_block((FULL, WINDOWED), 16, BF16) == 16 * 6 * 2 * 4 * 64 * 2


def test_blocks_have_the_layers_of_a_group():
    assert FULL.chunk_shape(7, 16, BF16) == (3, 2, 7, 16, 4, 64)


def test_numbers_in_fp8_have_a_scale_for_each_token_and_head():
    assert FULL.bytes_per_token(FP8) == 3 * 2 * 4 * (64 + 4)
    assert FULL.chunk_shape(7, 16, FP8) == (3, 2, 7, 16, 4, 64 + 4)


def test_a_shape_tells_the_blocks_of_its_chunk():
    assert num_blocks_of(FULL.chunk_shape(7, 16, BF16)) == 7
    assert num_blocks_of((3, 3)) == 0


def test_differences_come_in_order_and_name_their_group():
    theirs = FULL, KVGroup((1, 3), 8, 32, window=512)
    assert list(differences((FULL, WINDOWED), (FULL, WINDOWED))) == []
    assert list(differences((FULL, WINDOWED), theirs)) == [
        "num_kv_heads of group 1: ours 4, theirs 8",
        "head_dim of group 1: ours 64, theirs 32",
    ]
    assert list(differences((FULL,), theirs)) == ["groups of layers: ours 1, theirs 2"]


@pytest.mark.parametrize("groups", [(FULL,), (WINDOWED,), (FULL, WINDOWED)])
def test_groups_whose_kv_is_alike_share_the_blocks_of_the_first_one(groups):
    assert first_group(groups) is groups[0]
    assert windows_of(groups) == tuple(group.window for group in groups)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((FULL, KVGroup((1, 3), 2, 128)), r"layers \[0, 2, 4\]: 4 heads of 64; layers \[1, 3\]: 2 heads of 128"),
        ((), "found"),
    ],
)
def test_kv_that_no_pool_keeps_is_refused_with_its_groups(groups, message):
    with pytest.raises(UnsupportedModelError, match=message):
        first_group(groups)
