"""What the engine cannot run it refuses, at start-up or at the door, by the name of the fault and with numbers."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deployments.engine.config import EngineConfig, EngineLimits
from deployments.engine.execution import sizing
from deployments.engine.execution.sizing import choose_limits
from deployments.engine.model.check import check_weights_of
from deployments.engine.model.load import load_model, prepare_model
from deployments.engine.model.served import check_config
from deployments.engine.scheduling.checks import check_request
from deployments.errors import InvalidRequestError, RequestTooLargeError, UnsupportedModelError
from deployments.kv_groups import KVGroup
from deployments.messages import GenerateRequest, SamplingParams
from tests.engine.driving import Taken, build_engine, greedy, hand_over, run
from tests.engine.families import CPU, WINDOW, continue_greedily, load, random_prompt
from tests.tiny_models import SMALL

_SMALL = {key: value for key, value in SMALL.items() if key != "head_dim"}  # some cannot take one


def build(name: str, **settings: object) -> PreTrainedModel:
    """A small random model of the configuration class `name`."""
    config: PretrainedConfig = getattr(transformers, name)(**settings)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("T5Config", {}, "t5 is an encoder-decoder model"),
        ("MambaConfig", {"num_hidden_layers": 2}, "mamba has layers of type linear_attention"),
        ("JambaConfig", _SMALL | {"num_hidden_layers": 8}, "jamba has layers of type linear_attention"),
        ("BambaConfig", _SMALL | {"attn_layer_indices": [1]}, "bamba has layers of type linear_attention"),
        ("Qwen3NextConfig", _SMALL | {"num_hidden_layers": 4}, "qwen3_next has layers of type linear_attention"),
        ("Lfm2Config", _SMALL | {"layer_types": ["conv", "full_attention"]}, "lfm2 has layers of type conv"),
        ("Qwen2VLConfig", {}, r"qwen2_vl takes multimodal inputs \(vision_config\)"),
        ("ViTConfig", {}, "vit is not a causal language model"),
    ],
)
def test_a_configuration_gives_the_reason_away(name: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        check_config(getattr(transformers, name)(**settings))


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        # Differential attention attends twice in a layer, but has one place for its KV.
        ("DiffLlamaConfig", _SMALL, r"attention ran in layers \[0, 0, 1, 1\]"),
        # ALiBi: positions are in a bias on the scores, outside of the attention interface.
        ("BloomConfig", {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4}, "bloom"),
        ("MptConfig", {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4}, "mpt"),
        ("RwkvConfig", {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2}, "rwkv"),
        ("OpenAIGPTConfig", {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}, "openai-gpt"),
        ("BertConfig", _SMALL, "BertSelfAttention lets tokens see later ones"),
        ("RobertaConfig", _SMALL | {"is_decoder": True}, "roberta does not count positions from 0"),
        ("StableLmConfig", _SMALL, "StableLmAttention is not given the model's keyword arguments"),
        (
            "Qwen2MoeConfig",
            _SMALL | {"num_experts": 4, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
            "qwen2_moe: layers .* have a sliding window of 24 tokens",
        ),
        (
            "DeepseekV3Config",
            _SMALL | {"num_key_value_heads": 4, "n_routed_experts": 8, "first_k_dense_replace": 2}
            | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16},
            "deepseek_v3: heads of keys and values must have one size, those of layer 0 have 24 and 16",
        ),
    ],
)  # fmt: skip
def test_a_short_run_gives_the_reason_away(name: str, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        prepare_model(build(name, **settings), "", CPU)


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("DiffLlamaConfig", _SMALL, r"diffllama has 2 layers, but attention ran in layers \[0, 0, 1, 1\]"),
        ("StableLmConfig", _SMALL, "StableLmAttention is not given the model's keyword arguments"),
        ("MistralConfig", _SMALL | {"sliding_window": 1}, "have a sliding window of 1 tokens, must be at least 2"),
        (
            "Qwen2MoeConfig",
            _SMALL | {"num_experts": 4, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
            "qwen2_moe: layers .* have a sliding window of 24 tokens",
        ),
    ],
)
def test_layers_are_judged_before_there_are_numbers(
    name: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    build(name, **settings).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        check_weights_of(str(tmp_path))
    assert str(caught.value).startswith(f"model {str(tmp_path)!r}: ")


def test_a_model_that_cannot_run_without_numbers_is_left_to_its_engine(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # asks how long the longest sequence is
    build("LlamaConfig", **_SMALL | {"rope_parameters": rope}).save_pretrained(tmp_path)
    check_weights_of(str(tmp_path))


def test_a_token_that_reaches_its_neighbour_outside_of_attention_is_noticed() -> None:
    model = build("LlamaConfig", **_SMALL)

    def shift(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(1, dims=1)

    model.model.layers[0].mlp.register_forward_hook(shift)
    with pytest.raises(UnsupportedModelError, match="mixes neighbouring tokens outside of its attention layers"):
        prepare_model(model, "", CPU)


def test_outputs_that_are_not_finite_are_not_taken_for_something_else() -> None:
    model = build("LlamaConfig", **_SMALL)
    model.model.norm.variance_epsilon = -10.0
    with pytest.raises(
        UnsupportedModelError, match="llama computes what is not finite from its first tokens on, in float32"
    ):
        prepare_model(model, "", CPU)


def test_a_model_that_cannot_run_is_refused_with_the_reason() -> None:
    model = build("Glm4MoeConfig", **_SMALL | {"n_routed_experts": 4, "n_group": 1, "first_k_dense_replace": 1})
    model.model.layers[1].mlp.top_k = 9
    with pytest.raises(
        UnsupportedModelError, match="glm4_moe does not run: RuntimeError: selected index k out of range"
    ):
        prepare_model(model, "", CPU)


@pytest.mark.parametrize("window", [1, 0, -4])
def test_a_window_without_another_token_is_refused(window: int) -> None:
    message = rf"layers \[0, 1\] have a sliding window of {window} tokens, must be at least 2"
    with pytest.raises(UnsupportedModelError, match=message):
        prepare_model(build("MistralConfig", **_SMALL | {"sliding_window": window}), "", CPU)


@pytest.mark.parametrize("length", [8, 9, 16, 40])
def test_a_hand_off_ends_with_the_narrowest_window_that_is_taken(length: int) -> None:
    model = build("MistralConfig", **_SMALL | {"sliding_window": 2, "eos_token_id": None})
    loaded, prompt = prepare_model(copy.deepcopy(model), "", CPU), random_prompt(length)
    got = hand_over(build_engine(loaded, max_num_batched_tokens=16), build_engine(loaded), [prompt], 6)
    assert got == [continue_greedily(model, prompt, 6)]


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"nowhere\.gguf"):
        load_model(EngineConfig(model="/nowhere.gguf"))


# --- requests


def test_a_prompt_and_output_longer_than_the_model_takes_is_refused_with_the_numbers() -> None:
    engine = build_engine(load("llama"), max_model_len=64)
    with pytest.raises(RequestTooLargeError, match=r"60 prompt tokens \+ 5 to generate = 65, the model takes 64"):
        engine.add(greedy("r", random_prompt(60), 5))
    with pytest.raises(RequestTooLargeError, match="65, the model takes 64"):
        engine.prefill(greedy("r", random_prompt(60), 5), 0)
    engine.add(greedy("r", random_prompt(60), 4))
    assert run(engine).finished == {"r"}


def test_a_request_that_needs_more_blocks_than_there_are_is_refused_with_the_numbers() -> None:
    engine = build_engine(load("llama"), num_blocks=4)
    with pytest.raises(RequestTooLargeError, match=r"need 5 KV blocks, this engine has 4 of 8 tokens"):
        engine.add(greedy("r", random_prompt(30), 3))
    engine.add(greedy("r", random_prompt(30), 2))
    assert run(engine).finished == {"r"}, "one that takes the whole pool runs"


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message", "param"),
    [
        ((), 1, "the prompt is empty", "prompt"),
        ((1, 512, 3), 1, r"token id 512 is not in the vocabulary \(0 to 511\)", "prompt"),
        ((1, -1), 1, "token id -1 is not in the vocabulary", "prompt"),
        ((1,), 0, "max_tokens is 0, must be at least 1", "max_tokens"),
    ],
)
def test_a_wrong_request_is_refused_and_leaves_nothing(
    prompt: tuple[int, ...], max_tokens: int, message: str, param: str
) -> None:
    engine = build_engine(load("llama"))
    request = GenerateRequest("r", prompt, SamplingParams(max_tokens=max_tokens))
    for queue in (lambda: engine.add(request), lambda: engine.prefill(request, 0)):
        with pytest.raises(InvalidRequestError, match=message) as caught:
            queue()
        assert caught.value.param == param
    assert engine.num_sequences == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 2**64 - 1},
        {"top_k": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"seed": 2**64},
    ],
    ids=str,
)
def test_a_draw_that_no_kernel_could_make_is_refused_at_the_door(sampling: dict[str, Any]) -> None:
    (name,) = sampling
    request = GenerateRequest("r", (1, 2), SamplingParams(max_tokens=1, **sampling))
    with pytest.raises(InvalidRequestError, match=f"{name} is .*, must be from") as refused:
        check_request(request, EngineLimits(64, 16, 8, 4, 64), vocab_size=128)
    assert refused.value.param == name


def test_an_id_in_use_is_refused_until_its_last_chunk_is_released() -> None:
    engine = build_engine(load("llama"))
    request = greedy("r", random_prompt(10), 4)
    engine.prefill(request, 0)
    with pytest.raises(InvalidRequestError, match="request id 'r' is already in use"):
        engine.add(request)
    taken = Taken(engine, "r")
    run(engine)
    assert engine.num_sequences == 0
    with pytest.raises(InvalidRequestError, match="request id 'r' is already in use"):
        engine.prefill(request, 0)
    taken.handoff.release(taken.chunks[0].index)
    engine.add(request)


@pytest.mark.parametrize("first_block", [-1, 2])
def test_a_prefill_that_would_send_nothing_is_refused(first_block: int) -> None:
    engine = build_engine(load("llama"))
    with pytest.raises(InvalidRequestError, match=rf"first_block is {first_block}, must be from 0 to 1"):
        engine.prefill(greedy("r", random_prompt(16), 4), first_block)


# --- sizing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 1025}, "max_model_len is 1025, the model takes at most 1024"),
        ({"max_num_batched_tokens": 7, "max_num_seqs": 8}, r"max_num_batched_tokens is 7, .* max_num_seqs \(8\)"),
        ({"kv_cache_bytes": 100}, "kv_cache_bytes is 100, one block alone takes 8192"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_limits(load("llama"), EngineConfig(**settings))


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("num_blocks", 2**31 - 1),
        ("block_size", 2**31 - 1),
        ("max_model_len", 2**31 - 1),
        ("max_num_seqs", 2**15),
        ("max_num_batched_tokens", 2**23),
        ("num_threads", 4096),
    ],
)
def test_what_no_tensor_holds_is_refused_with_the_bound(name: str, bound: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n.* less than or equal to {bound} .*input_value={10**20}"):
        EngineConfig.model_validate({name: 10**20})
    assert EngineConfig.model_validate({name: bound}).model_dump()[name] == bound


def test_a_pool_of_more_places_than_kernels_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "total_memory", lambda: 1 << 60)
    with pytest.raises(
        ValueError, match="num_blocks is 134217728: 2147483648 tokens, in blocks of 16, must be 2147483"
    ):
        choose_limits(load("llama"), EngineConfig(num_blocks=2**27))


def test_the_pool_takes_the_bytes_it_was_given() -> None:
    # 2 layers, keys and values, 2 heads of 16, float32: 512 bytes a token.
    assert load("llama").kv_shape.bytes_per_token == 512
    limits = choose_limits(load("llama"), EngineConfig(kv_cache_bytes=1 << 20))
    assert (limits.block_size, limits.num_blocks) == (16, (1 << 20) // (16 * 512))


def test_the_kv_shape_is_what_the_layers_hand_over() -> None:
    one = KVGroup((0, 1), 2, 16)
    several = KVGroup((1,), 2, 16), KVGroup((0,), 2, 16, WINDOW), KVGroup((2,), 2, 16, WINDOW)
    for family, groups in (("llama", (one,)), ("gemma2", several)):
        shape = load(family).kv_shape
        assert (shape.groups, shape.dtype) == (groups, torch.float32)


def test_layers_with_other_kv_than_the_rest_are_named() -> None:
    model = build("LlamaConfig", **_SMALL)
    attention = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, torch.nn.Linear(attention.k_proj.in_features, 16, bias=False))
    with pytest.raises(UnsupportedModelError, match=r"layers \[0\]: 2 heads of 16; layers \[1\]: 1 heads of 16"):
        prepare_model(model, "", CPU)


def test_blocks_that_the_attention_on_a_gpu_cannot_read_are_refused() -> None:
    loaded = replace(load("llama"), has_cuda_layers=True)
    with pytest.raises(ValueError, match="block_size is 128, must be a multiple of 256 on a GPU"):
        choose_limits(loaded, EngineConfig(block_size=128))
    assert choose_limits(loaded, EngineConfig(block_size=512)).block_size == 512
