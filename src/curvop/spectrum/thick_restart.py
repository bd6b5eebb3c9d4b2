r"""Thick-restart block Lanczos with PyTorch tensors, on the device of the operator.

`KrylovBasis` holds orthonormal rows :math:`V`, a symmetric matrix :math:`H`, and a block of further orthonormal rows
:math:`Q` with :math:`A V^\top = V^\top H + Q^\top B`. Each step multiplies A with the block Q and appends Q to V.
`thick_restart` runs steps until the basis is full, and then restarts from the best Ritz vectors and the block Q, which
again satisfy such a relation (Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM
J. Matrix Anal. Appl. 22(2), 2000, doi:10.1137/S0895479898334605).

In exact arithmetic, the Krylov space of b starting vectors contains at most b eigenvectors of a multiple eigenvalue.
Only rounding errors bring in further eigenvectors, often too late. Small random blocks also help if the eigenvalues of
a cluster are close but distinct, even if the cluster has more than b eigenvalues ("A structural bound for cluster
robustness of randomized small-block Lanczos", 2025, arXiv:2507.10144).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.spectrum.counting import TimeUpError
from curvop.spectrum.lanczos import rounding_left, zeros
from curvop.spectrum.norms import column_norms, inner_products, row_norms, tensor_norm

__all__ = ["KrylovBasis", "RitzPairs", "orthonormalized", "thick_restart"]

Array = NDArray[Any]

_SECTION = 2**16  # number of columns of the basis that are combined at once
_CANCELLED = 0.1  # a vector whose norm shrinks by this factor within its block is orthogonalized to the basis again


@dataclasses.dataclass(frozen=True, eq=False)
class RitzPairs:
    """The result of `thick_restart`.

    Attributes
    ----------
    values : ndarray, shape (n,)
        The eigenvalues. n is k, or less if time ran out before the basis had k vectors.
    vectors : Tensor, shape (n, N)
        The eigenvectors as rows.
    num_converged : int
        The number of eigenpairs that satisfy the tolerance.
    timed_out : bool
        Whether time ran out.
    """

    values: Array
    vectors: Tensor
    num_converged: int
    timed_out: bool


def thick_restart(
    multiply: Callable[[Tensor], Tensor],
    starts: Tensor,
    k: int,
    basis: int,
    tol: float,
    maxiter: int,
    select: Callable[[Array, int], Array],
    deflated: Tensor | None = None,
    interval: int | None = None,
) -> RitzPairs:
    """Find eigenpairs of a symmetric operator by thick-restart block Lanczos.

    Parameters
    ----------
    multiply : callable
        Takes rows of shape ``(b, N)`` and returns their products with the operator. If `multiply` raises a
        ``TimeUpError``, the iteration stops and returns the Ritz pairs of the current basis.
    starts : Tensor, shape (b, N)
        The starting block. The basis has the same dtype and device.
    k : int
        The number of eigenvalues.
    basis : int
        The maximum number of basis vectors, from ``k + b`` to ``N - b``.
    tol : float
        The relative accuracy of the eigenvalues; 0 means machine precision. The stopping criterion is that of ARPACK.
    maxiter : int
        The maximum number of restarts.
    select : callable
        ``select(values, count)`` takes ascending values and returns the indices of the `count` most wanted values.
    deflated : Tensor, shape (D, N), optional
        Orthonormal rows. All basis vectors are kept orthogonal to these rows, so that the result has eigenpairs of the
        operator restricted to their orthogonal complement.
    interval : int, optional
        The number of products between two checks for convergence. By default, there is one check before each restart.
        Late checks take more products, but leave rounding errors more time to bring in the eigenvectors of multiple
        eigenvalues.

    Returns
    -------
    RitzPairs
    """
    eps = float(torch.finfo(starts.dtype).eps)
    krylov = KrylovBasis(multiply, starts, basis, deflated)
    # A restart also keeps half of the other Ritz vectors, because they speed up the convergence after the restart.
    # The rest of the basis is a multiple of the block size.
    kept = basis - krylov.width * max(1, (basis - k - (basis - k) // 2) // krylov.width)
    timed_out = False
    while True:
        try:
            krylov.grow(basis if interval is None else min(basis, krylov.count + interval))
        except TimeUpError:
            timed_out = True
        values, S = np.linalg.eigh(krylov.projected)
        wanted = select(values, min(k, krylov.count))
        coupling = krylov.coupling @ S  # components of A times the Ritz vectors along the next block
        residuals = column_norms(coupling[:, wanted])
        floor = eps ** (2 / 3) * krylov.scale
        converged = residuals <= max(tol, eps) * np.maximum(np.abs(values[wanted]), floor)
        full = krylov.count + krylov.width > basis
        maxiter -= full
        if timed_out or converged.all() or maxiter <= 0:
            return RitzPairs(values[wanted], krylov.combine(S[:, wanted]), int(converged.sum()), timed_out)
        if full:
            best = select(values, kept)
            krylov.restart(values[best], S[:, best])


class KrylovBasis:
    r"""An orthonormal basis that grows by one block per step, and the projection of a symmetric operator A onto it.

    Entries of the projected matrix whose exact values are known, for example zeros, are set to the exact values. If
    these entries were computed from inexact products, their errors would prevent convergence to a small tolerance.

    Each block is orthonormalized by a Gram-Schmidt process that takes the vector of the largest norm first. If the norm
    of the remaining vectors is a rounding error, the block is rank deficient. The remaining vectors are then replaced
    by random vectors, and their coupling to the basis is set to zero.

    Parameters
    ----------
    multiply, starts, deflated
        See `thick_restart`.
    size : int
        The maximum number of basis vectors.

    Attributes
    ----------
    width : int
        The number of vectors of a block, b.
    count : int
        The number of basis vectors.
    scale : float
        An estimate of the norm of A. Smaller numbers are considered zero if their ratio to it is a rounding error.
    """

    def __init__(
        self, multiply: Callable[[Tensor], Tensor], starts: Tensor, size: int, deflated: Tensor | None = None
    ) -> None:
        self.width, length = starts.shape
        self.count, self.scale = 0, 0.0
        self._multiply = multiply
        self._locked = 0 if deflated is None else len(deflated)
        # The deflated vectors, the basis, and the next block.
        self._rows = zeros((self._locked + size + self.width, length), starts.dtype, starts.device)
        self._rounding = rounding_left(starts.dtype, length)
        self._H = np.zeros((size + self.width, size + self.width))
        self._generator = torch.Generator().manual_seed(0)
        starts = starts.clone()
        if deflated is not None:
            self._rows[: self._locked] = deflated
            _orthogonalize(self._rows[: self._locked], starts)
        self._append_orthonormalized(starts, row_norms(starts), 0.0)

    @property
    def vectors(self) -> Tensor:
        """The basis vectors as rows, of shape ``(count, N)``."""
        return self._rows[self._locked : self._locked + self.count]

    @property
    def block(self) -> Tensor:
        """The next block as rows, of shape ``(b, N)``."""
        start = self._locked + self.count
        return self._rows[start : start + self.width]

    @property
    def projected(self) -> Array:
        """The projection of A onto the basis, of shape ``(count, count)``."""
        return self._H[: self.count, : self.count]

    @property
    def coupling(self) -> Array:
        """The components of A times the basis vectors along the next block, of shape ``(b, count)``."""
        return self._H[self.count : self.count + self.width, : self.count]

    def grow(self, count: int) -> None:
        """Take steps as long as the basis has at most `count` vectors."""
        while self.count + self.width <= count:
            self.step()

    def step(self) -> None:
        """Multiply A with the next block, append this block to the basis, and compute a new block."""
        W = self._multiply(self.block).to(self._rows.dtype)
        start, stop = self.count, self.count + self.width
        coefficients, norms = _orthogonalize(self._rows[: self._locked + stop], W, 2 * self.width)
        own = coefficients[:, self._locked + start :].cpu().numpy().astype(np.float64)
        self.scale = max(self.scale, float((np.abs(np.diag(own)) + norms).max()))
        self._H[start:stop, start:stop] = (own + own.T) / 2
        self.count = stop
        coupling = self._append_orthonormalized(W, norms, self._rounding * self.scale)
        self._H[stop : stop + self.width, start:stop] = coupling
        self._H[start:stop, stop : stop + self.width] = coupling.T

    def restart(self, values: Array, S: Array) -> None:
        """Replace the basis by Ritz vectors, given by their Ritz values and coefficients S ``(count, kept)``."""
        kept, coupling, block = len(values), self.coupling @ S, self.block.clone()
        weights = self._weights(S)
        for part in self.vectors.split(_SECTION, 1):  # a product with all columns at once would copy half of the basis
            part[:kept] = weights @ part
        self.count = kept
        self.block[:] = block
        self._H[:] = 0
        self._H[np.diag_indices(kept)] = values
        self._H[kept : kept + self.width, :kept] = coupling
        self._H[:kept, kept : kept + self.width] = coupling.T

    def combine(self, coefficients: Array) -> Tensor:
        """Return linear combinations of the basis vectors, as rows, for coefficients of shape ``(count, n)``."""
        return self._weights(coefficients) @ self.vectors

    def _weights(self, coefficients: Array) -> Tensor:
        weights = torch.from_numpy(np.ascontiguousarray(coefficients.T))
        return weights.to(self._rows.device, self._rows.dtype)

    def _append_orthonormalized(self, W: Tensor, norms: Array, tiny: float) -> Array:
        """Store an orthonormal basis Q of the rows of W as the next block. Return ``Q @ W.T``, of shape ``(b, b)``.

        The rows of W must be orthogonal to the basis. `norms` are their norms. W and `norms` are overwritten. Norms of
        up to `tiny` are considered zero.
        """
        start = self._locked + self.count
        coupling, left = np.zeros((self.width, self.width)), list(range(self.width))
        first_norms = norms.copy()
        for index in range(self.width):
            before, row = self._rows[: start + index], left.pop(int(np.argmax(norms[left])))
            w, length = W[row], float(norms[row])
            if tiny < length < _CANCELLED * first_norms[row]:
                length = float(_orthogonalize(before, W[row : row + 1])[1][0])
            if length <= tiny:
                length = 0.0
                w = torch.randn(len(w), generator=self._generator, dtype=w.dtype).to(w.device)
                _orthogonalize(before, w[None])
            q = torch.div(w, length or tensor_norm(w), out=self._rows[start + index])
            coupling[index, row] = length
            if left:
                along = W[left] @ q
                W[left] -= along[:, None] * q
                coupling[index, left] = np.where(norms[left] > tiny, along.cpu().numpy(), 0.0)
                norms[left] = row_norms(W[left])
        return coupling


def orthonormalized(rows: Tensor) -> Tensor:
    """Orthonormalize rows ``(n, N)`` in place that are almost orthonormal."""
    factor = torch.linalg.cholesky(rows @ rows.T)
    for part in rows.split(_SECTION, 1):
        part.copy_(torch.linalg.solve_triangular(factor, part, upper=False))
    return rows


def _orthogonalize(V: Tensor, W: Tensor, nearest: int = 0) -> tuple[Tensor, Array]:
    """Orthogonalize the rows of W ``(b, N)`` in place against the orthonormal rows of V ``(m, N)``.

    A pass over V leaves rounding errors, which are relative to the norms before the pass. The pass is therefore
    repeated if it halves a norm (Daniel, Gragg, Kaufman, Stewart, "Reorthogonalization and stable algorithms for
    updating the Gram-Schmidt QR factorization", Math. Comp. 30(136), 1976, doi:10.1090/S0025-5718-1976-0431641-8).
    Products with A have large components only along the last two blocks. If the components along the `nearest` last
    rows are subtracted first, a single pass over V usually suffices.

    Returns
    -------
    coefficients : Tensor, shape (b, m)
        The components that were subtracted.
    norms : ndarray, shape (b,)
        The norms of the remaining vectors.
    """
    total = W.new_zeros(len(W), len(V))
    if nearest:
        total[:, -nearest:] = _subtract_components(V[-nearest:], W)
    norms = row_norms(W)
    for _ in range(2):
        before = norms
        total += _subtract_components(V, W)
        norms = row_norms(W)
        if (norms > 0.5 * before).all():
            break
    return total, norms


def _subtract_components(V: Tensor, W: Tensor) -> Tensor:
    """Subtract the components of the rows of W ``(b, N)`` along the rows of V ``(m, N)``. Return them ``(b, m)``."""
    components = inner_products(V[None], W.T[None])[0].T
    W.addmm_(components, V, alpha=-1.0)
    return components
