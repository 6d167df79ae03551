"""Models with random weights, the same each time, for benchmarks."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from deployments.engine.layers.fp8 import quantize_weights
from deployments.engine.model.load import LoadedModel, optimize_layers, prepare_model
from deployments.engine.model.mxfp4 import store_experts
from tests.bench.gpu_shapes import Shape

# Exponents of the experts' scales, and 127: of numbers up to 0.02 to 0.05.
_LEAST_SCALE, _MOST_SCALE = 119, 120


def load_random(shape: Shape, device: str = "cuda") -> LoadedModel:
    """A model as `load_model` would have prepared it."""
    if shape.quantization == "mxfp4":
        model = _as_stored(shape.config(), device)
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
        fill_random(model)
    if shape.quantization == "fp8":
        quantize_weights(model)
    return optimize_layers(prepare_model(model, "random", torch.device(device)))


def fill_random(model: PreTrainedModel) -> None:
    """Give every matrix random weights."""
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype is torch.uint8:
                parameter.random_(0, 256, generator=generator)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)


def _as_stored(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """gpt-oss with experts in MXFP4, for which there may be no room as anything else."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    store_experts(model)
    model.to_empty(device=device)
    rotary: nn.Module = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    fill_random(model)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_scales"):
                parameter.random_(_LEAST_SCALE, _MOST_SCALE + 1, generator=generator)
            elif parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
    return model
