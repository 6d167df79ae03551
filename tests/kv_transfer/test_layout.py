"""What counts as the same KV, and how large it is."""

from dataclasses import replace

import pytest

from deployments.errors import LayoutMismatchError
from deployments.kv_groups import KVGroup
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.layout import KVLayout

LAYOUT = KVLayout("smollm2", "bfloat16", block_size=16, groups=(KVGroup(tuple(range(30)), 3, 64),))
# Of a model whose layers take turns: every other one sees a window alone.
TWO_GROUPS = replace(LAYOUT, groups=(KVGroup((0, 2, 4), 4, 64), KVGroup((1, 3), 4, 64, window=512)))


def test_equal_layouts_are_compatible():
    LAYOUT.check_compatible(replace(LAYOUT))


def test_a_mismatch_names_each_differing_field_with_both_values():
    theirs = replace(LAYOUT, model="qwen3", block_size=256)
    with pytest.raises(LayoutMismatchError) as caught:
        LAYOUT.check_compatible(theirs)
    assert "model: ours 'smollm2', theirs 'qwen3'" in str(caught.value)
    assert "block_size: ours 16, theirs 256" in str(caught.value)
    assert "dtype" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", (1, 5), r"layers of group 1: ours \(1, 3\), theirs \(1, 5\)"),
        ("num_kv_heads", 8, "num_kv_heads of group 1: ours 4, theirs 8"),
        ("window", 256, "window of group 1: ours 512, theirs 256"),
    ],
)
def test_a_mismatch_names_the_group_and_the_value(field, value, message):
    first, second = TWO_GROUPS.groups
    with pytest.raises(LayoutMismatchError, match=message):
        TWO_GROUPS.check_compatible(replace(TWO_GROUPS, groups=(first, replace(second, **{field: value}))))


def test_engines_with_other_numbers_of_groups_disagree():
    with pytest.raises(LayoutMismatchError, match="groups of layers: ours 1, theirs 2"):
        LAYOUT.check_compatible(TWO_GROUPS)


def test_sizes_follow_from_the_shape():
    assert LAYOUT.bytes_per_token == 30 * 2 * 3 * 64 * 2
    assert LAYOUT.bytes_per_block == 16 * LAYOUT.bytes_per_token
    assert LAYOUT.chunk_shape(5) == (30, 2, 5, 16, 3, 64)


def test_a_chunk_of_several_groups_has_blocks_of_the_first_ones_shape():
    of_a_layer = 2 * 4 * 64 * 2
    assert (TWO_GROUPS.bytes_per_token, TWO_GROUPS.bytes_per_block) == (5 * of_a_layer, 16 * 6 * of_a_layer)
    assert TWO_GROUPS.chunk_shape(7) == (3, 2, 7, 16, 4, 64)


def test_kv_in_fp8_is_not_handed_to_an_engine_that_keeps_it_otherwise():
    fp8 = replace(LAYOUT, dtype="fp8")
    with pytest.raises(LayoutMismatchError, match="dtype: ours 'bfloat16', theirs 'fp8'"):
        LAYOUT.check_compatible(fp8)
    assert fp8.bytes_per_token == 30 * 2 * 3 * (64 + 4)
    assert fp8.chunk_shape(5) == (30, 2, 5, 16, 3, 64 + 4)


def test_a_dtype_that_no_engine_has_is_refused():
    with pytest.raises(ValueError, match="float8"):
        replace(LAYOUT, dtype="float8")


def test_a_bound_of_zero_is_refused():
    with pytest.raises(ValueError, match="transfer_timeout_s is 0"):
        TransferConfig(transfer_timeout_s=0)
