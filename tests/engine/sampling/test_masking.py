"""Masks bar the tokens whose bits are not set, in the rows of their draws, and in no other."""

import numpy as np
import pytest
import torch

from deployments.engine.sampling.masking import Masking

VOCAB_SIZE = 77  # no multiple of a byte


@pytest.mark.parametrize("draws", [[0, 2], [0, 1, 2, 3]])  # some have no mask, or all have one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_barred_tokens_are_minus_infinity_and_the_rest_is_as_it_was(dtype: torch.dtype, draws: list[int]) -> None:
    generator = np.random.default_rng(0)
    allowed = generator.integers(0, 2, (len(draws), 96)).astype(np.uint8)
    masking = Masking(np.array(draws), np.packbits(allowed, axis=1, bitorder="little"))
    logits = torch.randn(4, VOCAB_SIZE).to(dtype)
    before = logits.clone()
    masked = masking.apply(logits)
    assert masked.dtype is dtype and torch.equal(logits, before)
    expected = before.clone()
    for row, bits in zip(draws, allowed, strict=True):
        expected[row][torch.from_numpy(bits[:VOCAB_SIZE] == 0)] = -torch.inf
    assert torch.equal(masked, expected)


def test_masks_of_sequences_become_an_array_that_torch_takes_as_it_is() -> None:
    masking = Masking.of([2, 0], [b"\x0f\x00", b"\xff\x01"])
    assert masking.draws.tolist() == [2, 0]
    assert torch.from_numpy(masking.allowed).tolist() == [[0x0F, 0], [0xFF, 1]]  # a warning fails a test
