"""What one process has of hand-offs: those that it gives away, and the way to those of others.

Called by `direct`; knows no Ray object references to them.
"""

from dataclasses import replace

import torch
from torch import Tensor

from deployments.engine.handoff.outgoing import Part
from deployments.kv_groups import num_blocks_of
from deployments.kv_transfer.base import Handoff, TransferConfig, TransferStats
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.link import Watchdog
from deployments.kv_transfer.local import Arena, Place
from deployments.kv_transfer.notes import Note
from deployments.kv_transfer.process import Counters
from deployments.kv_transfer.pull import Pull
from deployments.kv_transfer.receiver import Receiver, RemoteHandoff
from deployments.kv_transfer.source import Invitation, Source


class Endpoint:
    """State of one process; safe to call from any thread."""

    def __init__(self) -> None:
        self._config = TransferConfig()
        self._layout: KVLayout | None = None
        self._device = "cpu"
        self._arena: Arena | None = None
        self._counters = Counters()
        watchdog = Watchdog()
        self._source = Source(watchdog, self._counters, self._describe)
        self._receiver = Receiver(watchdog, self._counters, _accept)

    @property
    def layout(self) -> KVLayout:
        assert self._layout is not None, "configure() was not called in this process"
        return self._layout

    def configure(self, layout: KVLayout, device: str, config: TransferConfig, arena: Arena | None) -> None:
        self._layout, self._device, self._config, self._arena = layout, device, config, arena

    def stats(self) -> TransferStats:
        return replace(
            self._counters.read(),
            num_links=self._source.num_links + self._receiver.num_links,
            num_neighbours=self._receiver.num_neighbours,
            num_held=self._source.num_held,
        )

    def ticket(self) -> Tensor:
        """What stands for a hand-off: a chunk of no blocks."""
        if self._arena is not None:
            _ = self._arena.place  # taken now, for `hold` may not wait
        dtype = getattr(torch, self.layout.form.element)
        return torch.empty(self.layout.chunk_shape(0), dtype=dtype, device=self._device)

    def hold(self, object_id: str, handoff: Handoff) -> Place | None:
        """Keep a hand-off until `let_go`.

        Args:
            object_id: its name.
            handoff: of chunks that are complete, on a GPU too, when it tells of them.

        Returns:
            Where engines of this machine find its chunks; None if all must be sent to them.
        """
        self._source.hold(object_id, handoff)
        return None if self._arena is None else self._arena.place

    def let_go(self, object_id: str) -> None:
        """Drop a hand-off; what of it is being sent lives until that ends."""
        self._source.let_go(object_id)

    def accept(self, invitation: Invitation) -> None:
        """A receiver has opened a link and waits for us."""
        self._source.accept(invitation, self._device, self._config)

    def pull(self, handoff: RemoteHandoff) -> Pull:
        """Ask for a hand-off.

        Raises:
            LayoutMismatchError: the source's KV is of another kind; nothing was asked.
        """
        is_read = self._receiver.reads(handoff, self.layout, self._device)
        return Pull(self._receiver, handoff, is_read, self._config)

    def _describe(self, part: Part) -> Note:
        _check_chunk(part.tensor, self.layout, self._device)
        place = None if self._arena is None else self._arena.place_of(part.tensor)
        offset = None if place is None else place.offset
        return Note.of(part.chunk, part.num_parts, num_blocks_of(part.tensor.shape), offset)


def _accept(_engine: object, invitation: Invitation) -> None:
    endpoint.accept(invitation)


# One for the process, because the function above is run in it by other engines.
endpoint = Endpoint()


def _check_chunk(tensor: Tensor, layout: KVLayout, device: str) -> None:
    shape = layout.chunk_shape(num_blocks_of(tensor.shape))
    if (
        tuple(tensor.shape) != shape
        or tensor.dtype != getattr(torch, layout.form.element)
        or tensor.device.type != device
    ):
        raise ValueError(
            f"a chunk of KV has shape {shape}, {layout.dtype} on {device};"
            f" got {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"a chunk of KV must be contiguous, got strides {tensor.stride()}")
