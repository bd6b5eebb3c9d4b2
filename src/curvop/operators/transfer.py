"""Transfer of vectors to the device on which products are computed, and of products back to the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LINE", "TORCH_DTYPES", "Staging", "aligned", "host_tensor", "packed"]

TORCH_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}

# Alignment, in bytes, of the memory that torch allocates on the CPU. NumPy aligns arrays to 16 bytes only, and a slice
# can start at any address.
LINE = 64

# Largest size of the pinned buffer in bytes. Pinned memory is scarce. Larger vectors are therefore copied without
# pinned memory, which is slower.
_MAX_PINNED_BYTES = 2**29

# Size in bytes from which NumPy asks for huge pages.
_HUGE = 2**22

# Number of entries that `packed` transposes at once. They fit into the cache of the processor.
_BLOCK = 2**18


def aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor unchanged if it is aligned to ``LINE`` bytes, and an aligned copy otherwise.

    The order in which MKL adds numbers depends on the alignment of their memory. Without this function, the last bits
    of a product would depend on the memory address of the vector.
    """
    return tensor if tensor.data_ptr() % LINE == 0 else tensor.clone()


def host_tensor(
    shape: Sequence[int], dtype: torch.dtype, allocate: Callable[[int, type[np.uint8]], NDArray[Any]] = np.empty
) -> Tensor:
    """Return an aligned tensor on the CPU whose memory is allocated by ``numpy.empty`` or ``numpy.zeros``.

    For arrays of 4 MB or more, NumPy asks Linux for huge pages. The first write to them is four to eight times as fast
    as the first write to the memory of ``torch.empty``.
    """
    size = math.prod(shape) * dtype.itemsize
    buffer = torch.from_numpy(allocate(size + LINE, np.uint8))
    return buffer[-buffer.data_ptr() % LINE :][:size].view(dtype).view(tuple(shape))


def packed(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous, aligned tensor with the entries of ``rows``, a tensor of shape ``(K, N)`` on the CPU.

    If ``rows`` has these properties and the given dtype, it is returned unchanged. The rows are usually the columns of
    an array of shape ``(N, K)``. They are transposed in pieces, which takes half as long as transposing them at once.
    """
    if rows.is_contiguous():
        return aligned(rows.to(dtype))
    is_large = rows.numel() * dtype.itemsize >= _HUGE  # for small tensors, `host_tensor` is slower than ``torch.empty``
    result = host_tensor(rows.shape, dtype) if is_large else torch.empty(rows.shape, dtype=dtype)
    length = max(1, _BLOCK // len(rows))
    for target, source in zip(result.split(length, 1), rows.split(length, 1), strict=True):
        target.copy_(source)
    return result


class Staging:
    """Pinned buffer for copying vectors to a GPU and products back to the CPU. The buffer grows as needed."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"_buffer": None}

    def to_device(self, array: NDArray[Any], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Convert an array of real numbers to an aligned tensor on ``device``, which may share its memory.

        The values are converted to ``dtype`` on the CPU.
        """
        # torch.from_numpy requires one of these dtypes, and memory that is aligned and writeable, without negative
        # strides. Pinned memory is also contiguous.
        on_cpu = device.type == "cpu"
        usable = array.dtype in TORCH_DTYPES and array.flags.writeable and array.flags.aligned
        if not (usable and (array.flags.c_contiguous or (on_cpu and array.flags.f_contiguous))):
            wide = np.float64 if dtype == torch.float64 else np.float32  # NumPy has no bfloat16
            array = np.require(array, wide, ["C", "W"])
        source = torch.from_numpy(array)
        if on_cpu:  # unlike NumPy, torch converts the dtype on all cores
            return packed(source, dtype)
        buffer = self._view(source.shape, dtype)
        if buffer is None:
            return source.to(device, dtype)
        # The copy is asynchronous. Nevertheless, it ends before the buffer is used again, because the product is read
        # first, and reading the product waits for the copy.
        return buffer.copy_(source).to(device, non_blocking=True)

    def to_array(self, tensor: Tensor) -> NDArray[Any]:
        """Copy a tensor on a GPU to a new array."""
        buffer = self._view(tensor.shape, tensor.dtype)
        if buffer is None:
            return tensor.cpu().numpy()
        return buffer.copy_(tensor).numpy().copy()

    def _view(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return a view of the buffer with the given shape and dtype, or None if the buffer would be too large."""
        count = math.prod(shape) * dtype.itemsize
        if count > _MAX_PINNED_BYTES:
            return None
        if self._buffer is None or len(self._buffer) < count:
            self._buffer = torch.empty(count, dtype=torch.uint8, pin_memory=True)
        return self._buffer[:count].view(dtype).view(tuple(shape))
