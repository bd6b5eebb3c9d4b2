"""The study behind ``curvop eigs``, apart from how it is shown: `study` yields each result as soon as it is there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, svds

from curvop.checks.dense_check import DenseCheck, accuracy, dense_check
from curvop.cli.problem_loading import MATRICES, ProblemError, last_layer, wrap
from curvop.cli.report import Array, Cost, End, Result, Setup, Singular, Solve, Spectrum
from curvop.operators.engine_operator import NonFiniteProductError
from curvop.operators.error_text import describe_error, one_line
from curvop.operators.jacobian import JacobianLinearOperator
from curvop.solvers.linear_solve import solve
from curvop.spectrum.eigen import eigsh, without_verdicts
from curvop.testing.functorch_reference import functorch_jacobian

__all__ = [
    "MAX_RESTARTS",
    "evaluated",
    "measured",
    "named_params",
    "setup_of",
    "singular_study",
    "study",
    "wrap_jacobian",
]

MAX_RESTARTS = 1000  # of each `eigsh`, 10,000 products and more; SciPy's 10 N would let a large problem run for ever


def study(
    problem: dict[str, Any],
    *,
    matrix: str,
    ends: Sequence[tuple[str, int]],
    tol: float,
    settings: dict[str, Any],
    cost: bool,
    block: Sequence[str] | None,
    damping: float,
    bar: Any,
) -> Iterator[Result]:
    """Study a curvature matrix of a problem.

    Parameters
    ----------
    problem : dict
        As `curvop.problems.load` returns it.
    matrix : str
        A name of `curvop.matrices.MATRICES`.
    ends : sequence of (str, int)
        Which eigenvalues, in `eigsh`'s words, and how many of them; one call of `eigsh` each.
    tol : float
        `eigsh`'s relative accuracy of an eigenvalue; 0 is machine precision.
    settings : dict
        Of the operator: ``dtype``, ``engine`` and ``columns``, as `HessianLinearOperator` takes them.
    cost : bool
        Whether to measure what one product costs.
    block : sequence of str or None
        The parameters that the study is restricted to; None: all.
    damping : float
        Is added to the diagonal in the linear system.
    bar : tqdm.tqdm
        Counts the products; its description names the step.

    Yields
    ------
    Setup, Spectrum, DenseCheck, Solve
        One of each, in this order.

    Raises
    ------
    ProblemError
        If the problem cannot be wrapped or evaluated, or is too small for the number of eigenvalues.
    """
    whole, operator = wrap(problem, matrix, settings, block, bar)
    N, most = operator.shape[0], max(count for _, count in ends)
    if most >= N:
        raise ProblemError(f"--k = {most} is too large: eigsh finds at most N - 1 eigenvalues, and here N = {N:,}")
    problem = {**problem, "params": named_params(problem, whole)}
    setup = _first_pass(problem, whole, operator, block, cost)
    yield setup

    precision = accuracy(setup.dtype, setup.model_dtype)
    spectrum = _spectrum(operator, ends, tol, precision * setup.norm, bar)
    yield spectrum

    bar.set_description_str("dense check")
    found = [(end.which, end.wanted, end.values) for end in spectrum.ends]
    yield dense_check(problem, MATRICES[matrix].dense, list(setup.slices), found, tol + precision)

    part = operator if setup.block else whole.block(last_layer(list(setup.slices)))
    yield _solve(part, damping, precision, bar)


def named_params(problem: dict[str, Any], operator: Any) -> dict[str, Any]:
    """Return the parameters by name; those of a list get their names from the operator, which keeps their order."""
    values = problem["params"].values() if isinstance(problem["params"], Mapping) else problem["params"]
    return dict(zip(operator.params_slices, values, strict=True))


@contextmanager
def measured(operator: Any) -> Iterator[Cost]:
    """Give a cost that is filled in at the end."""
    cost, products, start = Cost(), operator.num_products, time.perf_counter()
    try:
        yield cost
    finally:
        cost.products, cost.seconds = operator.num_products - products, time.perf_counter() - start


def evaluated(operator: Any) -> tuple[Array, float]:
    """Return gradient and loss; a `ProblemError` says what is wrong with the problem where they cannot be had."""
    try:
        return _finite_gradient(operator)
    except Exception as error:  # the user's model, loss and data run here for the first time
        raise ProblemError(f"the problem cannot be evaluated: {describe_error(error)}") from error


def _finite_gradient(operator: Any) -> tuple[Array, float]:
    gradient, loss = operator.gradient_and_loss()
    if not np.isfinite(gradient).all():
        operator @ np.ones(operator.shape[1])  # its error names the batch and the parameter
        raise NonFiniteProductError(f"the gradient is not finite, and the loss is {loss:g}")
    return gradient, loss


def _first_pass(
    problem: dict[str, Any], whole: Any, operator: Any, block: Sequence[str] | None, with_cost: bool
) -> Setup:
    """Evaluate the loss, its gradient and one product: what cannot be differentiated twice fails here and at once."""
    with measured(operator) as cost:
        gradient, loss = evaluated(operator)
        try:
            product = operator @ np.random.default_rng(0).standard_normal(operator.shape[0])
        except Exception as error:  # what cannot be differentiated twice
            raise ProblemError(f"the problem cannot be evaluated: {describe_error(error)}") from error
    if not product.any():  # ARPACK would complain of its starting vector
        raise ProblemError("the matrix is zero: the loss is linear in these parameters, or does not depend on them")
    setup = setup_of(problem, whole.shape[0], operator, block, product, cost, with_cost)
    return dataclasses.replace(setup, loss=loss, gradient_norm=float(np.linalg.norm(gradient.astype(np.float64))))


def setup_of(
    problem: dict[str, Any],
    parameters: int,
    operator: Any,
    block: Sequence[str] | None,
    product: Array,
    cost: Cost,
    with_cost: bool,
) -> Setup:
    """Return what is known of a matrix after its product with a standard normal vector."""
    first = next(iter(problem["params"].values()))
    return Setup(
        P=parameters,
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


def _spectrum(operator: Any, ends: Sequence[tuple[str, int]], tol: float, rounding: float, bar: Any) -> Spectrum:
    """Find the ends of the spectrum, and the residuals of all eigenpairs, up to `rounding`, with one block product."""
    pairs = []
    for which, wanted in ends:
        bar.set_description_str(f"eigsh {which}")
        restarts = min(MAX_RESTARTS, 10 * operator.shape[0])
        with measured(operator) as cost, without_verdicts():
            result = eigsh(operator, wanted, which, tol=tol, maxiter=restarts, certificate=False, progress=False)
        pairs.append((which, wanted, result.values, result.vectors, cost))
    bar.set_description_str("residuals")
    with measured(operator) as residual_cost:
        images = operator @ np.concatenate([vectors for *_, vectors, _ in pairs], axis=1)
    found, starts = [], np.cumsum([len(values) for _, _, values, _, _ in pairs])[:-1]
    for (which, wanted, values, vectors, cost), image in zip(pairs, np.split(images, starts, axis=1), strict=True):
        # In double precision, as the eigenvalues are: in single, the subtraction would add an error of its own.
        residuals = np.linalg.norm(image.astype(np.float64) - vectors * values, axis=0)
        allowed = 2 * tol * np.abs(values) + rounding  # ARPACK promises tol |lambda|, by an estimate of its own
        found.append(End(which, wanted, values, vectors, residuals, allowed, cost))
    return Spectrum(tuple(found), residual_cost)


def _solve(block: Any, damping: float, rtol: float, bar: Any) -> Solve:
    """Solve with the damped block for its own gradient."""
    bar.set_description_str("solve")
    gradient, _ = _finite_gradient(block)
    with measured(block) as cost, without_verdicts():
        result = solve(block, gradient, damping=damping, rtol=rtol, progress=False)
    return Solve(tuple(block.params_slices), block.shape[0], damping, rtol, result, cost)


# The study behind ``curvop eigs --matrix jacobian``: the largest singular values of a model's Jacobian.


def singular_study(
    problem: dict[str, Any],
    *,
    k: int,
    tol: float,
    settings: dict[str, Any],
    cost: bool,
    block: Sequence[str] | None,
    bar: Any,
) -> Iterator[Setup | Singular | DenseCheck]:
    """Study the Jacobian of a problem's predictions; `curvop.eigs.study` says what the arguments are.

    Yields
    ------
    Setup, Singular, DenseCheck
        One of each, in this order.

    Raises
    ------
    ProblemError
        If the problem cannot be wrapped or evaluated, or is too small for the number of singular values.
    """
    whole, operator = wrap_jacobian(problem, settings, block, bar)
    if k >= min(operator.shape):
        raise ProblemError(f"--k = {k} is too large: the Jacobian is {operator.shape[0]:,} by {operator.shape[1]:,}")
    problem = {**problem, "params": named_params(problem, whole)}
    setup = _jacobian_pass(problem, whole, operator, block, cost)
    yield setup

    precision = accuracy(setup.dtype, setup.model_dtype)
    bar.set_description_str("svds")
    found = _svds(operator, k, tol, precision * setup.norm)
    yield found

    bar.set_description_str("dense check")
    ends = [("LA", k, found.values**2)]
    yield dense_check(problem, _gram, list(setup.slices), ends, 2 * (tol + precision))


def wrap_jacobian(
    problem: dict[str, Any], settings: dict[str, Any], block: Sequence[str] | None, progress: Any = False
) -> tuple[Any, Any]:
    """Return the Jacobian of a problem, and the part of it that `block` names; `curvop.matrices.wrap` does the others.

    Raises
    ------
    ProblemError
        If the problem cannot be wrapped.
    """
    try:
        whole = JacobianLinearOperator(
            problem["model"], problem["params"], problem["data"], **settings, progress=progress
        )
    except Exception as error:  # the user's model and data run here for the first time
        raise ProblemError(one_line(error)) from error
    try:
        return whole, whole if block is None else whole.block(block)
    except ValueError as error:  # the operator calls this argument 'params'
        raise ProblemError(f"--block: {str(error).removeprefix('params').lstrip(': ')}") from error


def _jacobian_pass(
    problem: dict[str, Any], whole: Any, operator: Any, block: Sequence[str] | None, with_cost: bool
) -> Setup:
    with measured(operator) as cost:
        try:
            product = operator @ np.random.default_rng(0).standard_normal(operator.shape[1])
        except Exception as error:
            raise ProblemError(f"the problem cannot be evaluated: {describe_error(error)}") from error
    if not product.any():
        raise ProblemError("the Jacobian is zero: the predictions do not depend on these parameters")
    return setup_of(problem, whole.shape[1], operator, block, product, cost, with_cost)


def _svds(operator: Any, k: int, tol: float, rounding: float) -> Singular:
    """Find the largest singular values, and what is left over of ``J v = sigma u`` and ``J' u = sigma v``."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal(min(operator.shape)).astype(operator.dtype, copy=False)
    basis = max(2 * k + 1, 30)
    with measured(operator) as cost:
        begun = time.perf_counter()
        try:
            left, values, right = svds(
                operator,
                k,
                tol=tol,
                v0=start,
                ncv=basis if basis < len(start) else None,
                maxiter=min(10 * len(start), MAX_RESTARTS),
                rng=rng,
            )
        except ArpackNoConvergence:
            raise ProblemError(
                f"svds did not converge in {time.perf_counter() - begun:.0f} s: try a smaller --k"
            ) from None
        order = np.argsort(-values, kind="stable")
        left, values, right = left[:, order], values[order].astype(np.float64), right[order].T
        ahead = np.linalg.norm((operator @ right).astype(np.float64) - left * values, axis=0)
        back = np.linalg.norm((operator.T @ left).astype(np.float64) - right * values, axis=0)
    return Singular(k, values, left, right, np.hypot(ahead, back), 2 * tol * values + rounding, cost)


def _gram(model: Any, loss_function: Any, params: dict[str, torch.Tensor], data: Any) -> torch.Tensor:
    """Form J' J, whose eigenvalues are the squares of the singular values."""
    J = functorch_jacobian(model, params, data).detach().to(torch.float64)
    return J.T @ J
