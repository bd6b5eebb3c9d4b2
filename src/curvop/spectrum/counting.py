"""Wrappers that validate symmetric operators, count their products, and enforce a time limit."""

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

__all__ = ["CountedOperator", "TimeUpError", "TimedOperator", "deadline_after", "symmetric_operator"]

_COLUMNS_PER_CHECK = 16  # largest number of columns of a block product between two checks of the clock
_RESERVE_MARGIN = 1.1  # the smallest time that is reserved for a column, in units of the time of the latest column


def symmetric_operator(A: Any) -> LinearOperator:
    """Convert an operator or a matrix to a real, square ``LinearOperator``. The symmetry of `A` is not checked.

    Raises
    ------
    TypeError
        If `A` is neither an operator nor a matrix, or if `A` is complex.
    ValueError
        If `A` is not square or is empty.
    """
    A = real_operator(A)
    if A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"A has shape {A.shape}, but must be square and not empty")
    return A


class CountedOperator(LinearOperator):  # type: ignore[misc]
    """Wrap a symmetric operator to count its products and to check that each product is finite.

    Products with NumPy arrays are returned as new arrays of dtype float32 or float64.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The real symmetric operator.
    bar : tqdm.tqdm
        The progress bar. Each product advances the bar by the number of columns of the product.
    dtype : dtype, optional
        The dtype of the products. The default is float32 if the dtype of `A` is float32, and float64 otherwise.

    Attributes
    ----------
    products : int
        The number of products so far. A block product with K columns counts as K products.

    Raises
    ------
    ValueError
        If a product is not finite.
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
        """Apply A to each row of a tensor ``(K, N)`` on the operator's device. Return a ``(K, N)`` tensor."""
        product = multiply(self._A, rows)
        self._count(len(rows))
        if not product.isfinite().all():
            raise ValueError("a product with A is not finite")
        return product

    @property
    def device(self) -> torch.device:
        """The device on which the operator computes its products."""
        return device_of(self._A)

    def _count(self, columns: int) -> None:
        self.products += columns
        self._bar.update(columns)

    def _adjoint(self) -> CountedOperator:
        return self

    _transpose = _adjoint

    def _checked(self, product: Any, columns: int) -> NDArray[Any]:
        self._count(columns)
        # Copy the product, because an operator may return its argument or reuse one output array for all products.
        copy = np.array(product, dtype=self.dtype)
        if not np.isfinite(copy).all():
            raise ValueError("a product with A is not finite")
        return copy


class TimeUpError(TimeoutError):
    """Raised if a product is requested after the deadline."""


def deadline_after(seconds: Any) -> float:
    """Return the deadline ``time.monotonic() + seconds``, or infinity if `seconds` is None.

    Raises
    ------
    TypeError, ValueError
        If `seconds` is not a number, is NaN, or is negative.
    """
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise TypeError(f"seconds is {seconds!r}, but must be a number, or None for no limit")
    try:
        limit = float(seconds)
    except OverflowError:  # an integer of more than 308 digits
        limit = math.inf
    if not limit >= 0:
        raise ValueError(f"seconds is {seconds}, but must be 0 or more, or None for no limit")
    return time.monotonic() + limit


class TimedOperator(WrappingLinearOperator):
    """Wrap a symmetric operator to raise a ``TimeUpError`` after a deadline.

    Block products are split into parts of at most 16 columns. The clock is checked before each part. A part has no more
    columns than fit into the remaining time, but at least one. If time runs out during a part, this part is completed.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The real symmetric operator.
    until : float
        The deadline as a value of ``time.monotonic()``.

    Attributes
    ----------
    reserved : int
        The number of columns for which time is reserved before the deadline. Products raise a ``TimeUpError`` as soon
        as the remaining time is only sufficient for these columns. Twice their estimated time is reserved, or half of
        the total time if this is less, but at least their estimated time. If the total time is not sufficient for these
        columns, no time is reserved.

    Raises
    ------
    TimeUpError
        If a product is requested after the deadline, or in the reserved time before it.
    """

    def __init__(self, A: LinearOperator, until: float) -> None:
        super().__init__(A.dtype, A.shape)
        self._A, self._until, self._start = A, until, time.monotonic()
        self._seconds_per_column = 0.0  # time per column of the latest product
        self._is_first = True  # the first product often takes longer, because it also prepares the later ones
        self.reserved = 0

    @property
    def columns_left(self) -> float:
        """The estimated number of columns that fit into the remaining time.

        The estimate uses the time per column of the latest product. Before the first product, the estimate is infinite.
        """
        left = max(0.0, self._until - time.monotonic())
        if self._seconds_per_column:
            return left / self._seconds_per_column
        return math.inf if left else 0.0

    def _apply(self, rows: Rows) -> Rows:
        parts: list[Any] = []
        start = 0
        while start < len(rows):
            step = max(1, int(min(self.columns_left, _COLUMNS_PER_CHECK)))
            parts.append(self._multiply(rows[start : start + step]))
            start += step
        if len(parts) == 1:
            return parts[0]  # type: ignore[no-any-return]
        return torch.cat(parts) if isinstance(rows, torch.Tensor) else np.concatenate(parts)

    def _multiply(self, rows: Rows) -> Rows:
        now = time.monotonic()
        if now >= self._until - self._seconds_reserved():
            raise TimeUpError("time is up")
        products: Any = self._A.matvec(rows[0])[None] if len(rows) == 1 else self._A.matmat(rows.T).T
        if not isinstance(self._A, TensorLinearOperator):
            products = np.array(products, order="C")  # an operator may return its argument
        self._is_first = not self._seconds_per_column
        self._seconds_per_column = (time.monotonic() - now) / len(rows)
        return products  # type: ignore[no-any-return]

    def _seconds_reserved(self) -> float:
        if not self.reserved or self._is_first:
            return 0.0
        total = self._until - self._start
        needed = _RESERVE_MARGIN * (self.reserved + 1) * self._seconds_per_column  # one more: it may have begun late
        return min(2 * needed, max(needed, total / 2)) if needed < total else 0.0
