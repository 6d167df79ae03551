"""Small checkpoints in FP8, as whoever publishes them writes them, and the models that they stand for."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from deployments.engine.kernels.fp8 import LARGEST, Scales, dequantize, round_to
from tests.engine.families import build_model
from tests.engine.model.checkpoints import change_config

BLOCK = 32  # so that the small model's layers have several, and parts of one
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}


def compressed(strategy: str, **changes: Any) -> dict[str, Any]:
    blocks = [BLOCK, BLOCK] if strategy == "block" else None
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": WEIGHTS | {"strategy": strategy, "block_structure": blocks},
        "input_activations": INPUTS,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | changes},
    }


FINE_GRAINED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
# By name: the configuration, what scales are called, and which tiles they are for.
FORMS: dict[str, tuple[dict[str, Any], str, str]] = {
    "by channel": (compressed("channel"), "weight_scale", "row"),
    "by tensor": (compressed("tensor"), "weight_scale", "tensor"),
    "by block": (compressed("block"), "weight_scale", "block"),
    "fine-grained": (FINE_GRAINED, "weight_scale_inv", "block"),
    "fine-grained, of one scale": (FINE_GRAINED | {"weight_block_size": None}, "weight_scale", "tensor"),
}


def grid_of(weight: Tensor, tile: str) -> Scales:
    num_rows, depth = weight.shape
    rows, columns = {"row": (1, depth), "tensor": (num_rows, depth), "block": (BLOCK, BLOCK)}[tile]
    parts = [[part.abs().max() for part in band.split(columns, 1)] for band in weight.split(rows)]
    return Scales(torch.tensor(parts) / LARGEST, rows, columns)


def write(
    folder: Path, form: str, round_scale: Callable[[Tensor], Tensor] = torch.clone
) -> tuple[PreTrainedModel, dict[str, Scales]]:
    """Write a checkpoint; the model that it stands for, and the grid of each of its layers."""
    config, name_of_scale, tile = FORMS[form]
    model = copy.deepcopy(build_model("llama"))
    model.save_pretrained(folder)
    weights, grids = load_file(folder / "model.safetensors"), {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            weight = layer.weight.detach()
            grid = grid_of(weight, tile)
            grid = grids[name] = replace(grid, values=round_scale(grid.values))
            codes = weights[f"{name}.weight"] = round_to(weight, grid)
            weights[f"{name}.{name_of_scale}"] = grid.values.flatten() if tile == "tensor" else grid.values
            with torch.no_grad():
                layer.weight.copy_(dequantize(codes, grid, torch.float32))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, quantization_config=config)
    return model, grids
