"""What one process has of the hand-off: the chunks it produced for others, and the way to those of others.

Called by `direct`; knows no Ray object references to chunks.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor

from deployments.kv_groups import num_blocks_of
from deployments.kv_transfer.base import TransferConfig, TransferStats
from deployments.kv_transfer.layout import KVLayout
from deployments.kv_transfer.link import Watchdog
from deployments.kv_transfer.local import Arena, Place
from deployments.kv_transfer.process import Counters
from deployments.kv_transfer.receiver import Pulled, Receiver, RemoteChunk
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
        self._source = Source(watchdog, self._counters)
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

    def hold(self, object_id: str, tensor: Tensor, notes: "tuple[Future[str], ...]", cuts: tuple[int, ...]) -> None:
        """Keep a chunk until `release`.

        Args:
            object_id: its name.
            tensor: complete, on a GPU too, once the last note is done.
            notes: what its receiver is told with its parts; done when these are complete.
            cuts: layers at which it is cut into parts.

        Raises:
            ValueError: not a contiguous tensor of this engine's layout and device.
        """
        _check_chunk(tensor, self.layout, self._device)
        self._source.hold(object_id, tensor, notes, cuts)

    def place_of(self, tensor: Tensor) -> Place | None:
        """Where engines of this machine find a chunk; None if it must be sent to them."""
        return self._arena.place_of(tensor) if self._arena is not None else None

    def release(self, object_id: str) -> None:
        """Drop a chunk; one that is being sent lives until that ends."""
        self._source.release(object_id)

    def accept(self, invitation: Invitation) -> None:
        """A receiver has opened a link and waits for us."""
        self._source.accept(invitation, self._device, self._config)

    def pull(self, chunk: RemoteChunk) -> Iterator[Pulled]:
        """See `Receiver.pull`."""
        return self._receiver.pull(chunk, self.layout, self._device, self._config)


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
