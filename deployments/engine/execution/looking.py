"""Looks at what decoder layers are given while a model computes a step, for a head that guesses by it."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from deployments.engine.model.eagle3 import Eagle3Head


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
        Once the model has run, one tensor, (T, len(layers) * hidden_size): copies of their inputs beside each other,
        since layers write over these.
    """
    states: list[Tensor] = []

    def look(place: int, layer: nn.Module, given: tuple[Any, ...]) -> None:
        own: Tensor = given[0][0]
        if not states:
            states.append(own.new_empty(len(own), len(layers) * own.shape[1]))
        states[0][:, place * own.shape[1] : (place + 1) * own.shape[1]] = own

    with ExitStack() as hooks:
        for place, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(partial(look, place)).remove)
        yield states


class Sight:
    """What a head makes of the states that it guesses by, where a model's steps may be replays of recorded ones.

    Args:
        model: see `decoder_layers`.
        head: of it.
        max_tokens: that the model computes at once.
    """

    def __init__(self, model: nn.Module, head: Eagle3Head, max_tokens: int) -> None:
        self._layers, self._fuse = decoder_layers(model, head.layers), head.fuse
        # Of what was computed last: graphs write to it in each replay.
        self._latest = head.norm.weight.new_zeros(max_tokens, head.hidden_size)
        self._taken, self._num_taken = self._latest[:0], 0

    def look(self, run: Callable[[], Tensor]) -> Tensor:
        """Have the model compute, perhaps into a graph; gives back what that gives."""
        with looking_at(self._layers) as states:
            out = run()
        self._latest[: len(states[0])] = self._fuse(states[0])
        return out

    def begin(self, num_tokens: int) -> Tensor:
        """A step begins. Gives its states, (num_tokens, hidden_size), of which `take` fills the next ones."""
        self._taken, self._num_taken = self._latest.new_empty(num_tokens, self._latest.shape[1]), 0
        return self._taken

    def take(self, num_tokens: int) -> None:
        """Copy those of so many tokens that were computed last."""
        end = self._num_taken + num_tokens
        self._taken[self._num_taken : end] = self._latest[:num_tokens]
        self._num_taken = end
