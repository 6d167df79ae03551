"""Before requests are let in the largest steps run: which these are, that they run, and what they leave to the pool."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.config import EngineConfig, EngineLimits
from deployments.engine.execution import rehearsal, rehearsed, sizing
from deployments.engine.execution.base import LaunchedStep
from deployments.engine.execution.heads import KnownTokens, NewestTokens
from deployments.engine.execution.portable import build_runner
from deployments.engine.execution.portable_heads import PortableHead
from deployments.engine.execution.rehearsal import (
    build_rehearsed,
    build_rehearsed_head,
    drafter_limits,
    most_drafts,
    rehearse,
    rehearse_head,
    rehearse_small,
    small_steps,
    worst_steps,
)
from deployments.engine.execution.sizing import choose_limits
from deployments.engine.kv.cache import KVCache
from deployments.engine.kv.layers import LayerWatch
from deployments.engine.sampling.adjusting import build_adjusting
from deployments.engine.sampling.guessing import GuessDraws
from deployments.engine.sampling.masking import Masking, build_masking
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.scheduling.scheduler import MAX_VERIFIED_TOKENS
from deployments.errors import InvalidRequestError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import CPU, VOCAB_SIZE, load, random_prompt, reference
from tests.engine.guessing_heads import with_head
from tests.engine.insides import runner_of

LIMITS = EngineLimits(
    max_model_len=100, block_size=8, num_blocks=2, max_num_seqs=5, max_num_batched_tokens=40
)  # fmt: skip


@given(st.integers(2, 500), st.integers(1, 20), st.integers(0, 2000))
def test_every_step_is_one_that_the_limits_allow(max_model_len: int, num_seqs: int, spare: int) -> None:
    limits = EngineLimits(max_model_len, 8, 2, num_seqs, num_seqs + spare)
    for step in worst_steps(limits):
        assert 1 <= len(step) <= num_seqs
        assert sum(new for _, new in step) <= limits.max_num_batched_tokens
        assert all(new >= 1 and computed >= 0 and computed + new <= max_model_len for computed, new in step)


def test_the_corners_are_among_the_steps() -> None:
    steps = worst_steps(LIMITS)
    assert [(99, 1)] * 5 in steps, "all sequences decode, as long as can be"
    assert [(0, 40)] in steps, "one whole prompt takes the budget"
    assert [(60, 40)] in steps, "so does the end of the longest one"
    assert [(99, 1)] * 4 + [(64, 36)] in steps, "decodes beside a prompt"
    assert [(0, 8)] * 5 in steps and [(92, 8)] * 5 in steps, "all sequences are prompts"


def test_small_steps_leave_room_for_a_prompt_whose_logprobs_are_wanted() -> None:
    limits = EngineLimits(max_model_len=1000, block_size=256, num_blocks=2, max_num_seqs=40, max_num_batched_tokens=800)
    steps = small_steps(limits)
    assert [(128, 1)] * 33 in steps and [(128, 1)] * 65 not in steps, "draws of few, and no more than there may be"
    assert [(128, 1)] * 3 + [(0, 101), (0, 37)] in steps and [(256, 35)] * 16 in steps
    assert [(256, 701)] in steps and [(256, 701)] not in small_steps(replace(limits, max_model_len=900))


@given(st.integers(2, 500), st.integers(1, 20), st.integers(0, 2000))
def test_every_small_step_is_one_that_the_limits_allow(max_model_len: int, num_seqs: int, spare: int) -> None:
    limits = EngineLimits(max_model_len, 8, 2, num_seqs, num_seqs + spare)
    for step in small_steps(limits):
        assert len(step) + 1 <= num_seqs and max_model_len > 3
        assert sum(new for _, new in step) + 3 <= limits.max_num_batched_tokens
        assert all(computed + new <= max_model_len for computed, new in step)


def test_a_step_with_as_many_drafts_as_may_be_is_among_them() -> None:
    assert most_drafts(LIMITS) == []
    assert most_drafts(replace(LIMITS, max_drafts=3)) == [3] * 5
    assert most_drafts(replace(LIMITS, max_drafts=8)) == [8] * 4 + [3], "40 tokens"
    assert sum(1 + count for count in most_drafts(EngineLimits(1000, 8, 2, 256, 8192, 8))) == MAX_VERIFIED_TOKENS


def test_a_model_that_guesses_for_an_engine_is_given_no_drafts_itself() -> None:
    assert drafter_limits(replace(LIMITS, max_drafts=3), load("llama")).max_drafts == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_the_steps_run_beside_a_pool_that_could_not_hold_them(family: str) -> None:
    loaded, limits = load(family), replace(LIMITS, max_drafts=8)
    cache = KVCache(loaded.kv_shape, limits.num_blocks, limits.block_size, CPU)
    for run in (rehearse, rehearse_small):
        run(build_runner(loaded, cache, limits), limits, loaded.vocab_size)


def launched(limits: EngineLimits, monkeypatch: pytest.MonkeyPatch) -> list[list[ScheduledSequence]]:
    """What the steps of a rehearsal are of, as they are launched."""
    loaded = load("llama")
    runner = build_runner(loaded, KVCache(loaded.kv_shape, limits.num_blocks, limits.block_size, CPU), limits)
    steps: list[list[ScheduledSequence]] = []
    launch = runner.launch

    def note(scheduled: list[ScheduledSequence], watch: LayerWatch | None = None) -> LaunchedStep:
        steps.append(scheduled)
        return launch(scheduled, watch)

    monkeypatch.setattr(runner, "launch", note)
    rehearse(runner, limits, loaded.vocab_size)
    return steps


def test_all_that_draw_are_penalized_for_all_that_was_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [step for step in launched(replace(LIMITS, max_drafts=8), monkeypatch) if step[0].num_draws]
    assert len(steps) > 5
    for step in steps:
        drawing = [item for item in step if item.num_draws]
        adjusting = build_adjusting(step, np.full(len(step), -1))
        num_draws = sum(item.num_draws for item in drawing)
        assert len(adjusting.repeated) == num_draws, "all tokens, of each draw"
        assert adjusting.repeated.counts.max() == max(item.first_draw + item.num_draws - 1 for item in drawing)
        generated = adjusting.repeated.counts.sum() - num_draws
        assert adjusting.generated.counts.sum() == generated, "all but the first token of each"
    assert max(item.first_draw + item.num_draws - 1 for item in steps[-1]) == LIMITS.max_model_len, "drafts"


def test_no_more_of_them_are_than_it_takes_to_fill_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take minutes to start an engine of many long sequences."""
    monkeypatch.setattr(rehearsed, "MAX_CELLS", LIMITS.max_model_len // 2)
    step = launched(LIMITS, monkeypatch)[0]
    assert len(step) == 5 and len(build_adjusting(step, np.full(5, -1)).repeated) == 3


def test_all_that_draw_have_grammars_but_one_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(LIMITS, max_drafts=8)
    steps = [step for step in launched(limits, monkeypatch) if step[0].num_draws]
    for step in steps:
        masking = build_masking(step)
        assert masking is not None and masking.allowed.shape[1] * 8 >= VOCAB_SIZE
        num_free = step[0].num_draws if sum(item.num_draws > 0 for item in step) > 1 else 0
        assert len(masking.draws) == sum(item.num_draws for item in step) - num_free
    assert sum(item.num_draws for item in steps[-1]) == 40, "drafts have masks of their own"


def test_an_engine_gives_the_same_tokens_after_them() -> None:
    engine = build_engine(load("llama"))
    rehearse(runner_of(engine), engine.limits, VOCAB_SIZE)
    rehearse_small(runner_of(engine), engine.limits, VOCAB_SIZE)
    prompt = random_prompt(23)
    assert generate(engine, [greedy("r", prompt, 12)]) == [reference("llama", prompt, 12)]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What is free of a GPU beside the largest steps, in bytes."""
    found = {"bytes": 0}
    monkeypatch.setattr(sizing, "free_beside_largest_steps", lambda loaded, limits: found["bytes"])
    return found


ON_GPU = EngineConfig(max_num_batched_tokens=512, max_num_seqs=4)
# 2 layers, keys and values, 2 heads of 16, float32.
BYTES_PER_BLOCK = 256 * 512


def test_the_pool_takes_what_is_left_beside_steps_and_hand_offs(free: dict[str, int]) -> None:
    loaded = replace(load("llama"), device=torch.device("cuda"))
    free["bytes"] = 2 << 30
    limits = choose_limits(loaded, ON_GPU)
    room = sizing.export_room(limits, BYTES_PER_BLOCK, loaded.device, ON_GPU.hands_over)
    assert room.num_blocks == 2 * 2 + 4 * 2, "two steps of two blocks, and four chunks of a step"
    pool = limits.num_blocks * BYTES_PER_BLOCK
    trial = sizing._TRIAL_BLOCKS * BYTES_PER_BLOCK
    left = free["bytes"] + trial - pool - room.num_blocks * BYTES_PER_BLOCK
    assert sizing._MARGIN_BYTES <= left < sizing._MARGIN_BYTES + BYTES_PER_BLOCK


def test_an_engine_that_hands_nothing_over_keeps_that_room_for_its_pool(free: dict[str, int]) -> None:
    free["bytes"] = 2 << 30
    loaded = replace(load("llama"), device=torch.device("cuda"))
    alone = choose_limits(loaded, ON_GPU.model_copy(update={"hands_over": False}))
    assert alone.num_blocks == choose_limits(loaded, ON_GPU).num_blocks + 2 * 2
    with pytest.raises(InvalidRequestError, match="hands_over is false"):
        build_engine(load("llama"), hands_over=False).prefill(greedy("r", random_prompt(9), 1), 0)


def test_limits_that_leave_nothing_for_kv_are_refused_with_the_numbers(free: dict[str, int]) -> None:
    free["bytes"] = 1 << 30
    loaded = replace(load("llama"), device=torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"1\.00 GiB .* are free .* max_num_batched_tokens \(512\), max_num_seqs \(4\)"
    ):
        choose_limits(loaded, ON_GPU)


def test_steps_that_do_not_fit_are_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. If reserved but")

    monkeypatch.setattr(rehearsal, "KVCache", lambda *_: "a pool")
    monkeypatch.setattr(rehearsal, "build_runner", out_of_memory)
    message = r"steps beside the model and a KV pool of 2 blocks .* max_num_seqs \(5\).* Tried to allocate 9.00 GiB\.$"
    with pytest.raises(ValueError, match=message):
        build_rehearsed(replace(load("llama"), device=torch.device("cuda")), LIMITS)


def test_a_head_that_does_not_fit_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. If reserved but")

    monkeypatch.setattr(rehearsal, "build_head_runner", out_of_memory)
    message = r"a head with its steps, beside the model and a KV pool of 2 blocks .* Tried to allocate 9.00 GiB\.$"
    with pytest.raises(ValueError, match=message):
        build_rehearsed_head(replace(with_head(), device=torch.device("cuda")), LIMITS)


@pytest.mark.parametrize("max_drafts", [0, 3])
def test_what_a_head_takes_is_not_left_to_the_pool(max_drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it where nothing is guessed."""
    limits, built = replace(LIMITS, max_drafts=max_drafts), []
    monkeypatch.setattr(rehearsal, "_build", lambda loaded, limits, rehearsals: built.append("model"))
    monkeypatch.setattr(rehearsal, "build_rehearsed_head", lambda loaded, limits: built.append("head"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: built.append("all of them"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 31))
    assert rehearsal.free_beside_largest_steps(with_head(), limits) == 1 << 30
    assert built == (["model", "head", "all of them"] if max_drafts else ["model", "all of them"])


def test_a_head_is_tried_with_as_many_tokens_and_sequences_as_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = replace(LIMITS, max_drafts=3)
    head = with_head().head
    assert head is not None
    runner = PortableHead(head, limits, CPU)
    seen: list[object] = []
    learn, guess = runner.learn, runner.guess

    def note_learned(states: torch.Tensor, known: KnownTokens) -> None:
        seen.append(len(known.places))
        learn(states, known)

    def note_guessed(states: torch.Tensor, newest: NewestTokens, draws: GuessDraws) -> list[list[int]]:
        seen.append((len(newest.lengths), int(newest.positions.max())))
        return guess(states, newest, draws)

    runner.learn, runner.guess = note_learned, note_guessed  # type: ignore[method-assign]
    masked: list[tuple[int, int]] = []

    def note_masked(self: Masking, logits: torch.Tensor) -> torch.Tensor:
        masked.append((len(self.draws), len(logits)))
        return apply(self, logits)

    apply = Masking.apply
    monkeypatch.setattr(Masking, "apply", note_masked)
    rehearse_head(runner, head, limits)
    assert seen == [40, (5, 99)]
    assert masked == [(4, 5)], "by grammars, of all but one"
