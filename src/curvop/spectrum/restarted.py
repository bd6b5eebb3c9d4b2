"""Lanczos with thick restarts, whose basis stays on the device where the operator computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.spectrum.norms import norm_of
from curvop.spectrum.orthogonality import rounding_left
from curvop.spectrum.timed import TimeUpError

__all__ = ["thick_restart"]

Array = NDArray[Any]


def thick_restart(
    multiply: Any, start: Tensor, k: int, basis: int, tol: float, maxiter: int, choose: Any
) -> tuple[Array, Tensor, int, bool]:
    r"""Find eigenpairs at an end of the spectrum of a symmetric operator (Wu, Simon, 2000).

    The basis :math:`V` grows to its full size; then the best Ritz vectors and the last residual begin it anew. In the
    projected matrix :math:`V^\top A V` what theory says is zero, or known, is that: products that are not exact would
    else set a floor to the residuals that it tells.

    Parameters
    ----------
    multiply : callable
        Of a ``(1, N)`` tensor. Its `TimeUpError` ends the search with what the basis holds.
    start : Tensor, shape (N,)
        In the precision and on the device of the basis.
    k : int
    basis : int
        Vectors of the basis, more than k, fewer than N.
    tol : float
        Relative accuracy of an eigenvalue; 0 for that of the basis.
    maxiter : int
        Restarts.
    choose : callable
        ``(values, count) -> indices`` of so many that are wanted, the most wanted first.

    Returns
    -------
    values : ndarray, shape (n,)
        k of them; fewer where time was up before the basis had so many vectors.
    vectors : Tensor, shape (n, N)
    converged : int
        How many of them are within `tol`.
    timed_out : bool

    References
    ----------
    Wu, Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl.
    22(2); the criterion is ARPACK's.
    """
    size, eps = len(start), float(torch.finfo(start.dtype).eps)
    V = torch.empty(basis + 1, size, dtype=start.dtype, device=start.device)
    V[0] = start / norm_of(start)
    H = np.zeros((basis + 1, basis + 1))
    generator = torch.Generator().manual_seed(0)
    kept, scale, timed_out = 0, 0.0, False
    while True:
        count = basis
        for at in range(kept, basis):
            try:
                w = multiply(V[at : at + 1])[0].to(start.dtype)
            except TimeUpError:
                count, timed_out = at, True
                break
            H[at, at] = float(_orthogonalise(V[: at + 1], w)[at])
            beta = norm_of(w)
            scale = max(scale, abs(H[at, at]) + beta)
            if beta <= rounding_left(start.dtype, size) * scale:  # an invariant subspace: go on from elsewhere
                beta = 0.0
                w = torch.randn(size, generator=generator, dtype=start.dtype).to(start.device)
                _orthogonalise(V[: at + 1], w)
            V[at + 1] = w / norm_of(w)
            H[at, at + 1] = H[at + 1, at] = beta
        values, S = np.linalg.eigh(H[:count, :count])
        wanted = choose(values, min(k, count))
        coupling = H[count, :count] @ S  # of the Ritz vectors to the next vector of the basis: their residuals
        residuals = np.abs(coupling[wanted])
        done = residuals <= max(tol, eps) * np.maximum(np.abs(values[wanted]), eps ** (2 / 3) * scale)
        maxiter -= 1
        if timed_out or done.all() or maxiter <= 0:
            return values[wanted], _combined(V[:count], S[:, wanted]), int(done.sum()), timed_out
        # Besides those that are wanted, half of the others: what was learnt of them speeds up the next round.
        kept = min(k + (basis - k) // 2, basis - 1)
        best = choose(values, kept)
        V[:kept] = _combined(V[:basis], S[:, best])
        V[kept] = V[basis]
        H[:] = 0
        H[np.diag_indices(kept)] = values[best]
        H[kept, :kept] = H[:kept, kept] = coupling[best]


def _orthogonalise(V: Tensor, w: Tensor) -> Tensor:
    """Take the rows of `V` out of `w`, in place and twice; return the shares."""
    total = torch.zeros(len(V), dtype=V.dtype, device=V.device)
    for _ in range(2):
        shares = V @ w
        w.addmv_(V.T, shares, alpha=-1.0)
        total += shares
    return total


def _combined(V: Tensor, coefficients: Array) -> Tensor:
    """Return the rows ``coefficients' V``."""
    return torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(V.device, V.dtype) @ V
