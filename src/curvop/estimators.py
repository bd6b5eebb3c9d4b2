"""Estimates of what a matrix would have to be formed for, from a few block products."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, solve_triangular
from scipy.sparse.linalg import LinearOperator

__all__ = ["diagonal"]


def diagonal(A: LinearOperator, num_products: int, rng: int | np.random.Generator | None = None) -> NDArray[Any]:
    """Estimate the diagonal ``(N,)`` of a symmetric operator by XDiag.

    Half of the products find the dominant part of the range, whose diagonal is exact; the rest is estimated, each test
    vector leaving out itself. The error falls with the eigenvalues' decay. Where half of the products exceed the rank
    of `A` by some, there is none; from N products on the diagonal is read off the matrix.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric.
    num_products : int
        At least 2. Memory is about 4 N num_products numbers.
    rng : int or numpy.random.Generator, optional
        Of the test vectors.

    Raises
    ------
    ValueError
        For arguments that cannot be, and where a product is not finite.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 3.1 and supplement; arXiv:2301.07825.
    """
    size = A.shape[1]
    count = num_products // 2
    if A.shape[0] != size or count < 1:
        raise ValueError(f"A has shape {A.shape} and num_products is {num_products}: A must be square, with 2 or more")
    if num_products >= size:
        return np.array(np.diagonal(np.asarray(A @ np.eye(size), dtype=np.float64)))
    tests = np.random.default_rng(rng).choice(np.array([-1.0, 1.0]), (size, count))
    product = np.asarray(A @ tests, dtype=np.float64)
    if not np.isfinite(product).all():
        raise ValueError("a product with A is not finite")
    # Pivoted, as columns may be equal: the signs that a few rows see are few.
    Q, R, order = qr(product, mode="economic", pivoting=True, check_finite=False)
    tests, product = tests[:, order], product[:, order]
    weights = np.abs(np.diag(R))
    if not weights.min() > np.finfo(float).eps * size * weights.max():  # the range is found: nothing is left over
        Q = Q[:, weights > np.finfo(float).eps * size * weights.max()]
        return _rowwise(Q, np.asarray(A @ Q)) if Q.size else np.zeros(size)
    image = np.asarray(A @ Q, dtype=np.float64)
    mixed = image.T @ tests
    S = solve_triangular(R, np.eye(count), lower=False).T
    S /= np.linalg.norm(S, axis=0)
    QS = Q @ S
    left_out = _rowwise(QS, image @ S)
    of_tests = tests * (product - Q @ mixed + QS * (S * mixed).sum(0))
    estimate: NDArray[Any] = _rowwise(Q, image) + (of_tests.sum(1) - left_out) / count
    return estimate


def _rowwise(left: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    total: NDArray[Any] = np.einsum("ij,ij->i", left, right)
    return total
