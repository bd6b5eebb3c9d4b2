r"""Call the user's model and loss the way the user calls them.

The kernels replace the model's parameters by other tensors. The code in this file instead calls the model and the loss
with the user's own parameters, and temporarily changes the values of these parameters. If the kernels fail to replace a
parameter, or the replacement has side effects, their products differ from those computed with this file. For example,
the loss may read ``model.parameters()``, or the forward pass may write to a buffer.

The values are changed by temporarily giving every parameter another ``.data`` tensor. In-place operations would not
work: they overwrite memory that retained graphs read, and they increment the version counter of the parameter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvop.kernels.batches import joined, map_leaves
from curvop.kernels.differentiable import ElementaryNorms, ReplacementMode
from curvop.kernels.guard import parts_of
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import CallableObjective, Objective
from curvop.kernels.objective_checks import batchwise_modules

__all__ = ["HeldPadding", "UserCode", "Values", "gradient_of", "in_double"]

Values = dict[str, Tensor]


class _SavedState:
    """The saved state of one of the user's tensors. If `moves` is True, the state includes the data of the tensor."""

    def __init__(self, tensor: Tensor, moves: bool) -> None:
        self._tensor, self._version = tensor, tensor._version
        self._data = tensor.data if moves else None
        self._leaf, self._flag, self._hooks = tensor.is_leaf, tensor.requires_grad, tensor._backward_hooks

    def restore(self) -> None:
        tensor = self._tensor
        if self._leaf and not tensor.is_leaf:  # a buffer that the forward pass wrote to
            tensor.detach_()
        if self._data is not None:
            tensor.data = self._data
        if tensor.requires_grad != self._flag:
            tensor.requires_grad_(self._flag)
        if tensor._backward_hooks is not self._hooks:
            tensor._backward_hooks = self._hooks
        if tensor._version != self._version:  # the tensor still has, or has again, the user's values
            torch._C._autograd._unsafe_set_version_counter((tensor,), (self._version,))


def _restore(states: Sequence[_SavedState]) -> None:
    for state in states:
        state.restore()


class UserCode:
    """Evaluate the user's model and loss while the user's own parameters temporarily have other values.

    Parameters
    ----------
    objective : Objective
    names : iterable of str
        Names of the parameters with respect to which the code is differentiated.
    dtype : torch.dtype
        Dtype of the computation: float64, or the dtype of the parameters.

    Attributes
    ----------
    base : dict of str to Tensor
        The values of the objective's parameters, at which the product is computed.
    targets : dict of str to Tensor
        The user's own parameters. Their values change within the context manager `lent`.
    padding_rows : list of Tensor
        The rows of embeddings at ``padding_idx``; see `HeldPadding`.
    """

    def __init__(self, objective: Objective, names: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.objective, self.names, self._dtype = objective, tuple(names), dtype
        self.base: Values = {name: value.detach().to(dtype) for name, value in objective.params.items()}
        self._model: Any = objective._model if isinstance(objective, ModelObjective) else None
        own: Mapping[str, Tensor] = objective.params
        if isinstance(self._model, nn.Module):
            own = dict(self._model.named_parameters(remove_duplicate=False))
        # The values of a parameter that is not a leaf cannot be changed. Only models and objectives that are functions
        # have such parameters. Pass clones to the function instead.
        self.targets: Values = {
            name: own[name] if own[name].is_leaf else self.base[name].clone() for name in objective.params
        }
        others: list[Tensor] = [value for module in objective.modules for value in module.parameters()]
        buffers = [value for module in objective.modules for value in module.buffers()]
        loss = getattr(objective, "loss_function", None)
        if isinstance(loss, functools.partial):
            others += [value for value in loss.keywords.values() if isinstance(value, Tensor)]
        selected = {id(value) for value in self.targets.values()}
        self._others = _distinct(selected, [value for value in (*others, *buffers) if self._moves(value)])
        self._buffers = _distinct(selected | {id(value) for value in self._others}, buffers)
        # Assume that a function has embeddings with padding, because its embeddings cannot be found here.
        is_module = isinstance(getattr(objective, "_objective", self._model), nn.Module)
        parts = parts_of(objective.modules)
        self._pads = not is_module or any(getattr(part, "padding_idx", None) is not None for part in parts)
        self.padding_rows: list[Tensor] = []
        self._spreads: dict[tuple[Any, ...], bool] = {}  # whether a mapping with these keys is passed as keywords

    def _moves(self, value: Tensor) -> bool:
        """Return True if a tensor that is not in `targets` must be replaced by a copy.

        A copy is needed if the computation uses another dtype, or if the model may write to the tensor.
        """
        cast = self._dtype == torch.float64 and value.dtype != torch.float64
        return value.is_floating_point() and (cast or self.objective._renormalized)

    def obstacle(self) -> str:
        """Return the reason why the user's tensors cannot be changed, or an empty string if they can."""
        if any(value.is_inference() for value in self.targets.values()):
            return "the model's own parameters were created in torch.inference_mode(), which excludes derivatives"
        changed = [value for value in (*self.targets.values(), *self._others) if value.dtype != self._dtype]
        if any(value.requires_grad and value.is_leaf and _has_graph(value) for value in changed):
            return "a graph of your own ends at the parameters, and would be lost if these had another dtype"
        return ""

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Allow changes of the user's tensors within a ``with`` block, and restore the tensors afterwards."""
        self._buffer_states = [_SavedState(value, moves=False) for value in self._buffers]
        moved = (*self.targets.values(), *self._others)
        states = [_SavedState(value, moves=True) for value in moved] + self._buffer_states
        try:
            try:
                self._take()
                yield
            finally:
                _restore(states)
        except BaseException:  # Ctrl-C may have interrupted `_restore`
            _restore(states)
            raise

    def _take(self) -> None:
        for name, value in self.targets.items():
            value.data = self.base[name].clone()
            if value._backward_hooks is not None:  # hooks are meant for the user's own backward passes only
                value._backward_hooks = None
            value.requires_grad_()
        for value in self._others:
            value.data = value.detach().to(self._dtype, copy=True)

    def return_to_point(self) -> None:
        """After a failed evaluation, reset the parameters to `base` and restore the buffers."""
        self.move({}, 0.0)
        _restore(self._buffer_states)

    def move(self, along: Mapping[str, Tensor], step: float) -> None:
        """Set each parameter to ``base + step * along``. Parameters that are not in `along` are set to `base`."""
        for name, value in self.targets.items():
            value.data = self.base[name] + step * along[name] if name in along else self.base[name].clone()

    def joins(self, kernel: Any) -> bool:
        """Return True if all batches can be evaluated as one batch."""
        objective = self.objective
        if kernel.by_batch or objective._batch_weight is not None or objective._part_weights is not None:
            return False
        # The model is called once per batch, so it must not write to buffers that the next call reads.
        parts = list(self._model.modules()) if isinstance(self._model, nn.Module) else []
        buffers = (buffer for part in parts if part.training for buffer in part.buffers(recurse=False))
        writes = objective.guard.writes or any(True for _ in buffers)
        return not writes and not batchwise_modules(objective.modules)

    def run(self, function: Callable[[list[Any]], Any], batches: list[Any]) -> Any:
        """Return ``function(batches)``, and undo its writes to batches and buffers.

        If the objective contains derivatives of normalizations, compute the normalizations with elementary operations.
        Derivatives of torch's fused normalizations would be wrong (see `curvop.kernels.differentiable`).
        """
        for batch in batches if isinstance(self._model, nn.Module) else ():
            self._choose_call(batch)
        norms = ElementaryNorms() if self.objective.evaluator.elementary_norms else contextlib.nullcontext()
        with torch.enable_grad(), norms:
            return self.objective.guard.run(functools.partial(self._padded, function), batches)

    def _choose_call(self, batch: Any) -> None:
        """Record whether the user would call the model as ``model(**X)`` for a mapping with the keys of this batch.

        If the signature of ``forward`` allows both ``model(X)`` and ``model(**X)``, assume that the user calls
        ``model(X)``, unless this call raises an error.
        """
        keys = _keys_of(self.objective.inputs(batch))  # type: ignore[attr-defined]
        if not keys or keys in self._spreads:
            return
        one, spread = _accepted_calls(self._model, keys)
        if one and spread:
            try:
                self.objective.guard.run(lambda own: self._model(self.objective.inputs(own)), batch)  # type: ignore[attr-defined]
                spread = False
            except Exception:
                one = False
        self._spreads[keys] = spread and not one

    def _padded(self, function: Callable[[list[Any]], Any], batches: list[Any]) -> Any:
        with HeldPadding(self.padding_rows) if self._pads else contextlib.nullcontext():
            return function(batches)

    def in_precision(self, batch: Any) -> Any:
        """Convert a batch to float64 if the computation uses float64. Otherwise, return the batch unchanged."""
        return in_double(batch) if self._dtype == torch.float64 else batch

    def predict(self, batch: Any) -> Any:
        """Return the model's prediction for a batch."""
        X = self.objective.inputs(batch)  # type: ignore[attr-defined]
        if not isinstance(self._model, nn.Module):
            return self._model(dict(self.targets), X)
        return self._model(**X) if self._spreads.get(_keys_of(X)) else self._model(X)

    def targets_of(self, batch: Any) -> Any:
        """Return the targets of a batch."""
        return self.objective.pair(batch)[1]  # type: ignore[attr-defined]

    def loss(self, batches: list[Any]) -> tuple[Tensor, Any]:
        """Join the batches into one batch, and return ``(loss, predictions)``.

        ``loss`` is the loss of the joined batch. ``predictions`` is a list with the prediction of each separate batch,
        or None if the objective is a function of parameters and batch.
        """
        if isinstance(self.objective, CallableObjective):
            for batch in batches:
                self.objective.weight(None, 0, batch)  # raises if the size of the batch is unknown
            return self.objective._objective(dict(self.targets), joined(batches)), None
        targets = [self.targets_of(batch) for batch in batches]
        predictions = [self.predict(batch) for batch in batches]
        return self._joined_loss(predictions, targets), predictions

    def predicts_apart(self, batches: list[Any]) -> bool:
        """Return True if the loss of the joined batches does not depend on the order in which the model is called.

        The loss depends on this order if it reads a value that the model stored in its last call.
        """
        if isinstance(self.objective, CallableObjective):
            return True

        def backwards(own: list[Any]) -> Tensor:
            targets = [self.targets_of(batch) for batch in own]
            predictions = [self.predict(batch) for batch in reversed(own)]
            return self._joined_loss(predictions[::-1], targets).detach()

        forwards = self.run(lambda own: self.loss(own)[0].detach(), batches)
        return bool(torch.allclose(forwards, self.run(backwards, batches), 1e-6, 0.0, equal_nan=True))

    def criterion(self, predictions: list[Any], batches: list[Any]) -> Tensor:
        """Join the predictions and the targets of all batches, and return the loss of the joined batch."""
        return self._joined_loss(predictions, [self.targets_of(batch) for batch in batches])

    def _joined_loss(self, predictions: list[Any], targets: list[Any]) -> Tensor:
        prediction, y = joined(list(zip(predictions, targets, strict=True)))
        loss: Tensor = self.objective.loss_function(prediction, y)  # type: ignore[attr-defined]
        return loss

    def gradient(
        self, outputs: Sequence[Tensor], seeds: Sequence[Tensor] | None = None, names: Iterable[str] | None = None
    ) -> Values:
        """Return the gradient of the sum of `outputs`, weighted by `seeds`, as a dict by parameter name.

        The gradient is with respect to the parameters in `names`. By default, these are the names passed to
        `UserCode`.
        """
        names = self.names if names is None else tuple(names)
        return dict(zip(names, gradient_of(outputs, [self.targets[name] for name in names], seeds), strict=True))


def _keys_of(X: Any) -> tuple[Any, ...]:
    return tuple(X) if isinstance(X, Mapping) else ()


def _accepted_calls(model: nn.Module, keys: Sequence[Any]) -> tuple[bool, bool]:
    """Return ``(one, spread)``: whether ``forward`` accepts ``model(X)``, and whether it accepts ``model(**X)``.

    The kernels decide the same question by binding arguments to the signature of ``forward``. This function shares no
    code with them: it counts the parameters of ``forward`` and compares their names with the keys of `X`. If the first
    parameter is annotated as a mapping, ``spread`` is False.
    """
    while isinstance(model, nn.DataParallel):
        model = model.module
    function = inspect.unwrap(model.forward)
    try:
        spec = inspect.getfullargspec(function)
    except TypeError:
        return True, False
    bound = inspect.ismethod(model.forward)
    positional = spec.args[int(bound) :]
    by_position_only = getattr(getattr(function, "__code__", None), "co_posonlyargcount", int(bound)) - int(bound)
    required = positional[: len(positional) - len(spec.defaults or ())]
    required_keywords = set(spec.kwonlyargs) - set(spec.kwonlydefaults or ())
    one = len(required) <= 1 and bool(positional or spec.varargs) and not required_keywords
    named = {*positional[max(by_position_only, 0) :], *spec.kwonlyargs}
    needed = {*required, *required_keywords}
    spread = all(isinstance(key, str) for key in keys) and needed <= named & set(keys)
    spread = spread and (set(keys) <= named or spec.varkw is not None)
    if one and spread and positional:
        try:
            kind = typing.get_type_hints(function).get(positional[0])
        except Exception:  # an annotation of a name that does not exist at runtime
            kind = spec.annotations.get(positional[0])
        spread = not _names_a_mapping(kind)
    return one, spread


def _names_a_mapping(kind: Any) -> bool:
    if isinstance(kind, str):
        words = "".join(letter if letter.isidentifier() else " " for letter in kind).split()
        return any(word in ("dict", "Dict") or word.endswith(("Mapping", "Encoding")) for word in words)
    if typing.is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, Mapping)):
        return True
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_names_a_mapping(part) for part in typing.get_args(kind))
    return origin is not None and origin is not kind and _names_a_mapping(origin)


def gradient_of(outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor] | None) -> list[Tensor]:
    """Return the gradient of the sum of `outputs`, weighted by `seeds`, with one tensor for each of `inputs`.

    The gradient is zero for inputs that the outputs do not depend on.
    """
    used = [index for index, output in enumerate(outputs) if output.requires_grad]
    if not used:
        return [torch.zeros_like(value) for value in inputs]
    ends = [outputs[index] for index in used]
    weights = None if seeds is None else [seeds[index] for index in used]
    grads = torch.autograd.grad(ends, list(inputs), weights, allow_unused=True, materialize_grads=True)
    return [part.detach() for part in grads]


def _distinct(known: set[int], tensors: list[Tensor]) -> list[Tensor]:
    """Return a list of the tensors without duplicates. Omit inference tensors, and tensors whose ids are in `known`."""
    distinct = {id(value): value for value in tensors if id(value) not in known and not value.is_inference()}
    return list(distinct.values())


def _has_graph(tensor: Tensor) -> bool:
    """Return True if one of the user's autograd graphs contains the leaf `tensor`.

    To find out, a hook is registered on the autograd node of the leaf. If one of the user's graphs contains the leaf,
    the graph keeps the node and the hook alive. Otherwise, the node and the hook are deleted immediately.
    """

    class Mark:
        def __call__(self, *gradients: Any) -> None:
            pass

    mark = Mark()
    reference = weakref.ref(mark)
    handle = torch.autograd.graph.get_gradient_edge(tensor).node.register_hook(mark)
    del mark
    alive = reference() is not None
    handle.remove()
    return alive


def in_double(tree: Any) -> Any:
    """Convert all floating-point tensors in a tree of tensors to float64."""
    return map_leaves(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


class HeldPadding(ReplacementMode):
    """Keep the padding rows of embeddings constant, because PyTorch's gradient treats them as constants.

    Parameters
    ----------
    rows : list of Tensor
        The row at ``padding_idx`` for each call of an embedding, in the order of the calls. If the list is empty, the
        first run fills it. Later runs, at other values of the parameters, use the rows in the list.
    """

    def __init__(self, rows: list[Tensor]) -> None:
        super().__init__()
        self._rows, self._calls = rows, 0

    def replacement(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function to call in place of `func`, or `func` itself."""
        return self._embedding if func is functional.embedding else func

    def _embedding(self, *args: Any, **kwargs: Any) -> Tensor:
        # Torch passes all arguments except the first two by name.
        if kwargs.get("padding_idx") is None:
            return functional.embedding(*args, **kwargs)
        return self._padded(*args, **kwargs)

    def _padded(self, indices: Tensor, weight: Tensor, *, padding_idx: int, **settings: Any) -> Tensor:
        embedded = functional.embedding(indices, weight, padding_idx, **settings)
        if self._calls == len(self._rows):
            self._rows.append(weight[padding_idx].detach().clone())
        self._calls += 1
        return torch.where((indices == padding_idx % len(weight))[..., None], self._rows[self._calls - 1], embedded)
