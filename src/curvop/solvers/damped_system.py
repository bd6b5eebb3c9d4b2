"""Apply a damped operator and its preconditioner to the rows of a tensor, and count and time the products."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from tqdm import tqdm

from curvop.operators.base import TensorLinearOperator
from curvop.operators.kfac import KFACLinearOperator
from curvop.operators.validation import real_operator
from curvop.spectrum.lanczos import device_of, product_dtype
from curvop.spectrum.norms import row_norms

__all__ = ["DampedSystem", "NotFiniteError", "operator_multiplier", "row_multiplier"]

RowFunction = Callable[[Tensor], Tensor]

_EPS = float(np.finfo(np.float64).eps)


class NotFiniteError(ValueError):
    """Raised if a product is not finite."""

    def __init__(self) -> None:
        super().__init__("a product with A is not finite")


class DampedSystem:
    """The matrix ``A + damping * I`` and a preconditioner, applied to the rows of float64 tensors.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator.
    damping : float
        Number that is added to the diagonal.
    preconditioner : callable or None
        Function that applies the preconditioner to each row of a tensor ``(K, N)``; see `row_multiplier`.
    until : float
        Deadline as a value of ``time.monotonic()``.
    bar : tqdm.tqdm
        Progress bar that counts products.
    num_columns : int
        Number of right-hand sides.

    Attributes
    ----------
    products : ndarray, shape (num_columns,)
        Number of products so far for each right-hand side. If several right-hand sides use a product, it is divided
        equally among them.
    scale : float
        Largest ratio of the norm of a product to the norm of its vector. This is a lower bound for the norm of the
        matrix.
    epsilon : float
        Machine epsilon of the products.
    """

    def __init__(
        self,
        A: LinearOperator,
        damping: float,
        preconditioner: RowFunction | None,
        until: float,
        bar: tqdm[Any],
        num_columns: int,
    ) -> None:
        self.A, self.precondition, self.bar = A, preconditioner, bar
        self._damping, self._until = float(damping), until
        self.products = np.zeros(num_columns)
        self.scale = 0.0
        self.epsilon = max(_EPS, torch.finfo(product_dtype(A)).eps, getattr(A, "epsilon", 0.0))
        self._multiply = operator_multiplier(A)
        self._latest: tuple[float, int] | None = None  # start of the latest product, and its number of columns

    @property
    def low_precision(self) -> bool:
        """Whether the products are less accurate than the recurrences."""
        return self.epsilon > _EPS

    def multiply(self, rows: Tensor, columns: NDArray[np.intp]) -> Tensor:
        """Return the products of the damped matrix with the rows.

        The products are counted in equal parts for the right-hand sides with the indices `columns`.
        """
        self._latest = time.monotonic(), len(rows)
        product = self._multiply(rows).add(rows, alpha=self._damping)
        self.products[columns] += len(rows) / len(columns)
        self.bar.update(len(rows))
        return product

    def checked_multiply(self, rows: Tensor, columns: NDArray[np.intp]) -> Tensor:
        """Return the products with the rows as ``multiply`` does, but raise an error if a product is not finite."""
        product = self.multiply(rows, columns)
        if not bool(product.isfinite().all()):
            raise NotFiniteError
        return product

    def time_for(self, count: int) -> bool:
        """Return whether a product with `count` rows probably ends before the deadline.

        The estimated time per row is the time since the start of the latest product, divided by its number of rows.
        This time includes the recurrences.
        """
        now = time.monotonic()
        seconds = (now - self._latest[0]) / self._latest[1] if self._latest else 0.0
        return now + count * seconds < self._until

    def measure_scale(self, columns: NDArray[np.intp]) -> None:
        """Update ``scale`` by one product with a random vector."""
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, self.A.shape[0]))).to(device_of(self.A))
        product = self.checked_multiply(x, columns)
        self.scale = max(self.scale, float(row_norms(product)[0] / row_norms(x)[0]))

    def products_per_column(self) -> NDArray[np.int64]:
        """Return ``products``, rounded to integers with the same sum."""
        whole = np.floor(self.products + 1e-9).astype(np.int64)
        missing = round(float(self.products.sum())) - int(whole.sum())
        whole[np.argsort(whole - self.products, kind="stable")[:missing]] += 1
        return whole


def row_multiplier(preconditioner: Any, shape: tuple[int, int], as_arrays: bool) -> RowFunction | None:
    """Return a function that applies a preconditioner to the rows of a tensor, or None if there is none.

    Parameters
    ----------
    preconditioner : LinearOperator, matrix, Tensor, callable or None
        The preconditioner. A callable receives columns ``(N, K)`` and returns columns of the same shape.
    shape : tuple of int
        Shape of the matrix of the system.
    as_arrays : bool
        Whether a callable receives arrays instead of tensors.

    Raises
    ------
    TypeError, ValueError
        If the preconditioner is complex, has none of these types, or has a shape other than `shape`. Also if it is a
        `curvop.KFACLinearOperator`, which approximates the matrix instead of its inverse.
    """
    if preconditioner is None:
        return None
    if isinstance(preconditioner, str):
        raise ValueError(
            f"preconditioner is {preconditioner!r}, but must be an operator, a matrix or a callable, such as "
            "curvop.preconditioner.kfac(A, damping); curvop.solve also accepts 'auto'"
        )
    if isinstance(preconditioner, KFACLinearOperator):  # conjugate gradients would end with a misleading warning
        raise ValueError(
            f"preconditioner is a {type(preconditioner).__name__}, which approximates the matrix and not its inverse: "
            "pass curvop.preconditioner.kfac(A, damping), or the inverse(damping) of this operator"
        )
    found = getattr(preconditioner, "shape", None)
    is_function = callable(preconditioner) and found is None
    if not is_function and (found is None or tuple(found) != tuple(shape)):
        raise ValueError(
            f"preconditioner has shape {found}, but must be an operator or a matrix of the shape of A, {tuple(shape)}, "
            "or a callable"
        )
    if is_function:
        return _function_multiplier(preconditioner, as_arrays)
    if isinstance(preconditioner, Tensor):
        if preconditioner.is_complex():
            raise TypeError("preconditioner is complex, but must be real")
        matrix = preconditioner.detach().to(torch.float64)
        return _function_multiplier(lambda X: matrix.to(X.device) @ X, as_arrays=False)
    return operator_multiplier(real_operator(preconditioner))


def operator_multiplier(A: LinearOperator) -> RowFunction:
    """Return a function that applies an operator to each row of a float64 tensor, by one block product."""
    if isinstance(A, TensorLinearOperator) and A.takes_tensors:
        return lambda rows: (A @ rows.T).T

    def multiply(rows: Tensor) -> Tensor:
        # Copy the product, because an operator may return its argument or reuse one output array for all products.
        array = rows.numpy(force=True)
        product = A.matvec(array[0])[None] if len(array) == 1 else A.matmat(array.T).T
        return torch.from_numpy(np.array(product, dtype=np.float64, order="C")).to(rows.device)

    return multiply


def _function_multiplier(function: Callable[[Any], Any], as_arrays: bool) -> RowFunction:
    def multiply(rows: Tensor) -> Tensor:
        # Pass a copy, because the function may work in place.
        X: Any = rows.numpy(force=True).T.copy() if as_arrays else rows.T.clone()
        with torch.no_grad():
            product = function(X)
        if np.shape(product) != tuple(X.shape):
            raise ValueError(
                f"preconditioner returned an array of shape {np.shape(product)} for columns of shape {tuple(X.shape)}, "
                "but must return one of the same shape"
            )
        product = torch.as_tensor(product)
        if product.is_complex():
            raise TypeError("preconditioner returned complex numbers, but must be real")
        return product.to(rows).T

    return multiply
