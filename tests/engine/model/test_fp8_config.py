"""What a configuration says of FP8 is read, or refused by the name of the field and its value."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.model.checkpoints import change_config, refusal
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
        (FINE_GRAINED | {"weight_block_size": [0, 128]}, "blocks of [0, 128]"),
        (FINE_GRAINED | {"weight_block_size": "all"}, "blocks of 'all'"),
    ],
)
def test_what_is_not_read_is_refused_by_its_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write(tmp_path, "by channel")
    change_config(tmp_path, quantization_config=config)
    told = refusal(tmp_path)
    assert told.startswith("config.json: quantization_config: ")
    assert message in told
