"""How far through a model's layers a step has come: told while the step is launched, to whoever hands KV over.

A step's attention writes the KV of its tokens layer by layer. Whoever watches may copy that of the first layers out
while the others are computed.
"""

from typing import Protocol

import torch


class LayerWatch(Protocol):
    """For the thread that launches steps.

    Attributes:
        ends: numbers of leading layers that are to be told, ascending.
    """

    @property
    def ends(self) -> tuple[int, ...]: ...

    def reach(self, num_layers: int, after: torch.cuda.Event | None = None, request_id: str | None = None) -> None:
        """KV of so many leading layers is written.

        Args:
            num_layers: one of `ends`.
            after: when it is; None: when all that has been launched up to now is done.
            request_id: of this request alone; None: of all of the step.
        """
        ...


def layer_ends(num_layers: int, num_parts: int) -> tuple[int, ...]:
    """Cut layers into parts that are as even as can be, at most one for each: where each ends."""
    num_parts = min(num_parts, num_layers)
    return tuple((i + 1) * num_layers // num_parts for i in range(num_parts))
