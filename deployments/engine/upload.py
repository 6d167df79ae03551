"""Small arrays from the host to a device, on a GPU without waiting for it.

One array by itself: `upload`. Many in every step: written one behind the other into pinned memory, copied at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """The values on the device, on a CPU in the same memory. A copy from memory that is not pinned would wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Upload:
    """Pinned memory for int32 values; its owner must not write to it while a copy may still be under way."""

    def __init__(self, num_values: int) -> None:
        self._host = torch.empty(num_values, dtype=torch.int32, pin_memory=True)
        self.values = self._host.numpy()

    def to(self, device: Tensor, count: int) -> Tensor:
        """Start the copy of the first values."""
        return device[:count].copy_(self._host[:count], non_blocking=True)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the values that are uploaded."""

    array: np.ndarray
    start: int

    def on(self, inputs: Tensor) -> Tensor:
        """The same stretch of what was uploaded."""
        return inputs[self.start : self.start + len(self.array)]


class Writer:
    """Gives out stretches of a buffer, one behind the other."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.num_values = 0

    def take(self, count: int) -> Span:
        """The next stretch."""
        span = Span(self._values[self.num_values : self.num_values + count], self.num_values)
        # 16 bytes: kernels of others may read vectors.
        self.num_values += -(-count // 4) * 4
        assert self.num_values <= len(self._values), f"{self.num_values} values for {len(self._values)}"
        return span

    def write(self, values: np.ndarray) -> Span:
        """The next stretch, filled with these."""
        span = self.take(len(values))
        span.array[:] = values
        return span
