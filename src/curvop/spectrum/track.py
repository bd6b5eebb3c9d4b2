"""Track extreme eigenvalues during training, for example the sharpness of a loss, with warm-started ARPACK.

With an optimizer, `track` computes eigenvalues of the preconditioned matrix (see `curvop.spectrum.optimizers`).
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.operators.validation import integer, real_scalar
from curvop.spectrum.counting import symmetric_operator
from curvop.spectrum.eigen import EigenResult, eigsh, without_verdicts
from curvop.spectrum.eigen_result import eigenvalue_at_end
from curvop.spectrum.optimizers import Positions, check_optimizer, preconditioned
from curvop.spectrum.symmetry import check_symmetry

__all__ = ["Tracker", "track"]

Array = NDArray[Any]

_MIN_WARM_BASIS = 8  # a good starting vector allows a smaller basis than the default of `eigsh`


def track(
    A: LinearOperator,
    k: int = 1,
    *,
    every: int = 10,
    which: str = "LA",
    tol: float = 1e-3,
    optimizer: torch.optim.Optimizer | None = None,
) -> Tracker:
    r"""Track extreme eigenvalues during training.

    Call ``tracker.step()`` once per step of your training loop. With an optimizer, the tracker follows the eigenvalues
    that determine whether the optimizer is stable, together with the stability threshold. To compute eigenvalues with
    error bounds for fixed parameters, use `eigsh` instead.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        A symmetric operator that always uses the current parameters. The operators of this package satisfy this
        condition: they read the parameters in every product, and recompute cached tensors if the parameters have
        changed. If `A` is not known to be symmetric, the first computation takes three more products to check this.
    k : int, optional
        The number of eigenvalues.
    every : int, optional
        The number of training steps from one computation of the eigenvalues to the next.
    which : {'LA', 'SA', 'LM'}, optional
        Which eigenvalues to track: the algebraically largest ('LA') or smallest ('SA'), or the largest in magnitude
        ('LM').
    tol : float, optional
        The relative accuracy of the eigenvalues.
    optimizer : torch.optim.SGD, Adam, AdamW or RMSprop, optional
        The optimizer that trains the parameters of `A`. If given, the tracker computes eigenvalues of the matrix that
        is preconditioned by the optimizer (see Notes). `A` must then be a curvature operator of this package, or a
        diagonal block of such an operator. The optimizer may also train other parameters.

    Returns
    -------
    Tracker
        The tracker. The attributes ``steps``, ``values``, ``largest`` and ``smallest`` contain the results, and the
        method ``plot`` draws them.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, if the optimizer is not one of the known classes, or if it does not have all
        parameters of `A`.

    See Also
    --------
    eigsh : Compute and certify eigenvalues once.

    Notes
    -----
    Each computation starts ARPACK from the sum of the previous eigenvectors, with a small basis. This warm start takes
    only a fraction of the products of a random start. If ARPACK does not converge, the computation is repeated with a
    random start. The eigenvalues are not certified.

    In full-batch gradient descent, the largest Hessian eigenvalue (the sharpness) typically grows to 2 / learning rate,
    and then hovers near this value [1]_. With other optimizers, the largest eigenvalue of the preconditioned Hessian
    :math:`P^{-1/2} (H + W) P^{-1/2}` typically grows to another threshold, which is given below [2]_. The diagonal
    matrix P contains the current second moments and the settings of the optimizer, including the learning rate
    :math:`\eta`:

    - SGD: :math:`P = 1 / \eta`. The threshold is 2 without momentum, ``(2 + 2 * momentum) / (1 - dampening)`` with
      momentum, and ``(2 + 2 * momentum) / (1 + 2 * momentum - momentum * dampening)`` with Nesterov momentum.
    - Adam and AdamW: :math:`P = (1 - \beta_1^t) (\sqrt{v / (1 - \beta_2^t)} + \epsilon) / \eta`. The threshold is
      ``(2 + 2 * beta1) / (1 - beta1)``, which is 38 for the default value of ``beta1``.
    - RMSprop: :math:`P = (\sqrt{v} + \epsilon) / \eta`. The threshold is ``2 + 2 * momentum``.

    Here v is the running mean of the squared gradients after t steps. With ``amsgrad=True``, v is the maximum of this
    mean over all steps. With ``centered=True``, v is the running variance of the gradients. A threshold is exact for a
    quadratic loss and fixed second moments. Suppose that all eigenvalues of H + W are positive. Then the optimizer
    converges if the largest preconditioned eigenvalue is below the threshold, and diverges if this eigenvalue is above
    the threshold. If H + W has a negative eigenvalue, the loss has no minimum, and the optimizer diverges for every
    learning rate.

    The options of an optimizer have the following effects:

    - Weight decay that is added to the gradient adds the diagonal matrix W, which contains the weight decay of each
      parameter, to the Hessian.
    - Decoupled weight decay (AdamW) multiplies P by ``1 - lr * weight_decay / 2``, because the decay of the parameters
      moves the limit of stability.
    - With ``maximize=True``, H is replaced by -H.
    - If groups of parameters have different thresholds, the entries of P for each group are multiplied by the ratio of
      its threshold to that of the first parameter. The threshold of the first parameter is then exact for all groups
      together.

    References
    ----------
    .. [1] J. M. Cohen, S. Kaur, Y. Li, J. Z. Kolter, A. Talwalkar, "Gradient descent on neural networks typically
       occurs at the edge of stability", ICLR 2021. arXiv:2103.00065
    .. [2] J. M. Cohen, B. Ghorbani, S. Krishnan, N. Agarwal, S. Medapati, M. Badura, D. Suo, D. Cardoze, Z. Nado, G. E.
       Dahl, J. Gilmer, "Adaptive gradient methods at the edge of stability", 2022. arXiv:2207.14484

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

    Compare the preconditioned sharpness of Adam with its threshold. In step 0, Adam has no second moments yet:

    >>> adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    >>> tracker = spectrum.track(H, every=10, optimizer=adam)
    >>> for _ in range(21):
    ...     sharpness = tracker.step()
    ...     adam.zero_grad()
    ...     nn.functional.mse_loss(model(X), y).backward()
    ...     adam.step()
    >>> tracker.thresholds.round(6)
    array([38., 38., 38.])
    >>> tracker.largest < tracker.thresholds
    array([False,  True,  True])
    """
    for name, value in (("k", k), ("every", every)):
        integer(name, value, 1)
    if which not in ("LA", "SA", "LM"):
        raise ValueError(f"which is {which!r}, but must be 'LA', 'SA' or 'LM'")
    A = symmetric_operator(A)
    positions = None if optimizer is None else check_optimizer(A, optimizer)
    return Tracker(A, k, which, every, real_scalar("tol", tol), optimizer, positions)


class Tracker:
    """A record of extreme eigenvalues during training, as returned by `track`.

    Attributes
    ----------
    steps : ndarray of int, shape (n,)
        The training steps at which eigenvalues were computed.
    values : ndarray, shape (n, k)
        The eigenvalues at each step in `steps`, in ascending order. A row is NaN if the eigenvalues did not converge at
        that step, or if the optimizer had no second moments yet.
    thresholds : ndarray, shape (n,), or None
        The stability threshold of the optimizer at each step in `steps`. None if the tracker has no optimizer.
    vectors : ndarray, shape (N, k), or None
        The latest converged eigenvectors, in the order of `values`, or None if no computation has converged yet. With
        an optimizer, these are eigenvectors of the preconditioned matrix.
    products : int
        The number of products so far.

    See Also
    --------
    track : Create a tracker.
    """

    def __init__(
        self,
        A: LinearOperator,
        k: int,
        which: str,
        every: int,
        tol: float,
        optimizer: torch.optim.Optimizer | None = None,
        positions: Positions | None = None,
    ) -> None:
        self._A, self._k, self._which, self._every, self._tol = A, k, which, every, tol
        self._optimizer, self._positions = optimizer, positions
        self._checked = False  # whether the symmetry of A has been checked
        self._next_step = 0
        self._history: list[tuple[int, Array, float]] = []  # step, eigenvalues, and threshold (NaN without optimizer)
        self.vectors: Array | None = None
        self.products = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Version 0.1.0 had no optimizers, and pickled pairs of steps and eigenvalues.
        history = [(*entry, math.nan)[:3] for entry in state["_history"]]
        missing = {"_optimizer": None, "_positions": None, "_checked": True}
        self.__dict__.update(missing | state | {"_history": history})
        # Earlier versions sorted the eigenvalues from the outermost one inwards.
        latest = next((values for _, values, _ in reversed(history) if not np.isnan(values).any()), None)
        if self.vectors is not None and latest is not None:
            self.vectors = self.vectors[:, np.argsort(latest, kind="stable")]
        self._history = [(step, np.sort(values), threshold) for step, values, threshold in history]

    @property
    def steps(self) -> NDArray[np.int64]:
        """The training steps at which eigenvalues were computed, as an array of shape ``(n,)``."""
        return np.array([step for step, _, _ in self._history], dtype=np.int64)

    @property
    def values(self) -> Array:
        """The eigenvalues at each step in `steps`, as an array of shape ``(n, k)``. Each row is in ascending order."""
        return np.array([values for _, values, _ in self._history]).reshape(-1, self._k)

    @property
    def largest(self) -> Array:
        """The algebraically largest eigenvalue at each step in `steps`, as an array of shape ``(n,)``.

        An entry is NaN if the eigenvalues of that step are NaN.

        Raises
        ------
        ValueError
            If `which` is 'SA', or if `which` is 'LM' and all k eigenvalues of a step are negative. The largest
            eigenvalue is then not known.
        """
        return self._at_end("largest")

    @property
    def smallest(self) -> Array:
        """The algebraically smallest eigenvalue at each step in `steps`, as an array of shape ``(n,)``.

        An entry is NaN if the eigenvalues of that step are NaN.

        Raises
        ------
        ValueError
            If `which` is 'LA', or if `which` is 'LM' and all k eigenvalues of a step are positive. The smallest
            eigenvalue is then not known.
        """
        return self._at_end("smallest")

    def _at_end(self, end: str) -> Array:
        size = self._A.shape[0]
        return np.array(
            [
                math.nan if np.isnan(values).any() else eigenvalue_at_end(end, values, self._which, size)
                for _, values, _ in self._history
            ]
        )

    @property
    def thresholds(self) -> Array | None:
        """The stability threshold at each step in `steps`, as an array of shape ``(n,)``. None without an optimizer."""
        if self._optimizer is None:
            return None
        return np.array([threshold for _, _, threshold in self._history], dtype=np.float64)

    def step(self) -> Array | None:
        """Count one training step, and compute the eigenvalues if the step is a multiple of ``every``.

        The first call counts as step 0. With an optimizer, the eigenvalues belong to the current parameters and the
        current second moments. Before the first step of the optimizer, there are no second moments, and the eigenvalues
        are NaN (except for SGD).

        Returns
        -------
        ndarray, shape (k,), or None
            The eigenvalues in ascending order, or an array of NaN if the eigenvalues do not converge. None if the step
            is not a multiple of ``every``.

        Raises
        ------
        ValueError
            If the operator is not symmetric. If the optimizer has second moments of only some of the parameters, or no
            longer has all parameters. If the optimizer has settings for which there is no stability threshold or no
            positive preconditioner.

        Warns
        -----
        RuntimeWarning
            If the eigenvalues do not converge.
        """
        step = self._next_step
        self._next_step += 1
        if step % self._every:
            return None
        if not self._checked:
            self.products += check_symmetry(self._A)
            self._checked = True
        A, values, threshold = self._A, np.full(self._k, np.nan), math.nan
        if self._optimizer is not None and self._positions is not None:
            A, threshold = preconditioned(self._A, self._optimizer, self._positions)
        if A is not None:
            result = self._search(A, None if self.vectors is None else self.vectors.sum(1))
            if not result.converged:
                result = self._search(A, None)
            if result.converged:
                values, self.vectors = np.asarray(result.values, dtype=np.float64), np.asarray(result.vectors)
            else:
                warnings.warn(f"step {step}: the eigenvalues did not converge", RuntimeWarning, stacklevel=2)
        self._history.append((step, values, threshold))
        return values

    def _search(self, A: LinearOperator, start: Array | None) -> EigenResult:
        """Run `eigsh` without a certificate.

        If a starting vector is given, a small basis is used. If `start` is None, a random vector and the default basis
        are used.
        """
        size = A.shape[0]
        warm = start is not None and self._k + 2 <= size
        basis = min(size, max(2 * self._k + 1, _MIN_WARM_BASIS)) if warm else None
        with without_verdicts():  # `step` retries or issues its own warning
            result = eigsh(
                *(A, self._k, self._which),
                tol=self._tol,
                v0=start,
                ncv=basis,
                certificate=False,
                side="parameters",
                progress=False,
            )
        self.products += result.products
        return result

    def plot(
        self,
        ax: Any = None,
        learning_rate: float | None = None,
        *,
        label: str | None = None,
        color: Any = None,
        **properties: Any,
    ) -> Any:
        """Plot the eigenvalues against the training steps, with the stability threshold as a dashed line.

        The legend calls the largest eigenvalue the sharpness. With an optimizer, the threshold is that of the
        optimizer. It is not drawn if the tracker follows the smallest eigenvalues (``which="SA"``). This method
        requires Matplotlib.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            The axes to draw on. The default is the axes of a new figure.
        learning_rate : float, optional
            The learning rate of gradient descent, whose stability threshold is ``2 / learning_rate``. Gradient descent
            becomes unstable if the sharpness exceeds this threshold. Do not pass a learning rate if the tracker has an
            optimizer.
        label : str, optional
            The name of the tracker, which the legend puts before the names of the lines. Pass it if you plot several
            trackers on the same axes.
        color : color, optional
            The color of all lines of this tracker. The default is the next color of a palette for color-blind readers.
        **properties
            Properties of the lines of the eigenvalues, each a ``matplotlib.lines.Line2D``, for example ``linewidth=2``.

        Returns
        -------
        matplotlib.axes.Axes
            The axes.

        Raises
        ------
        ImportError
            If Matplotlib is not installed.
        TypeError, ValueError
            If `learning_rate` is given and the tracker has an optimizer, if `learning_rate` is not a positive number,
            if `ax` is not a Matplotlib Axes, or if a property is invalid.
        """
        from curvop.spectrum.plots import plot_track

        return plot_track(self, ax, learning_rate, label=label, color=color, **properties)
