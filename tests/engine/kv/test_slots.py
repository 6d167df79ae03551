"""Block tables and positions to slots."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.kv.slots import places, slots


def test_a_position_goes_to_its_place_in_its_block():
    assert slots(np.array([[7, 2]]), 0, np.array([15, 16]), 16).tolist() == [127, 32]


def test_the_width_of_the_callers_integers_is_kept():
    assert slots(np.array([[7, 2]], np.int32), 0, np.array([15, 16], np.int32), 16).dtype == np.int32


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.data())
def test_no_two_tokens_of_a_batch_share_a_slot(block_size, num_sequences, num_blocks, data):
    blocks = np.random.default_rng(0).permutation(num_sequences * num_blocks).reshape(num_sequences, num_blocks)
    lens = data.draw(st.lists(st.integers(1, num_blocks * block_size), min_size=1, max_size=num_sequences))
    rows = np.repeat(np.arange(len(lens)), lens)
    positions = np.concatenate([np.arange(length) for length in lens])
    found = slots(blocks, rows, positions, block_size)
    assert len(set(found.tolist())) == len(positions)
    held, tokens = places(found, block_size)
    assert (held == blocks[rows, positions // block_size]).all()
    assert (tokens == positions % block_size).all()


def test_a_slot_goes_back_to_its_block_and_its_token_in_tensors_too():
    blocks, tokens = places(torch.tensor([127, 32]), 16)
    assert (blocks.tolist(), tokens.tolist()) == ([7, 2], [15, 0])
