"""Products by other routes than the engine's, which they are checked against.

Forward mode is exact up to rounding, but calls the model as the engine does. Double backward through the user's own
code, called as the user calls it, is as exact, but has the engine's formulas. Differences of the user's own code are
less precise, and share nothing with the engine: neither a second derivative nor the way in which the code is called.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.errors import first_line
from curvop.kernels.fisher_kernel import SampledFisherKernel
from curvop.kernels.jacobian_kernel import JacobianKernel
from curvop.kernels.kernel import Kernel
from curvop.kernels.layout import ParameterLayout
from curvop.kernels.memory import measured
from curvop.kernels.objective import Objective
from curvop.kernels.own_product import OwnProduct, own_product
from curvop.kernels.reference import KINDS, Point

__all__ = ["DIFFERENCES", "DOUBLE", "FORWARD", "GRADIENT", "REVERSE", "Route", "other_routes"]

FORWARD, DOUBLE, DIFFERENCES = "forward mode", "double backward", "finite differences"
REVERSE, GRADIENT = "reverse mode", "gradient"


@dataclasses.dataclass(frozen=True)
class Route:
    """A product by another route, or the gradient.

    Attributes
    ----------
    name : str
    products : tuple of Tensor, shape (M,)
        In float64; of finite differences with steps of two sizes. Empty if there is a `reason`.
    error : float
        Their relative difference; 0 where a product is exact up to rounding.
    reason : str
        Why there is no product.
    scale : float
        Of a block, the norm of a product of the matrix of all the objective's parameters with a vector of norm 1: what
        a block that is zero has rounding errors of. 0 of the whole matrix.
    own : OwnProduct or None
        If it is of the user's own code, what else that has shown.
    """

    name: str
    products: tuple[Tensor, ...] = ()
    error: float = 0.0
    reason: str = ""
    scale: float = 0.0
    own: OwnProduct | None = None


def other_routes(kernel: Kernel, vector: Tensor, available: int) -> list[Route]:
    """Return products with `vector` ``(N,)`` by other routes, in two passes over the data or three.

    Parameters
    ----------
    kernel : Kernel
    vector : Tensor, shape (N,)
        In float64, on the parameters' device.
    available : int
        Bytes that may be used.
    """
    kernel = getattr(kernel, "_kernel", kernel)  # what a compiled kernel compiles
    if isinstance(kernel, SampledFisherKernel):
        return [Route(FORWARD, reason="the targets are drawn by the operator itself: check the exact Fisher matrix")]
    names = [FORWARD, DIFFERENCES] if kernel.cols.names else [REVERSE]
    if type(kernel) not in KINDS:
        return [Route(name, reason=f"there is no other route to a {type(kernel).__name__}") for name in names]
    needed = _needed(kernel.objective)
    if needed > available:
        reason = f"float64 takes {needed / 1e9:.3g} GB here, but {available / 1e9:.3g} GB may be used"
        return [Route(name, reason=reason) for name in names]
    routes = [_forward(kernel, vector)] if kernel.cols.names else []
    own = own_product(kernel, vector, needed, available)
    if own.exact is not None or own.unknown:
        routes.append(Route(DOUBLE, () if own.exact is None else (own.exact,), reason=own.unknown, own=own))
    routes.append(Route(names[-1], tuple(own.products), own.error, own.reason, own=own))
    if own.gradient is not None:
        routes.append(Route(GRADIENT, (own.gradient,), own=own))
    whole = _whole(kernel)
    if whole is kernel:
        return routes
    scale = _scale(whole, needed, available, vector.device)
    return [dataclasses.replace(one, scale=scale) for one in routes]


def _scale(whole: Any, needed: int, available: int, device: torch.device) -> float:
    """Return the norm of a product with a random vector of norm 1."""
    some = torch.randn(whole.cols.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some = (some / some.norm()).to(device)
    products = _forward(whole, some).products if whole.cols.names else ()
    products = products or tuple(own_product(whole, some, needed, available).products)
    return float(products[0].norm()) if products else 0.0


def _whole(kernel: Any) -> Any:
    """Return the kernel with all of the objective's parameters, or itself where it has them."""
    params = kernel.objective.params
    whole = copy.copy(kernel)
    for side in ("rows", "cols"):
        if 0 < len(getattr(kernel, side).names) < len(params):
            setattr(whole, side, ParameterLayout(params, list(params)))
    return kernel if (whole.rows, whole.cols) == (kernel.rows, kernel.cols) else whole


def _forward(kernel: Any, vector: Tensor) -> Route:
    """Return the product in forward mode."""
    objective, weights = kernel.objective, []
    products: list[Tensor] = []
    autocast = torch.autocast(objective.device.type, enabled=False)
    with objective.slow_backends(), autocast:
        point = Point(objective)
        for index, batch in objective.batches():
            try:
                at = KINDS[type(kernel)](kernel, point, index, batch)
            except Exception as error:  # whatever a model does that cannot be done in float64
                return Route(FORWARD, reason=f"not in float64: {first_line(error)}")
            weights.append(at.weight)
            if not at.weight:
                continue
            try:
                product = at.weight * at.product(vector).double().detach()
            except Exception as error:  # an operation without this derivative, or too little memory
                return Route(FORWARD, reason=f"torch cannot: {first_line(error)}")
            products = [*products, product] if at.by_batch or not products else [products[0] + product]
    divisor = 1.0 if isinstance(kernel, JacobianKernel) else objective.divisor(weights)
    return Route(FORWARD, (torch.cat(products) / divisor,) if products else ())


def _needed(objective: Objective) -> int:
    """Return the bytes that a batch takes in float64, by what the loss of the first one saves."""
    leaves, saved = objective.leaves(objective.params), 0
    with objective.slow_backends():
        _, batch = next(objective.batches())
        with contextlib.suppress(RuntimeError):  # the model takes derivatives of its own, which refuses to be measured
            _, saved = measured(lambda: objective.evaluate(leaves, 0, batch), objective.tensors())
    # Of each tensor that is saved: itself, its tangent, and temporaries of either. Of the parameters: themselves, the
    # vector, two gradients with their tangents, three products. Of all else that the modules hold: two copies.
    parameters = sum(value.numel() for value in leaves.values())
    others = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in objective.tensors()}.values())
    return 8 * (4 * saved // objective.dtype.itemsize + 10 * parameters + 2 * others)
