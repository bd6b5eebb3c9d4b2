"""Compute products by other methods ("routes"), to check the engine's products.

- Forward mode is exact up to rounding. However, it calls the model the same way as the engine does, so it cannot detect
  an error in this call.
- Double backward is also exact up to rounding, and calls the user's code the way the user does. However, it uses the
  same formulas for second derivatives as the engine.
- Finite differences are less precise, but they share nothing with the engine: they need no second derivatives, and they
  call the user's code the way the user does.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional

from curvop.kernels.batches import map_leaves
from curvop.kernels.differences import OwnProduct, losses_of_examples, own_product, unreduced_loss
from curvop.kernels.differentiable import NORMS, STAND_INS
from curvop.kernels.errors import first_line
from curvop.kernels.factor_kernel import PerExampleKernel, item_count
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel, SampledFisherKernel
from curvop.kernels.ggn_kernel import GGNKernel, outputs_of
from curvop.kernels.guard import replaced
from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.jacobian_kernel import JacobianKernel
from curvop.kernels.kernel import Kernel
from curvop.kernels.losses import loss_kind
from curvop.kernels.memory import measured
from curvop.kernels.objective import Objective
from curvop.kernels.parameters import ParameterLayout
from curvop.kernels.user_code import HeldPadding, in_double

__all__ = ["DIFFERENCES", "DOUBLE", "FORWARD", "GRADIENT", "REVERSE", "Route", "other_routes"]

FORWARD, DOUBLE, DIFFERENCES = "forward mode", "double backward", "finite differences"
REVERSE, GRADIENT = "reverse mode", "gradient"


@dataclasses.dataclass(frozen=True)
class Route:
    """A product or a gradient that was computed by another method than the engine's.

    Attributes
    ----------
    name : str
    products : tuple of Tensor, shape (M,)
        The product in float64. Finite differences give one product for each of two or more step sizes. The tuple is
        empty if no product could be computed.
    error : float
        Relative difference between the products with the first two step sizes, or 0 if a product is exact up to
        rounding.
    reason : str
        The reason why no product could be computed, or an empty string.
    scale : float
        For a block of the matrix, the norm of the product of the whole matrix with a random vector of norm 1. If the
        block is zero, its rounding errors are proportional to this norm. If the kernel has the rows and columns of all
        parameters, `scale` is 0.
    own : OwnProduct or None
        Further results, if the product was computed by calling the user's own code. Otherwise None.
    """

    name: str
    products: tuple[Tensor, ...] = ()
    error: float = 0.0
    reason: str = ""
    scale: float = 0.0
    own: OwnProduct | None = None


def other_routes(kernel: Kernel, vector: Tensor, available: int) -> list[Route]:
    """Compute the product with a vector by other methods, in at least two passes over the data.

    Parameters
    ----------
    kernel : Kernel
    vector : Tensor, shape (N,)
        Vector in float64, on the parameters' device.
    available : int
        Number of bytes of memory that may be used.
    """
    kernel = getattr(kernel, "_kernel", kernel)  # unwrap a compiled kernel
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
    return [dataclasses.replace(route, scale=scale) for route in routes]


def _scale(whole: Any, needed: int, available: int, device: torch.device) -> float:
    """Return the norm of the product of a kernel's matrix with a random vector of norm 1."""
    vector = torch.randn(whole.cols.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (vector / vector.norm()).to(device)
    products = _forward(whole, vector).products if whole.cols.names else ()
    products = products or tuple(own_product(whole, vector, needed, available).products)
    return float(products[0].norm()) if products else 0.0


def _whole(kernel: Any) -> Any:
    """Return a copy of `kernel` with rows and columns for all parameters, or `kernel` itself if it has them all."""
    params = kernel.objective.params
    whole = copy.copy(kernel)
    for side in ("rows", "cols"):
        if 0 < len(getattr(kernel, side).names) < len(params):
            setattr(whole, side, ParameterLayout(params, list(params)))
    return kernel if (whole.rows, whole.cols) == (kernel.rows, kernel.cols) else whole


def _forward(kernel: Any, vector: Tensor) -> Route:
    """Compute the product in forward mode."""
    objective, weights = kernel.objective, []
    products: list[Tensor] = []
    autocast = torch.autocast(objective.device.type, enabled=False)
    with objective.slow_backends(), autocast:
        point = Point(objective)
        for index, batch in objective.batches():
            try:
                double_batch = KINDS[type(kernel)](kernel, point, index, batch)
            except Exception as error:  # an operation of the model that does not support float64
                return Route(FORWARD, reason=f"not in float64: {first_line(error)}")
            weights.append(double_batch.weight)
            if not double_batch.weight:
                continue
            try:
                product = double_batch.weight * double_batch.product(vector).double().detach()
            except Exception as error:  # an operation has no forward-mode derivative, or memory ran out
                return Route(FORWARD, reason=f"torch cannot: {first_line(error)}")
            separate = double_batch.by_batch or not products
            products = [*products, product] if separate else [products[0] + product]
    return Route(FORWARD, (torch.cat(products) / kernel.divisor(weights),) if products else ())


def _needed(objective: Objective) -> int:
    """Return the estimated number of bytes that a batch needs in float64.

    The estimate is based on the number of bytes that autograd saves for the loss of the first batch.
    """
    leaves, saved = objective.leaves(objective.params), 0
    with objective.slow_backends():
        _, batch = next(objective.batches())
        with contextlib.suppress(RuntimeError):  # a model that uses torch.func cannot be measured
            _, saved = measured(lambda: objective.evaluate(leaves, 0, batch), objective.tensors())
    # For each saved tensor, count four tensors: the tensor, its tangent, and one temporary tensor for each of these.
    # For the parameters, count their values, the vector, two gradients with their tangents, and three products. For all
    # tensors of the objective, count two copies.
    parameters = sum(value.numel() for value in leaves.values())
    others = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in objective.tensors()}.values())
    return 8 * (4 * saved // objective.dtype.itemsize + 10 * parameters + 2 * others)


Values = dict[str, Tensor]
Parts = tuple[Tensor, ...]


class Point:
    """The parameters of the objective and the buffers of its modules, in float64."""

    def __init__(self, objective: Objective) -> None:
        leaves = objective.leaves(())
        self.values: Values = in_double(leaves)
        self._buffers: dict[str, Values] = in_double(objective.buffers(leaves))
        training = any(part.training for module in objective.modules for part in module.modules())
        self._written_to = training or objective.guard.writes

    def buffers(self) -> dict[str, Values]:
        """Return the buffers of the modules, or copies of the buffers if the modules may write to them."""
        buffers: dict[str, Values] = map_leaves(torch.clone, self._buffers) if self._written_to else self._buffers
        return buffers


class _ForwardDifferentiable(HeldPadding):
    """Replace functions whose forward-mode derivative is missing or wrong in torch.

    In addition, keep the padding rows of embeddings constant; see `HeldPadding`.
    """

    def replacement(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function to call in place of `func`, or `func` itself."""
        return super().replacement(_COMPOSITES.get(func, func))


def _composite(terms_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(z: Tensor, y: Tensor, *reduced: Any, reduction: str = "mean", **settings: Any) -> Tensor:
        terms = terms_of(z, y, **{name: value for name, value in settings.items() if value is not None})
        return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()

    return loss


def _huber(z: Tensor, y: Tensor, delta: float = 1.0) -> Tensor:
    size = (z - y).abs()
    return torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


_COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {
    **STAND_INS,
    **NORMS,
    functional.mse_loss: _composite(lambda z, y: (z - y) ** 2),
    functional.huber_loss: _composite(_huber),
    functional.soft_margin_loss: _composite(lambda z, y: functional.softplus(-y * z)),
}


class DoubleBatch(abc.ABC):
    """Base class for products with the matrix of one batch in float64, computed in forward mode.

    There is a subclass for each kind of matrix. A product with the Hessian is the forward-mode derivative of a gradient
    that is computed in reverse mode.
    """

    by_batch = False

    def __init__(self, kernel: Any, point: Point, index: int, batch: Any) -> None:
        self.kernel, self.objective, self.point = kernel, kernel.objective, point
        self.batch = in_double(batch)
        self.index = index
        self._padding: list[Tensor] = []
        self.values = {name: point.values[name] for name in (*kernel.rows.names, *kernel.cols.names)}
        with torch.enable_grad():  # the model may compute derivatives
            self.prediction = self._traced({})[1]
        self._original = batch  # in the original precision, because the user's modules may compute the targets
        self.weight = 1.0 if self.by_batch else self.objective.weight(self.prediction, index, batch)

    @abc.abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Return the product of the batch's matrix with `vector`, shape ``(N,)``."""

    def _traced(self, values: Values) -> tuple[Tensor, Any]:
        with _ForwardDifferentiable(self._padding):
            loss_and_prediction: tuple[Tensor, Any] = self.objective.traced(
                self.point.values | values, self.point.buffers(), self.batch
            )
        return loss_and_prediction

    def _predict(self, values: Values) -> Parts:
        with _ForwardDifferentiable(self._padding):
            return tuple(outputs_of(self._prediction(values)))

    def _prediction(self, values: Values) -> Any:
        return self.objective.traced_prediction(
            self.point.values | values, self.point.buffers(), self.objective.inputs(self.batch)
        )

    def _targets(self) -> Any:
        return self.objective.traced_targets(self.point.values, self.point.buffers(), self.batch)

    def _along(self, vector: Tensor) -> Values:
        zeros = {name: torch.zeros_like(value) for name, value in self.values.items()}
        return zeros | dict(zip(self.kernel.cols.names, self.kernel.cols.split(vector), strict=True))

    def _rows(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.kernel.rows.of(parts)])

    def _vjp(self, function: Callable[[Values], Parts], vectors: Parts) -> Tensor:
        """Multiply the transposed Jacobian of `function` by `vectors`. There is one vector for each output."""
        leaves = _leaves(self.values)
        with torch.enable_grad():
            outputs = function(leaves)
        used = [index for index, output in enumerate(outputs) if output.requires_grad]
        if not used:
            return torch.zeros_like(self._rows(leaves))
        ends, seeds = [outputs[index] for index in used], [vectors[index] for index in used]
        grads = torch.autograd.grad(ends, list(leaves.values()), seeds, allow_unused=True, materialize_grads=True)
        return self._rows(dict(zip(leaves, grads, strict=True)))


def _leaves(values: Values) -> Values:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _derivative(function: Callable[[Values], Parts], values: Values, along: Values) -> Parts:
    """Return the derivative of `function` at `values` in the direction `along`, as one tensor for each output."""
    tangents: Parts = jvp(function, (values,), (along,))[1]
    return tangents


class _Hessian(DoubleBatch):
    def product(self, vector: Tensor) -> Tensor:
        gradient = grad(lambda values: self._traced(values)[0])
        product = _derivative(lambda values: tuple(gradient(values).values()), self.values, self._along(vector))
        return self._rows(dict(zip(self.values, product, strict=True)))


class _GaussNewton(DoubleBatch):
    def product(self, vector: Tensor) -> Tensor:
        tangents = _derivative(self._predict, self.values, self._along(vector))
        outputs = {str(index): output.detach() for index, output in enumerate(outputs_of(self.prediction))}
        gradient = grad(self._loss_of)
        along = dict(zip(outputs, tangents, strict=True))
        output_hessian = _derivative(lambda parts: tuple(gradient(parts).values()), outputs, along)
        return self._vjp(self._predict, output_hessian)

    def _loss_of(self, outputs: Values) -> Tensor:
        parts = iter(outputs.values())
        prediction = map_leaves(lambda part: next(parts) if part.is_floating_point() else part, self.prediction)
        with _ForwardDifferentiable([]):
            leaves = self.point.values
            loss: Tensor = self.objective.traced_loss(leaves, prediction, self.point.buffers(), self._targets())
        return loss


class _EmpiricalFisher(DoubleBatch):
    def product(self, vector: Tensor) -> Tensor:
        tangents = _derivative(self._losses, self.values, self._along(vector))
        divisor: float = self.objective.divisor_of(
            self.prediction, self.index, self._original, self.objective.targets(self._original)
        )
        return self._vjp(self._losses, tangents) / divisor

    def _losses(self, values: Values) -> Parts:
        """Return a tuple with one tensor that contains the loss of each example.

        The module `curvop.kernels.losses` defines what an example is.
        """
        with _ForwardDifferentiable(self._padding):
            prediction, y = self._prediction(values), self._targets()
            buffers, loss_function = self.point.buffers(), self.objective.loss_function
            if loss_kind(loss_function) is None:
                loss_of_batch = self.objective.traced_loss

                def loss_of_example(z: Any, y: Any) -> Any:
                    return loss_of_batch(self.point.values, _as_batch(z), buffers, _as_batch(y))

                return (vmap(loss_of_example)(prediction, y),)
            unreduced = unreduced_loss(loss_function)
            if isinstance(unreduced, nn.Module):
                own = dict(unreduced.named_parameters()) | dict(unreduced.named_buffers())
                with replaced([unreduced], {id(own[name]): value for name, value in buffers["loss"].items()}):
                    terms = unreduced(prediction, y)
            else:
                terms = unreduced(prediction, y, **buffers["loss"])
        return (losses_of_examples(terms, prediction),)


class _PerExample(_EmpiricalFisher):
    by_batch = True

    def product(self, vector: Tensor) -> Tensor:
        [terms] = _derivative(self._losses, self.values, self._along(vector))
        rows = terms
        if self.kernel.by_item:
            pair = self.objective.inputs(self._original), self.objective.targets(self._original)
            count = item_count(outputs_of(self.prediction), pair, len(terms))
            rows = terms.view(count or 1, -1).sum(1)
        weight = self.objective.weight(self.prediction, self.index, self.batch)
        divisor = self.objective.divisor_of(
            self.prediction, self.index, self._original, self.objective.targets(self._original)
        )
        return rows * math.sqrt(weight / divisor) if divisor else rows * 0.0


def _as_batch(example: Any) -> Any:
    return map_leaves(lambda leaf: leaf[None], example)


class _Jacobian(DoubleBatch):
    by_batch = True

    def product(self, vector: Tensor) -> Tensor:
        tangents = _derivative(self._predict, self.values, self._along(vector))
        return torch.cat([part.reshape(-1) for part in tangents])


KINDS: Mapping[type[Kernel], Callable[[Any, Any, int, Any], DoubleBatch]] = {
    HessianKernel: _Hessian,
    GGNKernel: _GaussNewton,
    EmpiricalFisherKernel: _EmpiricalFisher,
    JacobianKernel: _Jacobian,
    PerExampleKernel: _PerExample,
}
