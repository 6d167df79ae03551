"""What a configuration says of FP8 is read, or refused by the name of the field and its value."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.engine.families import continue_greedily
from tests.engine.model.checkpoints import PROMPT, change_config, refusal, tokens_of
from tests.engine.model.fp8_checkpoints import FINE_GRAINED, INPUTS, WEIGHTS, compressed, write


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            compressed("channel", weights=WEIGHTS | {"num_bits": 4, "strategy": "tensor_group"}),
            "weights of 4 bits, flo",
        ),
        (compressed("channel", weights=WEIGHTS | {"num_bits": 4, "type": "int"}), "weights of 4 bits, integers"),
        (compressed("channel", weights=WEIGHTS | {"type": "int"}), "weights of 8 bits, integers"),
        (compressed("channel", weights=WEIGHTS | {"symmetric": False, "strategy": "channel"}), "with zero points"),
        (compressed("group"), "scales by group"),
        (compressed("channel", input_activations=INPUTS | {"dynamic": False}), "inputs with scales of the checkpoint"),
        (compressed("channel", input_activations=INPUTS | {"num_bits": 4}), "inputs of 4 bits"),
        (compressed("channel", output_activations=INPUTS), "quantizes outputs"),
        (compressed("channel") | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        (compressed("channel") | {"transform_config": {"config_groups": {"u": {}}}}, "transformed"),
        (compressed("channel") | {"config_groups": {}}, "no config_groups"),
        (FINE_GRAINED | {"fmt": "e5m2"}, "numbers of the form 'e5m2'"),
        (FINE_GRAINED | {"activation_scheme": "static"}, "inputs with scales of the checkpoint (static)"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write(tmp_path, "by channel")
    change_config(tmp_path, quantization_config=config)
    told = refusal(tmp_path)
    assert told.startswith("config.json: quantization_config: ")
    assert message in told


@pytest.mark.parametrize("text", ["x\n" * 9999, ["x"] * 9999, "a b"])
def test_words_of_a_configuration_are_one_short_line_in_messages(tmp_path: Path, text: object) -> None:
    write(tmp_path, "by channel")
    group = compressed("channel")["config_groups"]["group_0"]
    named = {"config_groups": {str(text): group | {"weights": 5}}}
    weights = ({"strategy": text}, {"num_bits": text}, {"type": text})
    inputs = compressed("channel", input_activations=INPUTS | {"num_bits": text})
    fields = [FINE_GRAINED | {field: text} for field in ("fmt", "expert_dtype", "activation_scheme")]
    for config in (
        *(compressed("channel", weights=WEIGHTS | its) for its in weights),
        compressed("channel") | named,
        inputs,
        *fields,
    ):
        change_config(tmp_path, quantization_config=config)
        told = refusal(tmp_path)
        assert told.startswith("config.json: quantization_config: ") and "\n" not in told and len(told) < 250


@pytest.mark.parametrize("name", ["int-quantized", "pack-quantized", "nvfp4-pack-quantized", "mxfp8-quantized", 8])
def test_numbers_that_lie_otherwise_in_files_are_refused_whatever_else_is_said(tmp_path: Path, name: object) -> None:
    write(tmp_path, "by channel")
    read = "float-quantized, naive-quantized, mixed-precision, dense are read"
    change_config(tmp_path, quantization_config=compressed("channel") | {"format": name})
    assert refusal(tmp_path) == f"config.json: quantization_config: format is {name!r}; {read}"
    mixed = compressed("channel", format=name) | {"format": "mixed-precision"}
    change_config(tmp_path, quantization_config=mixed)
    assert refusal(tmp_path) == f"config.json: quantization_config: group_0.format is {name!r}; {read}"


@pytest.mark.parametrize("name", ["float-quantized", "naive-quantized", "dense", None])
def test_fp8_is_read_by_every_name_that_it_has(tmp_path: Path, name: str | None) -> None:
    expected, _ = write(tmp_path, "by channel")
    change_config(tmp_path, quantization_config=compressed("channel", format=name) | {"format": name})
    assert tokens_of(tmp_path) == continue_greedily(expected, PROMPT, 6)


@pytest.mark.parametrize("value", ["x", [1], False, []])
@pytest.mark.parametrize("name", ["sparsity_config", "transform_config", "input_activations"])
def test_what_must_be_an_object_and_is_none_is_refused_with_its_value(tmp_path: Path, name: str, value: object) -> None:
    write(tmp_path, "by channel")
    of_group = name == "input_activations"
    changed = compressed("channel", **{name: value}) if of_group else compressed("channel") | {name: value}
    change_config(tmp_path, quantization_config=changed)
    field = f"group_0.{name}" if of_group else name
    assert refusal(tmp_path) == f"config.json: quantization_config: {field} is {value!r}: must be an object"


NO_BLOCKS = [[0, 128], [-32, 32], [True, 32], [32.7, 32], [math.inf, 32], [32], [32, 32, 32], ["a", 32], "all", 5]


@pytest.mark.parametrize("value", NO_BLOCKS)
def test_blocks_that_are_none_are_refused_with_their_value(tmp_path: Path, value: object) -> None:
    write(tmp_path, "by block")
    said = f"is {value!r}: must be two whole numbers greater than 0"
    change_config(tmp_path, quantization_config=FINE_GRAINED | {"weight_block_size": value})
    assert refusal(tmp_path) == f"config.json: quantization_config: weight_block_size {said}"
    weights = WEIGHTS | {"strategy": "block", "block_structure": value}
    change_config(tmp_path, quantization_config=compressed("block", weights=weights))
    assert refusal(tmp_path) == f"config.json: quantization_config: group_0.weights.block_structure {said}"


@pytest.mark.parametrize("value", [[32.0, 32], "32x32"])
def test_blocks_with_one_meaning_are_read_however_they_are_spelled(tmp_path: Path, value: object) -> None:
    expected, _ = write(tmp_path, "by block")
    weights = WEIGHTS | {"strategy": "block", "block_structure": value}
    change_config(tmp_path, quantization_config=compressed("block", weights=weights))
    assert tokens_of(tmp_path) == continue_greedily(expected, PROMPT, 6)
