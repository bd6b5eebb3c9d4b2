"""Check that an operator is symmetric, before an algorithm relies on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvop.spectrum.lanczos import device_of, multiply, product_dtype, product_precision
from curvop.spectrum.noise import is_asymmetric
from curvop.spectrum.norms import norm, row_dots, row_norms

__all__ = ["check_symmetry"]

_ROWS = 1024  # rows of a dense matrix that are compared with columns at a time

_Matrix = type(aslinearoperator(np.zeros((1, 1))))


def check_symmetry(A: LinearOperator) -> int:
    """Raise an error if `A` is not symmetric. Return the number of products that the check took.

    Matrices are compared with their transposes. For operators that are not known to be symmetric, three products with
    random vectors give an estimate of the asymmetry and of the accuracy of the products. An asymmetry within this
    accuracy is accepted.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The real operator, or a matrix that was converted by ``aslinearoperator``.

    Raises
    ------
    ValueError
        If `A` is not symmetric.
    """
    if A.shape[0] == 1 or getattr(A, "is_symmetric", False):
        return 0
    precision = product_precision(A)
    if type(A) is _Matrix and (issparse(A.A) or isinstance(A.A, np.ndarray)):
        products, symmetry = 0, _asymmetry_of_matrix(A.A)
    else:
        products = 3
        symmetry, noise = _asymmetry_of_products(A)
        precision = max(precision, noise)
    if is_asymmetric(symmetry, precision):
        raise ValueError(
            f"A is not symmetric (||A - A'|| / ||A|| is about {symmetry:.1e}, but products are accurate to "
            f"{precision:.1e}): pass a symmetric operator, such as the symmetric part (A + A.T) / 2"
        )
    return products


def _asymmetry_of_matrix(A: Any) -> float:
    """Return ``||A - A'|| / ||A||`` in the Frobenius norm, or 0 if `A` is zero."""
    with np.errstate(invalid="ignore", over="ignore"):  # the caller reports products that are not finite
        if issparse(A):
            A = A.tocsr().astype(np.float64)
            return _ratio(norm((A - A.T).data), norm(A.data))
        A, differences, norms = np.asarray(A), [], []
        for start in range(0, len(A), _ROWS):
            rows = np.asarray(A[start : start + _ROWS], dtype=np.float64)
            differences.append(norm(rows - A[:, start : start + _ROWS].T))
            norms.append(norm(rows))
        return _ratio(norm(np.array(differences)), norm(np.array(norms)))


def _asymmetry_of_products(A: LinearOperator) -> tuple[float, float]:
    """Return (asymmetry, error): estimates of ``||A - A'|| / ||A||`` and of the relative error of products.

    Let u and v be random vectors of norm 1. The root mean square of ``sqrt(N) |u' (A - A') v|``, divided by that of
    ``||A u||``, is the relative asymmetry in the Frobenius norm. Rounding errors make products nonlinear. The error is
    therefore estimated from the difference between ``A (u + v)`` and ``A u + A v``.
    """
    size = A.shape[0]
    U = np.random.default_rng(0).standard_normal((2, size))
    U /= np.linalg.norm(U, axis=1, keepdims=True)
    length = float(np.linalg.norm(U[0] + U[1]))
    rows = torch.from_numpy(np.vstack([U, (U[0] + U[1]) / length])).to(device_of(A), product_dtype(A))
    products = multiply(A, rows).double()
    typical = float(np.linalg.norm(row_norms(products[:2]))) / 2**0.5
    mixed = row_dots(rows[:2].double(), products[:2].flip(0)).tolist()
    error = float(row_norms((products[2] - (products[0] + products[1]) / length)[None])[0])
    return _ratio(size**0.5 * abs(mixed[0] - mixed[1]), typical), _ratio(error, typical)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
