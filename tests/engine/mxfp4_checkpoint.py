"""Checkpoints with experts in MXFP4, as gpt-oss' are published."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

# What a code of 4 bits stands for: a sign, two bits of exponent and one of mantissa.
_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_NUMBERS = torch.cat([_NUMBERS, -_NUMBERS])
_SHARED, _BIAS = 32, 127  # codes of one scale; what is added to a scale's exponent


@torch.no_grad()
def save_in_mxfp4(model: PreTrainedModel, folder: Path) -> None:
    """Round a model's experts to MXFP4, in place, and write the checkpoint."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            del weights[name]
            codes, scales, rounded = _round_to_codes(parameter.detach().float().cpu())
            weights |= {f"{name}_blocks": codes, f"{name}_scales": scales}
            parameter.copy_(rounded)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.layers.*.mlp.router"]}
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))


def _round_to_codes(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (E, out, blocks, 16), two of them in a byte, scales (E, out, blocks), and what they stand for.

    Args:
        weight: (E, in, out), as the model has it.
    """
    numbers = weight.mT.unflatten(-1, (-1, _SHARED))
    exponents = numbers.abs().amax(-1).log2().floor().int() - 1
    codes = (torch.ldexp(numbers, -exponents.unsqueeze(-1)).unsqueeze(-1) - _NUMBERS).abs().argmin(-1)
    rounded = torch.ldexp(_NUMBERS[codes], exponents.unsqueeze(-1)).flatten(2).mT
    return (codes[..., ::2] | codes[..., 1::2] << 4).byte(), (exponents + _BIAS).byte(), rounded
