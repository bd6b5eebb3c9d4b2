"""How many columns of a block are multiplied at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

__all__ = ["Columns"]

_SIZES = (1, 8, 64)


class Columns:
    """Cuts blocks into chunks of the size that costs least for each column.

    Batching columns makes one operation of several: a gain where operations are small, a loss where they are large
    enough already. Which it is, is measured on the first chunks, upwards: a larger size is tried where the one before
    it paid.

    Parameters
    ----------
    setting : int or 'auto'
        The size of chunks, 1 for columns one by one, or ``'auto'`` to measure.
    """

    def __init__(self, setting: int | str) -> None:
        self._sizes = _SIZES if setting == "auto" else (int(setting),)
        self._prepared: set[int] = set()
        self._seconds: dict[int, float] = {}

    def chunks(self, count: int, room: Callable[[], int], synchronize: Callable[[], None]) -> Iterator[tuple[int, int]]:
        """Yield the bounds of chunks of `count` columns; what is done between one and the next is timed.

        Parameters
        ----------
        room : callable
            Returns for how many columns' temporaries there is memory.
        synchronize : callable
            Waits until the device has done what it was asked to.
        """
        if count == 1:
            yield 0, 1
            return
        start, most = 0, room()
        while start < count:
            left = count - start
            size = min(self._size(left, most), left)
            measuring = left > 1 and size in self._sizes and size not in self._seconds
            if measuring:
                synchronize()
                began = time.perf_counter()
            yield start, start + size
            if measuring:
                synchronize()
                self._record(size, time.perf_counter() - began)
            start += size

    def one_by_one(self) -> None:
        """Batch no columns any more: some operation cannot."""
        self._sizes = (1,)

    def _size(self, left: int, room: int) -> int:
        if len(self._sizes) == 1:
            return max(1, min(self._sizes[0], room))
        best = 1
        for size in self._sizes:
            if size > min(left, room):
                break
            if size not in self._seconds:
                return size
            if self._seconds[size] > self._seconds[best]:
                break
            best = size
        return best

    def _record(self, size: int, seconds: float) -> None:
        if size not in self._prepared:  # the first chunk of a size pays for what is prepared once
            self._prepared.add(size)
            return
        self._seconds[size] = seconds / size
