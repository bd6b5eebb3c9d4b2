"""Damped linear solves with a true residual and a check for indefiniteness.

`solve` runs SciPy's conjugate gradients (Hestenes, Stiefel, "Methods of conjugate gradients for solving linear
systems", J. Res. Natl. Bur. Stand. 49(6), 1952, doi:10.6028/jres.049.044). The function differs from
``scipy.sparse.linalg.cg`` as follows:

1. It checks the curvature along every search direction. If the curvature is not positive, MINRES (Paige, Saunders,
   "Solution of sparse indefinite systems of linear equations", SIAM J. Numer. Anal. 12(4), 1975, doi:10.1137/0712047)
   continues from the current solution.
2. It computes the true residual of the solution, because rounding errors accumulate in the residual that the solver
   updates recursively. If the true residual is too large, the solver is restarted from the current solution, as long as
   restarts reduce the residual.
3. It computes in float64, so that norms do not underflow. It also scales the system for MINRES, because some tolerances
   of MINRES are absolute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg, minres
from tqdm import tqdm

from curvop.operators.progress import step_bar
from curvop.operators.validation import integer, real_operator

__all__ = ["SolveResult", "check_arguments", "solve", "solve_column"]

_MAX_RUNS = 5  # maximum number of runs of a solver; each run starts from the previous solution
_CHECK_INTERVAL = 20  # MINRES steps between checks of the true residual; each check costs one product
# Negative curvature up to this multiple of the norm of the matrix may be a rounding error of a float32 model.
_ROUNDING = 10 * float(np.finfo(np.float32).eps)


def solve(
    A: LinearOperator,
    b: Any,
    *,
    damping: float,
    rtol: float = 1e-5,
    preconditioner: LinearOperator | None = None,
    maxiter: int | None = None,
    callback: Callable[[NDArray[Any]], object] | None = None,
    progress: bool = True,
) -> SolveResult:
    """Solve ``(A + damping * I) x = b`` for a symmetric operator `A`, and check the result.

    Use this function instead of ``scipy.sparse.linalg.cg`` if the matrix may be indefinite (for example, a Hessian), or
    if you need a reliable residual. For least-squares problems with a Jacobian, use ``scipy.sparse.linalg.lsmr``.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        The real symmetric operator, without damping.
    b : array_like, shape (N,)
        The real right-hand side.
    damping : float
        The number that is added to the diagonal of `A`, in the units of the eigenvalues of `A`.
    rtol : float, optional
        The relative residual at which the solver stops. It must be between 0 and 1. Values below about 1e-6 cannot be
        reached for float32 models, because their products are too inaccurate.
    preconditioner : LinearOperator, shape (N, N), optional
        A positive definite approximation of the inverse of the damped matrix, for example from
        `curvop.preconditioner.nystrom`.
    maxiter : int, optional
        The maximum number of products. A few additional products may be needed to compute the residual. The default is
        ``10 * N``.
    callback : callable, optional
        Called as ``callback(x)`` with a copy of the current solution after each step.
    progress : bool, optional
        Whether to show a progress bar that counts products.

    Returns
    -------
    SolveResult
        The solution and its residual.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, a product is not finite, or the preconditioner is not positive definite.

    Warns
    -----
    RuntimeWarning
        If the damped matrix is found to be indefinite or singular, or `rtol` is not reached.

    See Also
    --------
    curvop.preconditioner.nystrom : A preconditioner for matrices with few large eigenvalues.
    curvop.preconditioner.jacobi : A diagonal preconditioner.

    Notes
    -----
    The system is solved by the method of conjugate gradients [1]_, which requires a positive definite matrix and
    computes one product per step. If the curvature along a search direction is not positive, MINRES [2]_ continues from
    the current solution, and a warning is issued. The reported residual is always recomputed from the solution.

    References
    ----------
    .. [1] M. R. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems", J. Res. Natl. Bur.
       Stand. 49(6), 1952. doi:10.6028/jres.049.044
    .. [2] C. C. Paige, M. A. Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J. Numer.
       Anal. 12(4), 1975. doi:10.1137/0712047

    Examples
    --------
    A damped Gauss-Newton step:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import GGNLinearOperator, solve
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(40, 4).double(), torch.randn(40, 1).double()
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    >>> G = GGNLinearOperator(model, nn.MSELoss(), model.parameters(), [(X, y)])
    >>> gradient, loss = G.gradient_and_loss()
    >>> result = solve(G, gradient, damping=0.1, progress=False)
    >>> result.converged, result.residual <= 1e-5, result.solver
    (True, True, 'cg')
    >>> step = G.unravel(-result.solution)
    """
    A, b = real_operator(A), np.asarray(b)
    check_arguments(A, damping, rtol, preconditioner, maxiter)
    with step_bar("solve", progress) as bar:
        result = solve_column(A, b, damping, rtol, preconditioner, maxiter, callback, bar)
    if text := result.problem(rtol):
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return result


def solve_column(
    A: LinearOperator,
    b: NDArray[Any],
    damping: float,
    rtol: float,
    preconditioner: LinearOperator | None,
    maxiter: int | None,
    callback: Callable[[NDArray[Any]], object] | None,
    bar: tqdm[Any],
) -> SolveResult:
    """Solve one system without warnings. `check_arguments` has checked all arguments but `b`."""
    if b.shape != (A.shape[0],):
        raise ValueError(f"A has shape {A.shape} and b has shape {b.shape}: A must be square, and b ({A.shape[0]},)")
    if not np.can_cast(b.dtype, np.float64, "same_kind"):
        raise TypeError(f"b has dtype {b.dtype}, but must be real")
    if not np.isfinite(b).all():
        raise ValueError("b is not finite: pass finite numbers")
    most = 10 * len(b) if maxiter is None else maxiter
    return _Solver(A, b.astype(np.float64), damping, rtol, preconditioner, most, callback, bar).result()


@dataclasses.dataclass(frozen=True, eq=False)
class SolveResult:
    """The solution of ``(A + damping * I) x = b`` and its residual, returned by `solve`.

    ``print(result)`` shows a summary in one line.

    Attributes
    ----------
    solution : ndarray, shape (N,)
        The solution x, in float64.
    residual : float
        ``||b - (A + damping * I) x|| / ||b||``, computed from the solution and not updated recursively by the solver.
    products : int
        The number of products with `A`. Products for the residual are included. Products that constructed the
        preconditioner are not included.
    converged : bool
        Whether the residual is at most the requested `rtol`.
    negative_curvature : float or None
        The curvature ``p' (A + damping * I) p / p' p`` along a direction p of negative curvature, or None if no such
        direction was found. A negative value is an upper bound for the smallest eigenvalue and proves that the damped
        matrix is indefinite. The solution is then a saddle point of the quadratic function whose gradient is ``(A +
        damping * I) x - b``, and -x may not be a descent direction. The value None does not prove that the matrix is
        positive definite.
    solver : str
        'minres' if a direction with negative or numerically zero curvature was found, and 'cg' otherwise.

    See Also
    --------
    solve : Solve a damped system.
    """

    solution: NDArray[Any]
    residual: float
    products: int
    converged: bool
    negative_curvature: float | None
    solver: str

    def problem(self, rtol: float) -> str:
        """Return the text of a warning if the matrix is not positive definite or `rtol` is not reached, or ''.

        Parameters
        ----------
        rtol : float
            The requested relative residual.
        """
        if self.solver == "minres":
            remedy = "use a larger damping to make it positive definite"
            if self.negative_curvature is not None:
                remedy += ", or a GGNLinearOperator instead of a Hessian"
            return f"{self}; {remedy}"
        return "" if self.converged else f"{self}, but rtol is {rtol:g}"

    def __str__(self) -> str:
        verdict = "converged" if self.converged else "not converged"
        text = f"{verdict}: relative residual {self.residual:.2e} after {self.products} products ({self.solver})"
        if self.negative_curvature is not None:
            text += f"; the damped matrix is indefinite (smallest eigenvalue <= {self.negative_curvature:.3g})"
        elif self.solver == "minres":
            text += "; the damped matrix is numerically singular"
        return text


def check_arguments(A: LinearOperator, damping: Any, rtol: Any, preconditioner: Any, maxiter: Any) -> None:
    """Raise an error that names the argument if the arguments of `solve` are invalid."""
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    for name, value in (("damping", damping), ("rtol", rtol)):
        if not isinstance(value, int | float | np.number):
            raise TypeError(f"{name} is a {type(value).__name__}, but must be a number")
    if not (np.isfinite(damping) and 0 < rtol < 1):
        raise ValueError(
            f"damping is {damping} and rtol is {rtol}: damping must be finite, and rtol between 0 and 1 (exclusive)"
        )
    if maxiter is not None:
        integer("maxiter", maxiter, 1)
    if preconditioner is not None and getattr(preconditioner, "shape", None) != A.shape:
        shape = getattr(preconditioner, "shape", None)
        raise ValueError(f"preconditioner has shape {shape}, but must be a LinearOperator of the shape of A, {A.shape}")


class _ResidualReachedError(Exception):
    """Raised to stop MINRES when the true residual is small enough."""


class _CurvatureError(Exception):
    """Raised to stop conjugate gradients when the curvature along a search direction is not positive."""

    def __init__(self, value: float) -> None:
        self.value = value


class _Solver:
    """Solve one system in float64 by one or more runs of CG or MINRES."""

    def __init__(
        self,
        A: LinearOperator,
        b: NDArray[Any],
        damping: float,
        rtol: float,
        preconditioner: LinearOperator | None,
        maxiter: int,
        callback: Callable[[NDArray[Any]], object] | None,
        bar: tqdm[Any],
    ) -> None:
        self._A, self._b, self._damping, self._bar = A, b, damping, bar
        self._rtol, self._maxiter = rtol, maxiter
        self._preconditioner, self._callback = preconditioner, callback
        self._norm = float(np.linalg.norm(b))
        self._products = 0
        self._x = np.zeros(len(b))
        self._solver = "cg"
        self._negative_curvature: float | None = None
        self._best = np.inf, self._x  # smallest checked residual of MINRES, and its solution
        self._scale = 0.0  # the largest ||A p|| / ||p|| found, a lower bound of the norm of the damped matrix

    def result(self) -> SolveResult:
        """Run solvers until the true residual is small enough or no longer decreases, and return the result."""
        best = zero = self._x
        rest, smallest = self._b, 1.0 if self._norm else 0.0
        for _ in range(_MAX_RUNS):
            if smallest <= self._rtol or self._products >= self._maxiter:
                break
            self._advance(best, rest)
            new = self._b - self._multiply(self._x)
            residual = float(np.linalg.norm(new)) / self._norm
            # CG decreases the error, but not always the residual. The first solution of CG is therefore accepted even
            # if x = 0 has a smaller residual.
            if not (residual < smallest or (best is zero and self._solver == "cg")):
                break
            helped, best, rest, smallest = residual < 0.5 * smallest, self._x, new, residual
            if not helped and residual > 2 * self._rtol:  # close to rtol, a run need not halve the residual
                break
        converged = smallest <= self._rtol
        return SolveResult(best, smallest, self._products, converged, self._negative_curvature, self._solver)

    def _advance(self, x0: NDArray[Any], rest: NDArray[Any]) -> None:
        """Run a solver once from `x0`, and store the solution. `rest` is the residual vector of `x0`."""
        self._x = x0
        if self._preconditioner is not None and not rest @ (self._preconditioner @ rest) > 0:
            raise ValueError("preconditioner is not positive definite: pass one that is, or none")
        size = float(np.linalg.norm(rest))
        if self._solver == "cg":
            try:
                rtol = 0.9 * self._rtol * self._norm / size
                operator = LinearOperator(self._A.shape, matvec=self._multiply_direction, dtype=np.float64)
                options = {"maxiter": self._maxiter - self._products, "M": self._preconditioner}
                cg(operator, rest, rtol=rtol, atol=0.0, callback=self._step_callback(x0), **options)
                return
            except _CurvatureError as error:
                self._solver = "minres"
                self._scale = max(self._scale, self._norm_of_random_product())
                self._negative_curvature = error.value if error.value < -_ROUNDING * self._scale else None
            new = self._b - self._multiply(self._x)
            if np.linalg.norm(new) < size:
                x0, rest, size = self._x, new, float(np.linalg.norm(new))
            self._x = x0
        with contextlib.suppress(_ResidualReachedError):
            self._minres(x0, rest, size)

    def _minres(self, x0: NDArray[Any], rest: NDArray[Any], size: float) -> None:
        """Run MINRES on a system that is scaled so that the matrix and the right-hand side have norms near 1.

        The scaling is necessary, because some tolerances of SciPy's MINRES are absolute.
        """
        scale = self._scale or 1.0

        def multiply(x: NDArray[Any]) -> NDArray[Any]:
            return self._multiply(x) / scale

        def precondition(x: NDArray[Any]) -> NDArray[Any]:
            product: NDArray[Any] = self._preconditioner @ x * scale
            return product

        M = None
        if self._preconditioner is not None:
            M = LinearOperator(self._A.shape, matvec=precondition, dtype=np.float64)
        operator = LinearOperator(self._A.shape, matvec=multiply, dtype=np.float64)
        callback = self._step_callback(x0, size / scale, check_residual=True)
        self._best = np.inf, x0
        # With a smaller tolerance, MINRES would drift along the null space of the matrix.
        minres(operator, rest / size, rtol=1e-14, maxiter=self._maxiter - self._products, M=M, callback=callback)
        # MINRES may have drifted nevertheless. If an earlier solution is about as good, use it, because its norm is
        # smaller.
        residual, x = self._best
        if residual <= 1.01 * np.linalg.norm(self._b - self._multiply(self._x)):
            self._x = x

    def _step_callback(
        self, x0: NDArray[Any], scale: float = 1.0, check_residual: bool = False
    ) -> Callable[[NDArray[Any]], None]:
        """Return a callback that stores the current solution of a solver.

        If `check_residual` is True, the callback also checks the true residual every ``_CHECK_INTERVAL`` steps.
        """
        steps = 0

        def step(x: NDArray[Any]) -> None:
            nonlocal steps
            steps += 1
            self._x = x0 + scale * x
            if self._callback is not None:
                self._callback(self._x.copy())
            if check_residual and steps % _CHECK_INTERVAL == 0:
                residual = float(np.linalg.norm(self._b - self._multiply(self._x)))
                if residual <= self._rtol * self._norm:
                    raise _ResidualReachedError
                if residual < 0.99 * self._best[0]:
                    self._best = residual, self._x

        return step

    def _multiply(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the product of the damped matrix with `x`."""
        self._products += 1
        self._bar.update()
        product: NDArray[Any] = np.asarray(self._A @ x, dtype=np.float64) + self._damping * x
        if not np.isfinite(product).all():
            raise ValueError("a product with A is not finite")
        return product

    def _norm_of_random_product(self) -> float:
        x = np.random.default_rng(0).standard_normal(len(self._b))
        return float(np.linalg.norm(self._multiply(x)) / np.linalg.norm(x))

    def _multiply_direction(self, p: NDArray[Any]) -> NDArray[Any]:
        """Return the product of the damped matrix with a search direction `p` of CG.

        Raise ``_CurvatureError`` if the curvature along `p` is not positive.
        """
        size = float(np.linalg.norm(p))
        if not np.isfinite(size):
            raise ValueError("a search direction is not finite: preconditioner must be finite and positive definite")
        product = self._multiply(p)
        if size > 0:
            self._scale = max(self._scale, float(np.linalg.norm(product)) / size)
            curvature = float(p @ product)
            if curvature <= 0:
                raise _CurvatureError(curvature / size / size)
        return product
