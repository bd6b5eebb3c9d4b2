"""Track extreme eigenvalues during training, for example the sharpness of a loss, with warm-started ARPACK.

With an optimizer, `track` computes eigenvalues of the preconditioned matrix (see `curvop.spectrum.optimizers`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.operators.error_text import warn_user
from curvop.operators.keywords import named_keywords
from curvop.operators.summaries import Summary, abridged
from curvop.operators.validation import integer, real_scalar
from curvop.spectrum.counting import symmetric_operator
from curvop.spectrum.eigen import EigenResult, eigsh, without_verdicts
from curvop.spectrum.eigen_result import eigenvalue_at_end
from curvop.spectrum.optimizers import Positions, check_optimizer, preconditioned
from curvop.spectrum.symmetry import check_symmetry
from curvop.storage.result_files import load_arrays, save_arrays

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Tracker", "track"]

Array = NDArray[Any]

#: The arrays of a saved tracker. There may also be ``thresholds`` and ``vectors``.
_FIELDS = ("steps", "values", "which", "every", "tol", "size", "products", "next_step")
#: The names of the eigenvalues that `Tracker.to_frame` and `Tracker.latest` number from the outermost one inwards.
_COLUMNS = {"LA": "largest", "SA": "smallest", "LM": "largest_magnitude"}
_MIN_WARM_BASIS = 8  # a good starting vector allows a smaller basis than the default of `eigsh`


@named_keywords
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
    that determine whether the optimizer is stable, together with the stability threshold. If a trainer of Hugging Face
    or Lightning runs the loop, use `curvop.callbacks`. To compute eigenvalues with error bounds for fixed parameters,
    use `eigsh` instead.

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
        method ``plot`` draws them. The methods ``save`` and ``to_frame`` export them.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, if the optimizer is not one of the known classes, or if it does not have all
        parameters of `A`.

    See Also
    --------
    eigsh : Compute and certify eigenvalues once.
    curvop.callbacks.TransformersTracking : Track the model of a Hugging Face trainer.
    curvop.callbacks.LightningTracking : Track the model of a Lightning trainer.

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


class Tracker(Summary):
    """A record of extreme eigenvalues during training, as returned by `track`.

    ``print(tracker)`` shows the latest eigenvalues and the stability threshold in one line.

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

    Examples
    --------
    Save the record, and continue it later from the next step:

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from curvop import spectrum
    >>> A = np.diag(np.arange(1.0, 31.0))
    >>> tracker = spectrum.track(A, k=2, every=5)
    >>> for _ in range(8):
    ...     _ = tracker.step()
    >>> directory = tempfile.TemporaryDirectory()
    >>> path = Path(directory.name) / "sharpness.npz"
    >>> tracker.save(path)
    >>> again = spectrum.Tracker.load(path, A)
    >>> for _ in range(8):
    ...     _ = again.step()
    >>> again.steps
    array([ 0,  5, 10, 15])
    >>> directory.cleanup()
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
        self._has_thresholds = optimizer is not None
        self._checked = False  # whether the symmetry of A has been checked
        self._next_step = 0
        self._history: list[tuple[int, Array, float]] = []  # step, eigenvalues, and threshold (NaN without optimizer)
        self.vectors: Array | None = None
        self.products = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Version 0.1.0 had no optimizers, and pickled pairs of steps and eigenvalues.
        history = [(*entry, math.nan)[:3] for entry in state["_history"]]
        missing = {"_optimizer": None, "_positions": None, "_checked": True}
        missing["_has_thresholds"] = state.get("_optimizer") is not None
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
        if not self._has_thresholds:
            return None
        return np.array([threshold for _, _, threshold in self._history], dtype=np.float64)

    def __str__(self) -> str:
        steps = f"{self._next_step:,} training step{'s' * (self._next_step != 1)}"
        which = f"{self._k} eigenvalue{'s' * (self._k > 1)} ({self._which}) every {self._every} steps"
        text = f"{which}: {steps}, {self.products:,} products"
        if not self._history:
            return text
        names, *_, latest = self._summary_table()
        numbers = ", ".join(map(" = ".join, zip(names[1:], latest[1:], strict=True)))
        return f"{text}; at step {latest[0]}: {numbers}"

    def _summary_table(self) -> list[Sequence[str]]:
        columns, rows = self._table()
        cells = [[f"{step:,}", *(f"{value:.4g}" for value in row)] for step, row in zip(self.steps, rows, strict=True)]
        return abridged([["step", *(name.replace("_", " ") for name in columns)], *cells])

    def _draw_summary(self, figure: Any) -> bool:
        return bool(np.isfinite(self.values).any()) and super()._draw_summary(figure)

    @property
    def latest(self) -> dict[str, float]:
        """The latest row of `to_frame`, as a dict for a logger. It is empty before the first computation.

        The entries are the k eigenvalues, from the outermost one inwards, and the threshold if the tracker has an
        optimizer. For 'LA', the eigenvalues are called ``largest_1``, ``largest_2``, and so on. For 'SA' and 'LM', they
        are called ``smallest_1`` and ``largest_magnitude_1``.
        """
        columns, rows = self._table()
        return dict(zip(columns, rows[-1].tolist(), strict=True)) if len(rows) else {}

    def _table(self) -> tuple[list[str], Array]:
        """Return names of columns, and one row per step: eigenvalues from the outermost one inwards, and thresholds."""
        values = self.values
        keys = {"LA": -values, "SA": values, "LM": -np.abs(values)}[self._which]
        rows = np.take_along_axis(values, np.argsort(keys, axis=1, kind="stable"), axis=1)
        columns = [f"{_COLUMNS[self._which]}_{number}" for number in range(1, self._k + 1)]
        if (thresholds := self.thresholds) is None:
            return columns, rows
        return [*columns, "threshold"], np.column_stack([rows, thresholds])

    def step(self, number: int | None = None) -> Array | None:
        """Count one training step, and compute the eigenvalues if the step is a multiple of ``every``.

        By default, the first call counts as step 0, and each call counts one more step. With an optimizer, the
        eigenvalues belong to the current parameters and the current second moments. Before the first step of the
        optimizer, there are no second moments, and the eigenvalues are NaN (except for SGD).

        Parameters
        ----------
        number : int, optional
            The number of this step, for example the step number of a trainer that was resumed. It must be greater than
            the number of the previous step. If calls leave out numbers, the eigenvalues are computed in the first call
            that reaches or passes a multiple of ``every``.

        Returns
        -------
        ndarray, shape (k,), or None
            The eigenvalues in ascending order, or an array of NaN if the eigenvalues do not converge. None if the step
            is not a multiple of ``every``.

        Raises
        ------
        ValueError
            If `number` is not an integer, or is not greater than the number of the previous step. If the tracker was
            loaded without an operator. If the operator is not symmetric. If the optimizer has second moments of only
            some of the parameters, or no longer has all parameters. If the optimizer has settings for which there is no
            stability threshold or no positive preconditioner.

        Warns
        -----
        RuntimeWarning
            If the eigenvalues do not converge.
        """
        step = self._next_step if number is None else integer("number", number, self._next_step)
        due = self._is_due(step)
        self._next_step = step + 1
        if not due:
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
                warn_user(f"step {step}: the eigenvalues did not converge")
        self._history.append((step, values, threshold))
        return values

    def _is_due(self, step: int) -> bool:
        """Return True if `step` is a multiple of ``every``, or if a multiple was passed over since the last step."""
        return step // self._every != (self._next_step - 1) // self._every

    def _resume(self, step: int, history: list[tuple[int, Array, float]]) -> None:
        """Start at `step`, with the record of an earlier tracker up to this step, or after it if the record has it."""
        self._history = [entry for entry in history if entry[0] <= step]
        self._next_step = max([step, *(entry[0] + 1 for entry in self._history)])

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

    def to_frame(self) -> DataFrame:
        """Return the record as a pandas DataFrame, with one row per computation. This method requires pandas.

        Returns
        -------
        pandas.DataFrame
            The index ``step`` contains the training steps. The columns contain the eigenvalues from the outermost one
            inwards (the opposite of the order of `values` for 'LA'). They are called ``largest_1``, ``largest_2``, and
            so on for 'LA', ``smallest_1`` for 'SA', and ``largest_magnitude_1`` for 'LM'. The column ``threshold``
            contains the stability threshold, if the tracker has an optimizer.

        Raises
        ------
        ImportError
            If pandas is not installed.

        Examples
        --------
        >>> import numpy as np
        >>> from curvop import spectrum
        >>> tracker = spectrum.track(np.diag(np.arange(1.0, 31.0)), k=2, every=5)
        >>> for _ in range(8):
        ...     _ = tracker.step()
        >>> tracker.to_frame().round(3)  # doctest: +NORMALIZE_WHITESPACE
              largest_1  largest_2
        step
        0          30.0       29.0
        5          30.0       29.0
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_frame needs pandas: pip install pandas") from error
        columns, rows = self._table()
        return pd.DataFrame(rows, index=pd.Index(self.steps, name="step"), columns=columns)

    def save(self, path: str | os.PathLike[str], *, vectors: bool = True) -> None:
        """Write the record to an ``.npz`` file of plain arrays.

        The file does not contain the operator and the optimizer. An interrupted save leaves no partial file at `path`.

        Parameters
        ----------
        path : str or os.PathLike
            The file name, including its suffix. An existing file is replaced.
        vectors : bool, optional
            Whether to save the latest eigenvectors, which take 8 * k * N bytes. A loaded tracker starts its next
            computation from these vectors. Without them, it starts from a random vector, and takes more products.

        See Also
        --------
        load : Read a record from a file.
        """
        save_arrays(Path(path), **self._arrays(vectors))

    def _arrays(self, vectors: bool) -> dict[str, Array]:
        arrays = {"steps": self.steps, "values": self.values, "which": self._which, "every": self._every}
        arrays |= {"tol": self._tol, "size": self._A.shape[0], "products": self.products, "next_step": self._next_step}
        if (thresholds := self.thresholds) is not None:
            arrays["thresholds"] = thresholds
        if vectors and self.vectors is not None:
            arrays["vectors"] = self.vectors
        return {name: np.asarray(value) for name, value in arrays.items()}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        A: LinearOperator | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> Self:
        """Read a record that `save` wrote.

        Parameters
        ----------
        path : str or os.PathLike
            The file name.
        A : LinearOperator, shape (N, N), optional
            The operator with which the tracker continues. The next call of `step` then counts the step after the last
            step of the record. If `A` is left out, the tracker only shows the record.
        optimizer : torch.optim.SGD, Adam, AdamW or RMSprop, optional
            The optimizer with which the tracker continues. Pass it if `A` is given and the saved tracker had one.

        Returns
        -------
        Tracker
            The tracker, with the settings of the saved tracker.

        Raises
        ------
        ValueError
            If the file was not written by `save`. If `A` does not have the size of the saved tracker's operator. If
            only one of the saved tracker and the loaded tracker has an optimizer.
        TypeError, ValueError
            If `A` or the optimizer is invalid, as for `track`.

        See Also
        --------
        save : Write a record to a file.
        """
        return cls._from_arrays(load_arrays(path, _FIELDS, "Tracker.save"), os.fspath(path), A, optimizer)

    @classmethod
    def _from_arrays(
        cls, arrays: dict[str, Array], source: str, A: Any, optimizer: torch.optim.Optimizer | None
    ) -> Self:
        size, thresholds = int(arrays["size"]), arrays.get("thresholds")
        positions = None
        if A is not None:
            A = symmetric_operator(A)
            positions = None if optimizer is None else check_optimizer(A, optimizer)
            if A.shape[0] != size:
                raise ValueError(
                    f"A has shape {A.shape}, but the tracker in {source} followed a matrix of shape {(size, size)}: "
                    "pass the operator of the same parameters"
                )
        elif optimizer is not None:
            raise ValueError("optimizer is given without A: pass the operator with which the tracker continues as A")
        if A is not None and (optimizer is None) != (thresholds is None):
            word, remedy = ("without", "leave optimizer out") if thresholds is None else ("with", "pass optimizer=")
            raise ValueError(f"the tracker in {source} was saved {word} an optimizer: {remedy}")
        settings = (arrays["values"].shape[1], str(arrays["which"]), int(arrays["every"]), float(arrays["tol"]))
        tracker = cls(_NoOperator(size) if A is None else A, *settings, optimizer, positions)
        tracker._has_thresholds = thresholds is not None
        tracker._checked = A is None
        limits = np.full(len(arrays["steps"]), np.nan) if thresholds is None else thresholds
        tracker._history = list(zip(arrays["steps"].tolist(), arrays["values"], limits.tolist(), strict=True))
        tracker.products, tracker._next_step = int(arrays["products"]), int(arrays["next_step"])
        tracker.vectors = arrays.get("vectors")
        return tracker

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


class _NoOperator(LinearOperator):  # type: ignore[misc]
    """The operator of a tracker that was loaded without one. It has a shape, but no products."""

    def __init__(self, size: int) -> None:
        super().__init__(np.float64, (size, size))

    def _matvec(self, x: Array) -> Array:
        raise ValueError("the tracker was loaded without an operator: pass it as A to Tracker.load to continue")
