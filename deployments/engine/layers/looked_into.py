"""Which linear layers a model's own code looks into: a gate that asks for the type of its weight must find a weight.

Such a layer stays plain, for our forms of it have no `weight`, or one of another kind. Names do not tell, so a run of
the model is watched: by `model/probe.py`, for which it costs next to nothing, since that runs anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.functional import linear

_ATTRIBUTE = "kvrelay_is_looked_into"


class _Watched(nn.Linear):
    """Multiplies without looking at itself, so whoever looks is somebody else."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return linear(x, weight, self._parameters["bias"])

    def __getattr__(self, name: str) -> Tensor | nn.Module:  # of parameters and modules alone
        vars(self)[_ATTRIBUTE] = True
        return super().__getattr__(name)


@contextmanager
def watching_linears(model: nn.Module) -> Iterator[None]:
    """Note which plain linear layers are looked into while the model runs; it is as it was afterwards, but for notes.

    Layers at the same place of modules of one class are alike: of many experts a short run enters a few.
    """
    places = _places(model)
    for layer in places:
        layer.__class__ = _Watched
    try:
        yield
    finally:
        for layer in places:
            layer.__class__ = nn.Linear
        noted = {place for layer, place in places.items() if is_looked_into(layer)}
        for layer, place in places.items():
            if place in noted:
                vars(layer)[_ATTRIBUTE] = True


def _places(model: nn.Module) -> dict[nn.Linear, tuple[type[nn.Module], str]]:
    """Of each plain linear layer its parent's class, and its name there."""
    return {
        child: (type(parent), name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    }


def is_looked_into(layer: nn.Linear) -> bool:
    """Whether it has to keep the attributes of an `nn.Linear`."""
    return _ATTRIBUTE in vars(layer)
