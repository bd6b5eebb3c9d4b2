"""Thick-restart Lanczos with PyTorch tensors, on the device of the operator (Wu, Simon, 2000)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.spectrum.counting import TimeUpError
from curvop.spectrum.lanczos import rounding_left
from curvop.spectrum.norms import tensor_norm

__all__ = ["thick_restart"]

Array = NDArray[Any]


def thick_restart(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    basis: int,
    tol: float,
    maxiter: int,
    select: Callable[[Array, int], Array],
) -> tuple[Array, Tensor, int, bool]:
    r"""Find eigenpairs of a symmetric operator by thick-restart Lanczos (Wu, Simon, 2000).

    The basis :math:`V` grows until it has `basis` vectors. A restart then keeps only the best Ritz vectors and the last
    residual vector. Entries of the projected matrix :math:`V^\top A V` whose exact values are known, for example zeros,
    are set to the exact values. If these entries were computed from inexact products, their errors would prevent
    convergence to a small `tol`.

    Parameters
    ----------
    multiply : callable
        Takes a row vector of shape ``(1, N)`` and returns its product with the operator. If `multiply` raises a
        ``TimeUpError``, the iteration stops and returns the Ritz pairs of the current basis.
    start : Tensor, shape (N,)
        The starting vector. The basis has the same dtype and device.
    k : int
        The number of eigenvalues.
    basis : int
        The number of basis vectors, ``k < basis < N``.
    tol : float
        The relative accuracy of the eigenvalues; 0 means machine precision. The stopping criterion is that of ARPACK.
    maxiter : int
        The maximum number of restarts.
    select : callable
        ``select(values, count)`` takes ascending values and returns the indices of the `count` most wanted values.

    Returns
    -------
    values : ndarray, shape (n,)
        The eigenvalues. n is k, or less if time ran out before the basis had k vectors.
    vectors : Tensor, shape (n, N)
        The eigenvectors as rows.
    num_converged : int
        The number of eigenpairs that satisfy `tol`.
    timed_out : bool
        Whether time ran out.
    """
    size, eps = len(start), float(torch.finfo(start.dtype).eps)
    V = torch.empty(basis + 1, size, dtype=start.dtype, device=start.device)
    V[0] = start / tensor_norm(start)
    H = np.zeros((basis + 1, basis + 1))
    generator = torch.Generator().manual_seed(0)
    kept, scale, timed_out = 0, 0.0, False
    while True:
        count = basis
        for step in range(kept, basis):
            try:
                w = multiply(V[step : step + 1])[0].to(start.dtype)
            except TimeUpError:
                count, timed_out = step, True
                break
            H[step, step] = float(_orthogonalize(V[: step + 1], w)[step])
            beta = tensor_norm(w)
            scale = max(scale, abs(H[step, step]) + beta)
            if beta <= rounding_left(start.dtype, size) * scale:  # an invariant subspace: continue with a random vector
                beta = 0.0
                w = torch.randn(size, generator=generator, dtype=start.dtype).to(start.device)
                _orthogonalize(V[: step + 1], w)
            V[step + 1] = w / tensor_norm(w)
            H[step, step + 1] = H[step + 1, step] = beta
        values, S = np.linalg.eigh(H[:count, :count])
        wanted = select(values, min(k, count))
        coupling = H[count, :count] @ S  # components of A times the Ritz vectors along the next basis vector
        residuals = np.abs(coupling[wanted])
        converged = residuals <= max(tol, eps) * np.maximum(np.abs(values[wanted]), eps ** (2 / 3) * scale)
        maxiter -= 1
        if timed_out or converged.all() or maxiter <= 0:
            return values[wanted], _combine(V[:count], S[:, wanted]), int(converged.sum()), timed_out
        # Also keep half of the other Ritz vectors, because they speed up the convergence after the restart.
        kept = min(k + (basis - k) // 2, basis - 1)
        best = select(values, kept)
        V[:kept] = _combine(V[:basis], S[:, best])
        V[kept] = V[basis]
        H[:] = 0
        H[np.diag_indices(kept)] = values[best]
        H[kept, :kept] = H[:kept, kept] = coupling[best]


def _orthogonalize(V: Tensor, w: Tensor) -> Tensor:
    """Orthogonalize `w` in place against the rows of `V`, in two passes. Return the sum of both coefficient vectors."""
    total = torch.zeros(len(V), dtype=V.dtype, device=V.device)
    for _ in range(2):
        coefficients = V @ w
        w.addmv_(V.T, coefficients, alpha=-1.0)
        total += coefficients
    return total


def _combine(V: Tensor, coefficients: Array) -> Tensor:
    """Return the linear combinations ``coefficients.T @ V`` of the rows of `V`, as a tensor."""
    return torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(V.device, V.dtype) @ V
