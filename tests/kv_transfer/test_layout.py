"""What counts as the same KV, and how large it is."""

from dataclasses import replace

import pytest

from deployments.errors import LayoutMismatchError
from deployments.kv_transfer.base import TransferConfig
from deployments.kv_transfer.layout import KVLayout

LAYOUT = KVLayout("smollm2", "bfloat16", block_size=16, num_layers=30, num_kv_heads=3, head_dim=64)


def test_equal_layouts_are_compatible():
    LAYOUT.check_compatible(replace(LAYOUT))


def test_a_mismatch_names_each_differing_field_with_both_values():
    theirs = replace(LAYOUT, model="qwen3", block_size=256)
    with pytest.raises(LayoutMismatchError) as caught:
        LAYOUT.check_compatible(theirs)
    assert "model: ours 'smollm2', theirs 'qwen3'" in str(caught.value)
    assert "block_size: ours 16, theirs 256" in str(caught.value)
    assert "dtype" not in str(caught.value)


def test_sizes_follow_from_the_shape():
    assert LAYOUT.bytes_per_token == 30 * 2 * 3 * 64 * 2
    assert LAYOUT.bytes_per_block == 16 * LAYOUT.bytes_per_token
    assert LAYOUT.chunk_shape(5) == (30, 2, 5, 16, 3, 64)


def test_a_dtype_that_no_engine_has_is_refused():
    with pytest.raises(ValueError, match="float8"):
        replace(LAYOUT, dtype="float8")


def test_a_bound_of_zero_is_refused():
    with pytest.raises(ValueError, match="transfer_timeout_s is 0"):
        TransferConfig(transfer_timeout_s=0)
