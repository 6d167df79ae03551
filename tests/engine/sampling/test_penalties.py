"""Penalties in pieces: the same to the bit as token by token, and never more cells at once than there may be."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.engine.sampling import adjusting, penalties
from deployments.engine.sampling.adjusting import build_adjusting
from deployments.engine.sampling.penalties import MAX_CELLS
from deployments.engine.scheduling.ids import token_array
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.sequence import Role, Sequence
from deployments.messages import Adjustments, GenerateRequest, SamplingParams

VOCAB_SIZE = 19
PENALTIES = (
    None,
    Adjustments(repetition_penalty=1.3),
    Adjustments(presence_penalty=0.7),
    Adjustments(frequency_penalty=-0.1),
    Adjustments((), 0.9, -0.3, 0.7),
)


def decode(
    number: int, num_tokens: int, num_drafts: int, wanted: Adjustments | None, stop_token_ids: tuple[int, ...] = ()
) -> ScheduledSequence:
    """The newest of random tokens of a sequence, a third of which are its prompt, with drafts behind it."""
    random = np.random.default_rng([number, num_tokens, num_drafts])
    token_ids = token_array(random.integers(0, VOCAB_SIZE, num_tokens).tolist())
    sampling = SamplingParams(max_tokens=1000, stop_token_ids=stop_token_ids, adjustments=wanted)
    request = GenerateRequest(f"r{number}", tuple(token_ids[: num_tokens // 3 + 1]), sampling)
    sequence = Sequence(request, Role.LOCAL, 0.0, token_ids=token_ids, num_computed_tokens=num_tokens - 1)
    return ScheduledSequence.decode(sequence, tuple(random.integers(0, VOCAB_SIZE, num_drafts).tolist()))


def penalize(items: list[ScheduledSequence], logits: Tensor) -> Tensor:
    return build_adjusting(items, np.full(len(items), -1)).on(torch.empty(0, dtype=torch.int64)).apply(logits)


def token_by_token(items: list[ScheduledSequence], logits: Tensor) -> Tensor:
    """The same, as it is written down."""
    rows, changed = [(item, number) for item in items for number in range(item.num_draws)], logits.clone()
    for row, (item, number) in zip(changed, rows, strict=True):
        request = item.sequence.request
        wanted = request.sampling.adjustments or Adjustments()
        before = [*item.sequence.token_ids, *item.drafts[:number]]
        generated = before[len(request.prompt_token_ids) :]
        penalty = torch.tensor(wanted.repetition_penalty, dtype=torch.float32)
        for token in set(before):
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
        for token in set(generated):
            row[token] -= wanted.presence_penalty
        for token in generated:
            row[token] -= wanted.frequency_penalty
    return changed


@pytest.mark.parametrize("max_cells", [1, 50, MAX_CELLS])
@given(runs=st.lists(st.tuples(st.integers(2, 60), st.integers(0, 5), st.sampled_from(PENALTIES)), max_size=8))
def test_logits_are_those_of_one_token_after_the_other(
    max_cells: int, runs: list[tuple[int, int, Adjustments | None]]
) -> None:
    items = [decode(number, *run) for number, run in enumerate(runs)]
    logits = torch.randn(sum(item.num_draws for item in items), VOCAB_SIZE, generator=torch.manual_seed(len(runs)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(penalties, "MAX_CELLS", max_cells)
        assert torch.equal(penalize(items, logits), token_by_token(items, logits))


class Largest(TorchDispatchMode):
    """Notes of how many numbers the largest tensor is that an operation gives."""

    num_numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.num_numbers = max(self.num_numbers, found.numel())
        return found


def test_many_drafts_behind_long_contexts_take_no_more_than_so_many_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    max_cells, num_tokens, num_drafts = 4000, 1000, 63
    monkeypatch.setattr(penalties, "MAX_CELLS", max_cells)
    items = [decode(number, num_tokens, num_drafts, PENALTIES[-1]) for number in range(3)]
    logits = torch.randn(3 * (1 + num_drafts), VOCAB_SIZE)
    assert logits.numel() < max_cells < logits.shape[0] * num_tokens
    built = build_adjusting(items, np.full(len(items), -1))
    assert sum(map(len, built.repeated.tokens)) == 3 * (num_tokens + num_drafts), "once for all draws of each"
    with Largest() as largest:
        built.on(torch.empty(0, dtype=torch.int64)).apply(logits)
    # The numbers of a cell, presence and frequency, lie beside each other.
    assert max_cells // 2 < largest.num_numbers <= 2 * max_cells


def test_biases_and_barred_tokens_are_changed_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Adjustments(tuple((token, float(token)) for token in range(VOCAB_SIZE)), min_tokens=1000)
    items = [decode(number, 10, 3, wanted, stop_token_ids=(3, 5)) for number in range(2)]
    monkeypatch.setattr(adjusting, "MAX_CELLS", 9)
    logits = torch.randn(8, VOCAB_SIZE)
    expected = logits + torch.arange(VOCAB_SIZE)
    expected[:, [3, 5]] = -torch.inf
    assert torch.equal(penalize(items, logits), expected)
    cells = build_adjusting(items, np.full(2, -1)).biased
    assert [len(draws) for _, (draws, _) in cells.on(logits.device)] == [9] * 16 + [8]
