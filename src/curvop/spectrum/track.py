"""Eigenvalues along training."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.operators.validation import real_number, real_operator, whole_number
from curvop.spectrum.eigen import EigenResult, eigsh, without_verdicts

__all__ = ["Tracker", "track"]

Array = NDArray[Any]


class Tracker:
    """Extreme eigenvalues at some steps of training, made by `track`.

    Attributes
    ----------
    steps : ndarray of int, shape (n,)
        The steps at which they were computed.
    values : ndarray, shape (n, k)
        The outermost first.
    vectors : ndarray, shape (N, k), or None
        The last ones.
    products : int
        What it took so far.
    """

    def __init__(self, A: LinearOperator, k: int, which: str, every: int, tol: float) -> None:
        self._A, self._k, self._which, self._every, self._tol = A, k, which, every, tol
        self._called = 0
        self._found: list[tuple[int, Array]] = []
        self.vectors: Array | None = None
        self.products = 0

    @property
    def steps(self) -> NDArray[np.int64]:
        """The steps at which eigenvalues were computed, ``(n,)``."""
        return np.array([step for step, _ in self._found], dtype=np.int64)

    @property
    def values(self) -> Array:
        """The eigenvalues at these steps, ``(n, k)``."""
        return np.array([values for _, values in self._found]).reshape(-1, self._k)

    def step(self) -> Array | None:
        """Say that training is at a further step, the first call being step 0.

        Returns
        -------
        ndarray, shape (k,), or None
            The eigenvalues where the step is one at which they are computed; NaN, with a warning, where they do not
            converge.
        """
        at, self._called = self._called, self._called + 1
        if at % self._every:
            return None
        found = self._search(start=None) if self.vectors is None else self._search(self.vectors.sum(1))
        if not found.converged:
            found = self._search(start=None)
        values = np.full(self._k, np.nan)
        if found.converged:
            values, self.vectors = np.asarray(found.values, dtype=np.float64), np.asarray(found.vectors)
        else:
            warnings.warn(f"step {at}: the eigenvalues did not converge", RuntimeWarning, stacklevel=2)
        self._found.append((at, values))
        return values

    def _search(self, start: Array | None) -> EigenResult:
        """Look from a vector of equal parts of what was found last, with a small basis as it is nearly right."""
        size = self._A.shape[0]
        basis = None if start is None or self._k + 2 > size else min(size, max(2 * self._k + 1, 8))
        with without_verdicts():  # what does not converge is tried again, or told
            found = eigsh(
                self._A, self._k, self._which, tol=self._tol, v0=start, ncv=basis, certificate=False, progress=False
            )
        self.products += found.products
        return found

    def plot(self, ax: Any = None, learning_rate: float | None = None) -> Any:
        """Draw the eigenvalues over the steps; see `curvop.spectrum.plots.plot_track`."""
        from curvop.spectrum.plots import plot_track

        return plot_track(self, ax, learning_rate)


def track(A: LinearOperator, k: int = 1, *, every: int = 10, which: str = "LA", tol: float = 1e-3) -> Tracker:
    """Follow extreme eigenvalues along a training loop of one's own.

    Call ``tracker.step()`` once in each step of the loop. The operator shows the parameters as they are; what it keeps
    is made anew where they have changed. Each search begins at the vectors of the last one, so that it takes a fraction
    of the products.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Of the parameters that are trained; those of this package follow them by themselves.
    k : int
        How many eigenvalues.
    every : int
        Compute at every so many steps.
    which : {'LA', 'SA', 'LM'}
        Which ones, in `eigsh`'s words.
    tol : float
        Relative accuracy of an eigenvalue.

    Returns
    -------
    Tracker

    References
    ----------
    Cohen, Kaur, Li, Kolter, Talwalkar (2021), "Gradient descent on neural networks typically occurs at the edge of
    stability", ICLR.

    Examples
    --------
    >>> import torch
    >>> from curvop import HessianLinearOperator
    >>> X, y = torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    >>> model = torch.nn.Linear(3, 1, dtype=torch.float64)
    >>> loss_function, params = torch.nn.MSELoss(), dict(model.named_parameters())
    >>> tracker = track(HessianLinearOperator(model, loss_function, params, [(X, y)]), every=2)
    >>> for _ in range(4):
    ...     _ = tracker.step()  # and a step of the optimizer
    >>> tracker.steps
    array([0, 2])
    """
    for name, value in (("k", k), ("every", every)):
        whole_number(name, value, 1)
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which is {which!r}, but must be 'LA', 'SA' or 'LM'")
    return Tracker(real_operator(A), k, which, every, real_number("tol", tol))
