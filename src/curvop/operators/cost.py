"""What one product costs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

__all__ = ["Cost", "medians", "seconds"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one product of an operator costs, as measured by `cost` of the operator.

    Attributes
    ----------
    seconds : float
        Median time of a product with one vector, with everything kept that the budget allows.
    gradients : float
        ``seconds`` in units of a plain gradient over the same data: the median time of ``torch.autograd.grad`` of the
        loss by the operator's parameters, with the model and the loss called as a user calls them, summed over the
        batches; the time to read the data does not count. (Of a Jacobian, the loss is the sum of the predictions.)
        Counted in floating-point operations, a product of a Hessian takes at most 2.0 with a kept linearization and 3.0
        with a fresh one, less if the first layer is large; small models take what calls of torch take.
    kept_bytes : int
        Bytes that kept linearizations retain.
    kept_share : float
        Share of the batches that are kept; the others are linearized again in every product.
    peak_bytes : int or None
        Rise of memory above what is kept during a product; None if it is not known.
    compile_seconds : float
        Time that compiling has taken so far, 0 for the autograd engine.
    """

    seconds: float
    gradients: float
    kept_bytes: int
    kept_share: float
    peak_bytes: int | None
    compile_seconds: float

    def __str__(self) -> str:
        share = f"{self.kept_share:.0%} of the" if 0 < self.kept_share < 1 else "all" if self.kept_share else "no"
        peak = "" if self.peak_bytes is None else f"; {self.peak_bytes / 1e6:.1f} MB more at the peak"
        compiled = f"; compiled in {self.compile_seconds:.1f} s" if self.compile_seconds else ""
        return (
            f"one product: {self.seconds * 1e3:.3g} ms ({self.gradients:.1f} gradients); "
            f"{share} batches cached, {self.kept_bytes / 1e6:.1f} MB{peak}{compiled}"
        )


def seconds(function: Callable[[], object]) -> float:
    """Return the time that a function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(clocks: Sequence[Callable[[], float]], repeats: int) -> list[float]:
    """Return the median of what each function returns; they take turns, so that a busy machine is busy for all."""
    rounds = [[clock() for clock in clocks] for _ in range(repeats)]
    return [statistics.median(taken) for taken in zip(*rounds, strict=True)]
