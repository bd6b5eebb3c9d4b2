"""Random estimates that carry bounds of what is not random in them."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from curvop.spectrum.estimators import Estimate, mean_of

__all__ = ["BoundedEstimate", "bounded_mean"]

Array = NDArray[Any]


class BoundedEstimate(Estimate):
    """A random estimate that also carries the bounds of its quadrature; it unpacks to value and error.

    Attributes
    ----------
    value : float or ndarray
    error : float or ndarray
        Of the probes and the quadrature together: the root of the sum of squares of the standard error and of a quarter
        of ``high - low``, so that two of them reach the bounds.
    low, high : float or ndarray
        What the quadrature leaves open, averaged over the probes; the probes' spread is not in them.
    """

    low: Any
    high: Any

    def __new__(cls, value: Any, error: Any, low: Any, high: Any) -> Self:
        """Make an estimate with bounds."""
        self = super().__new__(cls, value, error)
        self.low, self.high = low, high
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.value, self.error, self.low, self.high

    def __repr__(self) -> str:
        names = ("value", "error", "low", "high")
        return f"BoundedEstimate({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def bounded_mean(
    values: Array, low: Array, high: Array, known: Any, rounding: Any, reach: Any = 0.0
) -> BoundedEstimate:
    """Return the mean of the probes' values ``(K, ...)`` with its bounds.

    To it is added what is `known` without probes, to within `reach`. No error is below `rounding`.
    """
    if not len(values):
        value, spread = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
        low, high = value - reach, value + reach
    else:
        value, spread = mean_of(values)
        low, high = low.mean(0) - reach, high.mean(0) + reach
    error = np.maximum(np.hypot(spread, (high - low) / 4), rounding)
    return BoundedEstimate((value + known)[()], error[()], (low + known)[()], (high + known)[()])
