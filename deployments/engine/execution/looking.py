"""Looks at what decoder layers are given while a model computes a step, for a head that guesses by it."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def decoder_layers(model: nn.Module, indices: Collection[int]) -> list[nn.Module]:
    """The layers of a model with these numbers, in this order.

    Args:
        model: with layers as transformers builds them: each has one attention, which knows its number.
        indices: of them.
    """
    found: dict[int, nn.Module] = {}
    for layer in model.modules():
        index = getattr(getattr(layer, "self_attn", None), "layer_idx", None)
        if isinstance(index, int):
            found[index] = layer
    assert set(indices) <= found.keys(), f"the model has layers {sorted(found)}, wanted are {list(indices)}"
    return [found[index] for index in indices]


@contextmanager
def looking_at(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Meanwhile the model runs once.

    Args:
        layers: in the order in which they run. None of them is run by one before it.

    Yields:
        Once the model has run, of each layer a copy of its input, (T, hidden_size): compiled layers write over it.
    """
    states: list[Tensor] = []

    def look(layer: nn.Module, given: tuple[Any, ...]) -> None:
        states.append(given[0][0].clone())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look).remove)
        yield states
