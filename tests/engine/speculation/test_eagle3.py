"""A head of the model guesses: as it would with all of a sequence before it, and no answer changes."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.engine.config import EngineConfig
from deployments.engine.execution.sizing import choose_limits
from deployments.engine.model.check import check_eagle3_pair
from deployments.engine.model.eagle3_files import load_eagle3
from deployments.engine.model.load import LoadedModel, load_model, prepare_model
from deployments.errors import UnsupportedModelError
from deployments.messages import GenerateRequest, SamplingParams
from tests.engine import eagle3_heads
from tests.engine.drafters import lies, mixture, truth
from tests.engine.driving import BLOCK_SIZE, Transcript, build_engine, generate, greedy, hand_over_all, run
from tests.engine.eagle3_heads import guesses, target, weights
from tests.engine.families import CPU, load, random_prompt, small_model
from tests.engine.grammars import END, load_with_tokenizer, regex
from tests.engine.guessing_heads import (
    NUM_TOKENS,
    SETTINGS,
    Helped,
    alone,
    guessing,
    helped,
    in_groups,
    plain,
    requests,
    with_head,
)
from tests.engine.insides import drafter_of, preempt, sequence_of

each = pytest.mark.parametrize("when", [truth, lies, mixture])


@each
@pytest.mark.parametrize("optimized", [False, True], ids=["modules", "compiled"])
def test_guesses_are_those_of_the_head_and_no_answer_changes(when: Callable[[int], bool], optimized: bool) -> None:
    engine = guessing(with_head(optimized=optimized))
    helper = helped(engine, when)
    assert generate(engine, requests()) == plain()
    helper.check()
    stats = engine.stats()
    assert stats.drafted_tokens.total and bool(stats.accepted_tokens.total) == (when is not lies)


def test_a_head_alone_changes_no_answer() -> None:
    engine = guessing()
    assert generate(engine, requests()) == plain()
    assert engine.stats().drafted_tokens.total > 0
    assert [generate(guessing(), [request])[0] for request in requests()] == plain()


def test_guesses_are_as_good_for_sequences_that_lost_their_blocks_and_for_long_prompts() -> None:
    engine = guessing(num_blocks=25, max_num_seqs=3, max_num_batched_tokens=24, enable_prefix_caching=False)
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    assert engine.stats().preemptions > 0
    helper.check()


def test_guesses_are_as_good_where_groups_of_layers_have_blocks_of_their_own() -> None:
    engine = guessing(in_groups(), num_blocks=40, max_num_seqs=3, max_num_batched_tokens=24)
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    assert engine.stats().preemptions > 0
    helper.check()


def test_a_sequence_that_moved_to_other_blocks_is_seen_from_its_first_token_again() -> None:
    engine, transcript = guessing(enable_prefix_caching=False), Transcript()
    helper = helped(engine, truth)
    engine.add(requests()[3])
    while len(transcript.tokens["r3"]) < 6:
        transcript.note(engine.step())
    preempt(engine, sequence_of(engine, "r3"))
    run(engine, transcript)
    assert tuple(transcript.tokens["r3"]) == plain()[3]
    helper.check()


def test_behind_a_hand_off_it_guesses_at_once_by_what_it_sees_itself() -> None:
    decode = guessing(enable_prefix_caching=False)
    helper = helped(decode, mixture)
    assert hand_over_all(build_engine(alone()), decode, requests()) == plain()
    for name, first in (("r0", 13), ("r3", 90), ("r6", 24)):
        own = [entry for entry in helper.guessed if entry[0] == name]
        head = with_head().head
        assert head is not None and own
        for _, begin, known, tokens in own:
            assert begin == first and tokens == guesses(head, known, len(tokens), first)
    helper.guessed.clear()
    assert hand_over_all(build_engine(alone()), decode, requests()[3:4]) == plain()[3:4]
    assert len(helper.guessed[0][2]) == 90 + 2, "behind its first step"


def test_what_is_resumed_is_computed_and_so_seen_whole() -> None:
    engine = guessing()
    helper = helped(engine, mixture)
    resumed = [
        replace(request, generated_token_ids=tokens[:7]) for request, tokens in zip(requests(), plain(), strict=True)
    ]
    assert generate(engine, resumed) == plain()
    helper.check()


def test_what_was_computed_for_a_prefix_is_seen_again_with_its_blocks() -> None:
    engine = guessing()
    prompt = random_prompt(6 * BLOCK_SIZE + 3, seed=9)
    helper = Helped(engine, {}, truth)
    helper._help = lambda sequence, count: (1,) * count  # type: ignore[method-assign]
    first = generate(engine, [greedy("r0", prompt, NUM_TOKENS)])
    num_first = len(helper.guessed)
    assert generate(engine, [greedy("r3", prompt, NUM_TOKENS)]) == first
    assert engine.stats().prefix_hit_tokens == 6 * BLOCK_SIZE and len(helper.guessed) == 2 * num_first
    helper.check()
    # Others have written to the blocks meanwhile: what is found now was computed by the model alone.
    drafter_of(engine)._held.clear()
    helper.guessed.clear()
    assert generate(engine, [greedy("r6", prompt, NUM_TOKENS)]) == first
    helper.check(first=6 * BLOCK_SIZE)


def test_behind_windows_it_sees_what_is_kept(tmp_path: Path) -> None:
    model = small_model("MistralConfig", num_hidden_layers=8, sliding_window=24)
    head = load_eagle3(eagle3_heads.save(tmp_path, weights()), model, model.config)
    loaded = prepare_model(copy.deepcopy(model), "", CPU)
    asked = [greedy(f"r{length}", random_prompt(length, seed=length), NUM_TOKENS) for length in (70, 5, 33)]
    expected = generate(build_engine(loaded), asked)
    engine = guessing(replace(loaded, head=head), max_num_batched_tokens=40)
    helper = Helped(
        engine, {request.request_id: tokens for request, tokens in zip(asked, expected, strict=True)}, mixture
    )
    drafter = drafter_of(engine)
    helper._view = lambda wish: drafter._of(wish).begin + drafter._unseen(wish.sequence, drafter._of(wish))
    assert generate(engine, asked) == expected
    assert max(first for _, first, _, _ in helper.guessed) >= 48, "blocks were given back"
    for name, first, known, tokens in helper.guessed:
        assert tokens == guesses(head, known, len(tokens), first, model), (
            f"{name} at {len(known)}, seen from {first} on"
        )


def test_answers_with_grammars_are_the_same_and_first_guesses_go_by_them() -> None:
    grammar = regex(r"[a-c]{1,3}(-[0-9]{2,4}){2,6}")
    drawn = SamplingParams(64, stop_token_ids=(END,), grammar=grammar)
    asked = [GenerateRequest(f"g{seed}", random_prompt(21, seed=5), replace(drawn, seed=seed)) for seed in range(4)]
    loaded = replace(with_head(), path=load_with_tokenizer("llama").path)
    expected = generate(build_engine(replace(loaded, head=None)), asked)
    engine = guessing(loaded)
    assert generate(engine, asked) == expected
    assert engine.stats().drafted_tokens.total > 0


def test_aborted_sequences_are_forgotten() -> None:
    engine, transcript = guessing(), Transcript()
    engine.add(greedy("r0", (1, 2, 3), NUM_TOKENS))
    engine.add(greedy("r3", (1, 2, 4), 4))
    while "r3" not in transcript.finished:
        transcript.note(engine.step())
    assert set(drafter_of(engine)._progress) == {"r0"}
    engine.abort("r0")
    assert not drafter_of(engine)._progress and engine.num_free_blocks == engine.limits.num_blocks


def test_blocks_of_a_view_that_begins_within_one_are_no_prefix_for_others() -> None:
    """Another sequence with the same prompt sees what this engine computes for itself."""
    decode, prompt = guessing(), random_prompt(3 * BLOCK_SIZE + 3, seed=9)
    helper = Helped(decode, {}, truth)
    helper._help = lambda sequence, count: (1,) * count  # type: ignore[method-assign]
    (first,) = hand_over_all(build_engine(alone()), decode, [greedy("r0", prompt, NUM_TOKENS)])
    helper.check(first=len(prompt))
    helper.guessed.clear()
    # All that is cached is in front of its view, but for the newest of these tokens.
    again = prompt + first[: 2 * BLOCK_SIZE - 3]
    assert generate(decode, [greedy("r3", again, NUM_TOKENS)])[0][:4] == first[2 * BLOCK_SIZE - 3 :][:4]
    cached = decode.stats().prefix_hit_tokens
    assert cached == 4 * BLOCK_SIZE
    helper.check(first=cached)


def test_a_pipelined_engine_guesses_the_same() -> None:
    engine = guessing(is_pipelined=True)
    helper = helped(engine, mixture)
    assert generate(engine, requests()) == plain()
    helper.check()


def test_the_heads_kv_counts_in_the_size_of_the_pool() -> None:
    config = EngineConfig(kv_cache_bytes=1 << 20, block_size=BLOCK_SIZE)
    without = choose_limits(alone(), config).num_blocks
    assert choose_limits(with_head(), config).num_blocks == without * 8 // 9


def test_settings_that_name_a_head_which_was_not_loaded_are_refused() -> None:
    with pytest.raises(ValueError, match=r"speculation\.model is 'beside', and no such model was loaded"):
        build_engine(load("llama"), speculation=SETTINGS)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    target().save_pretrained(folder)
    return str(folder)


def load_pair(model: str, head: str) -> LoadedModel:
    speculation = {"method": "eagle3", "model": head}
    return load_model(EngineConfig.model_validate({"model": model, "device": "cpu", "speculation": speculation}))


@pytest.mark.parametrize("is_old", [False, True], ids=["safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["midlayer.", "layers.0."])
def test_checkpoints_in_both_public_forms_are_loaded(
    tmp_path: Path, model_path: str, is_old: bool, prefix: str
) -> None:
    tensors = {name.replace("midlayer.", prefix): weight.half() if weight.is_floating_point() else weight
               for name, weight in weights().items()}  # fmt: skip
    path = eagle3_heads.save(tmp_path, tensors, is_old=is_old)
    check_eagle3_pair(model_path, path)
    head = load_pair(model_path, path).head
    assert head is not None and head.layers == (2, 4, 5) and head.fc.weight.dtype is torch.float32
    assert torch.equal(head.target_ids, weights()["t2d"].nonzero()[:, 0])
    known = head.logits(torch.randn(2, 64)).isfinite().all(dim=0)
    assert torch.equal(known, weights()["t2d"])


def test_a_head_may_bring_its_own_embedding_and_know_every_token(tmp_path: Path, model_path: str) -> None:
    tensors = weights() | {"embed_tokens.weight": torch.randn(512, 64), "lm_head.weight": torch.randn(512, 64)}
    for name in ("d2t", "t2d"):
        del tensors[name]
    head = load_pair(model_path, eagle3_heads.save(tmp_path, tensors, draft_vocab_size=512)).head
    assert head is not None and torch.equal(head.embed_tokens.weight, tensors["embed_tokens.weight"])  # type: ignore[union-attr]
    assert head.logits(torch.randn(2, 64)).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]}}, (2, 4, 7)),
        ({"eagle_aux_hidden_state_layer_ids": [0, 3, 7]}, (0, 3, 7)),
    ],
    ids=["outputs, as SGLang has them", "inputs, as vLLM has them"],
)
def test_which_layers_it_goes_by_its_configuration_may_say(
    tmp_path: Path, model_path: str, fields: dict[str, Any], layers: tuple[int, ...]
) -> None:
    head = load_pair(model_path, eagle3_heads.save(tmp_path, weights(), **fields)).head
    assert head is not None and head.layers == layers


def test_its_layer_adds_to_normalised_states_where_its_configuration_says_so(tmp_path: Path, model_path: str) -> None:
    states, tokens, positions = torch.randn(1, 64), torch.tensor([3]), torch.tensor([5])
    outs = []
    for number, fields in enumerate(({}, {"norm_before_residual": False}, {"norm_before_residual": True})):
        head = load_pair(model_path, eagle3_heads.save(tmp_path / str(number), weights(), **fields)).head
        assert head is not None
        with torch.no_grad():  # so that the layer gives what it adds to
            head.midlayer.self_attn.o_proj.weight.zero_()
            head.midlayer.mlp.down_proj.weight.zero_()
            outs.append(head(states, tokens, positions, eagle3_heads.Dense()))
            normalised = head.midlayer.hidden_norm(states)
    assert torch.equal(outs[0], states) and torch.equal(outs[1], states)
    assert torch.equal(outs[2], normalised) and not torch.allclose(normalised, states)


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    given = {name.replace("__", "."): weight for name, weight in tensors.items()}
    return {name: weight for name, weight in (weights() | given).items() if weight is not None}


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (changed(fc__weight=torch.zeros(64, 128)), {}, r"fc\.weight is \[64, 128\], must be \[64, 192\]"),
        (
            changed(midlayer__self_attn__q_proj__weight=torch.zeros(64, 64)),
            {},
            r"midlayer\.self_attn\.q_proj\.weight is \[64, 64\], must be \[64, 128\]",
        ),
        (changed(lm_head__weight=None), {}, r"the checkpoint lacks lm_head\.weight, \[96, 64\]"),
        (changed(d2t=None), {}, r"the checkpoint lacks d2t, \[96\]"),
        (changed(d2t=torch.full((96,), 500)), {}, "d2t names tokens twice, or such as the model does not have"),
        (changed(d2t=torch.arange(96).flip(0)), {}, "d2t names tokens twice"),
        (changed(t2d=torch.zeros(96, dtype=torch.bool)), {}, r"t2d is \[96\], must be \[512\]"),
        (changed(more__weight=torch.zeros(3)), {}, "it has more.weight, which heads of this form do not have"),
        (weights(), {"vocab_size": 500}, "vocab_size is 500, the model's is 512"),
        (weights(), {"target_hidden_size": 32}, "target_hidden_size is 32, the model's is 64"),
        (weights(), {"num_hidden_layers": 2}, "model_type is llama with 2 layers, must be llama with 1"),
        (weights(), {"hidden_size": 32}, "hidden_size is 32, the model's is 64, and it has no embed_tokens of its own"),
        (
            weights(),
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 8]},
            r"it takes the inputs of layers \[1, 2, 8\], must be 3 of the model's 8",
        ),
        *[
            (
                weights(),
                {"eagle_aux_hidden_state_layer_ids": ids},
                f"layer_ids is {re.escape(repr(ids))}, must be a list",
            )
            for ids in ("123", 5, [[1], 2, 3], [1.5, 2, 3], [True, 2, 3])
        ],
        (weights(), {"eagle_config": [1]}, r"eagle_config is \[1\], must be an object"),
        (
            weights(),
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": "xyz"}},
            r"eagle_config\.eagle_aux_hidden_state_layer_ids is 'xyz', must be a list of 3 numbers of layers",
        ),
        *[
            (
                weights(),
                {"draft_vocab_size": size},
                f"draft_vocab_size is {size!r}, must be a whole number of at least 1",
            )
            for size in (-1, "x", 96.0)
        ],
        (weights(), {"norm_before_residual": "x"}, "norm_before_residual is 'x', must be true or false"),
        (weights(), {"rope_scaling": {"rope_type": "nope"}}, "rope_scaling is {'rope_type': 'nope'}: KeyError"),
    ],
)
def test_a_head_of_another_form_is_refused_in_one_line(
    tmp_path: Path, model_path: str, tensors: dict[str, torch.Tensor], fields: dict[str, Any], message: str
) -> None:
    path = eagle3_heads.save(tmp_path, tensors, **fields)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_pair(model_path, path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedModelError, match=message):
        check_eagle3_pair(model_path, path)


@pytest.mark.parametrize(
    ("names", "times", "message"),
    [
        (["midlayer.mlp.up_proj.weight"], math.nan, r"weights that are not finite as float32: .*up_proj"),
        (["midlayer.self_attn.q_proj.weight", "midlayer.self_attn.k_proj.weight"], 1e21, "computes what is not finite"),
        (["lm_head.weight"], 1e38, r"computes what is not finite from its first token on, in float32"),
    ],
)
def test_a_head_that_computes_what_is_not_finite_is_refused(
    tmp_path: Path, model_path: str, names: list[str], times: float, message: str
) -> None:
    tensors = weights()
    tensors |= {name: tensors[name] * times for name in names}
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_pair(model_path, eagle3_heads.save(tmp_path, tensors))
    assert "\n" not in str(caught.value)
