"""How the last kernel of a block is told of the residual that it adds its output to."""

from torch import Tensor


class Owed:
    """What a layer adds its output to; None: nothing. Not an attribute of the module, which is slow to set."""

    __slots__ = ("residual",)

    def __init__(self) -> None:
        self.residual: Tensor | None = None

    def take(self) -> Tensor | None:
        """What is owed, once."""
        residual, self.residual = self.residual, None
        return residual
