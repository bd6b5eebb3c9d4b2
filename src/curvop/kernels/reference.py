"""One batch in float64, and its products by forward mode (of the gradient: forward over reverse)."""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvop.kernels.batches import map_leaves
from curvop.kernels.differentiable import NORMS, STAND_INS
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel
from curvop.kernels.ggn_kernel import outputs_of
from curvop.kernels.ggn_outer import GGNKernel
from curvop.kernels.guard import replaced
from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.jacobian_kernel import JacobianKernel
from curvop.kernels.kernel import Kernel
from curvop.kernels.losses import loss_kind
from curvop.kernels.objective import Objective

__all__ = ["KINDS", "DoubleBatch", "HeldPadding", "Point", "in_double"]

Values = dict[str, Tensor]
Parts = tuple[Tensor, ...]


class Point:
    """The objective's parameters, and what else its modules hold, in float64."""

    def __init__(self, objective: Objective) -> None:
        leaves = objective.leaves(())
        self.values: Values = in_double(leaves)
        self._held: dict[str, Values] = in_double(objective.held(leaves))
        training = any(part.training for module in objective.modules for part in module.modules())
        self._written_to = training or objective.guard.writes

    def held(self) -> dict[str, Values]:
        """Return what the modules hold; copies where they may write to it."""
        held: dict[str, Values] = map_leaves(torch.clone, self._held) if self._written_to else self._held
        return held


def in_double(tree: Any) -> Any:
    """Return a tree of tensors with those of real numbers in float64."""
    return map_leaves(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


class HeldPadding(TorchFunctionMode):
    """Holds embeddings' rows for padding still.

    Parameters
    ----------
    rows : list of Tensor
        Those at `padding_idx`, constants to torch's gradient, one of each call that there is; where it is empty, it is
        filled, so that later runs at other points have those of the first one.
    """

    def __init__(self, rows: list[Tensor]) -> None:
        super().__init__()
        self._rows, self._calls = rows, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func`, or what holds the rows still."""
        kwargs = kwargs or {}
        if func is functional.embedding and kwargs.get("padding_idx") is not None:
            return self._padded(*args, **kwargs)
        return func(*args, **kwargs)

    def _padded(self, places: Tensor, weight: Tensor, *, padding_idx: int, **settings: Any) -> Tensor:
        found = functional.embedding(places, weight, padding_idx, **settings)
        if self._calls == len(self._rows):
            self._rows.append(weight[padding_idx].detach().clone())
        self._calls += 1
        return torch.where((places == padding_idx % len(weight))[..., None], self._rows[self._calls - 1], found)


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
            found: tuple[Tensor, Any] = self.objective.traced(self.point.values | values, self.point.held(), self.batch)
        return found

    def _predict(self, values: Values) -> Parts:
        with _Composite(self._padding):
            return tuple(outputs_of(self._prediction(values)))

    def _prediction(self, values: Values) -> Any:
        return self.objective.traced_prediction(self.point.values | values, self.point.held(), self.batch)

    def _along(self, vector: Tensor) -> Values:
        zeros = {name: torch.zeros_like(value) for name, value in self.values.items()}
        return zeros | dict(zip(self.kernel.cols.names, self.kernel.cols.split(vector), strict=True))

    def _rows(self, parts: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.kernel.rows.of(parts)])

    def _pulled(self, function: Callable[[Values], Parts], vectors: Parts) -> Tensor:
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
        pushed = _derivative(self._predict, self.values, self._along(vector))
        outputs = {str(index): output.detach() for index, output in enumerate(outputs_of(self.prediction))}
        gradient = grad(self._loss_of)
        along = dict(zip(outputs, pushed, strict=True))
        middle = _derivative(lambda parts: tuple(gradient(parts).values()), outputs, along)
        return self._pulled(self._predict, middle)

    def _loss_of(self, outputs: Values) -> Tensor:
        rest = iter(outputs.values())
        prediction = map_leaves(lambda part: next(rest) if part.is_floating_point() else part, self.prediction)
        with _Composite([]):
            leaves = self.point.values
            loss: Tensor = self.objective.traced_loss(leaves, prediction, self.point.held(), self.batch)
        return loss


class _EmpiricalFisher(DoubleBatch):
    def product(self, vector: Tensor) -> Tensor:
        pushed = _derivative(self._losses, self.values, self._along(vector))
        divisor: float = self.objective.divisor_of(self.prediction, self.index, self.batch)
        return self._pulled(self._losses, pushed) / divisor

    def _losses(self, values: Values) -> Parts:
        """Return the examples' losses; `curvop.kernels.examples` says what an example is."""
        with _Composite(self._padding):
            prediction, y = self._prediction(values), self.batch[1]
            terms: Tensor
            held, loss_function = self.point.held(), self.objective.loss_function
            if loss_kind(loss_function) is None:
                of_one = self.objective.traced_loss
                return (
                    vmap(lambda z, y: of_one(self.point.values, _alone(z), held, (None, _alone(y))))(prediction, y),
                )
            if isinstance(loss_function, nn.Module):
                unreduced: Any = copy.copy(loss_function)
                unreduced.reduction = "none"
                own = dict(unreduced.named_parameters()) | dict(unreduced.named_buffers())
                with replaced([unreduced], {id(own[name]): value for name, value in held["loss"].items()}):
                    terms = unreduced(prediction, y)
            else:
                terms = functools.partial(loss_function, reduction="none", **held["loss"])(prediction, y)
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
