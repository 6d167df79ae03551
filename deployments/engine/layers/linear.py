"""In which form each linear layer of a model is kept and multiplied: one table, read from the top.

After `merge_linears`, since what is merged is kept as one; before layers are fused, since these hold linear layers in
their last form and are tried out with them. A kind is a class of `base.LinearLayer` and an entry here.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deployments.engine.config import EngineConfig
from deployments.engine.layers.base import LinearLayer
from deployments.engine.layers.fp8 import are_read, scales_of
from deployments.engine.layers.looked_into import is_looked_into
from deployments.engine.layers.packed import PackedLinear, compile_packed


@dataclass(frozen=True, slots=True)
class LinearKind:
    """One form in which a linear layer may be kept.

    Attributes:
        name: of the form.
        fits: whether a layer can be kept so, by its type, device, dtype and shape and by the engine's settings.
        build: the layer in this form; it shares the weight or keeps one of its own.
        compile: does what the first product would otherwise wait for; called once if a layer is kept so.
    """

    name: str
    fits: Callable[[nn.Linear, EngineConfig], bool]
    build: Callable[[nn.Linear], LinearLayer]
    compile: Callable[[], None] = lambda: None


def _fits_packed(layer: nn.Linear, _: EngineConfig) -> bool:
    weight = layer.weight
    return type(layer) is nn.Linear and weight.device.type == "cpu" and weight.dtype is torch.float32


def _fits_skinny(layer: nn.Linear, _: EngineConfig) -> bool:
    weight = layer.weight
    is_half = weight.dtype in (torch.bfloat16, torch.float16)
    return type(layer) is nn.Linear and weight.is_cuda and is_half and weight.is_contiguous()


def _build_skinny(layer: nn.Linear) -> LinearLayer:
    from deployments.engine.layers.skinny import SkinnyLinear  # Triton is there only where a GPU is

    return SkinnyLinear(layer)


def _fits_fp8(layer: nn.Linear, config: EngineConfig) -> bool:
    scales = scales_of(layer)
    return scales is not None and _fits_skinny(layer, config) and are_read(scales, layer.weight.shape)


def _build_fp8(layer: nn.Linear) -> LinearLayer:
    from deployments.engine.layers.cuda_fp8 import Fp8Linear  # Triton is there only where a GPU is

    return Fp8Linear(layer)


# The first that fits is taken. A layer that none fits stays plain: torch multiplies it.
LINEAR_KINDS = (
    LinearKind("packed", _fits_packed, PackedLinear, compile_packed),
    LinearKind("fp8", _fits_fp8, _build_fp8),
    LinearKind("skinny", _fits_skinny, _build_skinny),
)


def convert_linears(
    model: nn.Module, config: EngineConfig, kinds: Sequence[LinearKind] = LINEAR_KINDS
) -> Counter[LinearKind]:
    """Put each linear layer of a model into the first form that fits it, in place; all but those that are looked into.

    Returns:
        How many layers are kept in which form.
    """
    counts: Counter[LinearKind] = Counter()
    # Not all modules: a list that held the layers themselves would keep every weight beside its copy until the end.
    for parent in [module for module in model.modules() if next(module.children(), None) is not None]:
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and (kind := _kind_of(child, config, kinds)) is not None:
                setattr(parent, name, kind.build(child))
                counts[kind] += 1
    for kind in counts:
        kind.compile()
    return counts


def _kind_of(layer: nn.Linear, config: EngineConfig, kinds: Sequence[LinearKind]) -> LinearKind | None:
    return None if is_looked_into(layer) else next((kind for kind in kinds if kind.fits(layer, config)), None)
