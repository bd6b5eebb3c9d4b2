"""What one product costs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

__all__ = ["Cost", "median_seconds"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one product of an operator costs, as measured by `cost` of the operator.

    Attributes
    ----------
    seconds : float
        Median time of a product with one vector, everything kept that the budget lets be kept.
    gradients : float
        The same in units of one gradient over the same data, as `gradient_and_loss` computes it. Counted in matrix
        products the limit is 2.0 for a linearization that is kept and 3.0 for one made anew (less where the first layer
        is large).
    kept_bytes : int
        What kept linearizations retain.
    kept_share : float
        The share of the batches that is kept; the others are linearized anew in every product.
    peak_bytes : int or None
        How far memory rises above what is kept while a product is made; None where it cannot be told.
    compile_seconds : float
        What compiling took so far, 0 for the autograd engine.
    """

    seconds: float
    gradients: float
    kept_bytes: int
    kept_share: float
    peak_bytes: int | None
    compile_seconds: float

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f", {self.peak_bytes / 1e6:.1f} MB more at the peak"
        compiled = f"; compiling took {self.compile_seconds:.1f} s" if self.compile_seconds else ""
        return (
            f"a product takes {self.seconds * 1e3:.3g} ms, {self.gradients:.2f} gradients; "
            f"{self.kept_share:.0%} of the batches are kept, in {self.kept_bytes / 1e6:.1f} MB{peak}{compiled}"
        )


def median_seconds(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median time of each function; they take turns, so that a busy machine is busy for all of them."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for seconds, function in zip(taken, functions, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]
