"""MINRES for several right-hand sides in lockstep, on the device of the operator.

MINRES (Paige, Saunders, 1975) minimizes the residual over the Krylov space of each right-hand side, and also works for
indefinite and singular matrices. The recurrences are those of ``scipy.sparse.linalg.minres``, with these differences:

1. The right-hand sides advance together with block products. Right-hand sides that have converged are removed.
2. Every few steps, the true residuals are computed, and the best solutions so far are kept. This is necessary because
   rounding errors make the solutions drift along the null space of a singular matrix.

References
----------
Paige, Saunders (1975), "Solution of sparse indefinite systems of linear equations", SIAM J. Numer. Anal. 12(4),
doi:10.1137/0712047.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.solvers.damped_system import DampedSystem
from curvop.spectrum.norms import row_norms

__all__ = ["minres"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
_CHECK_INTERVAL = 20  # steps between checks of the true residuals, which cost one product per column
_TOLERANCE = 1e-14  # a smaller tolerance would increase the drift along the null space


def minres(
    system: DampedSystem,
    X: Tensor,
    residuals: Tensor,
    tolerances: Array,
    columns: NDArray[np.intp],
    max_steps: int,
    on_step: Callable[[], None] | None,
) -> tuple[str, int]:
    """Improve the solutions by MINRES until the true residuals are below their tolerances or no longer decrease.

    Parameters
    ----------
    system : DampedSystem
        The matrix and the preconditioner. Its attribute ``scale`` must be set.
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

    Returns
    -------
    reason : str
        'maxiter' or 'seconds' if this limit ended the run, and 'rtol' otherwise.
    steps : int
        The number of steps.
    """
    start, sides = X.clone(), residuals + 0.0
    norms = row_norms(residuals)
    best, best_norms = X.clone(), np.full(len(X), np.inf)
    recurrence = _Recurrence(system, residuals, norms)
    running, step, reason = np.arange(len(X)), 0, "rtol"

    def true_norms(which: NDArray[np.intp]) -> Array:
        change = X[which] - start[which]
        return row_norms(sides[which] - system.checked_multiply(change, columns[which]))

    while len(running):
        if step >= max_steps or not system.time_for(2 * len(running)):
            reason = "maxiter" if step >= max_steps else "seconds"
            break
        ended = recurrence.step(columns[running])
        X[running] = start[running] + recurrence.solutions
        step += 1
        if on_step is not None:
            on_step()
        if step % _CHECK_INTERVAL == 0:
            found = true_norms(running)
            better = found < 0.99 * best_norms[running]
            best[running[better]], best_norms[running[better]] = X[running[better]], found[better]
            ended |= found <= tolerances[running]
        if ended.any():
            recurrence.keep(~ended)
            running = running[~ended]
    if step:
        # If an earlier solution is about as good as the last one, use the earlier one, because its norm is smaller.
        late = np.flatnonzero(best_norms < np.inf)
        if len(late):
            earlier = late[best_norms[late] <= 1.01 * true_norms(late)]
            X[earlier] = best[earlier]
    return reason, step


class _Recurrence:
    """The recurrences of MINRES. The matrix and the right-hand sides are scaled to norms near 1."""

    def __init__(self, system: DampedSystem, residuals: Tensor, norms: Array) -> None:
        self._system = system
        self._factor = torch.from_numpy(norms / (system.scale or 1.0)).to(residuals)[:, None]
        self._r1 = residuals / torch.from_numpy(norms).to(residuals)[:, None]
        self._r2 = self._r1
        self._y = self._precondition(self._r1)
        self._first = _sqrt(_dots(self._r1, self._y))
        if not bool((self._first > 0).all()):
            raise ValueError("preconditioner is not positive definite: pass one that is, or none")
        zeros, ones = torch.zeros_like(self._first), torch.ones_like(self._first)
        self._beta, self._old_beta, self._phi_bar = self._first, zeros, self._first
        self._d_bar, self._epsilon, self._norm2 = zeros, zeros, zeros
        self._cos, self._sin = -ones, zeros
        self._largest, self._smallest = zeros, torch.full_like(ones, torch.inf)
        self._w, self._w2 = torch.zeros_like(residuals), torch.zeros_like(residuals)
        self._x = torch.zeros_like(residuals)
        self._count = 0

    @property
    def solutions(self) -> Tensor:
        """The solutions in the units of the right-hand sides."""
        return self._factor * self._x

    def step(self, columns: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Take one step, and return a mask of the runs that have ended."""
        v = self._y / self._beta
        y = self._system.checked_multiply(v, columns) / (self._system.scale or 1.0)
        if self._count:
            y.addcmul_(self._beta / self._old_beta, self._r1, value=-1)
        alpha = _dots(v, y)
        y.addcmul_(alpha / self._beta, self._r2, value=-1)
        self._r1, self._r2, self._y = self._r2, y, self._precondition(y)
        self._old_beta, self._beta = self._beta, _sqrt(_dots(y, self._y))
        self._norm2 = self._norm2 + alpha**2 + self._old_beta**2 + self._beta**2
        # Apply the previous rotation, and compute the next one.
        old_epsilon = self._epsilon
        delta = self._cos * self._d_bar + self._sin * alpha
        g_bar = self._sin * self._d_bar - self._cos * alpha
        self._epsilon, self._d_bar = self._sin * self._beta, -self._cos * self._beta
        root = torch.hypot(g_bar, self._d_bar)
        gamma = torch.hypot(g_bar, self._beta).clamp(min=_EPS)
        self._cos, self._sin = g_bar / gamma, self._beta / gamma
        phi, self._phi_bar = self._cos * self._phi_bar, self._sin * self._phi_bar
        w1, self._w2 = self._w2, self._w
        self._w = (v - old_epsilon * w1 - delta * self._w2) / gamma
        self._x = self._x + phi * self._w
        self._largest, self._smallest = torch.maximum(self._largest, gamma), torch.minimum(self._smallest, gamma)
        self._count += 1
        return self._ended(root)

    def _ended(self, root: Tensor) -> NDArray[np.bool_]:
        """Return a mask of the runs that have reached the smallest possible residual, up to rounding errors."""
        norm = self._norm2.sqrt()
        size = norm * torch.linalg.vector_norm(self._x, dim=1, keepdim=True)
        ended = self._phi_bar <= _TOLERANCE * size  # the residual is zero
        ended |= root <= _TOLERANCE * norm  # the residual is orthogonal to the range of the matrix
        ended |= self._largest / self._smallest >= 0.1 / _EPS  # the matrix is singular on the Krylov space
        ended |= size * _EPS >= self._first
        ended |= self._beta <= 10 * _EPS * norm  # the Krylov space is invariant
        return ended[:, 0].cpu().numpy()  # type: ignore[no-any-return]

    def keep(self, selected: NDArray[np.bool_]) -> None:
        """Keep the runs that are selected by a mask, and remove all others."""
        mask = torch.from_numpy(selected)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[mask.to(value.device)])

    def _precondition(self, rows: Tensor) -> Tensor:
        if self._system.precondition is None:
            return rows
        return self._system.precondition(rows) * (self._system.scale or 1.0)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(1, keepdim=True)


def _sqrt(squares: Tensor) -> Tensor:
    """Return the square roots of squared norms. Raise an error if the preconditioner made a squared norm negative."""
    if bool((squares < 0).any()) or not bool(squares.isfinite().all()):
        raise ValueError("preconditioner is not positive definite: pass one that is, or none")
    return squares.sqrt()
