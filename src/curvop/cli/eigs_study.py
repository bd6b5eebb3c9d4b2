"""Generators that run the studies of ``curvop eigs`` and yield each result as soon as it is available.

`study` computes extreme eigenvalues of a symmetric matrix; `singular_study` computes the largest singular values of a
Jacobian. `curvop.cli.report` prints the results.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, svds

from curvop.checks.dense_check import DenseCheck, accuracy, dense_check
from curvop.cli.problem_loading import MATRICES, ProblemError, last_layer, wrap, wrap_jacobian
from curvop.cli.report import Array, End, Result, Setup, Singular, Solve, StepCost
from curvop.operators.engine_operator import NonFiniteProductError
from curvop.operators.error_text import describe_error
from curvop.solvers.linear_solve import solve
from curvop.spectrum.counting import TimeUpError, deadline_after
from curvop.spectrum.eigen import eigsh, without_verdicts
from curvop.spectrum.eigen_result import NO_TIME, EigenResult
from curvop.testing.functorch_reference import functorch_jacobian

__all__ = ["evaluated", "singular_study", "study"]

# Settings for SciPy's svds, the same as in curvop.spectrum.eigsh. With SciPy's default of 10 N restarts, svds may never
# end for a large problem. If the singular values are clustered, SciPy's default of 20 basis vectors takes twice as many
# products as 30.
_SVDS_RESTARTS = 1000
_SVDS_BASIS = 30


def study(
    problem: dict[str, Any],
    *,
    matrix: str,
    ends: Sequence[tuple[str, int]],
    tol: float,
    settings: dict[str, Any],
    cost: bool,
    block: Sequence[str] | None,
    bar: Any,
    maxiter: int | None = None,
    seconds: float | None = None,
    check: bool = False,
    damping: float = 0.0,
) -> Iterator[Result]:
    """Compute extreme eigenvalues of a curvature matrix and certify them.

    Parameters
    ----------
    problem : dict
        The problem, as returned by `curvop.problems.load`.
    matrix : str
        A key of `curvop.cli.problem_loading.MATRICES`.
    ends : sequence of (str, int)
        Arguments `which` and `k` for each call of `curvop.spectrum.eigsh`.
    tol : float
        Argument `tol` for `curvop.spectrum.eigsh`; 0 means machine precision.
    settings : dict
        ``dtype``, ``engine`` and ``columns`` of the operator.
    cost : bool
        Whether to measure the cost of one product.
    block : sequence of str or None
        Names of the parameters of a block. If None, use the whole matrix.
    bar : tqdm.tqdm
        Progress bar that counts products. Its description names the current step.
    maxiter : int, optional
        Argument `maxiter` for `curvop.spectrum.eigsh`.
    seconds : float, optional
        Time limit of all eigenvalues. An end gets the time that is left in proportion to its number of eigenvalues.
    check : bool, optional
        Whether to compare the eigenvalues with those of the dense matrix, and to solve a damped linear system.
    damping : float, optional
        Damping of this linear system.

    Yields
    ------
    Setup, End, DenseCheck, Solve
        A `Setup`, one `End` for each of `ends`, and if `check` is True, a `DenseCheck` and a `Solve`.

    Raises
    ------
    ProblemError
        If the problem is invalid or cannot be evaluated, or if more eigenvalues are requested than the matrix allows.
    """
    whole, operator = wrap(problem, matrix, settings, block, bar)
    N, largest_k = operator.shape[0], max(k for _, k in ends)
    if largest_k > N:
        raise ProblemError(f"--k = {largest_k} is too large: pass at most {N:,}, the number of rows of the matrix")
    problem = {**problem, "params": _named_params(problem, whole)}
    setup = _first_pass(problem, whole, operator, block, cost)
    yield setup

    precision, until, found = accuracy(setup.dtype, setup.model_dtype), deadline_after(seconds), []
    for index, (which, k) in enumerate(ends):
        bar.set_description_str(f"eigsh {which}")
        share = k / sum(count for _, count in ends[index:])
        limit = None if seconds is None else share * max(0.0, until - time.monotonic())
        end = _eigsh(operator, which, k, tol, maxiter, limit, precision * setup.norm)
        found.append((which, k, end.result.values if end.result.converged else end.result.values[:0]))
        yield end
    if not check:
        return

    bar.set_description_str("dense check")
    yield dense_check(problem, MATRICES[matrix].dense, list(setup.slices), found, tol + precision)
    bar.set_description_str("solve")
    yield _solve(operator if setup.block else whole.block(last_layer(list(setup.slices))), damping, precision)


def singular_study(
    problem: dict[str, Any],
    *,
    k: int,
    tol: float,
    settings: dict[str, Any],
    cost: bool,
    block: Sequence[str] | None,
    bar: Any,
    maxiter: int | None = None,
    seconds: float | None = None,
    check: bool = False,
) -> Iterator[Setup | Singular | DenseCheck]:
    """Compute the largest singular values of the Jacobian of a problem's predictions, and their residuals.

    Parameters
    ----------
    problem : dict
        The problem, as returned by `curvop.problems.load`.
    k : int
        Number of singular values.
    tol : float
        Argument `tol` for SciPy's ``svds``; 0 means machine precision.
    settings : dict
        ``dtype``, ``engine`` and ``columns`` of the operator.
    cost : bool
        Whether to measure the cost of one product.
    block : sequence of str or None
        Names of the parameters whose columns form a block. If None, use the whole matrix.
    bar : tqdm.tqdm
        Progress bar that counts products. Its description names the current step.
    maxiter : int, optional
        Maximum number of restarts of SciPy's ``svds``.
    seconds : float, optional
        Time limit. ``svds`` has no partial result.
    check : bool, optional
        Whether to compare the singular values with those of the dense matrix.

    Yields
    ------
    Setup, Singular, DenseCheck
        One object of each type, in this order, the last one only if `check` is True.

    Raises
    ------
    ProblemError
        If the problem is invalid or cannot be evaluated, or if more singular values are requested than the matrix
        allows.
    """
    whole, operator = wrap_jacobian(problem, settings, block, bar)
    if k >= min(operator.shape):
        raise ProblemError(f"--k = {k} is too large: the Jacobian is {operator.shape[0]:,} by {operator.shape[1]:,}")
    problem = {**problem, "params": _named_params(problem, whole)}
    setup = _first_jacobian_pass(problem, whole, operator, block, cost)
    yield setup

    precision = accuracy(setup.dtype, setup.model_dtype)
    bar.set_description_str("svds")
    singular = _svds(operator, k, tol, precision * setup.norm, maxiter, seconds)
    yield singular
    if not check or singular.undone:
        return

    bar.set_description_str("dense check")
    ends = [("LA", k, singular.values**2)]
    yield dense_check(problem, _gram, list(setup.slices), ends, 2 * (tol + precision))


def evaluated(operator: Any) -> tuple[Array, float]:
    """Return (gradient, loss), both for the whole data set.

    Raises
    ------
    ProblemError
        If the problem cannot be evaluated, or the gradient is not finite.
    """
    try:
        return _finite_gradient(operator)
    except Exception as error:  # the user's model, loss and data run here for the first time
        raise ProblemError(f"the problem cannot be evaluated: {describe_error(error)}") from error


def _finite_gradient(operator: Any) -> tuple[Array, float]:
    gradient, loss = operator.gradient_and_loss()
    if not np.isfinite(gradient).all():
        operator @ np.ones(operator.shape[1])  # raises an error that names the batch and the parameter
        raise NonFiniteProductError(f"the gradient is not finite, and the loss is {loss:g}")
    return gradient, loss


def _named_params(problem: dict[str, Any], operator: Any) -> dict[str, Any]:
    """Return the parameters of the problem as a dictionary, with the names that the operator uses."""
    values = problem["params"].values() if isinstance(problem["params"], Mapping) else problem["params"]
    return dict(zip(operator.params_slices, values, strict=True))


def _first_pass(
    problem: dict[str, Any], whole: Any, operator: Any, block: Sequence[str] | None, with_cost: bool
) -> Setup:
    """Evaluate the loss, its gradient and one product, and return a description of the matrix.

    If the model or the loss has no second derivatives, the product raises an error before the solver starts.
    """
    with _timed(operator) as cost:
        gradient, loss = evaluated(operator)
        product = _first_product(operator)
    if not product.any():  # ARPACK would only complain about its starting vector
        raise ProblemError("the matrix is zero: the loss is linear in these parameters, or does not depend on them")
    setup = _setup(problem, whole.shape[0], operator, block, product, cost, with_cost)
    return dataclasses.replace(setup, loss=loss, gradient_norm=float(np.linalg.norm(gradient.astype(np.float64))))


def _first_jacobian_pass(
    problem: dict[str, Any], whole: Any, operator: Any, block: Sequence[str] | None, with_cost: bool
) -> Setup:
    with _timed(operator) as cost:
        product = _first_product(operator)
    if not product.any():
        raise ProblemError("the Jacobian is zero: the predictions do not depend on these parameters")
    return _setup(problem, whole.shape[1], operator, block, product, cost, with_cost)


def _first_product(operator: Any) -> Array:
    """Return the product of the operator with a standard normal vector."""
    try:
        product: Array = operator @ np.random.default_rng(0).standard_normal(operator.shape[1])
    except Exception as error:  # for example if there are no second derivatives
        raise ProblemError(f"the problem cannot be evaluated: {describe_error(error)}") from error
    return product


def _setup(
    problem: dict[str, Any],
    num_params: int,
    operator: Any,
    block: Sequence[str] | None,
    product: Array,
    cost: StepCost,
    with_cost: bool,
) -> Setup:
    first = next(iter(problem["params"].values()))
    return Setup(
        P=num_params,
        N=operator.shape[0],
        slices=dict(operator.params_slices),
        block=None if block is None else tuple(operator.params_slices),
        dtype=operator.dtype.name,
        model_dtype=str(first.dtype).removeprefix("torch."),
        device=str(first.device),
        loss=None,
        gradient_norm=None,
        norm=float(np.linalg.norm(product)),
        cost=cost,
        product=operator.cost() if with_cost else None,
    )


def _eigsh(
    operator: Any, which: str, k: int, tol: float, maxiter: int | None, seconds: float | None, rounding: float
) -> End:
    """Compute and certify the eigenpairs at one end of the spectrum.

    `rounding` is the rounding error that is accepted in a residual. If time runs out and the solver has no partial
    result, there are no eigenpairs.
    """
    method = "arpack" if which == "SM" else "lanczos"  # the latter returns what it has when time runs out
    limits: dict[str, Any] = {"maxiter": maxiter, "seconds": seconds}
    before = operator.num_products
    with _timed(operator) as cost, without_verdicts():
        try:
            result = eigsh(operator, k, which, method=method, tol=tol, side="parameters", progress=False, **limits)
        except TimeoutError:
            if seconds is None:  # an error of the user's code
                raise
            nothing = np.zeros(0), np.zeros((operator.shape[0], 0))
            products = operator.num_products - before
            result = EigenResult(*nothing, None, False, products, method, which, k, NO_TIME, timed_out=True)
    # The solver compares an estimate of the residual with tol |lambda|.
    return End(result, 2 * tol * np.abs(result.values) + rounding, cost)


def _solve(block: Any, damping: float, rtol: float) -> Solve:
    """Solve the damped linear system of a block. The right-hand side is the gradient for its parameters."""
    gradient, _ = _finite_gradient(block)
    with _timed(block) as cost, without_verdicts():
        result = solve(block, gradient, damping, rtol=rtol, progress=False)
    return Solve(tuple(block.params_slices), block.shape[0], damping, rtol, result, cost)


def _svds(operator: Any, k: int, tol: float, rounding: float, maxiter: int | None, seconds: float | None) -> Singular:
    """Compute the largest singular values and vectors, with residuals in ``J v = sigma u`` and ``J' u = sigma v``."""
    rng = np.random.default_rng(0)
    v0 = rng.standard_normal(min(operator.shape)).astype(operator.dtype, copy=False)
    basis = max(2 * k + 1, _SVDS_BASIS)
    undone = ""
    with _timed(operator) as cost:
        try:
            left, values, right = svds(
                operator if seconds is None else _limited(operator, deadline_after(seconds)),
                k,
                tol=tol,
                v0=v0,
                ncv=basis if basis < len(v0) else None,
                maxiter=maxiter or min(10 * len(v0), _SVDS_RESTARTS),
                rng=rng,
            )
        except ArpackNoConvergence:
            undone = "not converged: increase --maxiter, or decrease --k"
        except TimeUpError:
            undone = "not converged before time was up: increase --seconds, or decrease --k"
        if undone:
            N, P = operator.shape
            left, values, right = np.zeros((N, 0)), np.zeros(0), np.zeros((0, P))
        order = np.argsort(-values, kind="stable")
        left, values, right = left[:, order], values[order].astype(np.float64), right[order].T
        right_residuals = np.linalg.norm((operator @ right).astype(np.float64) - left * values, axis=0)
        left_residuals = np.linalg.norm((operator.T @ left).astype(np.float64) - right * values, axis=0)
    residuals = np.hypot(right_residuals, left_residuals)
    allowed = 2 * tol * values + rounding
    return Singular(k, values, left, right, residuals, allowed, cost, undone, "time was up" in undone)


def _limited(operator: Any, until: float) -> LinearOperator:
    """Return an operator whose products raise a `TimeUpError` after a deadline."""

    def limited(multiply: Callable[[Array], Array]) -> Callable[[Array], Array]:
        def product(x: Array) -> Array:
            if time.monotonic() >= until:
                raise TimeUpError("time is up")
            return multiply(x)

        return product

    products = {name: limited(getattr(operator, name)) for name in ("matvec", "rmatvec", "matmat", "rmatmat")}
    return LinearOperator(operator.shape, dtype=operator.dtype, **products)


def _gram(model: Any, loss_function: Any, params: dict[str, torch.Tensor], data: Any) -> torch.Tensor:
    """Return the dense matrix J' J. Its eigenvalues are the squares of the singular values of J."""
    J = functorch_jacobian(model, params, data).detach().to(torch.float64)
    return J.T @ J


@contextmanager
def _timed(operator: Any) -> Iterator[StepCost]:
    """Yield a `StepCost`. At the end of the ``with`` statement, set its number of products and its time."""
    cost, products, start = StepCost(), operator.num_products, time.perf_counter()
    try:
        yield cost
    finally:
        cost.products, cost.seconds = operator.num_products - products, time.perf_counter() - start
