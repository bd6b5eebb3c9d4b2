r"""Products by routes that share no second derivative with the engine, in float64: what they are checked against.

Finite differences are taken with two step sizes, which tell their error: it is large where a kink, as ReLU has, lies
between.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.double import KINDS, DoubleBatch, Point
from curvop.kernels.fisher import SampledFisherKernel
from curvop.kernels.jacobian import JacobianKernel
from curvop.kernels.kernel import Kernel
from curvop.kernels.layout import ParameterLayout
from curvop.kernels.memory import measured
from curvop.kernels.objective import Objective

__all__ = ["DIFFERENCES", "FORWARD", "STEP", "Route", "other_routes"]

FORWARD, DIFFERENCES, REVERSE = "forward mode", "finite differences", "reverse mode"

# Relative to the parameters. The cube root balances truncation, of the order of the step's square, with rounding, of
# the order of epsilon over the step.
STEP = torch.finfo(torch.float64).eps ** (1 / 3)


@dataclasses.dataclass(frozen=True)
class Route:
    """A product by another route.

    Attributes
    ----------
    name : str
    product : Tensor, shape (M,), or None
        In float64.
    error : float
        Its own, relative, as far as the route tells; 0 where it is exact up to rounding.
    reason : str
        Why there is no product.
    scale : float
        Of a block, the norm of a product of the matrix of all the objective's parameters with a vector of norm 1, by
        finite differences: what a block that is zero has rounding errors of. 0 of the whole matrix.
    """

    name: str
    product: Tensor | None = None
    error: float = 0.0
    reason: str = ""
    scale: float = 0.0


def other_routes(kernel: Kernel, vector: Tensor, available: int) -> list[Route]:
    """Return products with `vector` ``(N,)`` by other routes, in one pass over the data.

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
    names = [FORWARD, DIFFERENCES]
    kind = KINDS.get(type(kernel))
    if kind is None:
        return [Route(name, reason=f"there is no other route to a {type(kernel).__name__}") for name in names]
    steps = {FORWARD: (None,), DIFFERENCES: (STEP, STEP / 2)} if kernel.cols.names else {REVERSE: (None,)}
    sums = [_Sum(name, *sizes) for name, sizes in steps.items()]
    whole, scale = _whole(kernel), _Sum("scale", STEP)
    some = torch.randn(whole.cols.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some = (some / some.norm()).to(vector.device)
    weights: list[float] = []
    objective = kernel.objective
    autocast = torch.autocast(objective.device.type, enabled=False)
    with objective.slow_backends(), autocast:
        point = Point(objective)
        for index, batch in objective.batches():
            if not index and (reason := _too_large(objective, batch, available)):
                return [Route(one.name, reason=reason) for one in sums]
            try:
                at = kind(kernel, point, index, batch)
            except Exception as error:  # whatever a model does that cannot be done in float64
                return [Route(one.name, reason=f"not in float64: {_first_line(error)}") for one in sums]
            weights.append(at.weight)
            for one in sums if at.weight else ():
                one.add(at, vector)
            if at.weight and whole is not kernel:
                scale.add(kind(whole, point, index, batch), some)
    divisor = 1.0 if isinstance(kernel, JacobianKernel) else objective.divisor(weights)
    known = scale.route(divisor).product
    size = 0.0 if known is None else float(known.norm())
    return [dataclasses.replace(one.route(divisor), scale=size) for one in sums]


def _whole(kernel: Any) -> Any:
    """Return the kernel with all of the objective's parameters, or itself where it has them."""
    params = kernel.objective.params
    whole = copy.copy(kernel)
    for side in ("rows", "cols"):
        if 0 < len(getattr(kernel, side).names) < len(params):
            setattr(whole, side, ParameterLayout(params, list(params)))
    return kernel if (whole.rows, whole.cols) == (kernel.rows, kernel.cols) else whole


class _Sum:
    """A route's product, summed over the batches; two of them where steps of two sizes are compared."""

    def __init__(self, name: str, *steps: float | None) -> None:
        self.name = name
        self._steps = steps
        self._products: list[list[Tensor]] = []
        self._reason = ""

    def add(self, at: DoubleBatch, vector: Tensor) -> None:
        if self._reason:
            return
        try:
            products = [at.weight * at.product(vector, step).double().detach() for step in self._steps]
        except Exception as error:  # an operation without this derivative, or too little memory
            self._reason = f"torch cannot: {_first_line(error)}"
            self._products = []
            return
        if self._products and not at.by_batch:
            products = [total + product for [total], product in zip(self._products, products, strict=True)]
            self._products = [[product] for product in products]
        else:
            self._products = self._products or [[] for _ in products]
            for parts, product in zip(self._products, products, strict=True):
                parts.append(product)

    def route(self, divisor: float) -> Route:
        if self._reason or not self._products:
            return Route(self.name, reason=self._reason)
        *coarse, fine = [torch.cat(parts) / divisor for parts in self._products]
        if not coarse:
            return Route(self.name, fine)
        # That of the finer step is a third of the difference, of truncation; of rounding about all of it.
        unit = float(fine.abs().sum()) or 1.0  # whose squares might underflow
        difference, norm = float(((fine - coarse[0]) / unit).norm()), float((fine / unit).norm())
        return Route(self.name, fine, difference / norm if norm else 0.0)


def _too_large(objective: Objective, batch: Any, available: int) -> str:
    """Return the reason where float64 takes more memory than there is, by what the loss of a batch saves."""
    leaves = objective.leaves(objective.params)
    try:
        _, saved = measured(lambda: objective.evaluate(leaves, 0, batch), objective.tensors())
    except RuntimeError:  # the model takes derivatives of its own, which refuses to be measured
        saved = 0
    # Of each tensor that is saved: itself, its tangent, and temporaries of either. Of the parameters: themselves, the
    # vector, two gradients with their tangents, three products. Of all else that the modules hold: two copies.
    parameters = sum(value.numel() for value in leaves.values())
    others = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in objective.tensors()}.values())
    needed = 8 * (4 * saved // objective.dtype.itemsize + 10 * parameters + 2 * others)
    if needed <= available:
        return ""
    return f"float64 takes {needed / 1e9:.3g} GB here, but {available / 1e9:.3g} GB may be used"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
