"""An operator as the eigen-solvers and certificates see it: real, checked, its products counted on a bar."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from tqdm import tqdm

from curvop.operators.validation import real_operator
from curvop.spectrum.lanczos import device_of, multiply

__all__ = ["CountedOperator", "symmetric_operator"]


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
