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

__all__ = ["SolveResult", "solve"]

# A solver's own residual drifts from the true one; it begins anew from its solution as long as that helps.
_RESTARTS = 5
# Steps of MINRES from one look at the true residual, which takes a product, to the next.
_LOOK = 20


@dataclasses.dataclass(frozen=True)
class SolveResult:
    """The solution of ``(A + damping * I) x = b``, and what can be said of it.

    Attributes
    ----------
    solution : ndarray, shape (N,)
    residual : float
        ``||b - (A + damping * I) x|| / ||b||``, computed from the solution and not as the solver carries it along.
    products : int
        With `A`, the last for the residual.
    converged : bool
        Whether the residual is at most the `rtol` that was asked for.
    negative_curvature : float or None
        ``p' (A + damping * I) p / p' p`` of a direction that was found to have it, an upper bound of the least
        eigenvalue: the matrix is indefinite, the solution a saddle point of the quadratic, and -x no descent direction
        to be trusted. None where none was met, which does not prove that there is none.
    solver : str
        'cg', or 'minres' where negative curvature was found.
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
        return text


class _ReachedError(Exception):
    pass


class _NegativeCurvatureError(Exception):
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

    By conjugate gradients; where a direction of negative curvature is met, for which these are not made, by MINRES from
    there on, with a warning. In both cases the residual that is reported is computed anew from the solution.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric, undamped.
    b : ndarray, shape (N,)
    damping : float
        In the units of the eigenvalues.
    rtol : float
        The relative residual to reach. Below some 1e-6 the products of a float32 model are too coarse.
    preconditioner : LinearOperator, optional
        Positive definite, an approximate inverse of the damped matrix; see `curvop.preconditioner`.
    maxiter : int, optional
        Products at most, about; 10 N by default.
    callback : callable, optional
        Called with the solution so far after each step.
    progress : bool
        Count products on a bar.

    Returns
    -------
    SolveResult

    Warns
    -----
    RuntimeWarning
        Where the damped matrix is found to be indefinite, or `rtol` is not reached.

    References
    ----------
    Hestenes, Stiefel (1952); Paige, Saunders (1975), "Solution of sparse indefinite systems of linear equations".
    """
    b = np.asarray(b)
    if A.shape[0] != A.shape[1] or b.shape != (A.shape[0],):
        raise ValueError(f"A has shape {A.shape} and b has shape {b.shape}: A must be square, and b ({A.shape[0]},)")
    if not np.isfinite(b).all():
        raise ValueError("b is not finite")
    if not (np.isfinite(damping) and rtol > 0):
        raise ValueError(f"damping is {damping} and rtol is {rtol}: damping must be finite, rtol positive")
    with tqdm(desc="solve", unit=" products", disable=not progress, mininterval=0.5) as bar:
        result = _Run(A, b, damping, rtol, preconditioner, maxiter or 10 * len(b), callback, bar).result()
    if result.negative_curvature is not None:
        remedy = "a larger damping, or a GGNLinearOperator, makes it positive definite"
        warnings.warn(f"{result}; {remedy}", RuntimeWarning, stacklevel=2)
    elif not result.converged:
        warnings.warn(f"{result}, but rtol is {rtol:g}", RuntimeWarning, stacklevel=2)
    return result


class _Run:
    """One system, by as many solvers as it takes."""

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
        self._x = np.zeros(len(b), np.result_type(b.dtype, A.dtype, np.float32))
        self._negative: float | None = None

    def result(self) -> SolveResult:
        """Solve, and look at the true residual."""
        best = zero = self._x
        found = 1.0 if self._norm else 0.0
        for _ in range(_RESTARTS):
            if found <= self._rtol or self._products >= self._maxiter:
                break
            self._advance(best, found)
            residual = self._residual()
            # The first one counts even if zero has a smaller residual: conjugate gradients decrease the error instead.
            if not (residual < found or (best is zero and np.isfinite(residual))):
                break
            helped, best, found = residual < 0.5 * found, self._x, residual
            if not helped:
                break
        solver = "cg" if self._negative is None else "minres"
        return SolveResult(best, found, self._products, found <= self._rtol, self._negative, solver)

    def _advance(self, x0: NDArray[Any], residual: float) -> None:
        """Correct `x0`, whose relative residual is known, until the solver is content with what it carries along."""
        self._x = x0
        rest = self._b - self._multiply(x0) if x0.any() else self._b
        options: dict[str, Any] = {"maxiter": self._maxiter - self._products, "M": self._preconditioner}
        if self._negative is None:
            try:
                rtol = 0.9 * self._rtol / residual
                cg(self._operator(self._checked), rest, rtol=rtol, atol=0.0, callback=self._follow(x0), **options)
                return
            except _NegativeCurvatureError as error:
                self._negative = error.value
                x0, rest = self._x, self._b - self._multiply(self._x)
        with contextlib.suppress(_ReachedError):
            # To the limit of its precision: it judges by ||A|| ||x||, which may be far above ||b||.
            minres(self._operator(self._multiply), rest, rtol=0.0, callback=self._follow(x0, look=True), **options)

    def _follow(self, x0: NDArray[Any], look: bool = False) -> Callable[[NDArray[Any]], None]:
        """Return what a solver calls after each step; it looks at the true residual now and then where asked to."""
        steps = 0

        def step(x: NDArray[Any]) -> None:
            nonlocal steps
            steps += 1
            self._x = x0 + x
            if self._callback is not None:
                self._callback(self._x)
            if look and steps % _LOOK == 0 and self._residual() <= self._rtol:
                raise _ReachedError

        return step

    def _residual(self) -> float:
        return float(np.linalg.norm(self._b - self._multiply(self._x))) / self._norm

    def _operator(self, multiply: Callable[[NDArray[Any]], NDArray[Any]]) -> LinearOperator:
        return LinearOperator(self._A.shape, matvec=multiply, dtype=self._x.dtype)

    def _multiply(self, x: NDArray[Any]) -> NDArray[Any]:
        self._products += 1
        self._bar.update()
        product: NDArray[Any] = self._A @ x + self._damping * x
        return product

    def _checked(self, p: NDArray[Any]) -> NDArray[Any]:
        """Multiply a search direction, and see that the curvature along it is not negative."""
        product = self._multiply(p)
        curvature, square = float(p @ product), float(p @ p)
        if curvature <= 0 and square > 0:
            raise _NegativeCurvatureError(curvature / square)
        return product
