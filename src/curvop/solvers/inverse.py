"""The inverse of a damped symmetric operator, as an operator."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvop.operators.base import Rows, TensorLinearOperator
from curvop.operators.composites import CompositeLinearOperator, layouts_of
from curvop.operators.error_text import warn_user
from curvop.operators.keywords import named_keywords
from curvop.operators.progress import step_bar
from curvop.operators.validation import real_operator, real_scalar
from curvop.solvers.damped_system import row_multiplier
from curvop.solvers.linear_solve import SolveResult, check_arguments, solve_rows
from curvop.spectrum.lanczos import device_of
from curvop.spectrum.symmetry import check_symmetry

__all__ = ["InverseLinearOperator", "NotConvergedError"]


class NotConvergedError(RuntimeError):
    """Raised if a solve with an `InverseLinearOperator` did not reach the requested residual.

    Attributes
    ----------
    results : list of SolveResult
        The result for each column, with its true residual.
    """

    def __init__(self, message: str, results: list[SolveResult]) -> None:
        super().__init__(message, results)
        self.results = results

    @property
    def solution(self) -> NDArray[Any] | Tensor:
        """The best solution that was found, of shape (N,) or (N, K)."""
        columns = [result.solution for result in self.results]
        if len(columns) == 1:
            return cast("NDArray[Any] | Tensor", columns[0])
        return torch.stack(columns, 1) if isinstance(columns[0], Tensor) else np.stack(columns, axis=1)

    def __str__(self) -> str:
        return str(self.args[0])


class InverseLinearOperator(CompositeLinearOperator):
    r"""Inverse of a damped symmetric matrix, :math:`(A + \lambda I)^{-1}`, as a symmetric ``LinearOperator``.

    Each product solves linear systems by `curvop.solve`, and checks the true residuals of the solutions. The columns of
    a block share their products with A, and tensors stay on their device. Use this operator in expressions such as ``G
    @ Inv @ g``, or for the smallest eigenvalues of A by ``eigsh``. For a single system, call `curvop.solve` directly.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator of this package or of SciPy, without damping.
    damping : float
        Number :math:`\lambda` that is added to the diagonal of A, in the units of the eigenvalues of A.
    rtol : float, default 1e-5
        Relative residual at which the solver stops, between 0 and 1. Values below about 1e-6 cannot be reached for
        float32 models.
    preconditioner : LinearOperator, matrix, Tensor or callable, shape (N, N), optional
        Positive definite approximation of the inverse, for example from `curvop.preconditioner.nystrom`.
    maxiter : int, optional
        Maximum number of steps for each column. A step takes at most one product with A for each column, or up to two
        more if the damped matrix is nearly singular. The default is the smaller of ``10 * N`` and 1000.
    on_failure : {'raise', 'warn'}, default 'raise'
        Whether a solve that did not converge raises a `NotConvergedError`, or issues a warning and returns the best
        solution.
    progress : bool, default False
        Whether to show a progress bar that counts the products with A.

    Attributes
    ----------
    last : list of SolveResult
        Result for each column of the last product, with the true residual.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid. The message names the argument.
    NotConvergedError
        If a product did not converge and ``on_failure`` is 'raise'.

    Warns
    -----
    RuntimeWarning
        If the damped matrix is found to be indefinite or singular, or if ``on_failure`` is 'warn' and a product did not
        converge.

    See Also
    --------
    curvop.solve : Solve systems with one or several right-hand sides.
    curvop.preconditioner.nystrom : Preconditioner for matrices with few large eigenvalues.

    Notes
    -----
    All columns of a matrix are solved together. `num_products` counts the columns; ``A.num_products`` counts the
    products with A. Solutions are computed in float64, and the residuals are those of the float64 solutions. If the
    inverse is applied to a float32 tensor, the solution is then rounded to float32. If A is not known to be symmetric,
    the first product checks the symmetry by three products with A. A block of this operator is a block of the inverse,
    and not the inverse of a block: for the latter, pass ``A.block(names)``.

    Examples
    --------
    Compute predictive variances of a Laplace approximation. The posterior covariance of the parameters is the inverse
    of the damped Gauss-Newton matrix of the summed loss:

    >>> import torch
    >>> from curvop import GGNLinearOperator, InverseLinearOperator, JacobianLinearOperator
    >>> _ = torch.manual_seed(0)
    >>> X = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    >>> params = dict(model.named_parameters())
    >>> G = GGNLinearOperator(model, torch.nn.MSELoss(reduction="sum"), params, [(X, X.sin())])
    >>> J = JacobianLinearOperator(model, params, [(torch.tensor([[0.0], [5.0]], dtype=torch.float64), None)])
    >>> covariance = J @ InverseLinearOperator(G, damping=1.0, rtol=1e-8) @ J.T
    >>> near, far = covariance.to_dense().diagonal()
    >>> bool(near < far)
    True
    """

    @named_keywords
    def __init__(
        self,
        A: LinearOperator,
        damping: float,
        *,
        rtol: float = 1e-5,
        preconditioner: LinearOperator | None = None,
        maxiter: int | None = None,
        on_failure: str = "raise",
        progress: bool = False,
    ) -> None:
        A = real_operator(A)
        damping = real_scalar("damping", damping)
        check_arguments(A, damping, rtol, maxiter)
        row_multiplier(preconditioner, A.shape, as_arrays=True)  # checks the shape
        if on_failure not in ("raise", "warn"):
            raise ValueError(f"on_failure is {on_failure!r}, but must be 'raise' or 'warn'")
        rows, cols = layouts_of(A)
        super().__init__(A.shape, [A], (cols, rows))
        self.dtype = np.dtype(np.float64) if A.dtype is None else np.result_type(A.dtype, np.float32)
        self.args = (A, float(damping), float(rtol))
        self._A = A
        self._options: tuple[Any, ...] = (float(damping), float(rtol), preconditioner, maxiter)
        self._on_failure, self._progress = on_failure, progress
        self.last: list[SolveResult] = []
        self._is_checked = False

    def _formula(self) -> str:
        damping = f" + {self.args[1]:.6g} * I" if self.args[1] else ""
        return f"inv({self._parts[0]._formula()}{damping})".replace("+ -", "- ")

    @property
    def _is_diagonal(self) -> bool:
        return False

    def _mirror(self, conjugate: bool) -> TensorLinearOperator:
        return self

    def _identity(self) -> tuple[Any, ...]:
        return "operator", id(self)

    def _product_dtype(self, dtype: Any) -> Any:
        return np.result_type(self.dtype, dtype)

    def _multiply_last_axis(self, x: Rows) -> Rows:
        self.last = []
        return super()._multiply_last_axis(x)

    def _apply(self, rows: Rows) -> Rows:
        if not self._is_checked:
            check_symmetry(self._A)
            self._is_checked = True
        damping, rtol, preconditioner, maxiter = self._options
        as_arrays = not isinstance(rows, Tensor)
        vectors = torch.as_tensor(rows).to(device_of(self._A), torch.float64)
        multiplier = row_multiplier(preconditioner, self.shape, as_arrays)
        with step_bar("solve", self._progress) as bar:
            found = solve_rows(self._A, vectors, damping, rtol, multiplier, maxiter, None, math.inf, None, bar)
        self.last = found.results(as_arrays)
        self._report(rtol)
        if isinstance(rows, Tensor):
            return found.rows.to(rows.device, rows.dtype)
        return cast("Rows", found.rows.numpy(force=True).astype(self._product_dtype(rows.dtype), copy=False))

    def _report(self, rtol: float) -> None:
        """Raise an error or issue a warning if columns did not converge, or if the matrix is not positive definite."""
        failed = [result for result in self.last if not result.converged]
        if failed and self._on_failure == "raise":
            worst = max(failed, key=lambda result: result.residual)
            raise NotConvergedError(
                f"{len(failed)} of {len(self.last)} columns: {worst.problem(rtol)}. The attribute solution of this "
                "error contains the best solutions; on_failure='warn' returns them",
                self.last,
            )
        texts = [text for result in self.last if (text := result.problem(rtol))]
        if texts:
            more = f" (and {len(texts) - 1} other columns)" if len(texts) > 1 else ""
            warn_user(texts[0] + more)
