"""A smaller model guesses: no answer changes, whatever its guesses are worth, and its KV comes and goes with blocks."""

import copy
import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deployments.engine.config import EngineConfig
from deployments.engine.engine import Engine
from deployments.engine.execution.sizing import choose_limits
from deployments.engine.model.check import check_pair
from deployments.engine.model.load import LoadedModel, load_model, prepare_model
from deployments.engine.scheduling.run import ScheduledSequence
from deployments.engine.speculation import draft_model
from deployments.errors import UnsupportedModelError
from deployments.messages import Adjustments, GenerateRequest, SamplingParams
from tests.api.fakes import build_tokenizer
from tests.engine.driving import BLOCK_SIZE, Transcript, build_engine, generate, greedy, hand_over_all, run
from tests.engine.families import CPU, build_model, load, random_prompt
from tests.engine.insides import drafter_of, preempt, sequence_of
from tests.tiny_models import small_config

NUM_TOKENS = 24
SAMPLINGS = [
    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.8, top_p=0.9, seed=3, num_logprobs=1),
    SamplingParams(
        max_tokens=NUM_TOKENS, temperature=1.0, seed=4, adjustments=Adjustments(((5, 2.0),), 1.2, 0.5, 0.5, 4)
    ),
]
SETTINGS = {"method": "draft_model", "model": "beside", "is_adaptive": False}


@cache
def near() -> LoadedModel:
    """Hardly another model than `llama`."""
    model = copy.deepcopy(build_model("llama"))
    torch.manual_seed(5)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.add_(0.05 * weights.std() * torch.randn_like(weights))
    return prepare_model(model, "", CPU)


def guessing(drafter: LoadedModel, model: str = "llama", **overrides: Any) -> Engine:
    settings = SETTINGS | overrides.pop("speculation", {})
    return build_engine(replace(load(model), drafter=drafter), speculation=settings, **overrides)


def requests() -> list[GenerateRequest]:
    prompts = [random_prompt(13, seed=1), random_prompt(40, seed=2), (3, 4, 5, 6) * 6]
    return [
        GenerateRequest(f"r{number}", prompt, sampling)
        for number, (prompt, sampling) in enumerate(itertools.product(prompts, SAMPLINGS))
    ]


@cache
def plain() -> list[tuple[int, ...]]:
    return generate(build_engine(load("llama")), requests())


def share_right(engine: Engine) -> float:
    stats = engine.stats()
    assert stats.drafted_tokens.total > 0
    return stats.accepted_tokens.total / stats.drafted_tokens.total


def count_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each step of the small model, from now on."""
    counts: list[int] = []
    runner = drafter_of(engine)._runner
    launch = runner.launch

    def counting(scheduled: list[ScheduledSequence]) -> Any:
        counts.append(sum(item.num_tokens for item in scheduled))
        return launch(scheduled)

    monkeypatch.setattr(runner, "launch", counting)
    return counts


def test_a_model_that_guesses_for_itself_is_always_right_and_saves_steps() -> None:
    engine = guessing(load("llama"), max_num_seqs=16, max_num_batched_tokens=1024)
    assert generate(engine, requests()) == plain()
    assert share_right(engine) == 1
    assert engine.stats().steps <= 3 + NUM_TOKENS / 9 + 1, "eight drafts and the token behind them each"


def test_a_model_that_knows_nothing_changes_no_answer() -> None:
    engine = guessing(load("qwen3"))
    assert generate(engine, requests()) == plain()
    assert share_right(engine) < 0.1


def test_guesses_are_as_good_for_sequences_that_lost_their_blocks() -> None:
    engine = guessing(load("llama"), num_blocks=14, max_num_seqs=3)
    assert generate(engine, requests()) == plain()
    assert engine.stats().preemptions > 0 and share_right(engine) == 1


def test_a_sequence_that_moved_to_other_blocks_is_computed_anew_there() -> None:
    engine, transcript = guessing(load("llama"), enable_prefix_caching=False), Transcript()
    engine.add(greedy("r0", random_prompt(40, seed=2), NUM_TOKENS))
    while len(transcript.tokens["r0"]) < 3:
        transcript.note(engine.step())
    preempt(engine, sequence_of(engine, "r0"))
    engine.add(greedy("between", random_prompt(30, seed=8), NUM_TOKENS))
    run(engine, transcript)
    assert share_right(engine) == 1


def test_guesses_are_as_good_behind_a_hand_off_and_of_what_is_resumed() -> None:
    decode = guessing(load("llama"), enable_prefix_caching=False)
    assert hand_over_all(build_engine(load("llama")), decode, requests()) == plain()
    assert share_right(decode) == 1
    resumed = [
        replace(request, generated_token_ids=tokens[:7]) for request, tokens in zip(requests(), plain(), strict=True)
    ]
    engine = guessing(load("llama"))
    assert generate(engine, resumed) == plain()
    assert share_right(engine) == 1


def test_what_was_computed_for_a_prefix_is_found_again_with_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = guessing(load("llama"))
    prompt = random_prompt(6 * BLOCK_SIZE + 3, seed=9)
    counts = count_runs(engine, monkeypatch)
    first = generate(engine, [greedy("first", prompt, NUM_TOKENS)])
    assert counts[0] > 6 * BLOCK_SIZE
    counts.clear()
    assert generate(engine, [greedy("again", prompt, NUM_TOKENS)]) == first
    assert counts[0] < BLOCK_SIZE and share_right(engine) == 1
    counts.clear()
    # Others have written to the blocks meanwhile: what is found now was computed by the large model alone.
    drafter_of(engine)._held.clear()
    assert generate(engine, [greedy("once more", prompt, NUM_TOKENS)]) == first
    assert counts[0] > 6 * BLOCK_SIZE and share_right(engine) == 1


def test_blocks_that_others_have_used_since_hold_nothing_of_the_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = guessing(load("llama"), num_blocks=11)
    prompts = [random_prompt(6 * BLOCK_SIZE + 3, seed=seed) for seed in (9, 10, 9, 10)]
    for number, prompt in enumerate(prompts):
        generate(engine, [greedy(f"r{number}", prompt, NUM_TOKENS)])
    assert share_right(engine) == 1
    drafter = drafter_of(engine)
    assert len(drafter._held) <= 11 and not drafter._progress


def test_a_long_prompt_is_caught_up_with_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = guessing(load("llama"))  # a quarter of 256 tokens at once
    counts = count_runs(engine, monkeypatch)
    requests = [greedy("long", random_prompt(200, seed=3), NUM_TOKENS), greedy("short", (1, 2, 3), NUM_TOKENS)]
    assert generate(engine, requests) == generate(build_engine(load("llama")), requests)
    assert max(counts) == 64 and sum(counts) > 200 + 2 * NUM_TOKENS - 9 and share_right(engine) == 1


def test_guesses_are_drawn_with_the_noise_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [
        GenerateRequest(f"r{seed}", random_prompt(13, seed=seed), SamplingParams(max_tokens=40, seed=seed))
        for seed in range(8)
    ]
    shares = []
    for changes in ({}, {"seed": 77}, {"temperature": 0.0}):
        as_drafted = draft_model._as_drafted

        def changed(request: GenerateRequest, changes: Any = changes, as_drafted: Any = as_drafted) -> GenerateRequest:
            request = as_drafted(request)
            return replace(request, sampling=replace(request.sampling, **changes))

        with monkeypatch.context() as patch:
            patch.setattr(draft_model, "_as_drafted", changed)
            engine = guessing(near(), speculation={"max_drafts": 1})
            assert generate(engine, drawn) == generate(build_engine(load("llama")), drawn)
        shares.append(share_right(engine))
    same_noise, other_noise, likeliest = shares
    assert same_noise > 0.6 > 1.5 * max(other_noise, likeliest)


def test_a_sequence_too_long_for_the_small_model_goes_on_without_guesses() -> None:
    short = replace(load("llama"), max_model_len=30)
    engine = guessing(short)
    assert generate(engine, requests()) == plain()
    assert share_right(engine) == 1
    engine = guessing(short)
    generate(engine, [greedy("long", random_prompt(31, seed=1), NUM_TOKENS)])
    assert engine.stats().drafted_tokens.total == 0


@pytest.mark.parametrize("model", ["phi3_longrope", "llama_dynamic"])
def test_a_small_model_whose_positions_depend_on_the_length_is_followed(model: str) -> None:
    engine = guessing(load(model), model=model)
    asked = [greedy(f"r{length}", random_prompt(length, seed=length), 40) for length in (10, 30, 60)]
    assert generate(engine, asked) == generate(build_engine(load(model)), asked)
    assert share_right(engine) > 0.8


def test_a_model_whose_layers_have_blocks_of_their_own_is_guessed_for_by_those_of_the_first_group() -> None:
    model = load("gemma2")
    engine = guessing(replace(model, kv_shape=model.kv_shape.keeping_all), model="gemma2", num_blocks=60)
    asked = [greedy(f"r{length}", random_prompt(length, seed=length), 40) for length in (10, 30, 60)]
    assert generate(engine, asked) == generate(build_engine(model), asked)
    assert share_right(engine) > 0.8


def test_the_small_models_kv_counts_in_the_size_of_the_pool() -> None:
    config = EngineConfig(kv_cache_bytes=1 << 20, block_size=BLOCK_SIZE)
    alone = choose_limits(load("llama"), config).num_blocks
    assert choose_limits(replace(load("llama"), drafter=load("llama")), config).num_blocks == alone // 2


def save(folder: Path, vocab_size: int = 512, token: str = "a", kind: str = "LlamaConfig", **changes: object) -> Path:
    """A model with a tokenizer that knows this token in place of `a`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind, vocab_size=vocab_size, **changes))
    model.save_pretrained(folder)
    build_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"a":', f'"{token}":'))
    return folder


def test_the_model_is_loaded_beside_the_other_one(tmp_path: Path) -> None:
    speculation = {"method": "draft_model", "model": str(save(tmp_path / "small"))}
    config = EngineConfig.model_validate({"model": str(save(tmp_path / "large")), "speculation": speculation})
    loaded = load_model(config.model_copy(update={"device": "cpu"}))
    assert loaded.drafter is not None and loaded.drafter.path == str(tmp_path / "small")
    check_pair(str(tmp_path / "large"), str(tmp_path / "small"))


def test_a_small_model_of_which_some_layers_have_a_window_keeps_all_in_one_group(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    path = str(save(tmp_path / "both", kind="Qwen2Config", **changes))
    settings = {"model": path, "device": "cpu", "speculation": SETTINGS | {"model": path}}
    loaded = load_model(EngineConfig.model_validate(settings))
    assert loaded.kv_shape.windows == (None, 8)
    assert loaded.drafter is not None and loaded.drafter.kv_shape.windows == (None,)
    engine = build_engine(loaded, speculation=SETTINGS)
    asked = [greedy(f"r{length}", random_prompt(length, seed=length), 40) for length in (10, 30)]
    assert generate(engine, asked) == generate(build_engine(replace(loaded, drafter=None)), asked)
    assert share_right(engine) > 0.8


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"vocab_size": 520}, "a vocabulary of 520 tokens, the model one of 512"),
        ({"token": "zz"}, "token 97 is 'zz' there and 'a' here"),
    ],
)
def test_a_model_with_another_vocabulary_is_refused_early_and_late(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    large, small = str(save(tmp_path / "large")), str(save(tmp_path / "small", **other))
    with pytest.raises(UnsupportedModelError, match=message):
        check_pair(large, small)
    speculation = {"method": "draft_model", "model": small}
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(EngineConfig.model_validate({"model": large, "speculation": speculation}))


def test_settings_that_name_a_model_which_was_not_loaded_are_refused() -> None:
    with pytest.raises(ValueError, match=r"speculation\.model is 'beside', and no such model was loaded"):
        build_engine(load("llama"), speculation=SETTINGS)
