"""Damped linear systems: SciPy's solvers, with what they do not tell."""

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
from curvop.operators.validation import real_operator, whole_number

__all__ = ["SolveResult", "solve"]

# A solver's own residual drifts from the true one; it begins anew from its solution as long as that helps.
_RESTARTS = 5
# Steps of MINRES from one look at the true residual, which takes a product, to the next.
_LOOK = 20
# Of the matrix's norm: what curvature may be below zero by rounding alone, as products may be those of a float32 model.
_ROUNDING = 10 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class SolveResult:
    """The solution of ``(A + damping * I) x = b``, and what can be said of it.

    Attributes
    ----------
    solution : ndarray, shape (N,)
        In float64.
    residual : float
        ``||b - (A + damping * I) x|| / ||b||``, computed from the solution and not as the solver carries it along.
    products : int
        With `A`, those for looking at the residual included, those that a preconditioner was made with not.
    converged : bool
        Whether the residual is at most the `rtol` that was asked for.
    negative_curvature : float or None
        ``p' (A + damping * I) p / p' p`` of a direction that was found to have it, an upper bound of the least
        eigenvalue: the matrix is indefinite, the solution a saddle point of the quadratic, and -x no descent direction
        to be trusted. None where none was met, which does not prove that there is none.
    solver : str
        'cg', or 'minres' where curvature was found that is negative, or zero to rounding.
    """

    solution: NDArray[Any]
    residual: float
    products: int
    converged: bool
    negative_curvature: float | None
    solver: str

    def __str__(self) -> str:
        verdict = "converged" if self.converged else "not converged"
        text = f"{verdict}: relative residual {self.residual:.2e} after {self.products} products ({self.solver})"
        if self.negative_curvature is not None:
            text += f"; the damped matrix is indefinite, an eigenvalue is at most {self.negative_curvature:.3g}"
        elif self.solver == "minres":
            text += "; the damped matrix is singular to rounding"
        return text


class _ReachedError(Exception):
    pass


class _CurvatureError(Exception):
    def __init__(self, value: float) -> None:
        self.value = value


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
    """Solve ``(A + damping * I) x = b`` for a symmetric operator `A`.

    By conjugate gradients; where a direction without positive curvature is met, for which these are not made, by MINRES
    from there on, with a warning. In both cases the residual that is reported is computed anew from the solution.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric, undamped.
    b : ndarray, shape (N,)
        Real.
    damping : float
        In the units of the eigenvalues.
    rtol : float
        The relative residual to reach, below 1. Below some 1e-6 the products of a float32 model are too coarse.
    preconditioner : LinearOperator, optional
        Positive definite, an approximate inverse of the damped matrix; see `curvop.preconditioner`.
    maxiter : int, optional
        Products at most, but for a few that look at the residual; 10 N by default.
    callback : callable, optional
        Called with a copy of the solution so far after each step.
    progress : bool
        Count products on a bar.

    Returns
    -------
    SolveResult

    Raises
    ------
    TypeError, ValueError
        For what cannot be, and where products are not finite or the preconditioner is not positive definite.

    Warns
    -----
    RuntimeWarning
        Where the damped matrix is found to be indefinite or singular, or `rtol` is not reached.

    References
    ----------
    Hestenes, Stiefel (1952); Paige, Saunders (1975), "Solution of sparse indefinite systems of linear equations".
    """
    A, b = real_operator(A), np.asarray(b)
    _check(A, b, damping, rtol, maxiter)
    if preconditioner is not None and getattr(preconditioner, "shape", None) != A.shape:
        shape = getattr(preconditioner, "shape", None)
        raise ValueError(f"preconditioner has shape {shape}, but must be a LinearOperator of A's, {A.shape}")
    with step_bar("solve", progress) as bar:
        most = 10 * len(b) if maxiter is None else maxiter
        result = _Run(A, b.astype(np.float64), damping, rtol, preconditioner, most, callback, bar).result()
    if result.solver == "minres":
        remedy = "a larger damping makes it positive definite"
        if result.negative_curvature is not None:
            remedy += ", and so does a GGNLinearOperator in place of a Hessian"
        warnings.warn(f"{result}; {remedy}", RuntimeWarning, stacklevel=2)
    elif not result.converged:
        warnings.warn(f"{result}, but rtol is {rtol:g}", RuntimeWarning, stacklevel=2)
    return result


def _check(A: LinearOperator, b: NDArray[Any], damping: Any, rtol: Any, maxiter: Any) -> None:
    if A.shape[0] != A.shape[1] or b.shape != (A.shape[0],):
        raise ValueError(f"A has shape {A.shape} and b has shape {b.shape}: A must be square, and b ({A.shape[0]},)")
    if not np.can_cast(b.dtype, np.float64, "same_kind"):
        raise TypeError(f"b has dtype {b.dtype}, but must be real")
    if not np.isfinite(b).all():
        raise ValueError("b is not finite: pass finite numbers")
    for name, value in (("damping", damping), ("rtol", rtol)):
        if not isinstance(value, int | float | np.number):
            raise TypeError(f"{name} is a {type(value).__name__}, but must be a number")
    if not (np.isfinite(damping) and 0 < rtol < 1):
        raise ValueError(f"damping is {damping} and rtol is {rtol}: damping must be finite, rtol between 0 and 1")
    if maxiter is not None:
        whole_number("maxiter", maxiter, 1)


class _Run:
    """One system, by as many solvers as it takes; in float64, in which no norm underflows."""

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
        self._negative: float | None = None
        self._best = np.inf, self._x  # of the solutions of MINRES that were looked at
        self._scale = 0.0  # the largest ||A p|| / ||p|| met, a lower bound of the matrix's norm

    def result(self) -> SolveResult:
        """Solve, and look at the true residual."""
        best = zero = self._x
        rest, found = self._b, 1.0 if self._norm else 0.0
        for _ in range(_RESTARTS):
            if found <= self._rtol or self._products >= self._maxiter:
                break
            self._advance(best, rest)
            new = self._b - self._multiply(self._x)
            residual = float(np.linalg.norm(new)) / self._norm
            # Conjugate gradients decrease the error instead: theirs counts even if zero has a smaller residual.
            if not (residual < found or (best is zero and self._solver == "cg")):
                break
            helped, best, rest, found = residual < 0.5 * found, self._x, new, residual
            if not helped:
                break
        return SolveResult(best, found, self._products, found <= self._rtol, self._negative, self._solver)

    def _advance(self, x0: NDArray[Any], rest: NDArray[Any]) -> None:
        """Correct `x0`, with this residual, until the solver is content with what it carries along."""
        self._x = x0
        if self._preconditioner is not None and not rest @ (self._preconditioner @ rest) > 0:
            raise ValueError("preconditioner is not positive definite: pass one that is, or none")
        size = float(np.linalg.norm(rest))
        if self._solver == "cg":
            try:
                rtol = 0.9 * self._rtol * self._norm / size
                operator = LinearOperator(self._A.shape, matvec=self._checked, dtype=np.float64)
                options = {"maxiter": self._maxiter - self._products, "M": self._preconditioner}
                cg(operator, rest, rtol=rtol, atol=0.0, callback=self._follow(x0), **options)
                return
            except _CurvatureError as error:
                self._solver = "minres"
                self._scale = max(self._scale, self._norm_of_a_random_product())
                self._negative = error.value if error.value < -_ROUNDING * self._scale else None
            new = self._b - self._multiply(self._x)
            if np.linalg.norm(new) < size:
                x0, rest, size = self._x, new, float(np.linalg.norm(new))
            self._x = x0
        with contextlib.suppress(_ReachedError):
            self._minres(x0, rest, size)

    def _minres(self, x0: NDArray[Any], rest: NDArray[Any], size: float) -> None:
        """Run MINRES on the system divided by its norms, as it compares with numbers that know no scale."""
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
        callback = self._follow(x0, size / scale, look=True)
        self._best = np.inf, x0
        # To the limit of its precision, not beyond: there it would drift along what the matrix takes to zero.
        minres(operator, rest / size, rtol=1e-14, maxiter=self._maxiter - self._products, M=M, callback=callback)
        # It may have drifted all the same: a solution that was seen before and is as good is smaller.
        residual, x = self._best
        if residual <= 1.01 * np.linalg.norm(self._b - self._multiply(self._x)):
            self._x = x

    def _follow(self, x0: NDArray[Any], scale: float = 1.0, look: bool = False) -> Callable[[NDArray[Any]], None]:
        """Return what a solver calls after each step; it looks at the true residual now and then where asked to."""
        steps = 0

        def step(x: NDArray[Any]) -> None:
            nonlocal steps
            steps += 1
            self._x = x0 + scale * x
            if self._callback is not None:
                self._callback(self._x.copy())
            if look and steps % _LOOK == 0:
                residual = float(np.linalg.norm(self._b - self._multiply(self._x)))
                if residual <= self._rtol * self._norm:
                    raise _ReachedError
                if residual < 0.99 * self._best[0]:
                    self._best = residual, self._x

        return step

    def _multiply(self, x: NDArray[Any]) -> NDArray[Any]:
        self._products += 1
        self._bar.update()
        product: NDArray[Any] = np.asarray(self._A @ x, dtype=np.float64) + self._damping * x
        if not np.isfinite(product).all():
            raise ValueError("a product with A is not finite")
        return product

    def _norm_of_a_random_product(self) -> float:
        x = np.random.default_rng(0).standard_normal(len(self._b))
        return float(np.linalg.norm(self._multiply(x)) / np.linalg.norm(x))

    def _checked(self, p: NDArray[Any]) -> NDArray[Any]:
        """Multiply a search direction, and see that the curvature along it is positive."""
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
