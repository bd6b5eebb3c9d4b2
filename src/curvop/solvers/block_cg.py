r"""Block conjugate gradients: one Krylov space for all right-hand sides.

The method of O'Leary (1980) minimizes the error of every right-hand side over the sum of the Krylov spaces of all
right-hand sides. With one right-hand side, it is the method of conjugate gradients of Hestenes and Stiefel (1952). This
implementation differs from O'Leary's method as follows:

1. The residuals are stored as an orthonormal basis Q and coefficients C, as in the algorithm BCGrQ of Dubrulle (2001).
   The block of search directions is :math:`S = M Q + S \rho^\top` with the coefficients :math:`\rho` of the latest
   orthonormalization. Without the basis, the recurrence breaks down if the residuals become linearly dependent, which
   always happens when they converge.
2. Directions in which all residuals are below their tolerances are removed, so that the block becomes narrower. These
   directions are singular vectors of C. Right-hand sides that are zero, linearly dependent or converged therefore cost
   no products.
3. New residuals are orthogonalized against all earlier ones, as far as memory permits. Otherwise, rounding errors
   destroy the orthogonality and slow down convergence. For the Gauss-Newton matrix of a model of the digits data set
   (with a damping of 1e-4 of the largest eigenvalue, and a relative residual of 1e-6), the orthogonalization reduces
   the number of products from 235 to 107 for one right-hand side, and from 630 to 377 for ten.
4. A matrix is called singular only relative to the rounding errors of its products. The curvatures along the search
   directions are first compared with a norm of the matrix, in the inner product of the preconditioner. If they are
   smaller than the rounding errors that this norm allows, two products measure the rounding errors. Badly
   scaled matrices are therefore distinguished from singular ones: the products of a diagonal matrix with entries from
   1e-20 to 1e20 have small errors in every component, and those of a singular dense matrix do not.
5. All right-hand sides stay in one block. Single recurrences in lockstep never took fewer products in
   ``tests/solvers/test_block_solve.py``: 24 and 24 for two columns of a well-conditioned matrix, 78 and 78 for two
   columns with separate Krylov spaces, 87 and 95 for eight easy columns and a hard one, and 60 and 820 for 20 columns
   of a matrix with 40 rows. Columns are continued one by one only if rounding errors stop the block.
6. Every step synchronizes with the device only once, to copy the small matrices to the host.

References
----------
O'Leary (1980), "The block conjugate gradient algorithm and related methods", Linear Algebra Appl. 29,
doi:10.1016/0024-3795(80)90247-5. Dubrulle (2001), "Retooling the method of block conjugate gradients", Electron. Trans.
Numer. Anal. 12. Fukaya, Nakatsukasa, Yanagisawa, Yamamoto (2014), "CholeskyQR2: a simple and communication-avoiding
algorithm for computing a tall-skinny QR factorization on a large-scale parallel system", ScalA '14, for the
orthonormalization. Van der Vorst, Ye (2000), "Residual replacement strategies for Krylov subspace iterative methods for
the convergence of true residuals", SIAM J. Sci. Comput. 22(3), for the effect of rounding errors on the residuals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.operators.validation import available_bytes
from curvop.solvers.damped_system import DampedSystem, NotFiniteError

__all__ = ["BlockRun", "block_cg"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
_FIRST_ROWS = 32  # initial capacity of a history, in vectors
_MOST_ROWS = 1024  # maximum capacity; a longer history would take more time than it saves
_SMALL = 2**26  # if fewer bytes are needed, the free memory is not queried
#: Directions are removed as long as the squared norm of the removed part of each residual is at most this fraction of
#: the squared tolerance.
_NEGLIGIBLE = 0.3
#: A Cholesky factor is too ill-conditioned if a diagonal entry is smaller than this number (for rows of norm 1).
_DEPENDENT = 1e-5
#: The orthogonalization against earlier residuals may remove at most this fraction of a residual. A larger part is not
#: a rounding error of one step: the earlier residuals have lost their orthogonality, and the part is a true residual.
_LARGEST_REMOVAL = 0.1
#: A run stops if each residual is at most this fraction of ``epsilon * ||A|| * ||x||``, which is a bound on the
#: rounding errors of a product. For a float32 model of the digits data set, the solver attained a tenth of this bound.
_ROUNDING_FRACTION = 0.03


@dataclasses.dataclass
class BlockRun:
    """The outcome of a run of `block_cg`.

    Attributes
    ----------
    reason : str
        Why the run ended: 'rtol', 'maxiter' or 'seconds'; 'precision' if rounding errors of the products dominate the
        residuals; 'drift' if the residuals of a block have lost their orthogonality, so that the updated residuals may
        be wrong; 'curvature' if the curvature along a direction is not positive; 'breakdown' if the matrix of
        curvatures along the search directions is too ill-conditioned.
    steps : int
        The number of steps.
    sizes : ndarray, shape (K,)
        The norms of the recursively updated residuals, relative to their tolerances.
    curvature : float
        The smallest curvature along a search direction, if ``reason`` is 'curvature' or 'breakdown'.
    """

    reason: str
    steps: int
    sizes: Array
    curvature: float = 0.0


def block_cg(
    system: DampedSystem,
    X: Tensor,
    residuals: Tensor,
    tolerances: Array,
    columns: NDArray[np.intp],
    max_steps: int,
    on_step: Callable[[], None] | None,
    trust_rounding: bool = True,
) -> BlockRun:
    """Improve the solutions by block conjugate gradients until all residuals are below their tolerances.

    Parameters
    ----------
    system : DampedSystem
        The matrix and the preconditioner.
    X, residuals : Tensor, shape (K, N)
        The solutions, which are updated in place, and their residuals.
    tolerances : ndarray, shape (K,)
        The norms of the residuals at which the run stops.
    columns : ndarray, shape (K,)
        The indices of the right-hand sides. Each product is counted in equal parts for all of them.
    max_steps : int
        The maximum number of steps.
    on_step : callable or None
        Called after each step.
    trust_rounding : bool
        Whether the run may stop because rounding errors dominate the residuals.
    """
    tolerance = torch.from_numpy(tolerances).to(X)[:, None]
    scaled = residuals / tolerance
    Q, C, accurate = _orthonormal_rows(scaled)
    if not bool(accurate):
        Q, C = _householder(scaled)
    coefficients = C.cpu().numpy()
    kept, removed = _significant(coefficients, np.zeros(len(X)))
    Q, C = kept.to(X) @ Q, kept.to(X) @ C
    sizes = np.linalg.norm(coefficients, axis=0)
    limits, estimates_rounding = np.ones(len(X)), trust_rounding and system.low_precision
    if not len(Q):
        return BlockRun("rtol", 0, sizes)
    Q, S, factor = _precondition(system, Q)
    C = factor @ C
    history = _History(shared=system.precondition is None)
    history.add(Q, S)
    # The matrix ``S @ inv(M) @ S.T`` with the preconditioner M, and a lower bound for the norm of the preconditioned
    # matrix. Both are known without products.
    inner = torch.eye(len(S), dtype=X.dtype, device=X.device)
    norm = X.new_zeros(())
    step = 0
    while True:
        if step >= max_steps:
            return BlockRun("maxiter", step, sizes)
        if not system.time_for(len(S) + len(X)):  # the true residuals take a product for each right-hand side
            return BlockRun("seconds", step, sizes)
        P = system.multiply(S, columns)
        curvatures = S @ P.T
        curvatures = (curvatures + curvatures.T) / 2
        L, info = torch.linalg.cholesky_ex(curvatures)
        rest = Q - torch.cholesky_solve(P, L)  # not finite if the curvatures are singular, which is checked below
        change = history.clean(rest)
        Q, rho, accurate = _orthonormal_rows(rest)
        new, lost = rho @ C, ((change @ change.T @ C) * C).sum(0)
        squares, products = (S * S).sum(1), (P * P).sum(1)
        if system.precondition is None:
            norm = torch.maximum(norm, products.div(squares).max().sqrt())
        norm = torch.maximum(norm, curvatures.diagonal().div(inner.diagonal()).max())
        smallest = torch.maximum(norm * inner.diagonal(), (S * P).abs().sum(1)) * _EPS
        is_positive = (L.diagonal() ** 2 > smallest).all() & (info == 0)
        facts = [P.isfinite().all(), is_positive, accurate, products.div(squares).max()]
        flags = torch.stack([fact.to(torch.float64) for fact in facts])
        norms = torch.linalg.vector_norm(X, dim=1) if estimates_rounding else X.new_zeros(len(X))
        # The only synchronization with the device in this step.
        host = torch.cat([flags, norms, lost, new.reshape(-1)]).cpu().numpy()
        finite, positive, is_accurate, ratio = host[:4]
        if not finite:
            raise NotFiniteError
        if np.isinf(ratio):
            raise ValueError("the entries of A are too large for float64 arithmetic: scale A and damping")
        system.scale = max(system.scale, float(ratio) ** 0.5)
        if not positive:
            verdict, curvature = _examine(system, S, P, curvatures, norm * inner, columns)
            if verdict != "positive":
                return BlockRun(verdict, step, sizes, curvature)
        X.addmm_((tolerance * torch.cholesky_solve(C, L).T), S)
        step += 1
        if on_step is not None:
            on_step()
        coefficients = host[4 + 2 * len(X) :].reshape(tuple(new.shape))
        squared = np.square(coefficients).sum(0) + removed
        largest = np.maximum(np.maximum(squared, sizes**2), 1)
        if (host[4 + len(X) : 4 + 2 * len(X)] > _LARGEST_REMOVAL**2 * largest).any():
            if len(S) > 1:
                return BlockRun("drift", step, sizes)
            # A single recurrence converges, if slowly, without the orthogonality to the earlier residuals.
            rest, is_accurate = rest + change, False
            history.clear()
        if not is_accurate:
            Q, rho = _householder(rest)
            new = rho @ C
            coefficients = new.cpu().numpy()
            squared = np.square(coefficients).sum(0) + removed
        sizes = np.sqrt(squared)
        if estimates_rounding:
            rounding = system.epsilon * system.scale * host[4 : 4 + len(X)]
            limits = np.maximum(1.0, _ROUNDING_FRACTION * rounding / tolerances)
        if (sizes <= limits).all():
            return BlockRun("rtol" if (sizes <= 1).all() else "precision", step, sizes)
        kept, removed = _significant(coefficients, removed)
        if len(kept) < len(Q):
            kept = kept.to(X)
            Q, rho, new = kept @ Q, kept @ rho, kept @ new
        Q, Z, factor = _precondition(system, Q)
        C, mixing = factor @ new, factor @ rho
        history.add(Q, Z)
        S = torch.addmm(Z, mixing, S)
        if system.precondition is not None:
            # With the residuals R = Q - inv(K) P of the step and the curvatures K, P = K (Q - R), and R is orthogonal
            # to Q in the inner product of the preconditioner.
            squares = (curvatures @ curvatures).diagonal() + ((mixing @ curvatures) ** 2).sum(0)
            norm = torch.maximum(norm, squares.div(inner.diagonal()).max().sqrt())
        inner = torch.eye(len(S), dtype=X.dtype, device=X.device) + mixing @ inner @ mixing.T


class _History:
    """The bases of all residuals of a run, against which new residuals are orthogonalized.

    In exact arithmetic, the new residuals are orthogonal to all earlier ones in the inner product of the
    preconditioner. If the memory is not sufficient, only the first bases are kept. They contain the directions of the
    largest eigenvalues, to which orthogonality is lost first.

    Parameters
    ----------
    shared : bool
        Whether bases and preconditioned bases are equal, because there is no preconditioner.
    """

    def __init__(self, shared: bool) -> None:
        self._shared, self._count, self._full = shared, 0, False
        self._bases: list[Tensor] = []

    def add(self, Q: Tensor, Z: Tensor) -> None:
        """Add a basis Q and the preconditioned basis Z, if they fit into the memory."""
        count, parts = self._count + len(Q), (Q,) if self._shared else (Q, Z)
        self._full |= count > min(_MOST_ROWS, Q.shape[1])
        if not self._full and (not self._bases or count > len(self._bases[0])):
            self._grow(min(max(2 * count, _FIRST_ROWS), Q.shape[1], _MOST_ROWS), parts)
        if self._full:
            return
        for basis, part in zip(self._bases, parts, strict=True):
            basis[self._count : count] = part
        self._count = count

    def _grow(self, capacity: int, parts: tuple[Tensor, ...]) -> None:
        needed = 8 * capacity * parts[0].shape[1] * len(parts)
        if needed > _SMALL and needed > available_bytes(parts[0].device):
            self._full = True
            return
        grown = [part.new_zeros(capacity, part.shape[1]) for part in parts]
        for new, old in zip(grown, self._bases, strict=False):
            new[: self._count] = old[: self._count]
        self._bases = grown

    def clean(self, rows: Tensor) -> Tensor:
        """Orthogonalize rows against all bases, in place. Return the vectors that were subtracted from the rows."""
        if not self._count:
            return torch.zeros_like(rows)
        Q, Z = self._bases[0][: self._count], self._bases[-1][: self._count]
        change = rows @ Z.T @ Q
        rows.sub_(change)
        return change

    def clear(self) -> None:
        """Remove all bases."""
        self._count, self._full = 0, False


def _orthonormal_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (Q, r, accurate), where ``rows = r.T @ Q`` and the rows of Q are orthonormal (CholeskyQR2).

    ``accurate`` is a tensor with one boolean. If it is False, the rows are almost linearly dependent, and Q is not
    reliable. The function does not synchronize with the device.
    """
    norms = torch.linalg.vector_norm(rows, dim=1)
    safe = torch.where(norms > 0, norms, 1.0)
    Q, r = rows / safe[:, None], torch.diag(safe)
    accurate = torch.ones((), dtype=torch.bool, device=rows.device)
    for _ in range(2):
        L, info = torch.linalg.cholesky_ex(Q @ Q.T)
        accurate = accurate & (info == 0) & (L.diagonal().min() > _DEPENDENT)
        Q, r = torch.linalg.solve_triangular(L, Q, upper=False), L.T @ r
    return Q, r, accurate


def _householder(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Q, r), where ``rows = r.T @ Q`` and Q has orthonormal rows. The rows may be linearly dependent."""
    Q, r = torch.linalg.qr(rows.T)
    return Q.T.contiguous(), r


def _significant(coefficients: Array, removed: Array) -> tuple[Tensor, Array]:
    """Choose the directions that the block keeps.

    Parameters
    ----------
    coefficients : ndarray, shape (p, K)
        Coefficients of the residuals in the basis of the block, in units of the tolerances.
    removed : ndarray, shape (K,)
        Squared norm of the removed part of each residual.

    Returns
    -------
    kept : Tensor
        Orthonormal rows that span the directions to keep.
    removed : ndarray, shape (K,)
        The squared norms after the removal of further directions.
    """
    left, values, right = np.linalg.svd(coefficients, full_matrices=False)
    parts = np.square(values[::-1, None] * right[::-1])  # the smallest singular value first
    totals = removed + np.concatenate([np.zeros((1, len(removed))), np.cumsum(parts, axis=0)])
    count = int(np.flatnonzero((totals <= _NEGLIGIBLE).all(1)).max(initial=0))
    if not count and len(values) == len(coefficients):
        return torch.eye(len(coefficients), dtype=torch.float64), removed
    return torch.from_numpy(np.ascontiguousarray(left[:, : len(values) - count].T)), totals[count]


def _precondition(system: DampedSystem, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormalize the rows of Q in the inner product of the preconditioner M, a symmetric matrix.

    Return ``(P, P @ M, F)`` with ``Q = F.T @ P`` and ``P @ M @ P.T = I``. Directions in which M is zero up to
    rounding are removed.
    """
    if system.precondition is None:
        return Q, Q, torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    Z = system.precondition(Q)
    inner = (Q @ Z.T).cpu().numpy()
    values, vectors = np.array([np.nan]), inner
    if np.isfinite(inner).all():
        values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    if not (values[-1] > 0 and values[0] > -1e-8 * values[-1]):
        raise ValueError("preconditioner is not positive definite: pass one that is, or none")
    keep = values > _EPS * values[-1]
    roots, vectors = np.sqrt(values[keep]), vectors[:, keep]
    inverse, factor = (torch.from_numpy(part).to(Q) for part in ((vectors / roots).T, (vectors * roots).T))
    return inverse @ Q, inverse @ Z, factor


def _examine(
    system: DampedSystem, S: Tensor, P: Tensor, curvatures: Tensor, limits: Tensor, columns: NDArray[np.intp]
) -> tuple[str, float]:
    """Examine a matrix of curvatures that may not be positive definite.

    Parameters
    ----------
    S, P : Tensor, shape (p, N)
        The directions, and their products.
    curvatures : Tensor, shape (p, p)
        The matrix ``S @ P.T``.
    limits : Tensor, shape (p, p)
        Norm of the preconditioned matrix times the matrix of inner products of the directions.

    Returns
    -------
    verdict : str
        'positive'; 'curvature' if the curvature along a direction is not positive; or 'breakdown' if it is, but the
        matrix is too ill-conditioned.
    curvature : float
        A small curvature, relative to the squared norm of the direction.
    """
    K, diagonal = curvatures.cpu().numpy(), curvatures.diagonal().cpu().numpy()
    if not (diagonal > 0).all():
        return "curvature", _smallest_curvature(curvatures, S @ S.T)
    roots = np.sqrt(diagonal)
    values, vectors = np.linalg.eigh(K / roots[:, None] / roots)
    squares = (S * S).sum(1).cpu().numpy() / diagonal
    rounding = len(K) * _EPS * max(1.0, system.scale * float(squares.max()))
    if values[0] > rounding:
        return "positive", 0.0
    if values[0] < -rounding:
        return "curvature", _smallest_curvature(curvatures, S @ S.T)
    # Examine the direction of the smallest eigenvalue. The difference of two products with this direction shows their
    # rounding errors. The relative rounding error of the direction itself is about epsilon.
    weights = torch.from_numpy(vectors[:, :1].T / roots).to(S)
    direction = weights @ S
    product = weights @ P if len(S) == 1 else system.checked_multiply(direction, columns)
    error = system.checked_multiply(direction / 3, columns) * 3 - product
    curvature, square = float((direction * product).sum()), float((direction * direction).sum())
    own = (10 * _EPS) ** 2 * float((weights @ limits @ weights.T).sum())
    if not curvature > 2 * float((direction * error).abs().sum()) + own:
        return "curvature", curvature / square
    return ("positive" if values[0] > len(K) * _EPS else "breakdown"), curvature / square


def _smallest_curvature(curvatures: Tensor, inner: Tensor) -> float:
    """Return the smallest curvature ``x' A x / x' x`` over all linear combinations x of the directions.

    `curvatures` and `inner` are the matrices ``S A S.T`` and ``S S.T`` of the directions S.
    """
    K, G = curvatures.cpu().numpy(), inner.cpu().numpy()
    norms = np.sqrt(np.diagonal(G))
    values, vectors = np.linalg.eigh(G / norms[:, None] / norms)
    keep = values > _EPS * len(G) * values[-1]
    basis = vectors[:, keep] / np.sqrt(values[keep])
    projected = basis.T @ (K / norms[:, None] / norms) @ basis
    return float(np.linalg.eigvalsh((projected + projected.T) / 2)[0])
