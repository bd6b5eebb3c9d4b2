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

from curvop.kernels.batches import map_leaves
from curvop.kernels.differentiable import TwiceDifferentiable
from curvop.kernels.examples import Examples
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel
from curvop.kernels.ggn_kernel import outputs_of
from curvop.kernels.ggn_outer import GGNKernel
from curvop.kernels.hessian_kernel import HessianKernel
from curvop.kernels.jacobian_kernel import JacobianKernel
from curvop.kernels.joining import CannotJoinError, example_of
from curvop.kernels.layout import BatchLayout
from curvop.kernels.losses import loss_kind
from curvop.kernels.user_code import UserCode, Values, gradient_of

__all__ = ["DIFFERENCES", "Differences", "Part", "detached", "norm"]

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

    def pulled(self, function: Callable[[list[Any]], list[Tensor]], batches: list[Any], seeds: list[Tensor]) -> Values:
        """Return the transposed Jacobian of the parts that a function gives, times `seeds`."""
        found: Values = self.code.run(lambda own: self.code.gradient(function(own), seeds), batches)
        return found

    def predicted(self, batches: list[Any]) -> list[Tensor]:
        """Return the parts of the predictions that can be differentiated."""
        return [part for batch in batches for part in outputs_of(self.code.predict(batch))]

    def pushed(self, function: Callable[[list[Any]], list[Tensor]], batches: list[Any], size: float) -> list[Tensor]:
        """Return the derivative of the parts along the direction."""
        ahead, behind = self.both(lambda own: [part.detach() for part in function(own)], batches, size)
        # Where both are infinite, as behind a mask, nothing changes.
        return [torch.where(a == b, 0.0, a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]

    def holds(self, seeds: list[Tensor], pushed: list[Tensor], pulled: Mapping[str, Tensor]) -> bool:
        """Whether ``<u, J v>`` by differences is another than ``<J' u, v>`` by autograd."""
        pushes = sum(float((a * b).sum()) for a, b in zip(seeds, pushed, strict=True))
        size = norm(seeds) * norm(pushed)
        return abs(pushes - self.inner(pulled)) > _HELD * size


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
        pushed = self.pushed(self.predicted, batches, self.size(step))
        predictions = self.code.run(lambda own: [detached(self.code.predict(batch)) for batch in own], batches)
        outputs = [part for prediction in predictions for part in outputs_of(prediction)]
        size = step * (norm(map(_unmasked, outputs)) or 1.0) / (norm(pushed) or 1.0)
        ahead, behind = (
            self.code.run(functools.partial(self._slope, predictions, pushed, one), batches) for one in (size, -size)
        )
        middle = [(a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]
        pulled = self.pulled(self.predicted, batches, middle)
        eps = torch.finfo(self.vector.dtype).eps
        change = 2 * size * norm(middle)
        linear = norm(pushed) > 0 and norm(ahead) > 0 and change <= 100 * eps * norm(ahead)
        if norm(middle):
            return Part(self.rows(pulled), self.holds(middle, pushed, pulled), linear)
        seeded = self.pulled(self.predicted, batches, ahead)
        return Part(self.rows(pulled), self.holds(ahead, pushed, seeded), linear)

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
        pushed = self.pushed(self._losses, batches, self.size(step))
        pulled = self.pulled(self._losses, batches, pushed)
        total = self.pulled(self._losses, batches, [torch.ones_like(part) for part in pushed])
        inner = sum(float(part.sum()) for part in pushed)
        holds = self.holds([torch.ones_like(part) for part in pushed], pushed, total)
        return Part(self.rows(pulled), holds, inner=inner, total=self.rows(total))

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
        """Return the examples' losses, batch after batch; `curvop.kernels.examples` says what an example is."""
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
        pushed = self.pushed(self.predicted, batches, self.size(step))
        seeds = pushed if norm(pushed) else [torch.linspace(1, 2, p.numel()).cos().to(p).view_as(p) for p in pushed]
        pulled = self.pulled(self.predicted, batches, seeds)
        return Part(torch.cat([part.reshape(-1) for part in pushed]), self.holds(seeds, pushed, pulled))


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
