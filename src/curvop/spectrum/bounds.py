"""How far approximate eigenvalues of a symmetric matrix are from true ones, by the residuals of their vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["matched_bounds", "quadratic_estimates"]

Array = NDArray[Any]


def matched_bounds(values: Array, gram: Array, residual_gram: Array, noise: float) -> tuple[Array, Array]:
    r"""Bound the errors of eigenvalues so that each of them stands for an eigenvalue of its own.

    There are k eigenvalues of A, counted with their multiplicities, that can be assigned to the k values one to one,
    none of them further away than its bound. Where intervals of the size of the single residuals do not overlap, each
    holds an eigenvalue (Parlett, 1998, theorem 4.5.1). Values whose intervals do are taken together: with their vectors
    V and residuals :math:`R = A V - V \Lambda`, as many eigenvalues as there are values lie within
    :math:`\|R\|_2 / \sigma_{\min}(V)` of them. Two copies of one vector have no bound.

    Parameters
    ----------
    values : ndarray, shape (k,)
    gram, residual_gram : ndarray, shape (k, k)
        ``V' V`` of the vectors, of norm 1, and ``R' R`` of their residuals.
    noise : float
        The norm, at most, of the error of a product with a vector of norm 1.

    Returns
    -------
    bounds : ndarray, shape (k,)
        In the units of the eigenvalues.
    groups : ndarray of int, shape (k,)
        The number of the group that a value was bounded in.

    References
    ----------
    Parlett (1998), "The Symmetric Eigenvalue Problem". Kahan (1967), "Inclusion theorems for clusters of eigenvalues of
    Hermitian matrices"; Cao, Xie, Li (1996), "A sharp version of Kahan's theorem on clustered eigenvalues", Linear
    Algebra Appl. 245, for vectors that are not orthonormal.
    """
    order = np.argsort(values, kind="stable")
    bounds, groups = np.zeros(len(values)), np.zeros(len(values), dtype=np.int64)
    parts = [order[index : index + 1] for index in range(len(order))]
    while True:
        reach = [_bound(gram, residual_gram, part, noise) for part in parts]
        joined: list[Array] = []
        last = -np.inf
        for part, bound in zip(parts, reach, strict=True):
            if bound == np.inf:  # it is known where the copies are, and the others need not suffer from them
                bound = max(_bound(gram, residual_gram, part[[index]], noise) for index in range(len(part)))
            if joined and values[part[0]] - bound <= last:
                joined[-1] = np.concatenate([joined[-1], part])
            else:
                joined.append(part)
            last = max(last, values[part[-1]] + bound)
        if len(joined) == len(parts):
            break
        parts = joined
    for number, (part, bound) in enumerate(zip(parts, reach, strict=True)):
        bounds[part], groups[part] = bound, number
    return bounds, groups


def _bound(gram: Array, residual_gram: Array, part: Array, noise: float) -> float:
    count = len(part)
    if count == 1:
        return float(np.sqrt(residual_gram[part[0], part[0]])) + noise
    block = np.ix_(part, part)
    least = float(np.linalg.eigvalsh(gram[block])[0])
    if least <= 100 * count * np.finfo(float).eps:  # to rounding, the vectors are dependent
        return np.inf
    residual = np.sqrt(max(0.0, float(np.linalg.eigvalsh(residual_gram[block])[-1])))
    return float((residual + np.sqrt(count) * noise) / np.sqrt(least))


def quadratic_estimates(
    values: Array,
    quotients: Array,
    residuals: Array,
    bounds: Array,
    groups: Array,
    others: tuple[float, float],
    noise: float,
) -> Array:
    r"""Estimate the errors of eigenvalues by the squares of their residuals, where there is a gap around them.

    A Rayleigh quotient :math:`\rho` of residual r is no further than :math:`\|r\|^2 / \delta` from an eigenvalue, where
    :math:`\delta` is the distance from :math:`\rho` to all others (Kato, Temple; Parlett, 1998, theorem 11.7.1). It is
    an estimate here and no bound: the eigenvalues that were not found are only known to lie about the range `others`.

    Parameters
    ----------
    values, quotients, residuals, bounds : ndarray, shape (k,)
        The residuals are those of the values.
    groups : ndarray of int, shape (k,)
        Of a group of several, the bound is returned.
    others : (float, float)
        The range of what was not found; infinite where it is not known.
    noise : float
        As in `matched_bounds`.
    """
    estimates = bounds.copy()
    for index in range(len(values)):
        apart = groups != groups[index]
        if apart.sum() < len(values) - 1 or not np.isfinite(bounds[index]):
            continue
        quotient, shift = quotients[index], abs(values[index] - quotients[index])
        gaps = np.abs(quotient - values[apart]) - bounds[apart]
        beyond = max(others[0] - quotient, quotient - others[1])
        gap = min(float(gaps.min(initial=np.inf)), beyond)
        square = max(0.0, residuals[index] ** 2 - shift**2)
        if gap > 0:
            estimates[index] = min(bounds[index], shift + square / gap + noise)
    return estimates
