"""Track extreme eigenvalues during training, for example the sharpness of a loss, with warm-started ARPACK."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.operators.validation import integer, real_operator, real_scalar
from curvop.spectrum.eigen import EigenResult, eigsh, without_verdicts

__all__ = ["Tracker", "track"]

Array = NDArray[Any]

_MIN_WARM_BASIS = 8  # a good starting vector needs a smaller basis than the default of `eigsh`


def track(A: LinearOperator, k: int = 1, *, every: int = 10, which: str = "LA", tol: float = 1e-3) -> Tracker:
    """Track extreme eigenvalues during training.

    Call ``tracker.step()`` once per step of your training loop. To compute eigenvalues with error bounds for fixed
    parameters, use `eigsh` instead.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        A symmetric operator that always uses the current parameters. The operators of this package satisfy this
        condition: they read the parameters in every product, and recompute cached tensors if the parameters have
        changed.
    k : int, optional
        The number of eigenvalues.
    every : int, optional
        The number of training steps from one computation of the eigenvalues to the next.
    which : {'LA', 'SA', 'LM'}, optional
        Which eigenvalues to track: the algebraically largest ('LA') or smallest ('SA'), or the largest in magnitude
        ('LM').
    tol : float, optional
        The relative accuracy of the eigenvalues.

    Returns
    -------
    Tracker
        The tracker. The attributes ``steps`` and ``values`` contain the results, and the method ``plot`` draws them.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid.

    See Also
    --------
    eigsh : Compute and certify eigenvalues once.

    Notes
    -----
    Each computation starts ARPACK from the sum of the previous eigenvectors, with a small basis. This warm start takes
    only a fraction of the products of a random start. If ARPACK does not converge, the computation is repeated with a
    random start. The eigenvalues are not certified.

    In full-batch gradient descent, the largest Hessian eigenvalue (the sharpness) typically grows to 2 / learning rate,
    and then hovers near this value [1]_.

    References
    ----------
    .. [1] J. M. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, "Gradient descent on neural networks typically
       occurs at the edge of stability", ICLR 2021. arXiv:2103.00065

    Examples
    --------
    Compute the sharpness every 10 steps of gradient descent:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import HessianLinearOperator, spectrum
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(40, 4).double(), torch.randn(40, 1).double()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> H = HessianLinearOperator(model, nn.MSELoss(), model.parameters(), [(X, y)])
    >>> tracker = spectrum.track(H, every=10)
    >>> for _ in range(21):
    ...     sharpness = tracker.step()
    ...     optimizer.zero_grad()
    ...     nn.functional.mse_loss(model(X), y).backward()
    ...     optimizer.step()
    >>> tracker.steps
    array([ 0, 10, 20])
    >>> tracker.values.shape
    (3, 1)
    """
    for name, value in (("k", k), ("every", every)):
        integer(name, value, 1)
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which is {which!r}, but must be 'LA', 'SA' or 'LM'")
    return Tracker(real_operator(A), k, which, every, real_scalar("tol", tol))


class Tracker:
    """A record of extreme eigenvalues during training, as returned by `track`.

    Attributes
    ----------
    steps : ndarray of int, shape (n,)
        The training steps at which eigenvalues were computed.
    values : ndarray, shape (n, k)
        The eigenvalues at each step in `steps`, sorted from the outermost eigenvalue inwards. A row is NaN if the
        eigenvalues did not converge at that step.
    vectors : ndarray, shape (N, k), or None
        The latest converged eigenvectors, or None if no computation has converged yet.
    products : int
        The number of products so far.

    See Also
    --------
    track : Create a tracker.
    """

    def __init__(self, A: LinearOperator, k: int, which: str, every: int, tol: float) -> None:
        self._A, self._k, self._which, self._every, self._tol = A, k, which, every, tol
        self._next_step = 0
        self._history: list[tuple[int, Array]] = []
        self.vectors: Array | None = None
        self.products = 0

    @property
    def steps(self) -> NDArray[np.int64]:
        """The training steps at which eigenvalues were computed, as an array of shape ``(n,)``."""
        return np.array([step for step, _ in self._history], dtype=np.int64)

    @property
    def values(self) -> Array:
        """The eigenvalues at each step in `steps`, as an array of shape ``(n, k)``."""
        return np.array([values for _, values in self._history]).reshape(-1, self._k)

    def step(self) -> Array | None:
        """Count one training step, and compute the eigenvalues if the step is a multiple of ``every``.

        The first call counts as step 0.

        Returns
        -------
        ndarray, shape (k,), or None
            The eigenvalues, or an array of NaN if the eigenvalues do not converge. None if the step is not a multiple
            of ``every``.

        Warns
        -----
        RuntimeWarning
            If the eigenvalues do not converge.
        """
        step = self._next_step
        self._next_step += 1
        if step % self._every:
            return None
        result = self._search(start=None) if self.vectors is None else self._search(self.vectors.sum(1))
        if not result.converged:
            result = self._search(start=None)
        values = np.full(self._k, np.nan)
        if result.converged:
            values, self.vectors = np.asarray(result.values, dtype=np.float64), np.asarray(result.vectors)
        else:
            warnings.warn(f"step {step}: the eigenvalues did not converge", RuntimeWarning, stacklevel=2)
        self._history.append((step, values))
        return values

    def _search(self, start: Array | None) -> EigenResult:
        """Run `eigsh` without a certificate.

        Use a small basis if a starting vector is given. Use a random vector and the default basis if `start` is None.
        """
        size = self._A.shape[0]
        warm = start is not None and self._k + 2 <= size
        basis = min(size, max(2 * self._k + 1, _MIN_WARM_BASIS)) if warm else None
        with without_verdicts():  # `step` retries or issues its own warning
            result = eigsh(
                self._A, self._k, self._which, tol=self._tol, v0=start, ncv=basis, certificate=False, progress=False
            )
        self.products += result.products
        return result

    def plot(self, ax: Any = None, learning_rate: float | None = None) -> Any:
        """Plot the eigenvalues against the training steps.

        This method requires Matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            The axes to draw on. The default is the axes of a new figure.
        learning_rate : float, optional
            The learning rate of gradient descent. If given, a dashed line shows ``2 / learning_rate``. Gradient descent
            becomes unstable if the sharpness exceeds this value.

        Returns
        -------
        matplotlib.axes.Axes
            The axes.
        """
        from curvop.spectrum.plots import plot_track

        return plot_track(self, ax, learning_rate)
