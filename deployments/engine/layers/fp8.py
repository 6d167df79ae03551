"""Which weights of a model lie on a grid of FP8, and on which: noted beside each linear layer, whose weight is as ever.

Such a model is one of bfloat16 or float32 that runs everywhere. Where there are kernels for FP8 (`cuda_fp8.py`), codes
take the place of the weights that have scales beside them.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from deployments.engine.kernels.fp8 import Scales, dequantize, joined, quantize
from deployments.errors import UnsupportedModelError

# Layers that choose among experts or weigh them: small, and a rounding there sends tokens elsewhere.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_ATTRIBUTE = "kvrelay_scales"


def note_scales(layer: nn.Linear, scales: Scales) -> None:
    """Note on which grid the weight of a layer lies."""
    setattr(layer, _ATTRIBUTE, scales)


def scales_of(layer: nn.Module) -> Scales | None:
    """The grid of a layer's weight; None: it lies on none."""
    scales: Scales | None = getattr(layer, _ATTRIBUTE, None)
    return scales


def are_read(scales: Scales, shape: torch.Size) -> bool:
    """Whether kernels read it: in vectors of 16 bytes, and with a scale for a row or for every 128 columns."""
    return all(size % 16 == 0 for size in shape) and (scales.values.shape[1] == 1 or scales.depth == 128)


def note_joined(layer: nn.Linear, parts: Sequence[nn.Linear]) -> None:
    """Note the grid of a layer whose weight is those of its parts, one below the other; if all have one."""
    grids = [scales for part in parts if (scales := scales_of(part)) is not None]
    if len(grids) == len(parts):
        together = joined(grids, [part.out_features for part in parts])
        if together is not None:
            note_scales(layer, together)


@torch.inference_mode()
def quantize_weights(model: PreTrainedModel) -> int:
    """Move the weights of a model's linear layers, in place, to a grid of FP8 with a scale for each row.

    Embeddings, the output layer, norms and routers stay as they are.

    Returns:
        How many layers were moved; none, if the checkpoint was in FP8: what it left out was left out for a reason.

    Raises:
        UnsupportedModelError: a weight is not finite, or see `check_quantizable`.
    """
    if any(scales_of(module) is not None for module in model.modules()):
        return 0
    check_quantizable(model)
    num_moved = 0
    for name, layer in quantizable(model):
        codes, scales = quantize(layer.weight)
        if not scales.values.isfinite().all():
            raise UnsupportedModelError(f"{name}.weight is not finite, and cannot be quantized")
        layer.weight.copy_(dequantize(codes, scales, layer.weight.dtype))
        note_scales(layer, scales)
        num_moved += 1
    return num_moved


def check_quantizable(model: PreTrainedModel) -> None:
    """Refuse a model whose weights cannot be moved to FP8, whatever they are.

    Raises:
        UnsupportedModelError: it has experts, for which there are no kernels.
    """
    experts = next((name for name, weight in model.named_parameters() if weight.dim() > 2), None)
    if experts is not None:
        raise UnsupportedModelError(f"{model.config.model_type}: experts ({experts}) cannot be quantized yet")


def quantizable(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that may be in FP8, by name."""
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not output and name.rpartition(".")[2] not in _ROUTERS:
            yield name, module
