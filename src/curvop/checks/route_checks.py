"""Findings of a check on products by other routes, and on the gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.checks.check_report import NOT_APPLICABLE, OK, WARNING, WRONG, Finding
from curvop.checks.dense_check import rounding
from curvop.checks.model_checks import magnitude, measured, ratio

__all__ = ["route_findings"]

# Wrong formulas that were met changed a product in its third digit or before it.
_INCONCLUSIVE = 1e-3
# No difference quotient is held to more than its step, relative to the parameters.
_STEP = float(np.finfo(np.float64).eps ** (1 / 3))

_WRONG_DERIVATIVE = (
    "an operation of the model or the loss has a wrong derivative, or holds constant what depends on the parameters "
    "(no_grad(), as of spectral_norm in training mode): check blocks, A.block(name), to find the layer, and compare "
    "smaller models with curvop.functorch_hessian"
)
_OTHER_CODE = (
    "the matrix is not that of what your code computes: look for parameters that the loss reaches other than through "
    "those it is given, for buffers that the model writes to, for weights of the batches (batch_weight=) that are not "
    "what the loss divides by, and for a loss that couples the examples"
)
_HELD_STILL = (
    "your code holds constant what depends on the parameters (detach(), no_grad()), which is no error if it is meant; "
    "or a torch.autograd.Function has a wrong backward; or kinks (ReLU) lie within a step"
)
_LONG_STEPS = (
    "forward mode agrees with A: it may be kinks (ReLU) within a step, which is long where code computes in float32"
)
_NO_ROUTE = (
    "check a small copy of the problem where a route applies: with smooth activations in place of ReLU, with "
    "setup_context and jvp in each autograd.Function, without dtypes that the code names"
)


def route_findings(
    routes: Sequence[Any], product: NDArray[Any], gradient: NDArray[Any], eps: float, scale: float = 0.0
) -> Iterator[Finding]:
    """Yield the comparisons of a product with those by other routes; a warning where none of them can be compared.

    Differences are relative to the product, or to `scale` where that is larger.
    """
    gradients = [_gradient_finding(route, gradient, eps) for route in routes if route.name == "gradient"]
    calls = all(one.status == OK for one in gradients)  # whether it is called as you call it, so far
    products = [route for route in routes if route.name != "gradient"]
    found = [_compared(route, product, eps, scale) for route in products]
    status = {one.name: one.status for one in found}
    for one, route in zip(found, products, strict=True):
        if one.status != WRONG:
            yield one
        elif one.name != "finite differences" and status.get("finite differences") == OK:
            text = f"{one.text}, but finite differences of your own code agree with A"
            remedy = "torch's backward and its forward mode differ for an operation of the model or the loss"
            yield dataclasses.replace(one, status=WARNING, text=text, remedy=remedy)
        elif one.name == "finite differences" and status.get("forward mode") == OK == status.get("double backward"):
            yield dataclasses.replace(one, status=WARNING, remedy=_HELD_STILL)
        elif one.name == "finite differences" and status.get("forward mode") == OK and not route.own.fine and calls:
            yield dataclasses.replace(one, status=WARNING, remedy=_LONG_STEPS)
        elif one.name == "double backward" or (route.own and (status.get("forward mode") == OK or not calls)):
            yield dataclasses.replace(one, remedy=_OTHER_CODE)
        else:
            yield one
    yield from gradients
    if any(route.own is not None and route.own.linear for route in products) and not product.any():
        yield _linear(any(route.own is not None and route.own.known for route in products))
    if all(one.status == NOT_APPLICABLE for one in found if one.name != "double backward"):  # whose formulas are A's
        text = "the product was compared with none: a derivative that is wrong would go unnoticed"
        yield Finding("independent route", WARNING, text, remedy=_NO_ROUTE)


def _gradient_finding(route: Any, gradient: NDArray[Any], eps: float) -> Finding:
    """Compare the gradient with that of the user's own code; what cancels in both leaves rounding errors."""
    own = route.products[0].cpu().numpy()
    value = ratio(magnitude(gradient - own), max(magnitude(own), route.own.size))
    finding = measured(route.name, value, eps, "it differs from that of your own code", _OTHER_CODE, eps**0.5)
    return dataclasses.replace(finding, text="; ".join(filter(None, (finding.text, _how(route)))))


def _how(route: Any) -> str:
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


def _compared(route: Any, product: NDArray[Any], eps: float, scale: float) -> Finding:
    if not route.products:
        return Finding(route.name, NOT_APPLICABLE, route.reason)
    first, *others = [other.cpu().numpy() for other in route.products]
    # Of the product by the shorter step; the longer one has less rounding, and agrees where no kink is near.
    shorter = others[0] if others else first
    size = max(magnitude(shorter), scale)
    error = route.error * ratio(magnitude(shorter), size)
    values = [ratio(magnitude(product - other), size) for other in (first, *others)]
    value, limit = min(values), _STEP if others else 0.0
    if limit and value > max(limit, rounding(eps)):  # with none that it agrees with by no accident
        value = min(values[:2])
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
