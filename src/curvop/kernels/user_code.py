r"""Products by differences of the user's own code, called as the user calls it.

The kernels call the model with other tensors in the place of its parameters. Here the module and the loss are called as
they are, while the user's own parameters hold other values. So a product that is wrong because the replacement missed
something (a loss that reads ``model.parameters()``, a buffer that the forward pass writes to) differs from this one.

Every parameter gets another ``.data``, and its own back. Adding in place would write to memory that kept graphs read,
and would count as a change of the parameter.

First derivatives are `torch.autograd.grad` of the user's own loss, and are differentiated by central differences. If
several batches can be put together, the loss is that of the whole data set as one batch, as the matrix is defined, so
that wrong weights of the batches are found as well.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.batches import batch_size, leaves, map_leaves
from curvop.kernels.callable_objective import CallableObjective
from curvop.kernels.double import HeldPadding, in_double
from curvop.kernels.examples import Examples
from curvop.kernels.fisher import EmpiricalFisherKernel
from curvop.kernels.ggn import GGNKernel
from curvop.kernels.hessian import HessianKernel
from curvop.kernels.jacobian import JacobianKernel
from curvop.kernels.layout import BatchLayout
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import Objective
from curvop.kernels.preflight import batchwise_modules
from curvop.kernels.sandwich import outputs_of
from curvop.kernels.weights import loss_kind

__all__ = ["OwnProduct", "own_product"]

Values = dict[str, Tensor]

# Steps of central differences, relative to the parameters. The cube root of epsilon balances truncation, of the order
# of the step's square, with rounding, of the order of epsilon over the step. The second step is so much shorter that
# far fewer kinks, as ReLU has, lie within it: where the two products agree, no kink spoils them.
_LONG = {dtype: torch.finfo(dtype).eps ** (1 / 3) for dtype in (torch.float64, torch.float32)}
_STEPS = {
    torch.float64: (_LONG[torch.float64], _LONG[torch.float64] / 256),
    torch.float32: (_LONG[torch.float32], _LONG[torch.float32] / 16),
}
#: Relative difference of the two products up to which they are taken for the derivative.
_CONCLUSIVE = 1e-3
#: Relative difference between autograd's derivative and a difference quotient that no rounding explains.
_HELD = 1e-4
#: Examples of a batch whose losses are computed one by one; 10,000 calls of a loss take about 0.3 seconds.
_MOST_EXAMPLES = 10_000


class _CannotJoinError(Exception):
    """Batches cannot be put together."""


@dataclasses.dataclass
class OwnProduct:
    """A product by the user's own code.

    Attributes
    ----------
    products : list of Tensor, shape (M,)
        By the longer and by the shorter step, in float64; one alone if nothing is differenced. None if `reason` is set.
    error : float
        Relative difference between the two.
    gradient : Tensor or None
        Of the objective, by the parameters of the rows, or else of the columns.
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
        What the rounding errors of the gradient are relative to.
    reason : str
        Why there is none.
    """

    products: list[Tensor] = dataclasses.field(default_factory=list)
    error: float = 0.0
    gradient: Tensor | None = None
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
    objective, best = kernel.objective, OwnProduct()
    batches = max(1, available // max(needed, 1))
    for dtype in dict.fromkeys((torch.float64, objective.dtype)):
        # What is computed in float32 within a model in float64 asks for the longer steps, too.
        for steps in [_STEPS[torch.float64], _STEPS[torch.float32]] if dtype == torch.float64 else [_STEPS[dtype]]:
            found = _found(kernel, vector, dtype, steps, batches)
            if not best.products or (found.products and found.error < best.error):
                best = found
            if found.reason or best.error <= _CONCLUSIVE:
                break
        if best.products:
            break
    return best


def _found(kernel: Any, vector: Tensor, dtype: torch.dtype, steps: tuple[float, ...], most: int) -> OwnProduct:
    objective = kernel.objective
    code = _UserCode(objective, dict.fromkeys((*kernel.rows.names, *kernel.cols.names)), dtype)
    if code.in_use():
        return OwnProduct(reason="a graph that is kept outside holds the parameters in their own dtype")
    autocast = torch.autocast(objective.device.type, enabled=False)
    with objective.slow_backends(), autocast, code.lent():
        sums = _Sums(_KINDS[type(kernel)](code, kernel, vector.to(dtype)), steps)
        whole, batches = code.joins(kernel), []
        for index, batch in objective.batches():
            batches.append((index, batch))
            whole = whole and len(batches) <= most
            while batches and not whole:
                sums.add([batches.pop(0)], whole=False)
        if batches:
            with objective._generators.private(objective.devices):
                whole = len(batches) > 1 and sums.add(batches, whole=True)
                for one in () if whole else batches:
                    sums.add([one], whole=False)
    return sums.result(whole)


class _Lent:
    """A tensor of the user's, as it was."""

    def __init__(self, tensor: Tensor, moves: bool) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._data = tensor.data if moves else None
        self._leaf, self._flag, self._hooks = tensor.is_leaf, tensor.requires_grad, tensor._backward_hooks

    def put_back(self) -> None:
        tensor = self._tensor
        if self._leaf and not tensor.is_leaf:  # a buffer that the forward pass has written to
            tensor.detach_()
        if self._data is not None:
            tensor.data = self._data
        if tensor.requires_grad != self._flag:
            tensor.requires_grad_(self._flag)
        if tensor._backward_hooks is not self._hooks:
            tensor._backward_hooks = self._hooks
        if tensor._version != self._version:  # what was written to is not the user's memory, or has its values again
            torch._C._autograd._unsafe_set_version_counter((tensor,), (self._version,))


def _put_back(lent: Sequence[_Lent]) -> None:
    for one in lent:
        one.put_back()


class _UserCode:
    """The user's model and loss at values of the user's own parameters.

    Parameters
    ----------
    objective : Objective
    names : iterable of str
        The parameters to be differentiated by.
    dtype : torch.dtype
        In which it is to be computed: float64, or the parameters' own.

    Attributes
    ----------
    base : dict of str to Tensor
        The parameters' values at the point.
    """

    def __init__(self, objective: Objective, names: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.objective, self.names, self._dtype = objective, tuple(names), dtype
        self.base: Values = {name: value.detach().to(dtype) for name, value in objective.params.items()}
        self._model: Any = objective._model if isinstance(objective, ModelObjective) else None
        own: Mapping[str, Tensor] = objective.params
        if isinstance(self._model, nn.Module):
            own = dict(self._model.named_parameters(remove_duplicate=False))
        # A tensor that the user has computed, or made under inference mode, cannot stand for itself.
        self.targets: Values = {
            name: own[name] if own[name].is_leaf and not own[name].is_inference() else self.base[name].clone()
            for name in objective.params
        }
        others: list[Tensor] = [value for module in objective.modules for value in module.parameters()]
        buffers = [value for module in objective.modules for value in module.buffers()]
        loss = getattr(objective, "loss_function", None)
        if isinstance(loss, functools.partial):
            others += [value for value in loss.keywords.values() if isinstance(value, Tensor)]
        given = {id(value) for value in self.targets.values()}
        self._others = _others(given, [value for value in (*others, *buffers) if self._moves(value)])
        self._buffers = _others(given | {id(value) for value in self._others}, buffers)
        modules = [part for module in objective.modules for part in module.modules()]
        self._pads = not modules or any(getattr(part, "padding_idx", None) is not None for part in modules)
        self.rows: list[Tensor] = []

    def _moves(self, value: Tensor) -> bool:
        """Whether another tensor of the user's is computed with in another dtype, or written to."""
        cast = self._dtype == torch.float64 and value.dtype != torch.float64
        return value.is_floating_point() and (cast or self.objective._renormalised)

    def in_use(self) -> bool:
        """Whether a graph of the user's ends at a parameter whose dtype would change, for which it would be lost."""
        changed = [value for value in (*self.targets.values(), *self._others) if value.dtype != self._dtype]
        return any(value.requires_grad and value.is_leaf and _has_graph(value) for value in changed)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let the user's tensors hold other values for as long as the context lasts."""
        lent = [_Lent(value, moves=True) for value in (*self.targets.values(), *self._others)]
        lent += [_Lent(value, moves=False) for value in self._buffers]
        try:
            try:
                self._take()
                yield
            finally:
                _put_back(lent)
        except BaseException:  # Ctrl-C may have come while they were put back
            _put_back(lent)
            raise

    def _take(self) -> None:
        for name, value in self.targets.items():
            value.data = self.base[name].clone()
            if value._backward_hooks is not None:  # they are for what the user's own backward passes accumulate
                value._backward_hooks = None
            if name in self.names:
                value.requires_grad_()
        for value in self._others:
            value.data = value.detach().to(self._dtype, copy=True)

    def move(self, along: Mapping[str, Tensor], step: float) -> None:
        """Set the parameters to the point plus `step` times a direction."""
        for name, value in self.targets.items():
            value.data = self.base[name] + step * along[name] if name in along else self.base[name].clone()

    def joins(self, kernel: Any) -> bool:
        """Whether the data may be evaluated as one batch."""
        objective = self.objective
        if kernel.by_batch or objective._batch_weight is not None or objective._share is not None:
            return False
        return self._model is not None or not batchwise_modules(objective.modules)

    def run(self, function: Callable[[list[Any]], Any], batches: list[Any]) -> Any:
        """Return ``function(batches)``; what it writes to batches and buffers is undone."""
        with torch.enable_grad():
            return self.objective.guard.run(functools.partial(self._padded, function), batches)

    def _padded(self, function: Callable[[list[Any]], Any], batches: list[Any]) -> Any:
        with HeldPadding(self.rows) if self._pads else contextlib.nullcontext():
            return function(batches)

    def given(self, batch: Any) -> Any:
        """Return a batch as it is given to the user's code."""
        return in_double(batch) if self._dtype == torch.float64 else batch

    def predict(self, batch: Any) -> Any:
        """Return the model's prediction."""
        X, _ = batch
        return self._model(X) if isinstance(self._model, nn.Module) else self._model(dict(self.targets), X)

    def loss(self, batches: list[Any]) -> tuple[Tensor, Any]:
        """Return the loss of the batches as one, and their predictions."""
        if isinstance(self.objective, CallableObjective):
            if len(batches) > 1 and None in map(batch_size, batches):
                raise _CannotJoinError("their tensors differ in their first dimension")
            return self.objective._objective(dict(self.targets), joined(batches)), None
        predictions = [self.predict(batch) for batch in batches]
        return self.criterion(predictions, batches), predictions

    def criterion(self, predictions: list[Any], batches: list[Any]) -> Tensor:
        """Return the loss of predictions for the batches, as one."""
        prediction, y = joined([(one, batch[1]) for one, batch in zip(predictions, batches, strict=True)])
        loss: Tensor = self.objective.loss_function(prediction, y)  # type: ignore[attr-defined]
        return loss

    def gradient(self, output: Any, seeds: Sequence[Tensor] | None = None) -> Values:
        """Return the gradient of outputs, weighted by `seeds`, by the parameters."""
        inputs = [self.targets[name] for name in self.names]
        outputs = [output] if isinstance(output, Tensor) else list(output)
        return dict(zip(self.names, _gradient(outputs, inputs, seeds), strict=True))


def _gradient(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor] | None) -> list[Tensor]:
    reached = [index for index, output in enumerate(outputs) if output.requires_grad]
    if not reached:
        return [torch.zeros_like(value) for value in inputs]
    ends = [outputs[index] for index in reached]
    along = None if seeds is None else [seeds[index] for index in reached]
    found = torch.autograd.grad(ends, list(inputs), along, allow_unused=True, materialize_grads=True)
    return [part.detach() for part in found]


def _others(known: set[int], tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors that are not known, each once; one made under inference mode is left alone."""
    found = {id(value): value for value in tensors if id(value) not in known and not value.is_inference()}
    return list(found.values())


def _has_graph(tensor: Tensor) -> bool:
    """Whether a graph exists that ends at a leaf: its last node then lives on, with what is registered there."""

    class Mark:
        def __call__(self, *gradients: Any) -> None:
            pass

    mark = Mark()
    lives = weakref.ref(mark)
    handle = torch.autograd.graph.get_gradient_edge(tensor).node.register_hook(mark)
    del mark
    found = lives() is not None
    handle.remove()
    return found


def joined(trees: Sequence[Any]) -> Any:
    """Return trees of tensors as one, tensors along their first dimension.

    A list that has one entry an example, as of images of several sizes, is put together by ``+``.
    """
    if len(trees) == 1:
        return trees[0]
    return _join(trees, [_size(tree) for tree in trees])


def _size(tree: Any) -> int | None:
    """Return the first dimension of the tensors that are in no inner list, or None if they differ."""
    parts = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else [tree]
    outside = [part for part in parts if not isinstance(part, list)]
    return batch_size(tuple(outside))


def _join(trees: Sequence[Any], sizes: Sequence[int | None]) -> Any:
    first = trees[0]
    if isinstance(first, Tensor):
        if any(not isinstance(tree, Tensor) or not tree.ndim or tree.shape[1:] != first.shape[1:] for tree in trees):
            raise _CannotJoinError("their tensors have other shapes")
        return torch.cat(list(trees))
    if any(type(tree) is not type(first) for tree in trees):
        raise _CannotJoinError("they are of several kinds")
    if isinstance(first, Mapping):
        if any(tree.keys() != first.keys() for tree in trees):
            raise _CannotJoinError("their keys differ")
        found = copy.copy(first) if isinstance(first, MutableMapping) else {}
        for key in first:
            found[key] = _join([tree[key] for tree in trees], sizes)
        return found
    if isinstance(first, list) and all(map(_is_by_example, trees, sizes)):
        return [example for tree in trees for example in tree]
    if isinstance(first, list | tuple):
        if len({len(tree) for tree in trees}) > 1:
            raise _CannotJoinError("they have other lengths")
        parts = [_join(part, sizes) for part in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if any(not (tree is first or tree == first) for tree in trees):
        raise _CannotJoinError(f"a {type(first).__name__} cannot be put together with another")
    return first


def _is_by_example(tree: list[Any], size: int | None) -> bool:
    tensors = list(leaves(tree))
    inputs = bool(tensors) and all(leaf.ndim and len(leaf) == size for leaf in tensors)
    return len(tree) == size and not inputs


@dataclasses.dataclass
class _Part:
    """What the user's code gives for some batches, by one step."""

    product: Tensor
    holds: bool = False
    linear: bool = False
    inner: float = 0.0
    total: Tensor | None = None


class _Kind(abc.ABC):
    """How the product of one kind of matrix is made of differences of the user's code."""

    #: Whether a step is taken at all.
    steps = True
    #: Whether the matrix is a derivative of the gradient, or an approximation to it.
    curves = False

    def __init__(self, code: _UserCode, kernel: Any, vector: Tensor) -> None:
        self.code, self.kernel, self.vector = code, kernel, vector
        self.along: Values = {}
        if kernel.cols.names:
            self.along = dict(zip(kernel.cols.names, kernel.cols.split(vector), strict=True))

    @abc.abstractmethod
    def part(self, batches: list[Any], index: int, step: float) -> _Part:
        """Return the product of some batches, by a step relative to the parameters."""

    def divisor(self, weight: float, prediction: Any, index: int, batch: Any) -> float:
        """Return by what the product of a batch is divided before it is weighted."""
        return 1.0

    def whole_divisor(self, loss: Tensor, predictions: Any, batches: list[Any]) -> float:
        """Return by what the product of the whole data set is divided."""
        return 1.0

    def size(self, step: float) -> float:
        """Return the length of a step."""
        return (
            step * (_norm([self.code.base[name] for name in self.along]) or 1.0) / (_norm(self.along.values()) or 1.0)
        )

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
        return [(a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]

    def holds(self, seeds: list[Tensor], pushed: list[Tensor], pulled: Mapping[str, Tensor]) -> bool:
        """Whether ``<u, J v>`` by differences is another than ``<J' u, v>`` by autograd."""
        pushes = sum(float((a * b).sum()) for a, b in zip(seeds, pushed, strict=True))
        size = _norm(seeds) * _norm(pushed)
        return abs(pushes - self.inner(pulled)) > _HELD * size


def _norm(parts: Any) -> float:
    return math.hypot(*(float(part.norm()) for part in parts))


class _Hessian(_Kind):
    curves = True

    def part(self, batches: list[Any], index: int, step: float) -> _Part:
        def loss_and_gradient(own: list[Any]) -> tuple[float, Values]:
            loss = self.code.loss(own)[0]
            return float(loss.detach()), self.code.gradient(loss)

        size = self.size(step)
        (above, ahead), (below, behind) = self.both(loss_and_gradient, batches, size)
        slope, rate = (self.inner(ahead) + self.inner(behind)) / 2, (above - below) / (2 * size)
        noise = 100 * torch.finfo(self.vector.dtype).eps * (abs(above) + abs(below)) / size
        # At a minimum the slope is small beside its change within a step.
        change = abs(self.inner(ahead) - self.inner(behind))
        holds = abs(rate - slope) > _HELD * max(abs(rate), abs(slope)) + change + noise
        return _Part(self.rows({name: (ahead[name] - behind[name]) / (2 * size) for name in ahead}), holds)


class _GaussNewton(_Kind):
    curves = True

    def part(self, batches: list[Any], index: int, step: float) -> _Part:
        pushed = self.pushed(self.predicted, batches, self.size(step))
        predictions = self.code.run(lambda own: [_detached(self.code.predict(batch)) for batch in own], batches)
        outputs = [part for prediction in predictions for part in outputs_of(prediction)]
        size = step * (_norm(outputs) or 1.0) / (_norm(pushed) or 1.0)
        ahead, behind = (
            self.code.run(functools.partial(self._slope, predictions, pushed, one), batches) for one in (size, -size)
        )
        middle = [(a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]
        pulled = self.pulled(self.predicted, batches, middle)
        eps = torch.finfo(self.vector.dtype).eps
        change = 2 * size * _norm(middle)
        linear = _norm(pushed) > 0 and _norm(ahead) > 0 and change <= 100 * eps * _norm(ahead)
        return _Part(self.rows(pulled), self.holds(middle, pushed, pulled), linear)

    def _slope(self, predictions: list[Any], along: list[Tensor], size: float, own: list[Any]) -> list[Tensor]:
        """Return the derivative of the loss by the predictions, `size` away from them along a direction."""
        directions, moved = iter(along), []

        def move(part: Tensor) -> Tensor:
            if not part.is_floating_point():
                return part
            moved.append((part + size * next(directions)).requires_grad_())
            return moved[-1]

        loss = self.code.criterion([map_leaves(move, prediction) for prediction in predictions], own)
        return _gradient([loss], moved, None)


def _detached(tree: Any) -> Any:
    return map_leaves(lambda part: part.detach(), tree)


class _EmpiricalFisher(_Kind):
    def part(self, batches: list[Any], index: int, step: float) -> _Part:
        pushed = self.pushed(self._losses, batches, self.size(step))
        pulled = self.pulled(self._losses, batches, pushed)
        total = self.pulled(self._losses, batches, [torch.ones_like(part) for part in pushed])
        inner = sum(float(part.sum()) for part in pushed)
        return _Part(self.rows(pulled), self.holds(pushed, pushed, pulled), inner=inner, total=self.rows(total))

    def divisor(self, weight: float, prediction: Any, index: int, batch: Any) -> float:
        return float(self.code.objective.divisor_of(prediction, index, batch))  # type: ignore[attr-defined]

    def whole_divisor(self, loss: Tensor, predictions: Any, batches: list[Any]) -> float:
        """Return what the loss divides the sum of its examples' by, as its own value says."""
        if self.code.objective.reduction == "sum":
            return 1.0
        losses = torch.cat(self.code.run(self._losses, batches)).detach()
        if not float(losses.sum().abs()) > _CONCLUSIVE * float(losses.abs().sum()):
            raise _CannotJoinError("their losses cancel")
        return float(losses.sum() / loss)

    def count(self, batches: list[Any]) -> float:
        """Return how many examples count."""
        examples = Examples(self.code.objective.loss_function)  # type: ignore[attr-defined]
        predictions = self.code.run(lambda own: [_detached(self.code.predict(batch)) for batch in own], batches)
        pairs = zip(predictions, batches, strict=True)
        return sum(examples.count(outputs_of(prediction), y) for prediction, (_, y) in pairs)

    def _losses(self, batches: list[Any]) -> list[Tensor]:
        """Return the examples' losses, batch after batch; `curvop.kernels.examples` says what an example is."""
        return [self._unreduced(self.code.predict(batch), batch[1]) for batch in batches]

    def _unreduced(self, prediction: Any, y: Any) -> Tensor:
        loss_function: Any = self.code.objective.loss_function  # type: ignore[attr-defined]
        if loss_kind(loss_function) is None:
            count = len(outputs_of(prediction)[0])
            if count > _MOST_EXAMPLES:
                raise ValueError(f"a batch has {count:,} examples, too many to be evaluated one by one")
            pairs = (_example((prediction, y), index, count) for index in range(count))
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


def _example(tree: Any, index: int, count: int) -> Any:
    """Return the part of a tree that belongs to one of `count` examples."""

    def cut(part: Any) -> Any:
        return part[index : index + 1]

    def is_cut(part: Any) -> bool:
        return isinstance(part, Tensor) or (isinstance(part, list) and _is_by_example(part, count))

    return map_leaves(cut, tree, is_cut)


class _Jacobian(_Kind):
    def part(self, batches: list[Any], index: int, step: float) -> _Part:
        pushed = self.pushed(self.predicted, batches, self.size(step))
        pulled = self.pulled(self.predicted, batches, pushed)
        return _Part(torch.cat([part.reshape(-1) for part in pushed]), self.holds(pushed, pushed, pulled))


class _TransposedJacobian(_Kind):
    steps = False

    def part(self, batches: list[Any], index: int, step: float) -> _Part:
        def pull(own: list[Any]) -> Values:
            outputs = self.predicted(own)
            parts = self.kernel.cols.at(self.vector, index).split([output.numel() for output in outputs])
            seeds = [part.reshape(output.shape) for part, output in zip(parts, outputs, strict=True)]
            return self.code.gradient(outputs, seeds)

        return _Part(self.rows(self.code.run(pull, batches)))


def _of_jacobian(code: _UserCode, kernel: JacobianKernel, vector: Tensor) -> _Kind:
    kind = _Jacobian if isinstance(kernel.rows, BatchLayout) else _TransposedJacobian
    return kind(code, kernel, vector)


_KINDS: Mapping[type, Callable[[_UserCode, Any, Tensor], _Kind]] = {
    HessianKernel: _Hessian,
    GGNKernel: _GaussNewton,
    EmpiricalFisherKernel: _EmpiricalFisher,
    JacobianKernel: _of_jacobian,
}


class _Sums:
    """Sums over the batches, or of all of them as one."""

    def __init__(self, kind: _Kind, steps: tuple[float, ...]) -> None:
        self._kind, self._steps = kind, steps if kind.steps else (0.0,)
        self._clear()

    def _clear(self) -> None:
        self._products: list[list[Tensor]] = [[] for _ in self._steps]
        self._totals: list[list[Tensor]] = [[] for _ in self._steps]
        self._inner = [0.0 for _ in self._steps]
        self._gradients: list[Tensor] = []
        self._weights: list[float] = []
        self._count = 0.0
        self._holds, self._linear, self._reason = False, True, ""

    def add(self, numbered: list[tuple[int, Any]], whole: bool) -> bool:
        """Add batches, evaluated as one; return whether that could be done."""
        if self._reason:
            return False
        try:
            self._add(numbered[0][0], [self._kind.code.given(batch) for _, batch in numbered], whole)
        except Exception as error:  # whatever a model does that cannot be done in this dtype, or for want of memory
            self._clear()
            self._kind.code.move({}, 0.0)
            self._reason = "" if whole else f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
            return False
        return True

    def _add(self, index: int, batches: list[Any], whole: bool) -> None:
        kind, code, objective = self._kind, self._kind.code, self._kind.code.objective
        code.rows.clear()
        layout = kind.kernel.rows if kind.kernel.rows.names else kind.kernel.cols

        def begin(own: list[Any]) -> tuple[Tensor, Any, Values]:
            loss, predictions = code.loss(own)
            return loss.detach(), _detached(predictions), code.gradient(loss)

        loss, predictions, gradient = code.run(begin, batches)
        prediction = predictions[0] if predictions else None
        weight = 1.0 if whole else objective.weight(prediction, index, batches[0])
        self._weights.append(weight)
        if not weight:
            return
        self._gradients.append(weight * torch.cat([part.reshape(-1).double() for part in layout.of(gradient)]))
        if whole:
            divisor = kind.whole_divisor(loss, predictions, batches)
        else:
            divisor = kind.divisor(weight, prediction, index, batches[0])
        share = (1.0 if kind.kernel.by_batch else weight) / divisor
        for number, step in enumerate(self._steps):
            part = kind.part(batches, index, step)
            self._products[number].append(share * part.product.double())
            self._holds |= part.holds
            self._linear &= part.linear
            self._inner[number] += share * part.inner
            if part.total is not None:
                self._totals[number].append(share * part.total.double())
        if isinstance(kind, _EmpiricalFisher):
            self._count += share * kind.count(batches)

    def result(self, whole: bool) -> OwnProduct:
        """Return what was summed."""
        if self._reason or not self._gradients:
            return OwnProduct(reason=self._reason or "every batch has weight 0")
        kernel, objective = self._kind.kernel, self._kind.code.objective
        divisor = 1.0 if whole else objective.divisor(self._weights)
        by_batch = isinstance(kernel.rows, BatchLayout)
        products = [torch.cat(parts) if by_batch else _total(parts) / divisor for parts in self._products]
        if isinstance(self._kind, _TransposedJacobian):
            products = [_total(parts) for parts in self._products]
        centred: list[Tensor] = []
        if self._count:
            centred = [
                _total(totals) * inner / (divisor * self._count)
                for totals, inner in zip(self._totals, self._inner, strict=True)
            ]
        unit = float(products[-1].abs().sum()) or 1.0  # whose squares might underflow
        difference, norm = (float((one / unit).norm()) for one in (products[-1] - products[0], products[-1]))
        gradient = _total(self._gradients) / divisor
        return OwnProduct(
            products=products,
            error=difference / norm if norm else 0.0,
            gradient=gradient,
            centred=centred,
            holds=self._holds,
            linear=self._linear,
            known=_is_torch_loss(objective),
            whole=whole,
            fine=self._steps[0] <= _LONG[torch.float64],
            size=max(float(gradient.norm()), self._kind.change(products[0])),
        )


def _total(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def _is_torch_loss(objective: Objective) -> bool:
    loss = getattr(objective, "loss_function", None)
    while isinstance(loss, functools.partial):
        loss = loss.func
    kind = type(loss) if isinstance(loss, nn.Module) else loss
    return getattr(kind, "__module__", "").startswith("torch.nn")
