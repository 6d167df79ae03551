"""A checkpoint's config.json is understood, or refused by the field that is wrong and what it must be."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from deployments.engine.model import config
from deployments.engine.model.check import check_weights_of
from deployments.engine.model.config import read_config, read_values
from deployments.errors import UnsupportedModelError
from tests.engine.families import build_model, continue_greedily, small_model
from tests.engine.model.checkpoints import PROMPT, change_config, load, refusal, tokens_of


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": "1e-6", "hidden_size": 64.0, "num_hidden_layers": "2"},
        {"attention_dropout": 0, "max_position_embeddings": 1024.0},
        {"tie_word_embeddings": "false", "vocab_size": "512"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": None, "mscale": 1, "note": "stray"}},
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": "10000"},
        {"sliding_window": "2048", "return_dict": False, "num_labels": 10**12, "id2label": 3, "problem_type": "x"},
        {"num_key_value_heads": 2.0, "head_dim": "16", "pretraining_tp": "1", "unknown_key": {"a": [1]}},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_values_of_the_wrong_type_and_one_meaning_are_understood(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


def test_old_names_of_rope_parameters_mean_what_the_new_ones_do(folder: Path) -> None:
    change_config(folder, rope_parameters=None, rope_theta=10000, rope_scaling={"type": "linear", "factor": "2"})
    scaled: Any = build_model("llama").config.to_dict()
    scaled |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**scaled))
    model.load_state_dict(build_model("llama").state_dict())
    assert tokens_of(folder) == continue_greedily(model.eval(), PROMPT, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": "small"}, "config.json: rms_norm_eps is 'small': "),
        ({"rms_norm_eps": None}, "config.json: rms_norm_eps is None: "),
        ({"num_hidden_layers": 2.5}, "config.json: num_hidden_layers is 2.5: "),
        ({"hidden_size": [64]}, "config.json: hidden_size is [64]: "),
        ({"num_attention_heads": 0}, "config.json: num_attention_heads is 0: "),
        ({"hidden_act": "nope"}, "config.json: hidden_act is 'nope': "),
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}, "config.json: rope_parameters is {'rope_type"),
        ({"rope_parameters": {"rope_type": "linear"}}, "config.json: rope_parameters is {'rope_type': 'linear'"),
        ({"rope_parameters": "linear"}, "config.json: rope_parameters is 'linear': "),
        ({"dtype": "floaty"}, "config.json: dtype is 'floaty': "),
        ({"dtype": 5}, "config.json: dtype is 5: "),
        ({"dtype": "manual_seed"}, "config.json: dtype is 'manual_seed': "),
        ({"rms_norm_eps": math.nan}, "config.json: rms_norm_eps is nan: not a finite number"),
        ({"rms_norm_eps": "Infinity"}, "config.json: rms_norm_eps is inf: not a finite number"),
        ({"rms_norm_eps": 10**400}, "config.json: rms_norm_eps is 1000"),
        ({"max_position_embeddings": 0}, "config.json: max_position_embeddings is 0: must be greater than 0"),
        ({"max_position_embeddings": "-5"}, "config.json: max_position_embeddings is -5: must be greater than 0"),
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers is -1: must be greater than 0"),
        ({"rope_theta": 0, "rope_parameters": None}, "config.json: rope_theta is 0.0: must be greater than 1"),
        ({"rope_theta": None, "rope_parameters": None}, "config.json: rope_theta is None: "),
        ({"rope_theta": math.nan, "rope_parameters": None}, "config.json: rope_theta is nan: not a finite number"),
        ({"rope_parameters": {"rope_theta": 0}}, "config.json: rope_parameters.rope_theta is 0.0: must be"),
        ({"rope_parameters": {"short": [1, math.nan]}}, "config.json: rope_parameters.short[1] is nan: not a"),
        ({"rms_norm_eps": -1}, "config.json: rms_norm_eps is -1.0: must be greater than 0 and less than 0.1"),
        ({"rms_norm_eps": 0.5}, "config.json: rms_norm_eps is 0.5: must be greater than 0 and less than 0.1"),
        ({"rms_norm_eps": 0}, "config.json: rms_norm_eps is 0.0: must be greater than 0 and less than 0.1"),
        (
            {"base_model_tp_plan": 3},
            "config.json: base_model_tp_plan is 3: not what transformers keeps under that name",
        ),
        ({"base_model_pp_plan": [1]}, "config.json: base_model_pp_plan is [1]: not what transformers keeps under"),
        ({"to_dict": {}}, "config.json: to_dict is {}: not what transformers keeps under that name"),
        ({"dtype": "int8"}, "config.json: dtype is 'int8': not a type of floating-point numbers"),
        ({"num_key_value_heads": 3}, "config.json: num_key_value_heads is 3: must divide num_attention_heads, 4"),
        ({"num_key_value_heads": 0}, "config.json: num_key_value_heads is 0: must be greater than 0"),
        ({"max_position_embeddings": 10**12}, "config.json: max_position_embeddings is 1000000000000: must be greater"),
        (
            {"rope_parameters": {"rope_theta": 1}},
            "config.json: rope_parameters.rope_theta is 1.0: must be greater than 1",
        ),
        ({"nested": json.loads('{"a":' * 900 + "1" + "}" * 900)}, "config.json is nested too deeply"),
        ({"quantization_config": {"quant_method": "nope"}}, "config.json: quantization_config is {'quant_method': 'no"),
        ({"quantization_config": {}}, "config.json: quantization_config is {}: "),
        ({"quantization_config": 5}, "config.json: quantization_config is 5: "),
        ({"sliding_window": [64]}, "config.json: sliding_window is [64]: not a number of tokens"),
        (
            {"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]},
            "config.json: sliding_window is None: must be a number of tokens, for layer_types has sliding_attention",
        ),
        ({"sliding_window": "wide"}, "config.json: sliding_window is 'wide': not a number of tokens"),
        ({"model_type": None}, "config.json: model_type is missing"),
        ({"model_type": 7}, "config.json: model_type is 7, unknown to transformers"),
        ({"model_type": "newer"}, "config.json: model_type is 'newer', unknown to transformers"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_field_that_makes_no_model_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert refusal(folder).startswith(message)


LEFTOVERS: dict[str, Any] = {"attn_logit_softcapping": 0.0, "final_logit_softcapping": -1.0, "query_pre_attn_scalar": 0}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_caps_and_scalings_of_nothing_are_refused_where_a_model_has_them(tmp_path: Path, name: str) -> None:
    small_model("Gemma2Config").save_pretrained(tmp_path)
    change_config(tmp_path, **{name: LEFTOVERS[name]})
    assert refusal(tmp_path) == f"config.json: {name} is {LEFTOVERS[name]}: must be greater than 0"


def test_fields_that_a_model_does_not_have_say_nothing(folder: Path) -> None:
    change_config(folder, **LEFTOVERS, sliding_window=24)
    check_weights_of(str(folder))
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


@pytest.mark.parametrize("window", [2**31 - 1, 2**40, 2**63])
def test_a_window_wider_than_any_text_is_none(tmp_path: Path, window: int) -> None:
    model = small_model("MistralConfig", sliding_window=None)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, sliding_window=window)
    check_weights_of(str(tmp_path))
    assert tokens_of(tmp_path) == continue_greedily(model, PROMPT, 6)


def test_of_more_fields_than_a_model_has_none_is_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try takes as long as there are fields: 3,000 took a minute and a half."""
    change_config(folder, hidden_act="of my own")
    assert "hidden_act is 'of my own'" in refusal(folder)
    tried: list[str] = []
    monkeypatch.setattr(config, "_succeeds", lambda _attempt, _values, name: tried.append(name))
    change_config(folder, **{f"unknown_{number}": number for number in range(300)})
    assert refusal(folder).startswith("config.json: ") and not tried


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "config.json: num_hidden_layers is 1000000000000: must be greater than 0, and"),
        (
            {"num_hidden_layers": 9000},
            "config.json: num_hidden_layers is 9000, but the checkpoint has the weights of 2",
        ),
        ({"hidden_size": 10**12}, "config.json: hidden_size is 1000000000000, but the checkpoint's largest weight is "),
        (
            {"head_dim": 10**9},
            "config.json: head_dim is 1000000000, but the checkpoint's largest weight is lm_head.wei",
        ),
        (
            {"hidden_size": 128},
            "other shapes than config.json says (hidden_size is 128): lm_head.weight ([512, 64] in ",
        ),
        (
            {"head_dim": 40},
            "other shapes than config.json says (num_attention_heads is 4, num_key_value_heads is 2, head",
        ),
        ({"vocab_size": 10**12}, "other shapes than config.json says (vocab_size is 1000000000000): lm_head.weight"),
        ({"intermediate_size": 10**12}, "other shapes than config.json says (intermediate_size is 1000000000000): mod"),
        ({"num_attention_heads": 8}, "other shapes than config.json says (num_attention_heads is 8, head_dim is 16): "),
        ({"num_key_value_heads": 1}, "other shapes than config.json says (num_key_value_heads is 1, head_dim is 16): "),
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_allocated(
    folder: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    change_config(folder, **changes)
    assert refusal(folder).startswith(message)


def test_more_experts_than_the_checkpoint_has_are_refused_before_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    copy.deepcopy(build_model("mixtral")).save_pretrained(tmp_path)
    change_config(tmp_path, num_local_experts=10**12)
    assert "config.json: num_local_experts is 1000000000000, but the checkpoint's largest weight is " in refusal(
        tmp_path
    )
    change_config(tmp_path, num_local_experts=5)
    assert "other shapes than config.json says (num_local_experts is 5): " in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForRewardModel"]
)
def test_a_model_of_another_task_is_refused_by_its_name(folder: Path, name: str) -> None:
    change_config(folder, architectures=[name])
    assert name in refusal(folder)


@pytest.mark.parametrize("name", ["BertModel", "MistralForCausalLM", "GPT2LMHeadModel"])
def test_a_class_of_another_model_is_refused_by_its_name(folder: Path, name: str) -> None:
    change_config(folder, architectures=[name])
    assert refusal(folder).startswith(f"config.json: architectures names {name}, which is of model_type ")
    assert refusal(folder).endswith("and model_type is 'llama'")


@pytest.mark.parametrize("names", [["LlamaModel"], ["OwnForCausalLM"], [], None, 3, [3]], ids=str)
def test_a_class_that_is_the_models_or_of_nobody_known_does_not_matter(folder: Path, names: object) -> None:
    change_config(folder, architectures=names)
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


@pytest.mark.parametrize("chosen", [0, 5])
def test_more_experts_for_a_token_than_there_are_or_none_are_refused(tmp_path: Path, chosen: int) -> None:
    copy.deepcopy(build_model("mixtral")).save_pretrained(tmp_path)
    change_config(tmp_path, num_experts_per_tok=chosen)
    bound = "must be greater than 0 and at most num_local_experts, 4"
    assert refusal(tmp_path) == f"config.json: num_experts_per_tok is {chosen}: {bound}"


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "yarn", "type": "linear"},
            "rope_parameters.rope_type is 'yarn' and rope_parameters.type is 'lin",
        ),
        ({"rope_type": "yarn", "factor": 0}, "rope_parameters.factor is 0.0: must be greater than 0"),
        ({"rope_type": "linear", "factor": -2}, "rope_parameters.factor is -2.0: must be greater than 0"),
        ({"rope_type": "yarn", "attention_factor": -1}, "rope_parameters.attention_factor is -1.0: must be greater"),
        (
            {"rope_type": "yarn", "beta_fast": 1, "beta_slow": 32},
            "rope_parameters.beta_fast is 1.0: must be at least bet",
        ),
        (
            {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 1},
            "rope_parameters.high_freq_factor is 1.0",
        ),
        (
            {"rope_type": "longrope", "short_factor": [1.0, 0.0]},
            "rope_parameters.short_factor[1] is 0.0: must be greater",
        ),
        (
            {"partial_rotary_factor": 2},
            "rope_parameters.partial_rotary_factor is 2.0: must be greater than 0 and at most 1",
        ),
        ({"original_max_position_embeddings": 0}, "rope_parameters.original_max_position_embeddings is 0: must be gr"),
        ({"rope_theta": 5000}, "rope_theta is 10000.0 and rope_parameters.rope_theta is 5000.0: they must be the same"),
    ],
    ids=str,
)
def test_a_rotary_embedding_that_makes_no_sense_is_refused(folder: Path, rope: dict[str, Any], message: str) -> None:
    change_config(folder, rope_theta=10_000, rope_parameters={"rope_theta": 10_000, "factor": 2.0} | rope)
    assert refusal(folder).startswith(f"config.json: {message}")


def test_a_rotary_embedding_may_have_its_older_name_too(folder: Path) -> None:
    rope = {"rope_type": "longrope", "type": "su", "rope_theta": 10_000, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1] * 8, "long_factor": [2] * 8}
    change_config(folder, rope_parameters=rope)
    assert load(folder).max_model_len == 1024


def test_a_rotary_embedding_stretched_beyond_all_positions_is_refused(folder: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "yarn", "factor": 1e9, "rope_theta": 10_000})
    assert "stretched by factor 1000000000.0, is for 1024000000000 tokens, must be at most 1073741824" in refusal(
        folder
    )


def test_one_factor_is_not_taken_for_those_of_all_frequencies(folder: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10_000, "original_max_position_embeddings": 64}
    change_config(folder, rope_parameters=rope | {"short_factor": [1], "long_factor": [2]})
    assert "short_factor of its rotary embedding has 1 factors, must have 8" in refusal(folder)


def test_a_size_is_known_by_the_name_that_its_class_gives_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 0}')
    with pytest.raises(UnsupportedModelError, match="n_positions is 0: must be greater than 0"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("method", ["gptq", "awq", "torchao", "fbgemm_fp8", "quark", "hqq", "bitsandbytes"])
def test_a_quantization_that_is_not_served_is_refused_with_those_that_are(folder: Path, method: str) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": method[0] == "b"})
    served = "served are FP8 (fp8, compressed-tensors), MXFP4 (mxfp4) and bitnet"
    assert refusal(folder) == f"config.json: quantization_config: quantized by {method}, which is not served; {served}"


def test_bitsandbytes_is_known_without_its_name(folder: Path) -> None:
    change_config(folder, quantization_config={"load_in_8bit": True})
    assert "quantization_config: quantized by bitsandbytes, which is not served" in refusal(folder)


@pytest.mark.parametrize("infinite", [math.inf, {"__float__": "Infinity"}])
def test_a_limit_may_be_infinite(folder: Path, infinite: object) -> None:
    change_config(folder, time_step_limit=[0.0, infinite])
    assert read_values(str(folder))["time_step_limit"] == [0.0, math.inf]
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


def test_a_configuration_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 0, "shared_intermediate_size": 96, "mamba_n_heads": 8, "mamba_d_head": 16}
    kinds = {"layer_types": ["attention"] * 2, "position_embedding_type": "rope"}
    model = small_model("GraniteMoeHybridConfig", None, **sizes, **kinds)
    model.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    assert tokens_of(tmp_path) == continue_greedily(model, PROMPT, 6)


def test_what_is_no_number_is_refused_however_it_is_written(folder: Path) -> None:
    change_config(folder, rms_norm_eps={"__float__": "NaN"})
    assert refusal(folder).startswith("config.json: rms_norm_eps is nan: not a finite number")


def test_a_model_that_brings_its_own_code_is_refused_without_asking(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    change_config(folder, model_type="newer", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    assert refusal(folder) == "config.json: 'newer' brings its own code (auto_map), which is not run"
    change_config(folder, model_type="llama")  # transformers has its own for this one
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


def gemma4(folder: Path, **changes: object) -> Any:
    """A small model of a family whose layers have configurations of their own."""
    changes |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
    changes |= {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8, "sliding_window": 24}
    model = small_model("Gemma4TextConfig", None, **changes)
    model.save_pretrained(folder)
    return model


def test_layers_with_configurations_of_their_own_are_served_where_their_heads_are_alike(tmp_path: Path) -> None:
    model = gemma4(tmp_path, layer_types=["sliding_attention", "full_attention"], global_head_dim=16)
    check_weights_of(str(tmp_path))
    assert tokens_of(tmp_path) == continue_greedily(model, PROMPT, 6)


def test_heads_of_another_size_in_some_layers_are_refused_before_a_start(tmp_path: Path) -> None:
    gemma4(tmp_path, global_head_dim=32)
    message = "gemma4_text: head_dim is 16 or 32, depending on the layer; keys and values must have one shape in all"
    with pytest.raises(UnsupportedModelError, match=message):
        check_weights_of(str(tmp_path))
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("kinds", [["sliding_attention", "full_attention"], ["full_attention"] * 2], ids=str)
def test_a_mistral_has_its_window_in_the_layers_that_it_says(tmp_path: Path, kinds: list[str]) -> None:
    small_model("MistralConfig", sliding_window=8).save_pretrained(tmp_path)
    change_config(tmp_path, layer_types=kinds, architectures=["MistralForCausalLM", "MistralModel"])
    check_weights_of(str(tmp_path))
    assert tokens_of(tmp_path) == continue_greedily(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), PROMPT, 6)
    change_config(tmp_path, layer_types=["sliding_attention"] * 2)
    windowed = continue_greedily(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), PROMPT, 6)
    assert tokens_of(tmp_path) == windowed
    change_config(tmp_path, layer_types=kinds)
    assert tokens_of(tmp_path) != windowed, "these models would not notice"
