"""Convert the measurements of an operator check into findings.

There are two kinds of measurements. `curvop.checks.operator_checks` computes the errors of products. The `Inspection`
of an operator's objective describes the model, the loss and the data.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.checks.check_report import NOT_APPLICABLE, OK, WARNING, WRONG, Finding
from curvop.checks.dense_check import rounding_tolerance
from curvop.distributed.distributed_operator import DistributedLinearOperator
from curvop.operators.engine_operator import EngineLinearOperator
from curvop.spectrum.norms import norm
from curvop.storage.fingerprint import listed
from curvop.storage.journal import JournaledLinearOperator

__all__ = [
    "bypassed_journals",
    "distributed_findings",
    "distributed_parts",
    "engine_parts",
    "magnitude",
    "measured_finding",
    "model_findings",
    "ratio",
    "restored_warnings",
    "symmetry_finding",
    "zero_block_finding",
]

_Operator = TypeVar("_Operator", bound=LinearOperator)

# The dtypes of parameters (float32 and float64) have an epsilon below this limit. A larger epsilon is due to autocast,
# to TF32 on a GPU, or to a model that casts to a lower precision.
_LOW_PRECISION = 1e-4
# The symmetry defect of a symmetric operator that is not exactly linear is at most a few times its linearity error.
_NOISE_FACTOR = 10


def engine_parts(A: LinearOperator) -> list[EngineLinearOperator]:
    """Return the ``EngineLinearOperator`` objects that `A` is composed of, or ``[A]`` if `A` itself is one."""
    return _parts(A, EngineLinearOperator)


def distributed_parts(A: LinearOperator) -> list[DistributedLinearOperator]:
    """Return the distributed operators that `A` is composed of, or ``[A]`` if `A` itself is a distributed operator."""
    return _parts(A, DistributedLinearOperator)


def _parts(A: LinearOperator, kind: type[_Operator]) -> list[_Operator]:
    if isinstance(A, kind):
        return [A]
    operands = (operand for operand in getattr(A, "args", ()) if isinstance(operand, LinearOperator))
    return list({id(part): part for operand in operands for part in _parts(operand, kind)}.values())


@contextlib.contextmanager
def bypassed_journals(A: LinearOperator) -> Iterator[None]:
    """Disable the journals of `A` within a ``with`` block, because a check must not read recorded products."""
    with contextlib.ExitStack() as stack:
        for journal in _parts(A, JournaledLinearOperator):
            stack.enter_context(journal.bypassed())
        yield


@contextlib.contextmanager
def restored_warnings(operators: list[EngineLinearOperator]) -> Iterator[None]:
    """Forget the warnings that operators issue within a ``with`` block, so that later products issue them again."""
    objectives = [operator._objective for operator in operators]
    before = [set(objective.checks.warned) for objective in objectives]
    try:
        yield
    finally:
        for objective, warned in zip(objectives, before, strict=True):
            objective.checks.warned = warned


def magnitude(array: NDArray[Any]) -> float:
    """Compute the Frobenius norm of a real or complex array without overflow or underflow."""
    return norm(np.abs(array.astype(np.result_type(array.dtype, np.float64), copy=False)))


def ratio(part: float, whole: float) -> float:
    """Return ``part / whole``. If only `whole` is zero, return infinity. If both are zero, return 0."""
    return 0.0 if part == 0 else part / whole if whole else math.inf


def measured_finding(name: str, value: float, eps: float, problem: str, remedy: str, limit: float = 0.0) -> Finding:
    """Return a finding about a relative error of products.

    The finding is 'ok' for errors up to the 2/3 power of epsilon, a warning for errors up to the square root of
    epsilon, and 'wrong' for larger errors.

    The rounding error of a sum grows with the square root of the number of terms and with cancellation. The 2/3 power
    of epsilon allows for a factor of 1e5 in float64 and 200 in float32. An error above the square root of epsilon means
    that half of the digits are lost. Sums of a few million terms cannot explain such an error.

    Parameters
    ----------
    name : str
        Name of the finding.
    value : float
        The relative error. NaN counts as wrong.
    eps : float
        Epsilon of the lowest precision that a product uses.
    problem, remedy : str
        Text and remedy of the finding if the error is too large.
    limit : float
        Accept errors up to this limit if it is larger than the 2/3 power of `eps`.
    """
    limit = max(limit, rounding_tolerance(eps))
    status = OK if value <= limit else WARNING if value <= max(limit, eps**0.5) else WRONG
    return Finding(name, status, "" if status == OK and name != "noise floor" else problem, value, limit, remedy)


def model_findings(inspection: Any) -> Iterator[Finding]:
    """Yield the findings that follow from the `Inspection` of an operator's objective."""
    text = f"the parameters are {inspection.dtype}"
    if inspection.coarsest != inspection.dtype:
        text += f", and parts of the loss are computed in {inspection.coarsest}"
    if inspection.cause:
        text += f"; {inspection.cause}"
    yield _precision(f"{text}; epsilon {inspection.eps:.1e}", inspection.eps, inspection.remedy)
    random = inspection.change > inspection.eps**0.5  # above this limit, products raise an error
    first, second = inspection.losses
    if not math.isfinite(first + second):  # NaN is no sign of randomness; the product's error names the cause
        yield Finding("loss", WRONG, f"it is {first:g}", remedy="look for NaN and infinity in the data")
    yield _randomness(inspection, random)
    yield _order(inspection, random)
    yield from _modes(inspection, random)
    if inspection.batching:
        yield Finding("weights of batches", WRONG, inspection.batching, remedy=inspection.batching_remedy)
    elif inspection.unverified:
        text = "not verified, because no two batches can be evaluated as one: the loss is assumed to be a batch mean"
        yield Finding("weights of batches", NOT_APPLICABLE, text)
    reached = not inspection.unreached
    yield Finding(
        "parameters reached",
        OK if reached else WARNING,
        "all" if reached else f"the loss does not depend on {listed(inspection.unreached)}",
        remedy="their rows and columns are zero, and so are as many eigenvalues: leave them out of params",
    )


def _randomness(inspection: Any, random: bool) -> Finding:
    first, second = inspection.losses
    limit = rounding_tolerance(inspection.eps)
    changed = inspection.change > limit
    text = "of the loss"
    if changed:
        text = f"the loss is {first:.9g} in one pass and {second:.9g} in the next"
    remedy = "take random augmentation, or shuffling with drop_last=True, out of the data"
    if inspection.random or not inspection.reordered:
        remedy = "call model.eval(), and take random augmentation out of the data"
    status = WRONG if random else WARNING if changed else OK
    return Finding("randomness", status, text, inspection.change, limit, remedy)


def _order(inspection: Any, random: bool) -> Finding:
    if not inspection.reordered:
        batches = f"{inspection.batches} batch{'es' * (inspection.batches != 1)}"
        return Finding("order of the data", OK, f"the same {batches} in each pass")
    text = "each pass yields different batches, or another order"
    if not random:
        text += "; the sum over them is the same, but they can only be cached if all fit (cache=)"
    return Finding("order of the data", WARNING, text, remedy="pass shuffle=False to the DataLoader")


def _modes(inspection: Any, random: bool) -> Iterator[Finding]:
    if not inspection.looked_into:
        text = "the model is a function, whose layers are not accessible"
        yield Finding("dropout", NOT_APPLICABLE, text)
        yield Finding("batch normalisation", NOT_APPLICABLE, text)
        return
    status = OK if not inspection.random else WRONG if random else WARNING
    text = f"active in {listed(inspection.random)}" if inspection.random else "none is active"
    yield Finding("dropout", status, text, remedy="call model.eval()")
    several = inspection.batches > 1
    text = "no layer uses batch statistics"
    if inspection.batchwise:
        text = f"{listed(inspection.batchwise)} uses the statistics of each batch"
        if several:
            text += f", {inspection.batches} in all: the matrix depends on how the data are split into batches"
        else:
            text += ", of the only one"
    status = WARNING if inspection.batchwise and several else OK
    yield Finding("batch normalisation", status, text, remedy="call model.eval(), or pass one batch")


def distributed_findings(operators: Sequence[DistributedLinearOperator]) -> Iterator[Finding]:
    """Yield findings for an operator whose model, loss and data are not accessible.

    The findings describe the precision of distributed operators, and state what was not checked.
    """
    for operator in operators:
        text = f"epsilon {operator.epsilon:.1e}, from the parameters and the settings of rank 0"
        yield _precision(text, operator.epsilon)
    if operators:
        text = "the check covers the algebra, not the model and data of the ranks: check each rank's own operator, too"
    else:
        text = "A is not an operator of this package: the check covers its algebra only"
    yield Finding("model", NOT_APPLICABLE, text)


def _precision(text: str, eps: float, remedy: str = "") -> Finding:
    remedy = remedy or (
        "compute products outside of torch.autocast and without TF32 (torch.set_float32_matmul_precision, cudnn), and "
        "with a model that does not cast to a lower precision"
    )
    return Finding("precision", WARNING if eps > _LOW_PRECISION else OK, text, remedy=remedy)


def symmetry_finding(value: float, eps: float, noise: float, self_adjoint: bool, has_adjoint: bool) -> Finding:
    """Return a finding about the symmetry defect of a square operator.

    An operator that is its own adjoint must be symmetric. An operator with a different adjoint need not be symmetric,
    because the user has defined the adjoint separately. If an operator without an adjoint is not symmetric, the finding
    is a warning.

    Parameters
    ----------
    value : float
        The relative symmetry defect, which is the relative difference between ``u' (A x)`` and ``(A u)' x``.
    eps : float
        Epsilon of the lowest precision that a product uses.
    noise : float
        The largest relative error of products in the checks of ``matmat``, repeatability and linearity.
    self_adjoint : bool
        Whether ``A.H is A``.
    has_adjoint : bool
        Whether the operator has an adjoint (``rmatvec``).
    """
    if not has_adjoint and not value <= rounding_tolerance(eps):
        if value <= _NOISE_FACTOR * noise:
            text = f"unknown: the defect of A is {value:.1e}, but its products are only exact to {noise:.1e}"
            return Finding("symmetry", NOT_APPLICABLE, text)
        remedy = "eigsh, cg and densities need a symmetric matrix; if it is not meant to be, pass rmatvec="
        return Finding("symmetry", WARNING, "A is not symmetric", value, rounding_tolerance(eps), remedy)
    if self_adjoint or value <= math.sqrt(eps):
        remedy = "an operation of the model has a wrong derivative: eigsh, cg and curvop.spectrum would be wrong"
        return measured_finding("symmetry", value, eps, "u' (A x) differs from (A u)' x", remedy)
    text = f"A is not symmetric (defect {value:.1e}): use eigs and gmres, not eigsh and cg"
    return Finding("symmetry", NOT_APPLICABLE, text)


def zero_block_finding(size: float, scale: float) -> Finding:
    """Return a warning that a block is zero up to rounding.

    Parameters
    ----------
    size : float
        Norm of a product of the block with a vector of norm 1.
    scale : float
        Norm of a product of the matrix of all parameters with a vector of norm 1. Compared with this norm,
        the products of the block are rounding errors.
    """
    text = (
        f"the block is zero up to rounding: its products are {size / scale:.1e} times those with all parameters, "
        f"{scale:.1e}"
    )
    remedy = (
        "leave its parameters out, because its eigenvalues are rounding errors. The errors below are relative to all "
        "parameters"
    )
    return Finding("zero block", WARNING, text, remedy=remedy)
