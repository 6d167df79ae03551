"""A checkpoint's weights are loaded whole, or refused by the names of what is missing, too much, or of another kind."""

import copy
import json
import math
import re
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from deployments.engine.config import EngineConfig
from deployments.engine.model import checkpoint
from deployments.engine.model.check import check_weights_of
from deployments.engine.model.checkpoint import naming
from deployments.engine.model.load import load_model
from deployments.errors import UnsupportedModelError
from tests.engine.families import build_model, continue_greedily, small_model
from tests.engine.model.checkpoints import PROMPT, change_config, change_weights, refusal, tokens_of


def test_a_layer_that_the_weights_lack_is_not_drawn_at_random(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    assert refusal(folder) == "config.json: num_hidden_layers is 3, but the checkpoint has the weights of 2 layers"


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_single_weight_that_is_missing_is_named(folder: Path, name: str) -> None:
    change_weights(folder, **{name: None})
    assert refusal(folder) == f"the checkpoint lacks {name}"


def test_an_output_layer_that_is_the_embedding_may_be_missing(tmp_path: Path) -> None:
    model = small_model("LlamaConfig", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert tokens_of(tmp_path) == continue_greedily(model, PROMPT, 6)


def test_weights_of_another_shape_are_named_with_both_and_their_file(folder: Path) -> None:
    change_config(folder, intermediate_size=128)
    message = refusal(folder)
    assert "model.layers.0.mlp.gate_proj.weight ([96, 64] in model.safetensors, config.json wants [128, 64])" in message
    assert "mlp.down_proj.weight ([64, 96] in model.safetensors, config.json wants [64, 128])" in message


@pytest.mark.usefixtures("unreadable")
def test_before_anything_is_loaded_a_checkpoint_is_refused_in_the_same_words(folder: Path) -> None:
    check_weights_of(str(folder))
    change_config(folder, vocab_size=513)
    with pytest.raises(UnsupportedModelError) as caught:
        check_weights_of(str(folder))
    assert str(caught.value).removeprefix(f"model {str(folder)!r}: ") == refusal(folder)
    change_config(folder, vocab_size=512)
    change_weights(folder, **{"model.norm.weight": None})
    with pytest.raises(UnsupportedModelError, match=r"the checkpoint lacks model\.norm\.weight"):
        check_weights_of(str(folder))


def test_a_pickle_of_before_torch_1_6_which_has_no_headers_is_loaded(folder: Path) -> None:
    model = build_model("llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check_weights_of(str(folder))
    assert tokens_of(folder) == continue_greedily(model, PROMPT, 6)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "pytorch_model.bin holds no weights by their names, but a list"),
        ({}, "pytorch_model.bin holds no weights by their names, but nothing"),
        ({"state_dict": {"a": torch.zeros(1)}}, "pytorch_model.bin holds no weights by their names, but 'state_dict'"),
        ({0: torch.zeros(1)}, "pytorch_model.bin holds no weights by their names, but 0"),
        ({"a": Path("b")}, "pytorch_model.bin holds objects other than tensors, whose code is not run"),
    ],
)
def test_a_pickle_of_something_else_is_refused_before_anything_is_loaded(
    folder: Path, content: object, message: str
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=f"{message}$"):
        check_weights_of(str(folder))


def test_a_name_of_several_lines_does_not_cut_the_one_line_of_a_refusal(folder: Path) -> None:
    change_weights(folder, **{"model.a\nb": torch.zeros(1)})
    assert refusal(folder) == r"the checkpoint has weights that config.json has no place for: 'model.a\nb'"


@pytest.mark.usefixtures("unreadable")
def test_a_file_without_weights_is_named_whatever_lies_beside_it(folder: Path) -> None:
    save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(build_model("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r": no weights in model\.safetensors$"):
        check_weights_of(str(folder))


@pytest.mark.usefixtures("unreadable")
def test_an_index_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors\.index\.json has no weight_map$"):
        check_weights_of(str(folder))


@pytest.mark.usefixtures("unreadable")
def test_a_header_that_contradicts_itself_is_refused_by_the_name_of_its_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"shape":[64]', b'"shape":[65]', 1))
    with pytest.raises(UnsupportedModelError, match=r": model\.safetensors is no whole safetensors file: Safe"):
        check_weights_of(str(folder))


def test_what_was_converted_here_is_not_looked_at_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(folder, vocab_size=513)
    monkeypatch.setenv("KVRELAY_CACHE", str(folder.parent))
    check_weights_of(str(folder))


@pytest.mark.usefixtures("unreadable")
def test_a_model_of_a_hub_is_checked_before_anything_is_loaded_once_it_is_here_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--some--model" / "snapshots" / "abc"
    (cache / "models--some--model" / "refs").mkdir(parents=True)
    (cache / "models--some--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    snapshot.mkdir(parents=True)
    change_config(folder, intermediate_size=128)
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "1.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    check_weights_of("some/model")  # a file of it is still to come
    weights = load_file(folder / "model.safetensors")
    save_file({"lm_head.weight": weights.pop("lm_head.weight")}, snapshot / "2.safetensors", metadata={"format": "pt"})
    save_file(weights, snapshot / "1.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"model 'some/model': .*\[96, 64\] in 1.safetensors, config.json"):
        check_weights_of("some/model")


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


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][500, 3] = math.nan  # of a token that no trial draws
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.inf
    change_weights(folder, **weights)
    named = "model.embed_tokens.weight, model.layers.1.mlp.up_proj.weight"
    assert refusal(folder) == f"weights that are not finite as float32: {named}"


def test_weights_that_a_narrower_type_does_not_hold_are_named_with_it(folder: Path) -> None:
    change_weights(folder, **{"model.norm.weight": torch.full((64,), 1e6)})
    with pytest.raises(UnsupportedModelError, match=r"not finite as float16: model\.norm\.weight"):
        load_model(EngineConfig(model=str(folder), device="cpu", dtype="float16"))


def test_whole_numbers_without_a_quantization_are_named(folder: Path) -> None:
    change_weights(folder, **{"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.int8)})
    assert refusal(folder).endswith("no quantization_config in config.json: model.layers.0.mlp.up_proj.weight")


def test_an_output_layer_of_its_own_is_used_though_the_configuration_ties_it(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)


def test_old_pickles_are_compared_with_the_configuration_too(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert tokens_of(folder) == continue_greedily(build_model("llama"), PROMPT, 6)
    change_config(folder, num_hidden_layers=9000)
    assert "num_hidden_layers is 9000, but the checkpoint has the weights of 2 layers" in refusal(folder)


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


def test_a_refusal_names_its_model_in_the_first_line_that_tells_of_it() -> None:
    """Whoever starts a server shows the first one of its log."""
    with pytest.raises(UnsupportedModelError) as caught, naming("some/folder"):
        raise UnsupportedModelError("no layers")
    lines = [line for line in traceback.format_exception(caught.value) if "UnsupportedModelError: " in line]
    assert lines == ["deployments.errors.UnsupportedModelError: model 'some/folder': no layers\n"]


def test_a_model_whose_name_stands_in_a_message_is_named_too() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^model 'layers': it has no layers$"), naming("layers"):
        raise UnsupportedModelError("it has no layers")
    with pytest.raises(UnsupportedModelError, match=r"^EAGLE-3 head 'layers': none$"), naming("layers"):
        raise UnsupportedModelError("EAGLE-3 head 'layers': none")


@pytest.mark.usefixtures("unreadable")
def test_a_weight_in_two_shards_is_refused_with_both_before_anything_is_loaded(tmp_path: Path) -> None:
    copy.deepcopy(build_model("llama")).save_pretrained(tmp_path, max_shard_size="100KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    weights = load_file(first)
    name = min(weights)
    save_file(load_file(second) | {name: 2 * weights[name]}, second, metadata={"format": "pt"})
    message = f"the checkpoint has {name} twice, in {first.name} and {second.name}"
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        check_weights_of(str(tmp_path))
    assert refusal(tmp_path) == message


def test_what_transformers_raises_about_a_configuration_is_a_refusal_with_its_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, per_layer_config={"1": {"hidden_act": "gelu"}})
    monkeypatch.setattr(checkpoint, "check_config", lambda config: config.hidden_act)
    message = "config.json: AmbiguousGlobalPerLayerAttributeError: 'hidden_act' is a per-layer attribute and may vary"
    assert refusal(folder).startswith(message)


def test_what_our_own_code_raises_is_no_fault_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "check_config", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check_weights_of(str(folder))


@pytest.mark.parametrize("is_newer", [False, True])
def test_a_family_with_a_table_of_attention_of_its_own_is_refused_in_words(tmp_path: Path, is_newer: bool) -> None:
    sizes = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("falcon", **sizes, num_kv_heads=2, new_decoder_architecture=is_newer)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = "falcon takes its attention from a table of its own, where paged attention has no place"
    with pytest.raises(UnsupportedModelError, match=message):
        check_weights_of(str(tmp_path))
    assert refusal(tmp_path) == message
