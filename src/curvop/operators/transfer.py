"""The way between NumPy's arrays, or a user's tensors, and memory that products are made in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LINE", "Staging", "aligned"]

# Bytes that torch aligns its own memory to, on the host; NumPy's begins at multiples of 16, and slices anywhere.
LINE = 64

# Pinned memory is taken from everyone on the machine: what is larger goes the slower way, unpinned.
_MOST = 2**29


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor, or a copy of it where it begins elsewhere than torch's own would.

    MKL sums in another order there, so that the last bits of a product would depend on where its vector lies.
    """
    return tensor if tensor.data_ptr() % LINE == 0 else tensor.clone()


class Staging:
    """One pinned buffer, through which vectors go to a GPU and products come back; it grows as needed."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_buffer": None}

    def to_device(self, array: NDArray[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return `array` on `device` in `dtype`; the host converts it on its way into the buffer."""
        source = torch.from_numpy(array)
        buffer = self._of(source.shape, dtype)
        if buffer is None:
            return source.to(device, dtype)
        # The buffer is free again when the product is: whoever reads it waits for all that was queued before.
        return buffer.copy_(source).to(device, non_blocking=True)

    def to_array(self, tensor: Tensor) -> NDArray[Any]:
        """Return a fresh array of what is on a GPU."""
        buffer = self._of(tensor.shape, tensor.dtype)
        if buffer is None:
            return tensor.cpu().numpy()
        return buffer.copy_(tensor).numpy().copy()

    def _of(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        count = math.prod(shape) * dtype.itemsize
        if count > _MOST:
            return None
        if self._buffer is None or len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        return self._buffer[:count].view(dtype).view(tuple(shape))
