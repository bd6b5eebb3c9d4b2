r"""The user's code, called as the user calls it.

The kernels call the model with other tensors in the place of its parameters. Here the module and the loss are called as
they are, while the user's own parameters hold other values. So a product that is wrong because the replacement missed
something (a loss that reads ``model.parameters()``, a buffer that the forward pass writes to) differs from one that is
made here.

Every parameter gets another ``.data``, and its own back. Adding in place would write to memory that kept graphs read,
and would count as a change of the parameter.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from curvop.kernels.batches import joined, map_leaves
from curvop.kernels.differentiable import ElementaryNorms
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import CallableObjective, Objective
from curvop.kernels.objective_checks import batchwise_modules

__all__ = ["HeldPadding", "UserCode", "Values", "gradient_of", "in_double"]

Values = dict[str, Tensor]


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


class UserCode:
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
        # A function may be given tensors that the user has computed: others, as these cannot hold other values.
        self.targets: Values = {
            name: own[name] if own[name].is_leaf else self.base[name].clone() for name in objective.params
        }
        others: list[Tensor] = [value for module in objective.modules for value in module.parameters()]
        buffers = [value for module in objective.modules for value in module.buffers()]
        loss = getattr(objective, "loss_function", None)
        if isinstance(loss, functools.partial):
            others += [value for value in loss.keywords.values() if isinstance(value, Tensor)]
        given = {id(value) for value in self.targets.values()}
        self._others = _others(given, [value for value in (*others, *buffers) if self._moves(value)])
        self._buffers = _others(given | {id(value) for value in self._others}, buffers)
        # A function cannot be looked into.
        looks = isinstance(getattr(objective, "_objective", self._model), nn.Module)
        parts = [part for module in objective.modules for part in module.modules()]
        self._pads = not looks or any(getattr(part, "padding_idx", None) is not None for part in parts)
        self.rows: list[Tensor] = []

    def _moves(self, value: Tensor) -> bool:
        """Whether another tensor of the user's is computed with in another dtype, or written to."""
        cast = self._dtype == torch.float64 and value.dtype != torch.float64
        return value.is_floating_point() and (cast or self.objective._renormalised)

    def obstacle(self) -> str:
        """Return why the user's tensors cannot hold other values, if so."""
        if any(value.is_inference() for value in self.targets.values()):
            return "the model's own parameters were made under torch.inference_mode(), and cannot be differentiated by"
        changed = [value for value in (*self.targets.values(), *self._others) if value.dtype != self._dtype]
        if any(value.requires_grad and value.is_leaf and _has_graph(value) for value in changed):
            return "a graph of your own ends at the parameters, and would be lost if these had another dtype"
        return ""

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let the user's tensors hold other values for as long as the context lasts."""
        self._lent_buffers = [_Lent(value, moves=False) for value in self._buffers]
        lent = [_Lent(value, moves=True) for value in (*self.targets.values(), *self._others)] + self._lent_buffers
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
            value.requires_grad_()
        for value in self._others:
            value.data = value.detach().to(self._dtype, copy=True)

    def return_to_point(self) -> None:
        """Undo what an evaluation that has failed has left."""
        self.move({}, 0.0)
        _put_back(self._lent_buffers)

    def move(self, along: Mapping[str, Tensor], step: float) -> None:
        """Set the parameters to the point plus `step` times a direction."""
        for name, value in self.targets.items():
            value.data = self.base[name] + step * along[name] if name in along else self.base[name].clone()

    def joins(self, kernel: Any) -> bool:
        """Whether the data may be evaluated as one batch."""
        objective = self.objective
        if kernel.by_batch or objective._batch_weight is not None or objective._part_weights is not None:
            return False
        # A model that is called once a batch would find in its buffers what it has left there.
        parts = list(self._model.modules()) if isinstance(self._model, nn.Module) else []
        buffers = (one for part in parts if part.training for one in part.buffers(recurse=False))
        writes = objective.guard.writes or any(True for _ in buffers)
        return not writes and not batchwise_modules(objective.modules)

    def run(self, function: Callable[[list[Any]], Any], batches: list[Any]) -> Any:
        """Return ``function(batches)``; what it writes to batches and buffers is undone.

        If it holds derivatives of normalisations, these are computed by elementary operations: torch's own gradient of
        them is wrong (see `curvop.kernels.differentiable`).
        """
        norms = ElementaryNorms() if self.objective.evaluator.elementary_norms else contextlib.nullcontext()
        with torch.enable_grad(), norms:
            return self.objective.guard.run(functools.partial(self._padded, function), batches)

    def _padded(self, function: Callable[[list[Any]], Any], batches: list[Any]) -> Any:
        with HeldPadding(self.rows) if self._pads else contextlib.nullcontext():
            return function(batches)

    def in_precision(self, batch: Any) -> Any:
        """Return a batch as it is given to the user's code."""
        return in_double(batch) if self._dtype == torch.float64 else batch

    def predict(self, batch: Any) -> Any:
        """Return the model's prediction."""
        X, _ = batch
        return self._model(X) if isinstance(self._model, nn.Module) else self._model(dict(self.targets), X)

    def loss(self, batches: list[Any]) -> tuple[Tensor, Any]:
        """Return the loss of the batches as one, and their predictions."""
        if isinstance(self.objective, CallableObjective):
            for batch in batches:
                self.objective.weight(None, 0, batch)  # raises if its size is not known
            return self.objective._objective(dict(self.targets), joined(batches)), None
        predictions = [self.predict(batch) for batch in batches]
        return self.criterion(predictions, batches), predictions

    def predicts_apart(self, batches: list[Any]) -> bool:
        """Whether the loss of batches as one does not depend on the order in which their predictions are made.

        It does if the loss reads what the model has left of the last one.
        """
        if isinstance(self.objective, CallableObjective):
            return True

        def backwards(own: list[Any]) -> Tensor:
            predictions = [self.predict(batch) for batch in reversed(own)]
            return self.criterion(predictions[::-1], own).detach()

        forwards = self.run(lambda own: self.loss(own)[0].detach(), batches)
        return bool(torch.allclose(forwards, self.run(backwards, batches), 1e-6, 0.0, equal_nan=True))

    def criterion(self, predictions: list[Any], batches: list[Any]) -> Tensor:
        """Return the loss of predictions for the batches, as one."""
        prediction, y = joined([(one, batch[1]) for one, batch in zip(predictions, batches, strict=True)])
        loss: Tensor = self.objective.loss_function(prediction, y)  # type: ignore[attr-defined]
        return loss

    def gradient(
        self, outputs: Sequence[Tensor], seeds: Sequence[Tensor] | None = None, names: Iterable[str] | None = None
    ) -> Values:
        """Return the gradient of outputs, weighted by `seeds`, by the parameters that take part, or by `names`."""
        names = self.names if names is None else tuple(names)
        return dict(zip(names, gradient_of(outputs, [self.targets[name] for name in names], seeds), strict=True))


def gradient_of(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor] | None) -> list[Tensor]:
    """Return the gradient of outputs, weighted by `seeds`, by `inputs`; zero for what they do not reach."""
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
