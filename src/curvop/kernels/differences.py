"""Products by central differences of first derivatives of the user's own code, one kind of matrix at a time.

Where several batches are given, the loss is that of all of them as one: of their predictions, put together.
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
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel
from curvop.kernels.ggn_kernel import GGNKernel, outputs_of
from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.jacobian_kernel import JacobianKernel
from curvop.kernels.losses import Examples, loss_kind
from curvop.kernels.objective import Objective
from curvop.kernels.parameters import BatchLayout
from curvop.kernels.user_code import UserCode, Values, gradient_of

__all__ = ["DIFFERENCES", "Differences", "OwnProduct", "Part", "detached", "norm", "own_product"]

#: Relative difference between autograd's derivative and a difference quotient that no rounding explains.
_HELD = 1e-4
#: Part of the examples' losses that their sum must be for their divisor to be read off it.
_CANCELS = 1e-3
#: Examples of a batch whose losses are computed one by one; 10,000 calls of a loss take about 0.3 seconds.
_MOST_EXAMPLES = 10_000


@dataclasses.dataclass
class Part:
    """What the user's code gives for some batches, by one step."""

    product: Tensor
    holds: bool = False
    linear: bool = False
    inner: float = 0.0
    total: Tensor | None = None


class Differences(abc.ABC):
    """How the product of one kind of matrix is made of differences of the user's code."""

    #: Whether a step is taken at all.
    steps = True
    #: Whether the matrix is a derivative of the gradient, or an approximation to it.
    curves = False

    def __init__(self, code: UserCode, kernel: Any, vector: Tensor) -> None:
        self.code, self.kernel, self.vector = code, kernel, vector
        self.along: Values = {}
        if kernel.cols.names:
            self.along = dict(zip(kernel.cols.names, kernel.cols.split(vector), strict=True))

    @abc.abstractmethod
    def part(self, batches: list[Any], index: int, step: float) -> Part:
        """Return the product of some batches, by a step relative to the parameters."""

    def divisor(self, weight: float, prediction: Any, index: int, batch: Any) -> float:
        """Return by what the product of a batch is divided before it is weighted."""
        return 1.0

    def whole_divisor(self, loss: Tensor, predictions: Any, batches: list[Any]) -> float:
        """Return by what the product of the whole data set is divided."""
        return 1.0

    def exact(self, batches: list[Any]) -> Tensor | None:
        """Return the product without differences, by the operator's formulas; None if there is none."""
        return None

    def count(self, batches: list[Any]) -> float:
        """Return how many examples count, of a matrix whose examples have a mean."""
        return 0.0

    def size(self, step: float) -> float:
        """Return the length of a step."""
        return step * (norm([self.code.base[name] for name in self.along]) or 1.0) / (norm(self.along.values()) or 1.0)

    def change(self, product: Tensor) -> float:
        """Return by how much the gradient changes if the parameters do by their own size."""
        return float(product.norm()) * self.size(1.0) if self.curves else 0.0

    def both(self, function: Callable[[list[Any]], Any], batches: list[Any], size: float) -> list[Any]:
        """Return what a function of the batches gives ahead of the point and behind it, and go back there."""
        found = []
        for step in (size, -size):
            self.code.move(self.along, step)
            found.append(self.code.run(function, batches))
        self.code.move({}, 0.0)
        return found

    def rows(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the vector of the parameters of the rows."""
        return torch.cat([part.reshape(-1) for part in self.kernel.rows.of(parts)])

    def inner(self, gradient: Mapping[str, Tensor]) -> float:
        """Return a gradient's product with the direction."""
        return sum(float((gradient[name] * part).sum()) for name, part in self.along.items())

    def vjp(self, function: Callable[[list[Any]], list[Tensor]], batches: list[Any], seeds: list[Tensor]) -> Values:
        """Return the transposed Jacobian of the parts that a function gives, times `seeds`."""
        found: Values = self.code.run(lambda own: self.code.gradient(function(own), seeds), batches)
        return found

    def predicted(self, batches: list[Any]) -> list[Tensor]:
        """Return the parts of the predictions that can be differentiated."""
        return [part for batch in batches for part in outputs_of(self.code.predict(batch))]

    def jvp(self, function: Callable[[list[Any]], list[Tensor]], batches: list[Any], size: float) -> list[Tensor]:
        """Return the derivative of the parts along the direction."""
        ahead, behind = self.both(lambda own: [part.detach() for part in function(own)], batches, size)
        # Where both are infinite, as behind a mask, nothing changes.
        return [torch.where(a == b, 0.0, a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]

    def holds(self, seeds: list[Tensor], jvp: list[Tensor], vjp: Mapping[str, Tensor]) -> bool:
        """Whether ``<u, J v>`` by differences is another than ``<J' u, v>`` by autograd."""
        pushes = sum(float((a * b).sum()) for a, b in zip(seeds, jvp, strict=True))
        size = norm(seeds) * norm(jvp)
        return abs(pushes - self.inner(vjp)) > _HELD * size


def norm(parts: Iterable[Tensor]) -> float:
    """Return the norm of several tensors together."""
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
        # At a minimum the slope is small beside its change within a step.
        change = abs(self.inner(ahead) - self.inner(behind))
        holds = abs(rate - slope) > _HELD * max(abs(rate), abs(slope)) + change + noise
        return Part(self.rows({name: (ahead[name] - behind[name]) / (2 * size) for name in ahead}), holds)

    def exact(self, batches: list[Any]) -> Tensor:
        """Return the product by double backward."""

        def product(own: list[Any]) -> Values:
            with TwiceDifferentiable():
                loss = self.code.loss(own)[0]
                inputs = [self.code.targets[name] for name in self.along]
                found = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True)
                inner = torch.stack([(a * b).sum() for a, b in zip(found, self.along.values(), strict=True)]).sum()
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
            self.code.run(functools.partial(self._slope, predictions, jvp, one), batches) for one in (size, -size)
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
        """Return the derivative of the loss by the predictions, `size` away from them along a direction."""
        directions, moved = iter(along), []

        def move(part: Tensor) -> Tensor:
            if not part.is_floating_point():
                return part
            moved.append((part + size * next(directions)).requires_grad_())
            return moved[-1]

        loss = self.code.criterion([map_leaves(move, prediction) for prediction in predictions], own)
        return gradient_of([loss], moved, None)


def _unmasked(part: Tensor) -> Tensor:
    """Return a prediction without the huge numbers that stand behind a mask."""
    return part.masked_fill(part.abs() > torch.finfo(part.dtype).max ** 0.5, 0.0)


def detached(tree: Any) -> Any:
    """Return a tree of tensors, cut off."""
    return map_leaves(lambda part: part.detach(), tree)


class _EmpiricalFisher(Differences):
    def part(self, batches: list[Any], index: int, step: float) -> Part:
        jvp = self.jvp(self._losses, batches, self.size(step))
        vjp = self.vjp(self._losses, batches, jvp)
        total = self.vjp(self._losses, batches, [torch.ones_like(part) for part in jvp])
        inner = sum(float(part.sum()) for part in jvp)
        holds = self.holds([torch.ones_like(part) for part in jvp], jvp, total)
        return Part(self.rows(vjp), holds, inner=inner, total=self.rows(total))

    def divisor(self, weight: float, prediction: Any, index: int, batch: Any) -> float:
        return float(self.code.objective.divisor_of(prediction, index, batch))  # type: ignore[attr-defined]

    def whole_divisor(self, loss: Tensor, predictions: Any, batches: list[Any]) -> float:
        """Return what the loss divides the sum of its examples' by, as its own value says."""
        if self.code.objective.reduction == "sum":
            return 1.0
        losses = torch.cat(self.code.run(self._losses, batches)).detach()
        if not float(losses.sum().abs()) > _CANCELS * float(losses.abs().sum()):
            raise CannotJoinError("their losses cancel")
        return float(losses.sum() / loss)

    def count(self, batches: list[Any]) -> float:
        """Return how many examples count."""
        examples = Examples(self.code.objective.loss_function)  # type: ignore[attr-defined]
        predictions = self.code.run(lambda own: [detached(self.code.predict(batch)) for batch in own], batches)
        pairs = zip(predictions, batches, strict=True)
        return sum(examples.count(outputs_of(prediction), y) for prediction, (_, y) in pairs)

    def _losses(self, batches: list[Any]) -> list[Tensor]:
        """Return the examples' losses, batch after batch; `curvop.kernels.losses` says what an example is."""
        return [self._unreduced(self.code.predict(batch), batch[1]) for batch in batches]

    def _unreduced(self, prediction: Any, y: Any) -> Tensor:
        loss_function: Any = self.code.objective.loss_function  # type: ignore[attr-defined]
        if loss_kind(loss_function) is None and not all(part.ndim for part in outputs_of(prediction)):
            loss: Tensor = loss_function(prediction, y)  # a prediction without dimensions is one example
            return loss[None]
        if loss_kind(loss_function) is None:
            count = len(outputs_of(prediction)[0])
            if count > _MOST_EXAMPLES:
                raise ValueError(f"a batch has {count:,} examples, too many to be evaluated one by one")
            pairs = (example_of((prediction, y), index, count) for index in range(count))
            return torch.stack([loss_function(*pair) for pair in pairs])
        if isinstance(loss_function, nn.Module):
            loss_function = copy.copy(loss_function)
            loss_function.reduction = "none"
            terms = loss_function(prediction, y)
        else:
            terms = functools.partial(loss_function, reduction="none")(prediction, y)
        by_row = terms.shape == prediction.shape and terms.ndim > 1
        losses: Tensor = (terms.sum(-1) if by_row else terms).reshape(-1)
        return losses


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


def _of_jacobian(code: UserCode, kernel: JacobianKernel, vector: Tensor) -> Differences:
    kind = _Jacobian if isinstance(kernel.rows, BatchLayout) else _TransposedJacobian
    return kind(code, kernel, vector)


DIFFERENCES: Mapping[type, Callable[[UserCode, Any, Tensor], Differences]] = {
    HessianKernel: _Hessian,
    GGNKernel: _GaussNewton,
    EmpiricalFisherKernel: _EmpiricalFisher,
    JacobianKernel: _of_jacobian,
}


# Products by differences of the user's own code, over all batches, with steps of two sizes.

# Pairs of steps of central differences, relative to the parameters, to be tried until the two products agree. The cube
# root of epsilon balances truncation, of the order of the step's square, with rounding, of the order of epsilon over
# the step. Far fewer kinks, as ReLU has, lie within the shorter ones. What is computed in float32 within a model in
# float64 asks for the longer ones.
_FINE, _COARSE = (torch.finfo(dtype).eps ** (1 / 3) for dtype in (torch.float64, torch.float32))
_STEPS = {
    torch.float64: [(_FINE, _FINE / 2**8), (_FINE / 2**8, _FINE / 2**12), (_COARSE, _COARSE / 4)],
    torch.float32: [(_COARSE, _COARSE / 4)],
}
#: Relative difference of the two products up to which they are taken for the derivative.
_CONCLUSIVE = 1e-3


@dataclasses.dataclass
class OwnProduct:
    """A product by the user's own code.

    Attributes
    ----------
    products : list of Tensor, shape (M,)
        By the longer and by the shorter step, in float64; one alone if nothing is differenced. Then those by other
        pairs of steps, if any. Empty if there is a `reason`.
    error : float
        Relative difference between the first two.
    gradient : Tensor or None
        Of the objective, by the parameters of the rows, or else of the columns.
    exact : Tensor or None
        The product without differences, by the operator's formulas: the code alone is called in another way.
    unknown : str
        Why there is no such product, if there should be one.
    centred : list of Tensor
        Of an empirical Fisher matrix, what the mean of the gradients takes away from each product.
    holds : bool
        Whether autograd's first derivative is another than the difference quotient: the code holds something constant
        (``detach()``), or a backward is wrong.
    linear : bool
        Whether the loss is linear in the prediction.
    known : bool
        Whether it is one of torch's own losses.
    whole : bool
        Whether all batches were evaluated as one.
    fine : bool
        Whether the steps are those of double precision, within which kinks lie by rare accident alone.
    size : float
        What the rounding errors of the gradient are relative to: that by all parameters, or how much it changes.
    reason : str
        Why there is none.
    """

    products: list[Tensor] = dataclasses.field(default_factory=list)
    error: float = 0.0
    gradient: Tensor | None = None
    exact: Tensor | None = None
    unknown: str = ""
    centred: list[Tensor] = dataclasses.field(default_factory=list)
    holds: bool = False
    linear: bool = False
    known: bool = False
    whole: bool = False
    fine: bool = True
    size: float = 0.0
    reason: str = ""


def own_product(kernel: Any, vector: Tensor, needed: int, available: int) -> OwnProduct:
    """Return the product with `vector` ``(N,)`` by the user's own code, in double precision if it can be run so.

    Parameters
    ----------
    kernel : Kernel
    vector : Tensor, shape (N,)
        In float64, on the parameters' device.
    needed : int
        Bytes that a batch takes in float64.
    available : int
        Bytes that may be used.
    """
    objective, tried = kernel.objective, [OwnProduct()]
    batches = max(1, available // max(needed, 1))
    for dtype in dict.fromkeys((torch.float64, objective.dtype)):
        for steps in _STEPS[dtype]:
            tried.append(_found(kernel, vector, dtype, steps, batches))
            if not tried[-1].products or tried[-1].error <= _CONCLUSIVE:
                break
        found = sorted((one for one in tried if one.products), key=lambda one: one.error)
        if found:
            products = [product for one in found for product in one.products]
            return dataclasses.replace(
                found[0], products=products, centred=[mean for one in found for mean in one.centred]
            )
    return tried[-1]


def _found(kernel: Any, vector: Tensor, dtype: torch.dtype, steps: tuple[float, ...], most: int) -> OwnProduct:
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
            whole = whole and len(batches) <= most
            while batches and not whole:
                sums.add([batches.pop(0)], whole=False)
        if batches:
            with objective._generators.private(objective.devices):
                whole = len(batches) > 1 and sums.predict_apart(batches) and sums.add(batches, whole=True)
                for one in () if whole else batches:
                    sums.add([one], whole=False)
    return sums.result(whole)


class _Sums:
    """Sums over the batches, or of all of them as one."""

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
        """Whether batches can be evaluated as one."""
        code = self._kind.code
        try:
            return code.predicts_apart([code.in_precision(batch) for _, batch in numbered])
        except Exception:  # whatever does not work is found when it is done batch by batch
            code.return_to_point()
            return False

    def add(self, numbered: list[tuple[int, Any]], whole: bool) -> bool:
        """Add batches, evaluated as one; return whether that could be done."""
        if self._reason:
            return False
        try:
            self._add(numbered[0][0], [self._kind.code.in_precision(batch) for _, batch in numbered], whole)
        except Exception as error:  # whatever a model does that cannot be done in this dtype, or for want of memory
            self._clear()
            self._kind.code.return_to_point()
            self._reason = "" if whole else first_line(error)
            return False
        return True

    def _add(self, index: int, batches: list[Any], whole: bool) -> None:
        kind, code, objective = self._kind, self._kind.code, self._kind.code.objective
        code.rows.clear()

        def begin(own: list[Any]) -> tuple[Tensor, Any, Values]:
            loss, predictions = code.loss(own)
            return loss.detach(), detached(predictions), code.gradient([loss], names=code.targets)

        loss, predictions, gradient = code.run(begin, batches)
        prediction = predictions[0] if predictions else None
        weight = 1.0 if whole else objective.weight(prediction, index, batches[0])
        self._weights.append(weight)
        if not weight:
            return
        self._gradients.append({name: weight * part.double() for name, part in gradient.items()})
        if whole:
            divisor = kind.whole_divisor(loss, predictions, batches)
        else:
            divisor = kind.divisor(weight, prediction, index, batches[0])
        share = weight / divisor
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
        except Exception as error:  # an operation without a second derivative, or too little memory
            self._unknown = f"torch cannot: {first_line(error)}"

    def result(self, whole: bool) -> OwnProduct:
        """Return what was summed."""
        if self._reason or not self._gradients:
            return OwnProduct(reason=self._reason or "every batch has weight 0")
        kernel, objective = self._kind.kernel, self._kind.code.objective
        divisor = 1.0 if whole else objective.divisor(self._weights)
        by_batch = isinstance(kernel.rows, BatchLayout)
        products = [torch.cat(parts) if by_batch else _total(parts) / divisor for parts in self._products]
        centred: list[Tensor] = []
        if self._count:
            centred = [
                _total(totals) * inner / (divisor * self._count)
                for totals, inner in zip(self._totals, self._inner, strict=True)
            ]
        unit = float(products[-1].abs().sum()) or 1.0  # whose squares might underflow
        difference, size = (float((one / unit).norm()) for one in (products[-1] - products[0], products[-1]))
        gradient = {name: _total([one[name] for one in self._gradients]) / divisor for name in self._gradients[0]}
        layout = kernel.rows if kernel.rows.names else kernel.cols
        return OwnProduct(
            products=products,
            error=difference / size if size else 0.0,
            gradient=torch.cat([part.reshape(-1) for part in layout.of(gradient)]),
            exact=_total(self._exact) / divisor if self._exact and not self._unknown else None,
            unknown=self._unknown,
            centred=centred,
            holds=self._holds,
            linear=self._linear,
            known=_is_torch_loss(objective),
            whole=whole,
            fine=self._steps[0] <= _FINE,
            size=max(norm(gradient.values()), self._kind.change(products[0])),
        )


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _is_torch_loss(objective: Objective) -> bool:
    loss = getattr(objective, "loss_function", None)
    while isinstance(loss, functools.partial):
        loss = loss.func
    kind = type(loss) if isinstance(loss, nn.Module) else loss
    return (getattr(kind, "__module__", None) or "").startswith("torch.nn")
