"""What a check tells of the model, the loss and the data behind an operator."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.checks.check_report import NOT_APPLICABLE, OK, WARNING, WRONG, Finding
from curvop.checks.dense_check import rounding
from curvop.distributed.distributed_operator import DistributedLinearOperator
from curvop.operators.engine_operator import EngineLinearOperator
from curvop.spectrum.norms import norm
from curvop.storage.fingerprint import listed
from curvop.storage.journal import JournaledLinearOperator

__all__ = [
    "computed_parts",
    "magnitude",
    "measured",
    "model_findings",
    "past_journals",
    "ratio",
    "served_findings",
    "served_parts",
    "symmetry_finding",
    "warned_as_before",
    "zero_block",
]

_Operator = TypeVar("_Operator", bound=LinearOperator)

# Numbers this coarse are not the parameters' own but those of autocast, or of TF32 on a GPU.
_COARSE = 1e-4
# What products that are not linear lack in symmetry is no more than a few times what they lack in linearity.
_NOISY = 10


def computed_parts(A: LinearOperator) -> list[EngineLinearOperator]:
    """Return the operators of this package that `A` is, or is made of."""
    return _parts(A, EngineLinearOperator)


@contextlib.contextmanager
def past_journals(A: LinearOperator) -> Iterator[None]:
    """Let products be made that a journal would answer: what it has on disk says nothing of what is made now."""
    with contextlib.ExitStack() as stack:
        for journal in _parts(A, JournaledLinearOperator):
            stack.enter_context(journal.bypassed())
        yield


def served_parts(A: LinearOperator) -> list[DistributedLinearOperator]:
    """Return the operators of several processes that `A` is, or is made of."""
    return _parts(A, DistributedLinearOperator)


def _parts(A: LinearOperator, kind: type[_Operator]) -> list[_Operator]:
    if isinstance(A, kind):
        return [A]
    parts = (part for part in getattr(A, "args", ()) if isinstance(part, LinearOperator))
    return list({id(one): one for part in parts for one in _parts(part, kind)}.values())


@contextlib.contextmanager
def warned_as_before(bases: list[EngineLinearOperator]) -> Iterator[None]:
    """Let products warn, later, of what is a finding here."""
    objectives = [base._objective for base in bases]
    before = [set(objective.warned) for objective in objectives]
    try:
        yield
    finally:
        for objective, told in zip(objectives, before, strict=True):
            objective.warned = told


def magnitude(array: NDArray[Any]) -> float:
    """Return the root of the sum of all squares, of real or complex numbers of any scale and any precision."""
    return norm(np.abs(array.astype(np.result_type(array.dtype, np.float64), copy=False)))


def ratio(part: float, whole: float) -> float:
    """Return ``part / whole``: of nothing, nothing is none of it, and anything else more than all."""
    return 0.0 if part == 0 else part / whole if whole else math.inf


def measured(name: str, value: float, eps: float, what: str, remedy: str, limit: float = 0.0) -> Finding:
    """Return a finding on an error of products, judged by the epsilon of the numbers that they are computed in.

    Rounding errors of the terms of a sum add up to a multiple of epsilon that grows with the square root of their
    number, and cancellation multiplies them: the 2/3 power leaves room for 1e5 such in float64, for 200 in float32.
    Halved digits, the square root, are what no sum of a few million terms explains.
    """
    limit = max(limit, rounding(eps))
    status = OK if value <= limit else WARNING if value <= max(limit, eps**0.5) else WRONG  # NaN is wrong
    return Finding(name, status, "" if status == OK and name != "noise floor" else what, value, limit, remedy)


def model_findings(seen: Any) -> Iterator[Finding]:
    """Yield what `inspect` of an operator has seen."""
    parts = "" if seen.coarsest == seen.dtype else f", and parts of the loss are computed in {seen.coarsest}"
    yield _precision(f"the parameters are {seen.dtype}{parts}; epsilon {seen.eps:.1e}", seen.eps)
    random = seen.change > seen.eps**0.5  # as in every sweep over the data
    first, second = seen.losses
    if not math.isfinite(first + second):  # not random: the product that it spoils says where
        yield Finding("loss", WRONG, f"it is {first:g}", remedy="look for NaN and infinity in the data")
    limit = rounding(seen.eps)
    changed = seen.change > limit
    yield Finding(
        "randomness",
        WRONG if random else WARNING if changed else OK,
        f"the loss is {first:.9g} in one pass and {second:.9g} in the next" if changed else "of the loss",
        seen.change,
        limit,
        "call model.eval(), and take random augmentation out of the data"
        if seen.random or not seen.reordered
        else "take random augmentation, or shuffling with drop_last=True, out of the data",
    )
    yield _order(seen, random)
    yield from _modes(seen, random)
    if seen.batching:
        yield Finding("weights of batches", WRONG, seen.batching, remedy=seen.batching_remedy)
    elif seen.unverified:
        text = (
            "not verified, as no two batches can be evaluated as one: it is assumed that the loss is a mean over each"
        )
        yield Finding("weights of batches", NOT_APPLICABLE, text)
    reached = not seen.unreached
    yield Finding(
        "parameters reached",
        OK if reached else WARNING,
        "all" if reached else f"the loss does not depend on {listed(seen.unreached)}",
        remedy="their rows and columns are zero, and so many eigenvalues: leave them out of params",
    )


def served_findings(served: Sequence[DistributedLinearOperator]) -> Iterator[Finding]:
    """Yield what is known where no model is at hand: the precision of what ranks compute, if it is theirs."""
    for one in served:
        yield _precision(f"epsilon {one.epsilon:.1e}, of the parameters of rank 0, and autocast", one.epsilon)
    text = (
        "its model and data are looked at on no rank, only its algebra is checked: check each rank's own operator, too"
        if served
        else "this is none of the package's operators: only its algebra is checked"
    )
    yield Finding("model", NOT_APPLICABLE, text)


def _precision(text: str, eps: float) -> Finding:
    remedy = (
        "take products outside of torch.autocast, without TF32 (torch.set_float32_matmul_precision, cudnn), and let "
        "the model cast to nothing coarser"
    )
    return Finding("precision", WARNING if eps > _COARSE else OK, text, remedy=remedy)


def _order(seen: Any, random: bool) -> Finding:
    if not seen.reordered:
        return Finding(
            "order of the data", OK, f"the same {seen.batches} batch{'es' * (seen.batches != 1)} in each pass"
        )
    return Finding(
        "order of the data",
        WARNING,
        "each pass yields other batches, or in another order"
        + ("" if random else "; the sum over them is the same, but only if all fit in cache= can they be kept"),
        remedy="pass shuffle=False to the DataLoader",
    )


def _modes(seen: Any, random: bool) -> Iterator[Finding]:
    if not seen.looked_into:
        text = "the model is a function, and cannot be looked into"
        yield Finding("dropout", NOT_APPLICABLE, text)
        yield Finding("batch normalisation", NOT_APPLICABLE, text)
        return
    status = OK if not seen.random else WRONG if random else WARNING
    text = f"active in {listed(seen.random)}" if seen.random else "none is active"
    yield Finding("dropout", status, text, remedy="call model.eval()")
    cut = seen.batches > 1
    text = "none sees the batch"
    if seen.batchwise:
        text = f"{listed(seen.batchwise)} uses the statistics of each batch"
        text += f", {seen.batches} in all: the matrix depends on how the data is cut" if cut else ", of the only one"
    status = WARNING if seen.batchwise and cut else OK
    yield Finding("batch normalisation", status, text, remedy="call model.eval(), or pass one batch")


def symmetry_finding(value: float, eps: float, noise: float, own: bool, alone: bool) -> Finding:
    """Return what a lack of symmetry is, of an operator that is its `own` adjoint, has none (`alone`), or has another.

    One that has another says by it that it need not be symmetric; one that has none says nothing. `noise` is how far
    products are from linear.
    """
    if alone and not value <= rounding(eps):
        if value <= _NOISY * noise:
            text = f"it cannot be told: of products that are exact to {noise:.1e} only, A lacks it by {value:.1e}"
            return Finding("symmetry", NOT_APPLICABLE, text)
        remedy = "eigsh, cg and densities need a symmetric matrix; if it is not meant to be, pass rmatvec="
        return Finding("symmetry", WARNING, "A is not symmetric", value, rounding(eps), remedy)
    if own or value <= math.sqrt(eps):
        remedy = "an operation of the model has a wrong derivative: eigsh, cg and curvop.spectrum go astray"
        return measured("symmetry", value, eps, "u' (A x) is not (A u)' x", remedy)
    text = f"A is not symmetric, by {value:.1e}: it is for eigs and gmres, not eigsh, cg"
    return Finding("symmetry", NOT_APPLICABLE, text)


def zero_block(size: float, scale: float) -> Finding:
    """Return the finding that a block is zero, where its products of norm `size` are the rounding errors of others'."""
    text = f"the block is zero up to rounding: of a product with all parameters, {scale:.1e}, its products are"
    remedy = "leave its parameters out: its eigenvalues are rounding errors. What follows is relative to all parameters"
    return Finding("zero block", WARNING, f"{text} {size / scale:.1e}", remedy=remedy)
