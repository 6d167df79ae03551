"""A checkpoint is loaded whole, or refused by the names of what is missing, too much, or of another kind."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from deployments.engine.config import EngineConfig
from deployments.engine.model.config import read_config
from deployments.engine.model.load import LoadedModel, load_model
from deployments.errors import UnsupportedModelError
from tests.engine.driving import build_engine, generate, greedy
from tests.engine.families import build_model, continue_greedily, random_prompt, small_model

PROMPT = random_prompt(20, seed=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy.deepcopy(build_model("llama")).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), device="cpu"))


def tokens_of(folder: Path) -> tuple[int, ...]:
    (tokens,) = generate(build_engine(load(folder)), [greedy("r", PROMPT, 6)])
    return tokens


def refusal(folder: Path) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value).removeprefix(f"model {str(folder)!r}: ")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Put tensors in, or, by None, leave them out."""
    weights = load_file(folder / "model.safetensors") | changes
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


# --- weights


def test_a_layer_that_the_weights_lack_is_not_drawn_at_random(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    message = refusal(folder)
    assert message.startswith("the checkpoint lacks model.layers.2.input_layernorm.weight, ")
    assert message.endswith("and 4 more")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_single_weight_that_is_missing_is_named(folder: Path, name: str) -> None:
    change_weights(folder, **{name: None})
    assert refusal(folder) == f"the checkpoint lacks {name}"


def test_an_output_layer_that_is_the_embedding_may_be_missing(tmp_path: Path) -> None:
    model = small_model("LlamaConfig", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert tokens_of(tmp_path) == continue_greedily(model, PROMPT, 6)


def test_weights_of_another_shape_are_named_with_both(folder: Path) -> None:
    change_config(folder, intermediate_size=128)
    message = refusal(folder)
    assert "model.layers.0.mlp.gate_proj.weight ([96, 64], config.json wants [128, 64])" in message
    assert "mlp.down_proj.weight ([64, 96], config.json wants [64, 128])" in message


def test_a_layer_that_the_configuration_lacks_is_not_left_out(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    message = refusal(folder)
    assert message.startswith("the checkpoint has weights that config.json has no place for: model.layers.1.")


def test_a_bias_that_the_configuration_lacks_is_not_left_out(folder: Path) -> None:
    change_weights(folder, **{"lm_head.bias": torch.ones(512)})
    assert refusal(folder).endswith("no place for: lm_head.bias")


def test_what_is_not_of_the_model_is_left_out(folder: Path) -> None:
    extra = {"v_head.summary.weight": torch.ones(1, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(folder, **extra)
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


# --- configuration


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": "1e-6", "hidden_size": 64.0, "num_hidden_layers": "2"},
        {"attention_dropout": 0, "max_position_embeddings": 1024.0},
        {"tie_word_embeddings": "false", "vocab_size": "512"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": None, "mscale": 1, "note": "stray"}},
        {"rope_parameters": None, "rope_scaling": None, "rope_theta": "10000"},
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
        ({"rope_theta": 0, "rope_parameters": None}, "config.json: rope_theta is 0.0: must be greater than 0"),
        ({"rope_theta": None, "rope_parameters": None}, "config.json: rope_theta is None: "),
        ({"rope_theta": math.nan, "rope_parameters": None}, "config.json: rope_theta is nan: not a finite number"),
        ({"rope_parameters": {"rope_theta": 0}}, "config.json: rope_parameters.rope_theta is 0.0: must be"),
        ({"rope_parameters": {"short": [1, math.nan]}}, "config.json: rope_parameters.short[1] is nan: not a"),
        ({"nested": json.loads('{"a":' * 900 + "1" + "}" * 900)}, "config.json is nested too deeply"),
        ({"quantization_config": {"quant_method": "nope"}}, "config.json: quantization_config is {'quant_method': 'no"),
        ({"quantization_config": {}}, "config.json: quantization_config is {}: "),
        ({"quantization_config": 5}, "config.json: quantization_config is 5: "),
        ({"model_type": None}, "config.json: model_type is missing"),
        ({"model_type": 7}, "config.json: model_type is 7, unknown to transformers"),
        ({"model_type": "newer"}, "config.json: model_type is 'newer', unknown to transformers"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_field_that_makes_no_model_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert refusal(folder).startswith(message)


def test_a_size_is_known_by_the_name_that_its_class_gives_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_positions": 0}')
    with pytest.raises(UnsupportedModelError, match="n_positions is 0: must be greater than 0"):
        read_config(str(tmp_path))


def test_a_known_quantization_is_left_to_transformers(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "unknown to transformers" not in refusal(folder)


def test_a_limit_may_be_infinite(folder: Path) -> None:
    change_config(folder, time_step_limit=[0.0, math.inf])
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


def test_a_model_that_brings_its_own_code_is_refused_without_asking(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    change_config(folder, model_type="newer", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"})
    assert refusal(folder) == "config.json: 'newer' brings its own code (auto_map), which is not run"
    change_config(folder, model_type="llama")  # transformers has its own for this one
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


# --- files that are not whole


def test_a_truncated_checkpoint_is_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(folder).startswith("model.safetensors is truncated")


def test_shards_are_loaded_and_a_missing_one_is_named(tmp_path: Path) -> None:
    copy.deepcopy(build_model("llama")).save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert tokens_of(tmp_path) == continue_greedily(build_model("llama"), PROMPT, 6)
    shards[0].unlink()
    assert refusal(tmp_path) == f"model.safetensors.index.json names files that are missing: {shards[0].name}"
