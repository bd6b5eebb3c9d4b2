"""An operator as the eigen-solvers and certificates see it: real, checked, its products counted on a bar."""

from __future__ import annotations

import math
import numbers
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from tqdm import tqdm

from curvop.operators.base import Rows, TensorLinearOperator, WrappingLinearOperator
from curvop.operators.validation import real_operator
from curvop.spectrum.lanczos import device_of, multiply

__all__ = ["CountedOperator", "TimeUpError", "TimedOperator", "end_of", "symmetric_operator"]


def symmetric_operator(A: Any) -> LinearOperator:
    """Return `A`, an operator or a matrix, as a ``LinearOperator`` that may be symmetric.

    Raises
    ------
    TypeError
        Where it is no operator, or complex.
    ValueError
        Where it is not square, or empty.
    """
    A = real_operator(A)
    if A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"A has shape {A.shape}, but must be square and not empty")
    return A


class CountedOperator(LinearOperator):  # type: ignore[misc]
    """A symmetric operator in single or double precision whose products are counted, checked and fresh.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric.
    bar : tqdm.tqdm
        Counts the columns that are multiplied.
    dtype : dtype, optional
        Of the products: float32 where that of `A` is, and float64 otherwise, by default.

    Raises
    ------
    ValueError
        From a product that is not finite.
    """

    def __init__(self, A: LinearOperator, bar: tqdm[Any], dtype: Any = None) -> None:
        if dtype is None:
            dtype = np.float32 if A.dtype == np.float32 else np.float64
        super().__init__(np.dtype(dtype), A.shape)
        self._A, self._bar = A, bar
        self.products = 0

    def _matvec(self, x: Any) -> NDArray[Any]:
        x = np.asarray(x)
        return self._checked(self._A.matvec(x.reshape(-1)), 1).reshape(x.shape)

    def _matmat(self, X: Any) -> NDArray[Any]:
        return self._checked(self._A.matmat(np.asarray(X)), X.shape[1])

    def multiply_rows(self, rows: Tensor) -> Tensor:
        """Return the products ``(K, N)`` with the rows of a tensor, where the operator computes."""
        product = multiply(self._A, rows)
        self._count(len(rows))
        if not product.isfinite().all():
            raise ValueError("a product with A is not finite")
        return product

    @property
    def device(self) -> torch.device:
        """Where the operator computes."""
        return device_of(self._A)

    def _count(self, columns: int) -> None:
        self.products += columns
        self._bar.update(columns)

    def _adjoint(self) -> CountedOperator:
        return self

    _transpose = _adjoint

    def _checked(self, product: Any, columns: int) -> NDArray[Any]:
        self._count(columns)
        # A copy, as an operator may return its argument, or an array that its next product overwrites.
        fresh = np.array(product, dtype=self.dtype)
        if not np.isfinite(fresh).all():
            raise ValueError("a product with A is not finite")
        return fresh


# Time that a study may take: from seconds to a point in time, and an operator that keeps to it.

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
        if not isinstance(self._A, TensorLinearOperator):
            products = np.array(products, order="C")  # an operator may return its argument
        self._pace = (time.monotonic() - begun) / len(rows)
        return products  # type: ignore[no-any-return]
