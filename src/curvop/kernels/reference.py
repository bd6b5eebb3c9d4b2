"""Products by other routes than the engine's, which they are checked against.

Forward mode is exact up to rounding, but calls the model as the engine does. Double backward through the user's own
code, called as the user calls it, is as exact, but has the engine's formulas. Differences of the user's own code are
less precise, and share nothing with the engine: neither a second derivative nor the way in which the code is called.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional

from curvop.kernels.batches import map_leaves
from curvop.kernels.differences import OwnProduct, own_product
from curvop.kernels.differentiable import NORMS, STAND_INS
from curvop.kernels.errors import first_line
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


# One batch in float64, and its products by forward mode (of the gradient: forward over reverse).

Values = dict[str, Tensor]
Parts = tuple[Tensor, ...]


class Point:
    """The objective's parameters, and what else its modules hold, in float64."""

    def __init__(self, objective: Objective) -> None:
        leaves = objective.leaves(())
        self.values: Values = in_double(leaves)
        self._buffers: dict[str, Values] = in_double(objective.buffers(leaves))
        training = any(part.training for module in objective.modules for part in module.modules())
        self._written_to = training or objective.guard.writes

    def buffers(self) -> dict[str, Values]:
        """Return what the modules hold; copies where they may write to it."""
        buffers: dict[str, Values] = map_leaves(torch.clone, self._buffers) if self._written_to else self._buffers
        return buffers


class _Composite(HeldPadding):
    """Computes by elementary operations what torch has no forward mode for, besides."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what stands in for `func`, or `func` itself."""
        return super().__torch_function__(_COMPOSITES.get(func, func), types, args, kwargs)


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
    """One batch in float64, at a point; subclasses say which function of the parameters, and which rest."""

    by_batch = False

    def __init__(self, kernel: Any, point: Point, index: int, batch: Any) -> None:
        self.kernel, self.objective, self.point = kernel, kernel.objective, point
        self.batch = in_double(batch)
        self.index = index
        self._padding: list[Tensor] = []
        self.values = {name: point.values[name] for name in (*kernel.rows.names, *kernel.cols.names)}
        with torch.enable_grad():  # a model may contain derivatives of its own
            self.prediction = self._traced({})[1]
        self.weight = 1.0 if self.by_batch else self.objective.weight(self.prediction, index, self.batch)

    @abc.abstractmethod
    def product(self, vector: Tensor) -> Tensor:
        """Return the product with `vector` ``(N,)``."""

    def _traced(self, values: Values) -> tuple[Tensor, Any]:
        with _Composite(self._padding):
            found: tuple[Tensor, Any] = self.objective.traced(
                self.point.values | values, self.point.buffers(), self.batch
            )
        return found

    def _predict(self, values: Values) -> Parts:
        with _Composite(self._padding):
            return tuple(outputs_of(self._prediction(values)))

    def _prediction(self, values: Values) -> Any:
        return self.objective.traced_prediction(self.point.values | values, self.point.buffers(), self.batch)

    def _along(self, vector: Tensor) -> Values:
        zeros = {name: torch.zeros_like(value) for name, value in self.values.items()}
        return zeros | dict(zip(self.kernel.cols.names, self.kernel.cols.split(vector), strict=True))

    def _rows(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.kernel.rows.of(parts)])

    def _vjp(self, function: Callable[[Values], Parts], vectors: Parts) -> Tensor:
        """Return the transposed Jacobian of `function` times `vectors`."""
        leaves = _leaves(self.values)
        with torch.enable_grad():
            outputs = function(leaves)
        reached = [index for index, output in enumerate(outputs) if output.requires_grad]
        if not reached:
            return torch.zeros_like(self._rows(leaves))
        ends, seeds = [outputs[index] for index in reached], [vectors[index] for index in reached]
        found = torch.autograd.grad(ends, list(leaves.values()), seeds, allow_unused=True, materialize_grads=True)
        return self._rows(dict(zip(leaves, found, strict=True)))


def _leaves(values: Values) -> Values:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _derivative(function: Callable[[Values], Parts], values: Values, along: Values) -> Parts:
    """Return the derivative of `function` in a direction."""
    found: Parts = jvp(function, (values,), (along,))[1]
    return found


class _Hessian(DoubleBatch):
    def product(self, vector: Tensor) -> Tensor:
        gradient = grad(lambda values: self._traced(values)[0])
        found = _derivative(lambda values: tuple(gradient(values).values()), self.values, self._along(vector))
        return self._rows(dict(zip(self.values, found, strict=True)))


class _GaussNewton(DoubleBatch):
    def product(self, vector: Tensor) -> Tensor:
        tangents = _derivative(self._predict, self.values, self._along(vector))
        outputs = {str(index): output.detach() for index, output in enumerate(outputs_of(self.prediction))}
        gradient = grad(self._loss_of)
        along = dict(zip(outputs, tangents, strict=True))
        output_hessian = _derivative(lambda parts: tuple(gradient(parts).values()), outputs, along)
        return self._vjp(self._predict, output_hessian)

    def _loss_of(self, outputs: Values) -> Tensor:
        rest = iter(outputs.values())
        prediction = map_leaves(lambda part: next(rest) if part.is_floating_point() else part, self.prediction)
        with _Composite([]):
            leaves = self.point.values
            loss: Tensor = self.objective.traced_loss(leaves, prediction, self.point.buffers(), self.batch)
        return loss


class _EmpiricalFisher(DoubleBatch):
    def product(self, vector: Tensor) -> Tensor:
        tangents = _derivative(self._losses, self.values, self._along(vector))
        divisor: float = self.objective.divisor_of(self.prediction, self.index, self.batch)
        return self._vjp(self._losses, tangents) / divisor

    def _losses(self, values: Values) -> Parts:
        """Return the examples' losses; `curvop.kernels.losses` says what an example is."""
        with _Composite(self._padding):
            prediction, y = self._prediction(values), self.batch[1]
            terms: Tensor
            buffers, loss_function = self.point.buffers(), self.objective.loss_function
            if loss_kind(loss_function) is None:
                of_one = self.objective.traced_loss
                return (
                    vmap(lambda z, y: of_one(self.point.values, _alone(z), buffers, (None, _alone(y))))(prediction, y),
                )
            if isinstance(loss_function, nn.Module):
                unreduced: Any = copy.copy(loss_function)
                unreduced.reduction = "none"
                own = dict(unreduced.named_parameters()) | dict(unreduced.named_buffers())
                with replaced([unreduced], {id(own[name]): value for name, value in buffers["loss"].items()}):
                    terms = unreduced(prediction, y)
            else:
                terms = functools.partial(loss_function, reduction="none", **buffers["loss"])(prediction, y)
        by_row = terms.shape == prediction.shape and terms.ndim > 1
        return ((terms.sum(-1) if by_row else terms).reshape(-1),)


def _alone(example: Any) -> Any:
    return map_leaves(lambda leaf: leaf[None], example)


class _Jacobian(DoubleBatch):
    by_batch = True

    def product(self, vector: Tensor) -> Tensor:
        found = _derivative(self._predict, self.values, self._along(vector))
        return torch.cat([part.reshape(-1) for part in found])


KINDS: Mapping[type[Kernel], Callable[[Any, Any, int, Any], DoubleBatch]] = {
    HessianKernel: _Hessian,
    GGNKernel: _GaussNewton,
    EmpiricalFisherKernel: _EmpiricalFisher,
    JacobianKernel: _Jacobian,
}
