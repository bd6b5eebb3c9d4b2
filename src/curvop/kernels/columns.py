"""How many columns of a block are multiplied at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

__all__ = ["Columns"]

_SIZES = (1, 8, 64)
# Chunks of a size that are timed: the least of them counts, as a busy machine only ever adds to it.
_MEASURED = 3


class Columns:
    """Cuts blocks into chunks of the size that costs least for each column.

    Batching columns makes one operation of several: a gain where operations are small, a loss where they are large
    enough already. Which it is, is measured on the first chunks, upwards: a larger size is tried where the one before
    it paid.

    Parameters
    ----------
    setting : int or 'auto'
        The size of chunks, 1 for columns one by one, or ``'auto'`` to measure.
    worth : float
        Seconds that a column takes above which no larger size is tried.
    """

    def __init__(self, setting: int | str, worth: float = math.inf) -> None:
        self._worth = worth
        self._sizes: tuple[int, ...] = _SIZES if setting == "auto" else (int(setting),)
        self._taken: dict[int, list[float]] = defaultdict(list)

    def chunks(self, count: int, room: Callable[[], int], clock: Callable[[], float]) -> Iterator[tuple[int, int]]:
        """Yield the bounds of chunks of `count` columns; what is done between one and the next is timed.

        Parameters
        ----------
        room : callable
            Returns for how many columns' temporaries there is memory.
        clock : callable
            Returns the seconds at which the device has done what it was asked to.
        """
        if count == 1:
            yield 0, 1
            return
        start, most = 0, room()
        while start < count:
            left = count - start
            size = min(self._size(left, most), left)
            measuring = left > 1 and size in self._sizes and not self._known(size)
            began = clock() if measuring else 0.0
            yield start, start + size
            if measuring:
                self._taken[size].append((clock() - began) / size)
            start += size

    def forget(self) -> None:
        """Measure anew."""
        self._taken.clear()

    def shrink(self) -> bool:
        """Make chunks smaller from now on; return whether they can be."""
        largest = self._sizes[-1]
        self._sizes = self._sizes[:-1] or (max(1, largest // 2),)
        return largest > 1

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
            if not self._known(size):
                return size if size == 1 or self._seconds(best) <= self._worth else best
            if self._seconds(size) > self._seconds(best):
                break
            best = size
        return best

    def _known(self, size: int) -> bool:
        return len(self._taken[size]) == _MEASURED

    def _seconds(self, size: int) -> float:
        """Return what a column takes in chunks of `size`; the first chunk paid for what is prepared once."""
        return min(self._taken[size][1:])
