"""The study behind ``curvop eigs --matrix jacobian``: the largest singular values of a model's Jacobian."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, svds

from curvop.checks.dense_check import DenseCheck, accuracy, dense_check
from curvop.cli.eigs_study import MAX_RESTARTS, measured, named_params, setup_of
from curvop.cli.problem_loading import ProblemError, describe_error, one_line
from curvop.cli.results import Setup, Singular
from curvop.operators.jacobian import JacobianLinearOperator
from curvop.testing.functorch_reference import functorch_jacobian

__all__ = ["singular_study", "wrap_jacobian"]


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
    setup = _first_pass(problem, whole, operator, block, cost)
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


def _first_pass(
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
