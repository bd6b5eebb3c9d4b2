"""What a check tells of the model, the loss and the data behind an operator, and of products by other routes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.check_report import NOT_APPLICABLE, OK, WARNING, WRONG, Finding
from curvop.computed import ComputedLinearOperator
from curvop.dense import rounding
from curvop.distributed import DistributedLinearOperator
from curvop.fingerprint import listed
from curvop.journal import JournaledLinearOperator
from curvop.kernels.routes import DIFFERENCES, FORWARD, GRADIENT, Route
from curvop.norms import norm

__all__ = [
    "computed_parts",
    "magnitude",
    "measured",
    "model_findings",
    "past_journals",
    "ratio",
    "route_findings",
    "served_findings",
    "served_parts",
    "symmetry_finding",
    "warned_as_before",
    "zero_block",
]

_Operator = TypeVar("_Operator", bound=LinearOperator)

# Wrong formulas that were met changed a product in its third digit or before it.
_INCONCLUSIVE = 1e-3
# No difference quotient is held to more than its step, relative to the parameters.
_STEP = float(np.finfo(np.float64).eps ** (1 / 3))
# Numbers this coarse are not the parameters' own but those of autocast, or of TF32 on a GPU.
_COARSE = 1e-4
# What products that are not linear lack in symmetry is no more than a few times what they lack in linearity.
_NOISY = 10

_WRONG_DERIVATIVE = (
    "an operation of the model or the loss has a wrong derivative: check blocks, A.block(name), to find the layer, and "
    "compare smaller models with curvop.functorch_hessian"
)
_OTHER_CODE = (
    "the matrix is not that of what your code computes: look for parameters that the loss reaches other than through "
    "those it is given, for buffers that the model writes to, for weights of the batches (batch_weight=) that are not "
    "what the loss divides by, and for a loss that couples the examples"
)
_HELD_STILL = (
    "your code holds constant what depends on the parameters (detach(), no_grad()), which is no error if it is meant, "
    "or a torch.autograd.Function has a wrong backward"
)
_LONG_STEPS = "it may be kinks (ReLU) within a step, which is long as your code computes in single precision"
_NO_ROUTE = (
    "check a small copy of the problem where a route applies: with smooth activations in place of ReLU, with "
    "setup_context and jvp in each autograd.Function, without dtypes that the code names"
)


def computed_parts(A: LinearOperator) -> list[ComputedLinearOperator]:
    """Return the operators of this package that `A` is, or is made of."""
    return _parts(A, ComputedLinearOperator)


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
def warned_as_before(bases: list[ComputedLinearOperator]) -> Iterator[None]:
    """Let products warn, later, of what is a finding here."""
    objectives = [base._objective for base in bases]
    before = [set(objective.told) for objective in objectives]
    try:
        yield
    finally:
        for objective, told in zip(objectives, before, strict=True):
            objective.told = told


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


def route_findings(
    routes: Sequence[Route], product: NDArray[Any], gradient: NDArray[Any], eps: float, scale: float = 0.0
) -> Iterator[Finding]:
    """Yield the comparisons of a product with those by other routes; a warning where none of them can be compared.

    Differences are relative to the product, or to `scale` where that is larger.
    """
    products = [one for one in routes if one.name != GRADIENT]
    found = [_compared(route, product, eps, scale) for route in products]
    statuses = {one.name: one.status for one in found}
    for one, route in zip(found, products, strict=True):
        if one.status == WRONG and one.name == FORWARD and statuses.get(DIFFERENCES) == OK:
            # Torch's forward mode has errors of its own.
            text = f"{one.text}, but the other route agrees with A"
            remedy = "torch's backward and its forward mode differ for an operation of the model or the loss"
            yield Finding(one.name, WARNING, text, one.value, one.limit, remedy)
        elif one.status == WRONG and one.name == DIFFERENCES and statuses.get(FORWARD) == OK:
            remedy = _OTHER_CODE if not route.own or route.own.fine else _LONG_STEPS
            status = WRONG if not route.own or route.own.fine else WARNING
            yield Finding(one.name, status, f"{one.text}, but forward mode agrees with A", one.value, one.limit, remedy)
        else:
            yield one
    for route in routes:
        if route.name == GRADIENT:
            yield _gradient_finding(route, gradient, eps)
        elif route.own is not None and route.own.linear and not product.any():
            yield _linear(route.own.known)
    if all(one.status == NOT_APPLICABLE for one in found):
        text = "the product was compared with none: a derivative that is wrong would go unnoticed"
        yield Finding("independent route", WARNING, text, remedy=_NO_ROUTE)


def _gradient_finding(route: Route, gradient: NDArray[Any], eps: float) -> Finding:
    """Compare the gradient with that of the user's own code; what cancels in both leaves rounding errors."""
    own = route.products[0].cpu().numpy()
    value = ratio(magnitude(gradient - own), max(magnitude(own), route.own.size if route.own else 0.0))
    finding = measured(route.name, value, eps, "it differs from that of your own code", _OTHER_CODE, eps**0.5)
    return dataclasses.replace(finding, text="; ".join(filter(None, (finding.text, _how(route)))))


def _how(route: Route) -> str:
    """Say how the user's code was called."""
    if route.own is None:
        return ""
    return "of your own code" + (", all data as one batch" if route.own.whole else "")


def _linear(known: bool) -> Finding:
    """Return the finding that a Gauss-Newton matrix is zero because of its loss, one of torch's if it is `known`."""
    if known:
        text = "the matrix is zero: the second derivative of this loss by the prediction is"
        remedy = "use HessianLinearOperator, or a loss that curves (CrossEntropyLoss of logits in place of NLLLoss)"
        return Finding("zero matrix", WARNING, text, remedy=remedy)
    text = "the matrix is zero: the loss is linear in the prediction, as where the model returns its own loss"
    remedy = "use HessianLinearOperator, or return logits from the model and let loss_function compute the loss of them"
    return Finding("zero matrix", WRONG, text, remedy=remedy)


def _compared(route: Route, product: NDArray[Any], eps: float, scale: float) -> Finding:
    if not route.products:
        return Finding(route.name, NOT_APPLICABLE, route.reason)
    others = [other.cpu().numpy() for other in route.products]
    # Of the product by the shorter step; the longer one has less rounding, and agrees where no kink is near.
    size = max(magnitude(others[-1]), scale)
    error = route.error * ratio(magnitude(others[-1]), size)
    value = min(ratio(magnitude(product - other), size) for other in others)
    limit = 0.0 if len(others) == 1 else _STEP
    if limit and value > max(limit, rounding(eps)):
        if error > _INCONCLUSIVE:
            text = f"the steps differ by {error:.1e} between themselves, as at the kinks of ReLU: nothing can be said"
            return Finding(route.name, NOT_APPLICABLE, text)
        limit += 4 * error
        if error > _STEP and limit < value < 100 * error:  # a smooth function leaves less
            text = f"kinks, as of ReLU, lie within a step: it agrees to {value:.1e}, and no more can be said"
            return Finding(route.name, NOT_APPLICABLE, text)
        if value > limit and route.own is not None and route.own.holds:
            text = "autograd's derivative of your code is not its difference quotient: nothing can be said of A's"
            return Finding(route.name, WARNING, text, value, limit, _HELD_STILL)
    finding = measured(route.name, value, eps, "A's product differs from it", _WRONG_DERIVATIVE, limit)
    return dataclasses.replace(finding, text="; ".join(filter(None, (finding.text, _how(route)))))
