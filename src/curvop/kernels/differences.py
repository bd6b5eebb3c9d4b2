"""Compute matrix-vector products by central differences of first derivatives of the user's own code.

`own_product` computes a product for the whole data set twice, with two step sizes. The difference between the two
results is an estimate of the error.

`Differences` has a subclass for each kind of matrix. A subclass computes the contribution of one or more batches to the
product, with one step size. Several batches can be evaluated as one batch: the model is called for each batch, the
predictions and the targets are joined, and the loss function is called once.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.batches import CannotJoinError, example_of, map_leaves
from curvop.kernels.differentiable import TwiceDifferentiable
from curvop.kernels.errors import first_line
from curvop.kernels.factor_kernel import PerExampleKernel, item_count
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel
from curvop.kernels.ggn_kernel import GGNKernel, outputs_of
from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.jacobian_kernel import JacobianKernel
from curvop.kernels.losses import Examples, is_torch_loss, loss_kind
from curvop.kernels.parameters import BatchLayout
from curvop.kernels.user_code import UserCode, Values, gradient_of

__all__ = [
    "DIFFERENCES",
    "Differences",
    "OwnProduct",
    "Part",
    "detached",
    "losses_of_examples",
    "norm",
    "own_product",
    "unreduced_loss",
]

#: Largest relative difference between autograd's derivative and a difference quotient that is attributed to rounding
#: errors.
_TOLERANCE = 1e-4
#: The losses of the examples are considered to cancel if the absolute value of their sum is at most this fraction of
#: the sum of their absolute values.
_CANCELLATION = 1e-3
#: Largest number of examples for which the loss function is called once per example; 10,000 calls take about 0.3
#: seconds.
_MAX_EXAMPLES = 10_000


@dataclasses.dataclass
class Part:
    """The contribution of one or more batches to a product, with one step size.

    Attributes
    ----------
    product : Tensor, shape (M,)
        The contribution to the product.
    holds, linear : bool
        See `OwnProduct`.
    inner : float
        For an empirical Fisher matrix, the sum of the directional derivatives of the examples' losses along the vector.
    total : Tensor or None
        For an empirical Fisher matrix, the sum of the gradients of the examples' losses.
    """

    product: Tensor
    holds: bool = False
    linear: bool = False
    inner: float = 0.0
    total: Tensor | None = None


class Differences(abc.ABC):
    """Base class for computing products with one kind of matrix by finite differences of the user's code.

    Parameters
    ----------
    code : UserCode
    kernel : Kernel
    vector : Tensor, shape (N,)
    """

    #: Whether the product is computed from a difference quotient.
    steps = True
    #: Whether the matrix is the derivative of the gradient, or approximates this derivative.
    curves = False

    def __init__(self, code: UserCode, kernel: Any, vector: Tensor) -> None:
        self.code, self.kernel, self.vector = code, kernel, vector
        self.along: Values = {}
        if kernel.cols.names:
            self.along = dict(zip(kernel.cols.names, kernel.cols.split(vector), strict=True))

    @abc.abstractmethod
    def part(self, batches: list[Any], index: int, step: float) -> Part:
        """Compute the contribution of the batches to the product.

        The norm of a step is `step` times the norm of the parameters.
        """

    def share(self, weight: float, prediction: Any, index: int, batch: Any) -> float:
        """Return the factor by which the product of a batch is multiplied; `weight` is the weight of the batch."""
        return weight

    def whole_divisor(self, loss: Tensor, predictions: Any, batches: list[Any]) -> float:
        """Return the number by which the product of all batches is divided if they are evaluated as one batch."""
        return 1.0

    def exact(self, batches: list[Any]) -> Tensor | None:
        """Compute the product by double backward, or return None if the subclass does not implement it."""
        return None

    def count(self, batches: list[Any]) -> float:
        """Return the number of examples that contribute to the loss, or 0 if the matrix is not a mean over examples."""
        return 0.0

    def size(self, step: float) -> float:
        """Return the factor by which the vector is multiplied to obtain a step of relative size `step`; see `part`."""
        return step * (norm([self.code.base[name] for name in self.along]) or 1.0) / (norm(self.along.values()) or 1.0)

    def change(self, product: Tensor) -> float:
        """Estimate the norm of the change of the gradient if the parameters move by ``size(1.0)`` times the vector.

        Return 0 if the matrix is not a derivative of the gradient (`curves` is False).
        """
        return float(product.norm()) * self.size(1.0) if self.curves else 0.0

    def both(self, function: Callable[[list[Any]], Any], batches: list[Any], size: float) -> list[Any]:
        """Evaluate ``function(batches)`` after a step ``+size`` and after a step ``-size`` along the vector."""
        results = []
        for step in (size, -size):
            self.code.move(self.along, step)
            results.append(self.code.run(function, batches))
        self.code.move({}, 0.0)
        return results

    def rows(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Concatenate the entries of `parts` that correspond to rows of the matrix into one vector."""
        return torch.cat([part.reshape(-1) for part in self.kernel.rows.of(parts)])

    def inner(self, gradient: Mapping[str, Tensor]) -> float:
        """Return the inner product of a gradient with the vector."""
        return sum(float((gradient[name] * part).sum()) for name, part in self.along.items())

    def vjp(self, function: Callable[[list[Any]], list[Tensor]], batches: list[Any], seeds: list[Tensor]) -> Values:
        """Multiply the transposed Jacobian of a function by `seeds`, a list with one tensor for each output."""
        product: Values = self.code.run(lambda own: self.code.gradient(function(own), seeds), batches)
        return product

    def predicted(self, batches: list[Any]) -> list[Tensor]:
        """Return the floating-point tensors in the predictions for the batches."""
        return [part for batch in batches for part in outputs_of(self.code.predict(batch))]

    def jvp(self, function: Callable[[list[Any]], list[Tensor]], batches: list[Any], size: float) -> list[Tensor]:
        """Return the derivative of a function along the vector, computed by central differences."""
        ahead, behind = self.both(lambda own: [part.detach() for part in function(own)], batches, size)
        # Masked entries are infinite in both evaluations. Their derivative is zero, not NaN.
        return [torch.where(a == b, 0.0, a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]

    def holds(self, seeds: list[Tensor], jvp: list[Tensor], vjp: Mapping[str, Tensor]) -> bool:
        """Return True if ``<u, J v>``, computed by differences, differs from ``<J' u, v>``, computed by autograd.

        Parameters
        ----------
        seeds : list of Tensor
            ``u``
        jvp : list of Tensor
            ``J v``
        vjp : dict of str to Tensor
            ``J' u``
        """
        by_differences = sum(float((a * b).sum()) for a, b in zip(seeds, jvp, strict=True))
        size = norm(seeds) * norm(jvp)
        return abs(by_differences - self.inner(vjp)) > _TOLERANCE * size


def norm(parts: Iterable[Tensor]) -> float:
    """Return the norm of the concatenation of several tensors."""
    return math.hypot(*(float(part.norm()) for part in parts))


class _Hessian(Differences):
    curves = True

    def part(self, batches: list[Any], index: int, step: float) -> Part:
        def loss_and_gradient(own: list[Any]) -> tuple[float, Values]:
            loss = self.code.loss(own)[0]
            return float(loss.detach()), self.code.gradient([loss])

        size = self.size(step)
        (above, ahead), (below, behind) = self.both(loss_and_gradient, batches, size)
        slope, rate = (self.inner(ahead) + self.inner(behind)) / 2, (above - below) / (2 * size)
        noise = 100 * torch.finfo(self.vector.dtype).eps * (abs(above) + abs(below)) / size
        # Near a minimum, the slope may be much smaller than its change within a step. The tolerance therefore includes
        # the change.
        change = abs(self.inner(ahead) - self.inner(behind))
        holds = abs(rate - slope) > _TOLERANCE * max(abs(rate), abs(slope)) + change + noise
        return Part(self.rows({name: (ahead[name] - behind[name]) / (2 * size) for name in ahead}), holds)

    def exact(self, batches: list[Any]) -> Tensor:
        """Compute the product by double backward."""

        def product(own: list[Any]) -> Values:
            with TwiceDifferentiable():
                loss = self.code.loss(own)[0]
                inputs = [self.code.targets[name] for name in self.along]
                grads = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
                inner = torch.stack([(a * b).sum() for a, b in zip(grads, self.along.values(), strict=True)]).sum()
                return self.code.gradient([inner])

        return self.rows(self.code.run(product, batches))


class _GaussNewton(Differences):
    curves = True

    def part(self, batches: list[Any], index: int, step: float) -> Part:
        jvp = self.jvp(self.predicted, batches, self.size(step))
        predictions = self.code.run(lambda own: [detached(self.code.predict(batch)) for batch in own], batches)
        outputs = [part for prediction in predictions for part in outputs_of(prediction)]
        size = step * (norm(map(_unmasked, outputs)) or 1.0) / (norm(jvp) or 1.0)
        ahead, behind = (
            self.code.run(functools.partial(self._slope, predictions, jvp, offset), batches) for offset in (size, -size)
        )
        output_hessian = [(a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]
        vjp = self.vjp(self.predicted, batches, output_hessian)
        eps = torch.finfo(self.vector.dtype).eps
        change = 2 * size * norm(output_hessian)
        linear = norm(jvp) > 0 and norm(ahead) > 0 and change <= 100 * eps * norm(ahead)
        if norm(output_hessian):
            return Part(self.rows(vjp), self.holds(output_hessian, jvp, vjp), linear)
        seeded = self.vjp(self.predicted, batches, ahead)
        return Part(self.rows(vjp), self.holds(ahead, jvp, seeded), linear)

    def _slope(self, predictions: list[Any], along: list[Tensor], size: float, own: list[Any]) -> list[Tensor]:
        """Return the gradient of the loss with respect to the predictions at ``predictions + size * along``."""
        directions, moved = iter(along), []

        def move(part: Tensor) -> Tensor:
            if not part.is_floating_point():
                return part
            moved.append((part + size * next(directions)).requires_grad_())
            return moved[-1]

        loss = self.code.criterion([map_leaves(move, prediction) for prediction in predictions], own)
        return gradient_of([loss], moved, None)


def _unmasked(part: Tensor) -> Tensor:
    """Return a copy of a tensor in which huge numbers, which come from a mask, are replaced by zero."""
    return part.masked_fill(part.abs() > torch.finfo(part.dtype).max ** 0.5, 0.0)


def detached(tree: Any) -> Any:
    """Return a tree of tensors in which each tensor is detached from its graph."""
    return map_leaves(lambda part: part.detach(), tree)


class _EmpiricalFisher(Differences):
    def part(self, batches: list[Any], index: int, step: float) -> Part:
        jvp = self.jvp(self._losses, batches, self.size(step))
        vjp = self.vjp(self._losses, batches, jvp)
        total = self.vjp(self._losses, batches, [torch.ones_like(part) for part in jvp])
        inner = sum(float(part.sum()) for part in jvp)
        holds = self.holds([torch.ones_like(part) for part in jvp], jvp, total)
        return Part(self.rows(vjp), holds, inner=inner, total=self.rows(total))

    def share(self, weight: float, prediction: Any, index: int, batch: Any) -> float:
        objective: Any = self.code.objective
        return weight / float(objective.divisor_of(prediction, index, batch, objective.targets(batch)))

    def whole_divisor(self, loss: Tensor, predictions: Any, batches: list[Any]) -> float:
        """Return the number by which the loss function divides the sum of the examples' losses."""
        if self.code.objective.reduction == "sum":
            return 1.0
        losses = torch.cat(self.code.run(self._losses, batches)).detach()
        if not float(losses.sum().abs()) > _CANCELLATION * float(losses.abs().sum()):
            raise CannotJoinError("their losses cancel")
        return float(losses.sum() / loss)

    def count(self, batches: list[Any]) -> float:
        """Return the number of examples that contribute to the loss."""
        examples = Examples(self.code.objective.loss_function)  # type: ignore[attr-defined]
        predictions = self.code.run(lambda own: [detached(self.code.predict(batch)) for batch in own], batches)
        targets = self.code.run(lambda own: [detached(self.code.targets_of(batch)) for batch in own], batches)
        pairs = zip(predictions, targets, strict=True)
        return sum(examples.count(outputs_of(prediction), y) for prediction, y in pairs)

    def _losses(self, batches: list[Any]) -> list[Tensor]:
        """For each batch, return a tensor with the losses of its examples.

        `curvop.kernels.losses` defines what an example is.
        """
        targets = [self.code.targets_of(batch) for batch in batches]
        return [self._unreduced(self.code.predict(batch), y) for batch, y in zip(batches, targets, strict=True)]

    def _unreduced(self, prediction: Any, y: Any) -> Tensor:
        loss_function: Any = self.code.objective.loss_function  # type: ignore[attr-defined]
        if loss_kind(loss_function) is None and not all(part.ndim for part in outputs_of(prediction)):
            loss: Tensor = loss_function(prediction, y)  # a prediction without dimensions is one example
            return loss[None]
        if loss_kind(loss_function) is None:
            count = len(outputs_of(prediction)[0])
            if count > _MAX_EXAMPLES:
                raise ValueError(f"a batch has {count:,} examples, too many to evaluate them one by one")
            pairs = (example_of((prediction, y), index, count) for index in range(count))
            return torch.stack([loss_function(*pair) for pair in pairs])
        return losses_of_examples(unreduced_loss(loss_function)(prediction, y), prediction)


def unreduced_loss(loss_function: Any) -> Any:
    """Return a copy of a PyTorch loss function (a module or a function) with ``reduction='none'``."""
    if isinstance(loss_function, nn.Module):
        loss_function = copy.copy(loss_function)
        loss_function.reduction = "none"
        return loss_function
    return functools.partial(loss_function, reduction="none")


def losses_of_examples(terms: Tensor, prediction: Tensor) -> Tensor:
    """Return the loss of each example, given the terms of an unreduced loss.

    If the loss has one term for each output, the terms of an example are summed.
    """
    by_output = terms.shape == prediction.shape and terms.ndim > 1
    return (terms.sum(-1) if by_output else terms).reshape(-1)


class _PerExample(_EmpiricalFisher):
    def part(self, batches: list[Any], index: int, step: float) -> Part:
        jvp = self.jvp(self._losses, batches, self.size(step))
        ones = [torch.ones_like(part) for part in jvp]
        holds = self.holds(ones, jvp, self.vjp(self._losses, batches, ones))
        terms = torch.cat(jvp)
        return Part(terms.view(self._items(batches, len(terms)), -1).sum(1), holds)

    def share(self, weight: float, prediction: Any, index: int, batch: Any) -> float:
        return math.sqrt(super().share(weight, prediction, index, batch)) if weight else 0.0

    def count(self, batches: list[Any]) -> float:
        return 0.0

    def _items(self, batches: list[Any], terms: int) -> int:
        [batch] = batches
        if not self.kernel.by_item:
            return terms
        outputs = outputs_of(self.code.run(lambda own: detached(self.code.predict(own[0])), batches))
        objective: Any = self.code.objective
        return item_count(outputs, (objective.inputs(batch), objective.targets(batch)), terms) or 1


class _TransposedPerExample(_PerExample):
    steps = False

    def part(self, batches: list[Any], index: int, step: float) -> Part:
        rows = self.kernel.cols.at(self.vector, index)

        def pull(own: list[Any]) -> Values:
            losses = torch.cat(self._losses(own))
            return self.code.gradient([losses], [rows.repeat_interleave(len(losses) // max(len(rows), 1))])

        return Part(self.rows(self.code.run(pull, batches)))


class _Jacobian(Differences):
    def part(self, batches: list[Any], index: int, step: float) -> Part:
        jvp = self.jvp(self.predicted, batches, self.size(step))
        seeds = jvp if norm(jvp) else [torch.linspace(1, 2, p.numel()).cos().to(p).view_as(p) for p in jvp]
        vjp = self.vjp(self.predicted, batches, seeds)
        return Part(torch.cat([part.reshape(-1) for part in jvp]), self.holds(seeds, jvp, vjp))


class _TransposedJacobian(Differences):
    steps = False

    def part(self, batches: list[Any], index: int, step: float) -> Part:
        def pull(own: list[Any]) -> Values:
            outputs = self.predicted(own)
            parts = self.kernel.cols.at(self.vector, index).split([output.numel() for output in outputs])
            seeds = [part.reshape(output.shape) for part, output in zip(parts, outputs, strict=True)]
            return self.code.gradient(outputs, seeds)

        return Part(self.rows(self.code.run(pull, batches)))


def _by_batch(
    kind: type[Differences], transposed: type[Differences]
) -> Callable[[UserCode, JacobianKernel, Tensor], Differences]:
    def create(code: UserCode, kernel: JacobianKernel, vector: Tensor) -> Differences:
        return (kind if isinstance(kernel.rows, BatchLayout) else transposed)(code, kernel, vector)

    return create


DIFFERENCES: Mapping[type, Callable[[UserCode, Any, Tensor], Differences]] = {
    HessianKernel: _Hessian,
    GGNKernel: _GaussNewton,
    EmpiricalFisherKernel: _EmpiricalFisher,
    JacobianKernel: _by_batch(_Jacobian, _TransposedJacobian),
    PerExampleKernel: _by_batch(_PerExample, _TransposedPerExample),
}


# Pairs of step sizes for central differences, relative to the norm of the parameters. The pairs are tried in order
# until the products with both steps agree. The truncation error is proportional to the squared step, and the rounding
# error to epsilon divided by the step. Both errors are balanced if the step is the cube root of epsilon. Shorter steps
# are tried because they reach far fewer kinks (of ReLU, for example). Longer steps are tried because some float64
# models compute partly in float32.
_FINE, _COARSE = (torch.finfo(dtype).eps ** (1 / 3) for dtype in (torch.float64, torch.float32))
_STEPS = {
    torch.float64: [(_FINE, _FINE / 2**8), (_FINE / 2**8, _FINE / 2**12), (_COARSE, _COARSE / 4)],
    torch.float32: [(_COARSE, _COARSE / 4)],
}
#: Two products agree if their relative difference is at most this number.
_CONCLUSIVE = 1e-3


@dataclasses.dataclass
class OwnProduct:
    """A product that was computed by calling the user's own code.

    Attributes
    ----------
    products : list of Tensor, shape (M,)
        Products in float64. For each pair of steps that was tried, the list has the product with the longer step,
        followed by the product with the shorter step. The pair with the smallest error comes first. The list has a
        single product if no differences are needed, and is empty if no product could be computed.
    error : float
        Relative difference between the first two products.
    gradient : Tensor or None
        Gradient of the objective with respect to the parameters that the rows belong to. If the rows belong to
        predictions, the gradient is with respect to the parameters that the columns belong to.
    exact : Tensor or None
        The product computed by double backward through the user's code, or None. Double backward uses the same formulas
        as the operator, but calls the model and the loss the way the user does.
    unknown : str
        The reason why `exact` could not be computed, or an empty string.
    centered : list of Tensor
        For an empirical Fisher matrix, one vector for each entry of `products`: the amount by which the product would
        decrease if the mean gradient were subtracted from the gradient of each example.
    holds : bool
        Whether autograd's first derivative differs from the difference quotient. The two differ if the code treats a
        value as constant (``detach()``), or if the backward pass of an operation is wrong.
    linear : bool
        Whether the loss is linear in the prediction.
    known : bool
        Whether the loss is a PyTorch loss function.
    whole : bool
        Whether all batches were evaluated as one batch.
    fine : bool
        Whether the steps are those for float64. These steps are so short that they rarely reach a kink (of ReLU, for
        example).
    size : float
        Scale of the rounding errors of the gradient: the norm of the gradient with respect to all parameters, or the
        estimate by `Differences.change` if the estimate is larger.
    reason : str
        The reason why no product could be computed, or an empty string.
    """

    products: list[Tensor] = dataclasses.field(default_factory=list)
    error: float = 0.0
    gradient: Tensor | None = None
    exact: Tensor | None = None
    unknown: str = ""
    centered: list[Tensor] = dataclasses.field(default_factory=list)
    holds: bool = False
    linear: bool = False
    known: bool = False
    whole: bool = False
    fine: bool = True
    size: float = 0.0
    reason: str = ""


def own_product(kernel: Any, vector: Tensor, needed: int, available: int) -> OwnProduct:
    """Compute the product with a vector by calling the user's own code, in float64 if the code supports float64.

    Parameters
    ----------
    kernel : Kernel
    vector : Tensor, shape (N,)
        Vector in float64, on the parameters' device.
    needed : int
        Number of bytes that a batch needs in float64.
    available : int
        Number of bytes of memory that may be used.
    """
    objective, results = kernel.objective, [OwnProduct()]
    batches = max(1, available // max(needed, 1))
    for dtype in dict.fromkeys((torch.float64, objective.dtype)):
        for steps in _STEPS[dtype]:
            results.append(_product(kernel, vector, dtype, steps, batches))
            if not results[-1].products or results[-1].error <= _CONCLUSIVE:
                break
        best_first = sorted((result for result in results if result.products), key=lambda result: result.error)
        if best_first:
            products = [product for result in best_first for product in result.products]
            centered = [mean for result in best_first for mean in result.centered]
            return dataclasses.replace(best_first[0], products=products, centered=centered)
    return results[-1]


def _product(kernel: Any, vector: Tensor, dtype: torch.dtype, steps: tuple[float, ...], max_batches: int) -> OwnProduct:
    """Compute the product with a vector in one dtype, with one pair of step sizes.

    If there are at most `max_batches` batches and they can be joined, they are evaluated as one batch.
    """
    objective = kernel.objective
    code = UserCode(objective, dict.fromkeys((*kernel.rows.names, *kernel.cols.names)), dtype)
    if reason := code.obstacle():
        return OwnProduct(reason=reason)
    autocast = torch.autocast(objective.device.type, enabled=False)
    with objective.slow_backends(), autocast, code.lent():
        sums = _Sums(DIFFERENCES[type(kernel)](code, kernel, vector.to(dtype)), steps)
        whole, batches = code.joins(kernel), []
        for index, batch in objective.batches():
            batches.append((index, batch))
            whole = whole and len(batches) <= max_batches
            while batches and not whole:
                sums.add([batches.pop(0)], whole=False)
        if batches:
            with objective.generators.private(objective.devices):
                whole = len(batches) > 1 and sums.predict_apart(batches) and sums.add(batches, whole=True)
                for numbered in () if whole else batches:
                    sums.add([numbered], whole=False)
    return sums.result(whole)


class _Sums:
    """Compute a product, either as a sum of the contributions of the batches, or with all batches as one batch."""

    def __init__(self, kind: Differences, steps: tuple[float, ...]) -> None:
        self._kind, self._steps = kind, steps if kind.steps else (0.0,)
        self._clear()

    def _clear(self) -> None:
        self._products: list[list[Tensor]] = [[] for _ in self._steps]
        self._totals: list[list[Tensor]] = [[] for _ in self._steps]
        self._inner = [0.0 for _ in self._steps]
        self._gradients: list[Values] = []
        self._weights: list[float] = []
        self._exact: list[Tensor] = []
        self._unknown = ""
        self._count = 0.0
        self._holds, self._linear, self._reason = False, True, ""

    def predict_apart(self, numbered: list[tuple[int, Any]]) -> bool:
        """Return True if the batches can be evaluated as one batch; see `UserCode.predicts_apart`."""
        code = self._kind.code
        try:
            return code.predicts_apart([code.in_precision(batch) for _, batch in numbered])
        except Exception:  # if the error occurs again, the evaluation batch by batch will report it
            code.return_to_point()
            return False

    def add(self, numbered: list[tuple[int, Any]], whole: bool) -> bool:
        """Evaluate the batches as one, and add their contribution to the product. Return False if an error occurs."""
        if self._reason:
            return False
        try:
            self._add(numbered[0][0], [self._kind.code.in_precision(batch) for _, batch in numbered], whole)
        except Exception as error:  # an operation does not support this dtype, or memory ran out
            self._clear()
            self._kind.code.return_to_point()
            self._reason = "" if whole else first_line(error)
            return False
        return True

    def _add(self, index: int, batches: list[Any], whole: bool) -> None:
        kind, code, objective = self._kind, self._kind.code, self._kind.code.objective
        code.padding_rows.clear()

        def begin(own: list[Any]) -> tuple[Tensor, Any, Values]:
            loss, predictions = code.loss(own)
            return loss.detach(), detached(predictions), code.gradient([loss], names=code.targets)

        loss, predictions, gradient = code.run(begin, batches)
        prediction = predictions[0] if predictions else None
        weight = 1.0 if whole else objective.weight(prediction, index, batches[0])
        self._weights.append(weight)
        if weight:
            self._gradients.append({name: weight * part.double() for name, part in gradient.items()})
        elif not kind.kernel.by_batch:
            return
        if whole:
            share = 1.0 / kind.whole_divisor(loss, predictions, batches)
        else:
            share = kind.share(weight, prediction, index, batches[0])
        for number, step in enumerate(self._steps):
            part = kind.part(batches, index, step)
            self._products[number].append(share * part.product.double())
            self._holds |= part.holds
            self._linear &= part.linear
            self._inner[number] += share * part.inner
            if part.total is not None:
                self._totals[number].append(share * part.total.double())
        self._count += share * kind.count(batches)
        try:
            if not self._unknown and (exact := kind.exact(batches)) is not None:
                self._exact.append(share * exact.double())
        except Exception as error:  # an operation has no second derivative, or memory ran out
            self._unknown = f"torch cannot: {first_line(error)}"

    def result(self, whole: bool) -> OwnProduct:
        """Return the product for all added batches; pass ``whole=True`` if they were evaluated as one batch."""
        if self._reason or not self._gradients:
            return OwnProduct(reason=self._reason or "every batch has weight 0")
        kernel, objective = self._kind.kernel, self._kind.code.objective
        divisor = 1.0 if whole else objective.divisor(self._weights)
        by_batch = isinstance(kernel.rows, BatchLayout)
        whole_or_sum = 1.0 if whole else kernel.divisor(self._weights)
        products = [torch.cat(parts) if by_batch else _total(parts) / whole_or_sum for parts in self._products]
        centered: list[Tensor] = []
        if self._count:
            centered = [
                _total(totals) * inner / (divisor * self._count)
                for totals, inner in zip(self._totals, self._inner, strict=True)
            ]
        unit = float(products[-1].abs().sum()) or 1.0  # prevents underflow of squares
        difference = float(((products[-1] - products[0]) / unit).norm())
        size = float((products[-1] / unit).norm())
        names = self._gradients[0]
        gradient = {name: _total([parts[name] for parts in self._gradients]) / divisor for name in names}
        layout = kernel.rows if kernel.rows.names else kernel.cols
        return OwnProduct(
            products=products,
            error=difference / size if size else 0.0,
            gradient=torch.cat([part.reshape(-1) for part in layout.of(gradient)]),
            exact=_total(self._exact) / divisor if self._exact and not self._unknown else None,
            unknown=self._unknown,
            centered=centered,
            holds=self._holds,
            linear=self._linear,
            known=is_torch_loss(getattr(objective, "loss_function", None)),
            whole=whole,
            fine=self._steps[0] <= _FINE,
            size=max(norm(gradient.values()), self._kind.change(products[0])),
        )


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
