"""Repair a set of eigenpairs in which a search has found a missed eigenvalue.

The search returns a vector that is orthogonal to the computed eigenvectors, and whose Rayleigh quotient proves that an
eigenvalue was missed. `EigenRepair` runs thick-restart Lanczos from this vector, on the orthogonal complement of the
computed eigenvectors, until all Ritz values outside of the limits of the search have converged. It then computes the
eigenpairs of A in the span of the old and the new vectors (Rayleigh-Ritz), and keeps the wanted ones. The products with
the old vectors are known, so only the products with the new vectors are computed.

Lanczos multiplies single vectors: on matrices with eigenvalues of multiplicity 4, blocks of two vectors took more
products, and fewer repairs succeeded within the budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from curvop.operators.transfer import aligned
from curvop.spectrum.certificate import Evidence
from curvop.spectrum.counting import CountedOperator, TimeUpError
from curvop.spectrum.lanczos import rounding_left
from curvop.spectrum.missed_search import SearchResult
from curvop.spectrum.norms import column_norms
from curvop.spectrum.thick_restart import thick_restart

__all__ = ["EigenRepair"]

Array = NDArray[Any]

_MAX_REPAIRS = 4
_MOST = 6  # eigenvalues per repair
_MIN_BASIS, _MAX_BASIS = 20, 40  # Lanczos vectors of a repair
_CHECK_INTERVAL = 5  # products between two checks for convergence; most repairs take 15 products


class EigenRepair:
    """A repair of eigenpairs for `curvop.spectrum.certificate.certify_within`.

    Parameters
    ----------
    tol : float
        The relative accuracy of the eigenvalues, as in `curvop.spectrum.eigsh`.
    select : callable
        ``select(values)`` takes ascending values and returns the indices of the wanted ones.
    budget : int
        The maximum number of products of all repairs and of the searches between them.
    memory : int
        The number of bytes that a repair may use.

    Attributes
    ----------
    added : int
        The number of eigenpairs that the repairs have added.
    """

    def __init__(self, tol: float, select: Callable[[Array], Array], budget: int, memory: int) -> None:
        self._tol, self._select, self._budget, self._memory = tol, select, budget, memory
        self._last, self._left = 0, _MAX_REPAIRS
        self.added = 0

    def __call__(self, A: CountedOperator, evidence: Evidence, found: SearchResult) -> Evidence | None:
        """Return better eigenpairs, or None if Lanczos does not converge with the remaining products and time."""
        if self._left == _MAX_REPAIRS:
            self._last = A.products + self._budget
        self._left -= 1
        if self._left < 0:
            return None
        try:
            new, products = self._missed(A, evidence, found)
        except TimeUpError:
            return None
        self.added += new.shape[1]
        return self._merged(evidence, new, products) if new.shape[1] else None

    def _missed(self, A: CountedOperator, evidence: Evidence, found: SearchResult) -> tuple[Array, Array]:
        """Return eigenvectors with eigenvalues beyond the limits of the search, and their products with A."""
        start, products, beyond = found.vectors, found.products, found.beyond
        if start is None or products is None or beyond is None:
            raise AssertionError("the search found nothing")
        Q, exponent = np.linalg.qr(evidence.vectors)[0], evidence.exponent
        R = products - start * np.einsum("ij,ij->j", start, products)
        R -= Q @ (Q.T @ R)
        scale = max(abs(found.low), abs(found.high), float(np.abs(evidence.values).max()))
        if column_norms(R).max() <= rounding_left(torch.float64, len(Q)) * scale:
            return start, products  # the search has computed all eigenvectors
        below = beyond < found.limits[0]
        low, high = (float(np.ldexp(limit, exponent)) for limit in found.limits)

        def select(values: Array, count: int) -> Array:
            outermost = np.arange(len(values)) if below else np.arange(len(values))[::-1]
            if count <= _MOST:  # these must converge
                missed = (values < low).sum() if below else (values > high).sum()
                count = min(count, max(1, int(missed)))
            return outermost[:count]

        size, k = Q.shape
        products_left = self._last - A.products - _MOST
        fitting = self._memory // (8 * size) - 8 * (k + _MOST)  # Lanczos runs next to eight copies of the eigenvectors
        basis = min(_MAX_BASIS, fitting, size - k - 1, products_left)
        if basis < _MIN_BASIS:
            return start[:, :0], products[:, :0]
        rows = [aligned(torch.from_numpy(np.ascontiguousarray(V.T))).to(A.device) for V in (start[:, :1], Q)]
        pairs = thick_restart(
            A.multiply_rows,
            rows[0],
            _MOST,
            basis,
            self._tol,
            1 + (products_left - basis) // ((basis - _MOST + 1) // 2),
            select,
            deflated=rows[1],
            interval=_CHECK_INTERVAL,
        )
        new: Array = pairs.vectors.T.cpu().numpy()
        if pairs.timed_out or pairs.num_converged < len(pairs.values):
            new = new[:, :0]
        return new, np.ldexp(A.matmat(new), -exponent)

    def _merged(self, evidence: Evidence, new: Array, products: Array) -> Evidence:
        """Return the wanted eigenpairs of A in the span of the old and the new vectors."""
        W = np.hstack([evidence.vectors, new])
        AW = np.hstack([evidence.residuals + evidence.vectors * evidence.values, products])
        U = np.linalg.qr(W, mode="r")
        H = solve_triangular(U, solve_triangular(U, W.T @ AW, trans="T").T, trans="T")
        values, S = np.linalg.eigh((H + H.T) / 2)
        chosen = self._select(values)
        values, C = values[chosen], solve_triangular(U, S[:, chosen])
        vectors, products = W @ C, AW @ C
        return dataclasses.replace(
            evidence,
            values=values,
            vectors=vectors,
            lengths=np.ones(len(values)),
            residuals=products - vectors * values,
            quotients=np.einsum("ij,ij->j", vectors, products),
        )
