"""Time that a study may take: from seconds to a point in time, and an operator that keeps to it."""

from __future__ import annotations

import math
import numbers
import time
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator

from curvop.operators.base import BridgeLinearOperator, Rows, WrappingLinearOperator

__all__ = ["TimeUpError", "TimedOperator", "end_of"]

_AT_ONCE = 16  # columns from one look at the clock to the next


class TimeUpError(TimeoutError):
    """A product was asked for when time was up."""


def end_of(seconds: Any) -> float:
    """Return when `seconds` from now are over, on the clock of ``time.monotonic``; infinite for None.

    Raises
    ------
    TypeError, ValueError
        Where it is no number, NaN, or negative.
    """
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise TypeError(f"seconds is {seconds!r}, but must be a number, or None for no limit")
    try:
        limit = float(seconds)
    except OverflowError:  # a whole number of more than 308 digits
        limit = math.inf
    if not limit >= 0:
        raise ValueError(f"seconds is {seconds}, but must be 0 or more, or None for no limit")
    return time.monotonic() + limit


class TimedOperator(WrappingLinearOperator):
    """A symmetric operator that multiplies until time is up; a block in parts, so as to look at the clock in between.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric.
    until : float
        On the clock of ``time.monotonic``.

    Attributes
    ----------
    spare : int
        Columns that somebody else is to multiply afterwards: their time is left to them, where it is not more than half
        of all.

    Raises
    ------
    TimeUpError
        From a product that is asked for when time is up. What is under way is not broken off.
    """

    def __init__(self, A: LinearOperator, until: float) -> None:
        super().__init__(A.dtype, A.shape)
        self._A, self._until, self._begun = A, until, time.monotonic()
        self._pace = 0.0  # seconds for a column, of late
        self.spare = 0

    @property
    def columns_left(self) -> float:
        """How many columns can be multiplied in the time that is left, as the last ones went."""
        left = max(0.0, self._until - time.monotonic())
        return left / self._pace if self._pace else math.inf if left else 0.0

    def _apply(self, rows: Rows) -> Rows:
        parts: list[Any] = [self._multiplied(rows[at : at + _AT_ONCE]) for at in range(0, len(rows), _AT_ONCE)]
        if len(parts) == 1:
            return parts[0]  # type: ignore[no-any-return]
        return torch.cat(parts) if isinstance(rows, torch.Tensor) else np.concatenate(parts)

    def _multiplied(self, rows: Rows) -> Rows:
        begun, spared = time.monotonic(), self.spare * self._pace
        if begun >= self._until - (spared if spared <= (self._until - self._begun) / 2 else 0.0):
            raise TimeUpError("time is up")
        products: Any = self._A.matvec(rows[0])[None] if len(rows) == 1 else self._A.matmat(rows.T).T
        if not isinstance(self._A, BridgeLinearOperator):
            products = np.array(products, order="C")  # an operator may return its argument
        self._pace = (time.monotonic() - begun) / len(rows)
        return products  # type: ignore[no-any-return]
