"""A draw is a pure function of seed, position and logits, has the right distribution, and keeps to its bounds."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from deployments.engine.kernels.cpu_sampling import gumbel_scores
from deployments.engine.sampling.sampler import SamplingBatch, SamplingColumns, SamplingPreparation, sample
from deployments.messages import SamplingParams

# 99.9 % quantile of chi-square with 9 degrees of freedom.
_CHI_SQUARE_9 = 27.88


def params(**settings: float) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1} | settings))  # type: ignore[arg-type]  # a test's shorthand


def draw(logits: Tensor, rows: list[SamplingParams], positions: list[int]) -> list[int]:
    tokens: list[int] = sample(logits, SamplingBatch(SamplingColumns(rows), np.array(positions))).tolist()
    return tokens


def draw_many(logits: Tensor, num_draws: int, **settings: float) -> np.ndarray:
    """Tokens drawn from one distribution with as many seeds."""
    rows = [params(seed=seed, **settings) for seed in range(num_draws)]
    return np.array(draw(logits.expand(num_draws, -1), rows, [7] * num_draws))


def random_logits(rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens may be drawn, the slow way: top-k, then top-p of what is left, and min-p; ties stay together."""
    scaled = logits.astype(np.float64) / temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    least = 0.0
    if top_k:
        least = probs[order[min(top_k, len(order)) - 1]]
        order = order[:top_k]
    if top_p < 1:
        mass = probs[order].sum()
        reached = 0.0
        for token in order:
            if reached >= top_p * mass and reached > 0:
                break
            reached += probs[token]
            last = probs[token]
        least = max(least, last)
    kept: np.ndarray = (probs >= least) & (probs >= min_p * probs.max())
    return kept


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = random_logits(5, 1000, seed=1)
    assert draw(logits, [params(temperature=0.0, seed=i) for i in range(5)], [3] * 5) == logits.argmax(-1).tolist()


def test_greedy_and_drawn_rows_may_share_a_batch() -> None:
    logits = random_logits(3, 100, seed=2)
    rows = [params(seed=1), params(temperature=0.0), params(seed=2, temperature=0.5)]
    tokens = draw(logits, rows, [4, 5, 6])
    assert tokens[1] == int(logits[1].argmax())
    for i in (0, 2):
        assert draw(logits[i : i + 1], [rows[i]], [4 + i]) == [tokens[i]]


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 1000), num_rows=st.integers(1, 8))
def test_a_row_draws_the_same_token_in_any_batch_and_order(data: st.DataObject, seed: int, num_rows: int) -> None:
    logits = random_logits(num_rows, 600, seed)
    row = st.builds(
        params,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
        top_k=st.sampled_from([0, 1, 40, 300, 10_000]),
        top_p=st.sampled_from([0.1, 0.9, 0.999, 1.0]),
        min_p=st.sampled_from([0.0, 0.05]),
        seed=st.integers(-(2**63), 2**64 - 1),
    )
    rows = [data.draw(row) for _ in range(num_rows)]
    positions = [data.draw(st.integers(0, 10_000)) for _ in range(num_rows)]
    alone = [draw(logits[i : i + 1], [rows[i]], [positions[i]])[0] for i in range(num_rows)]
    order = data.draw(st.permutations(range(num_rows)))
    together = draw(logits[order], [rows[i] for i in order], [positions[i] for i in order])
    assert together == [alone[i] for i in order]


def test_steps_one_after_the_other_draw_as_each_by_itself() -> None:
    preparation, logits = SamplingPreparation(), random_logits(3, 1000, seed=2)
    greedy, warm, hot = params(temperature=0), params(seed=1, top_k=50), params(seed=1, temperature=1.5)
    for step, rows in enumerate([[warm, greedy, hot], [warm, greedy, hot], [hot, greedy, warm], [greedy] * 3]):
        positions = np.array([step, 9, 2 * step])
        drawn = sample(logits, preparation.prepare(rows, positions)).tolist()
        assert drawn == draw(logits, rows, positions.tolist())


def test_another_position_or_seed_draws_anew() -> None:
    flat = torch.zeros(200, 50_000)
    by_position = draw(flat, [params(seed=5)] * 200, list(range(200)))
    by_seed = draw(flat, [params(seed=i) for i in range(200)], [5] * 200)
    assert len(set(by_position)) > 190 and len(set(by_seed)) > 190


def noise(seeds: list[int], positions: list[int], vocab_size: int) -> np.ndarray:
    """The scores of equal logits."""
    keys = SamplingColumns([params(seed=seed) for seed in seeds]).keys(np.array(positions))
    flat, ones = torch.zeros(len(keys), vocab_size), torch.ones(len(keys), dtype=torch.float64)
    return gumbel_scores(flat, flat[:, 0], ones, torch.from_numpy(keys)).double().numpy()


def test_noise_is_gumbel_distributed_over_tokens_seeds_and_positions() -> None:
    ids, same = list(range(10_000)), [3] * 10_000
    for numbers in (noise(ids, same, 1), noise(same, ids, 1), noise(ids, ids, 1), noise([3], [3], 10_000)):
        uniform = np.exp(-np.exp(-numbers))
        counts = np.histogram(uniform, bins=10, range=(0, 1))[0]
        assert counts.sum() == 10_000 and ((counts - 1000) ** 2 / 1000).sum() < _CHI_SQUARE_9


def test_noise_of_neighbours_is_unrelated() -> None:
    both = noise([3, 3, 4], [7, 8, 7], 20_000)
    among_rows, among_tokens = np.corrcoef(both), np.corrcoef(both[0, 1:], both[0, :-1])
    for correlation in (among_rows[0, 1], among_rows[0, 2], among_rows[1, 2], among_tokens[0, 1]):
        assert abs(correlation) < 4 / 20_000**0.5


def test_noise_reaches_as_far_as_a_large_vocabulary_needs() -> None:
    """The expected maximum of N draws is log(N) + 0.577, with a deviation of 1.28."""
    greatest = noise(list(range(100)), [1] * 100, 150_000).max(axis=1)
    assert abs(greatest.mean() - (np.log(150_000) + 0.5772)) < 0.5 and abs(greatest.std() - 1.2825) < 0.4


def test_rounding_hardly_ever_changes_a_draw_however_flat_the_distribution() -> None:
    """A number looked up in the cumulated distribution would change with about one in 60 of these."""
    logits = random_logits(1, 50_000, seed=11, scale=0.5)
    rounding = 1e-4 * torch.randn(2_000, 50_000, generator=torch.Generator().manual_seed(12))
    rows, positions = [params(seed=seed) for seed in range(2_000)], [3] * 2_000
    exact = np.array(draw(logits.expand(2_000, -1), rows, positions))
    assert (np.array(draw(logits + rounding, rows, positions)) != exact).sum() <= 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_distribution(temperature: float) -> None:
    logits = random_logits(1, 10, seed=3, scale=1.0)
    tokens = draw_many(logits, 20_000, temperature=temperature)
    expected = 20_000 * torch.softmax(logits[0].double() / temperature, -1).numpy()
    counts = np.bincount(tokens, minlength=10)
    assert ((counts - expected) ** 2 / expected).sum() < _CHI_SQUARE_9


def test_draws_within_bounds_keep_their_proportions() -> None:
    logits = random_logits(1, 500, seed=4)
    kept = torch.topk(logits[0], 10).indices
    expected = 20_000 * torch.softmax(logits[0, kept].double(), -1).numpy()
    tokens = draw_many(logits, 20_000, top_k=10)
    counts = np.array([(tokens == token).sum() for token in kept.tolist()])
    assert counts.sum() == 20_000
    assert ((counts - expected) ** 2 / expected).sum() < _CHI_SQUARE_9


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    vocab_size=st.sampled_from([5, 50, 700]),
    temperature=st.sampled_from([0.2, 1.0, 4.0, 50.0]),
    top_k=st.sampled_from([0, 1, 2, 10, 400, 5000]),
    top_p=st.sampled_from([0.0107, 0.5031, 0.9017, 0.9903, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.9]),
    rounded=st.booleans(),
)
def test_exactly_the_allowed_tokens_are_drawn(
    seed: int, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float, rounded: bool
) -> None:
    logits = random_logits(1, vocab_size, seed)
    if rounded:  # many ties
        logits = logits.round()
    kept = allowed(logits[0].numpy(), temperature, top_k, top_p, min_p)
    tokens = set(
        draw_many(logits, 400, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).tolist(),
    )
    assert tokens <= set(np.flatnonzero(kept).tolist())
    # Each allowed token that 400 draws cannot miss by chance is among them.
    probs = torch.softmax(logits[0].double() / temperature, -1).numpy() * kept
    likely = np.flatnonzero(probs / probs.sum() > 0.05)
    assert set(likely.tolist()) <= tokens


def test_a_flat_distribution_keeps_its_tail_up_to_the_bound() -> None:
    logits = torch.linspace(0, 0.001, 2048).unsqueeze(0)
    tokens = draw_many(logits, 4000, top_p=0.9)
    assert tokens.min() >= 204, "the least likely tenth is dropped"
    assert (tokens < 2048 - 256).mean() > 0.8, "and nothing else is"


def test_rows_with_and_without_bounds_do_not_change_each_other() -> None:
    logits = random_logits(1, 2000, seed=9, scale=0.1).expand(3, -1)
    rows = [params(seed=8), params(seed=8, top_p=0.95), params(seed=8, top_k=3)]
    together = draw(logits, rows, [1, 1, 1])
    assert together == [draw(logits[:1], [row], [1])[0] for row in rows]


@pytest.mark.parametrize("temperature", [1e-6, 1e-3])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(1, 1000, seed=6)
    assert set(draw_many(logits, 200, temperature=temperature)) == {int(logits.argmax())}


def test_a_very_high_temperature_is_uniform() -> None:
    tokens = draw_many(random_logits(1, 10, seed=7), 20_000, temperature=1e6)
    counts = np.bincount(tokens, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < _CHI_SQUARE_9


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.full((1, 100), float("-inf"))
    logits[0, [3, 60]] = torch.tensor([0.0, 1.0])
    for settings_ in ({}, {"top_k": 50}, {"top_p": 0.999}, {"min_p": 1e-9}):
        assert set(draw_many(logits, 500, **settings_)) == {3, 60}


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [slice(None), slice(0, 1), slice(5, 6)], ids=["all", "first", "one"])
def test_a_row_of_a_broken_model_ends_with_some_token_and_leaves_others_alone(broken: float, where: slice) -> None:
    logits = random_logits(2, 100, seed=9)
    rows, sound = [params(top_p=0.5, top_k=7), params(top_p=0.5, top_k=7)], logits[1:].clone()
    logits[0, where] = broken
    tokens = draw(logits, rows, [2, 2])
    assert 0 <= tokens[0] < 100
    assert tokens[1:] == draw(sound, rows[1:], [2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_drawn_from_as_they_are(dtype: torch.dtype) -> None:
    logits = random_logits(4, 300, seed=8).to(dtype)
    rows = [params(seed=i, top_p=0.9) for i in range(4)]
    assert draw(logits, rows, [2] * 4) == draw(logits.double(), rows, [2] * 4)
