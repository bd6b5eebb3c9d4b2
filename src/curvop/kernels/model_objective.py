"""The objective of a model and a loss function: ``loss_function(model(X), y)`` over batches ``(X, y)``."""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from curvop.kernels.batches import at_batch
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.guard import Record, modules_of, own_batch, replaced
from curvop.kernels.losses import (
    check_classes,
    loss_derivative,
    loss_divisor,
    loss_kind,
    loss_reduction,
    loss_value,
)
from curvop.kernels.memory import out_of_memory
from curvop.kernels.objective import BatchLoss, BatchWeight, Buffers, EvaluatedLoss, Evaluation, Objective
from curvop.kernels.objective_checks import reached
from curvop.kernels.parameters import check_callable, checked_params
from curvop.kernels.target_loss import TargetLoss

__all__ = ["ModelObjective"]

T = TypeVar("T")

#: A function ``prediction -> (copy, parts)``. Here ``copy`` is a detached copy of the prediction, and ``parts`` is a
#: list of tensors in the copy. The loss is differentiated with respect to these tensors.
Cut = Callable[[Any], tuple[Any, list[Tensor]]]

_SETTINGS = (bool, int, float, str)
#: If a prediction has at least this many entries, gradients also use a closed form, which saves memory.
_LARGE = 2**18
_RECOMPUTES = (
    "the model recomputes layers in the backward pass (gradient checkpointing), but torch then uses the model's own "
    "parameters in place of params: pass the model's own, which must require grad, or turn checkpointing off"
)


class ModelObjective(Objective):
    """The loss ``loss_function(model(X), y)`` over batches ``(X, y)``.

    Parameters
    ----------
    model : nn.Module or callable ``(params, X) -> prediction``
    loss_function : callable ``(prediction, y) -> scalar``
    params : dict of str to Tensor, or iterable of the model's own parameters
    data : iterable of pairs ``(X, y)``
    batch_weight : callable, optional
        A function ``batch -> w_b`` that returns the weight of a batch. Pass this function if the loss function averages
        over something other than the examples of a batch.
    """

    #: The name of the loss function in error messages.
    loss_name = "loss_function"
    _is_standard = False  # operators that were pickled by version 0.2.0 do not have it

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        loss_function: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        batch_weight: BatchWeight | None = None,
    ) -> None:
        check_callable("model", model, "an nn.Module, or a function (params, X) -> prediction")
        check_callable("loss_function", loss_function, "a loss of torch.nn, or a function (prediction, y) -> scalar")
        if isinstance(loss_function, TargetLoss):
            raise TypeError(
                "loss_function is a TargetLoss, which takes a whole batch, as in from_functions, but "
                "data yields pairs (X, y) here: pass its loss_function, and data with the targets y"
            )
        modules = [*modules_of(model), *modules_of(loss_function)]
        self._set_up(model, loss_function, modules, params, data, batch_weight)

    def _set_up(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        loss_function: Callable[[Any, Any], Tensor],
        modules: Iterable[nn.Module],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[Any],
        batch_weight: BatchWeight | None,
    ) -> None:
        """Initialize the objective. `modules` are the modules to which `model` and `loss_function` refer."""
        reduction = loss_reduction(loss_function, self.loss_name)
        self._model = model
        #: For the keys of a mapping X: whether the model is called as ``model(**X)``, and the reason for this choice.
        self._calls: dict[tuple[Any, ...], tuple[bool, str]] = {}
        self.loss_function = loss_function
        modules = list(dict.fromkeys(modules))
        Objective.__init__(self, modules, checked_params(model, params), data, reduction, batch_weight)
        self._has_state = isinstance(loss_function, nn.Module)
        # True if the model is a module, and the loss function is a module or a known function.
        self._is_standard = isinstance(model, nn.Module) and (
            self._has_state
            or loss_kind(loss_function) is not None
            or getattr(loss_function, "stands_in", False) is True
        )
        self._divisor = loss_divisor(loss_function)
        self._derivative = loss_derivative(loss_function)

    def _set_modules(self, modules: Sequence[nn.Module]) -> None:
        super()._set_modules(modules)
        own = {id(value) for module in self.modules for value in module.parameters()}
        self._apart = self._renormalized or any(
            id(value) not in own or not value.requires_grad for value in self.params.values()
        )
        self._check_replaceable()

    def _check_replaceable(self) -> None:
        """Raise a TypeError if a scripted or traced module owns one of the parameters.

        The parameters of scripted and traced modules cannot be replaced.
        """
        names = {id(original): name for name, tensors in self.originals().items() for original in tensors}
        for path, part in (named for module in self.modules for named in module.named_modules()):
            own = [names[id(value)] for value in part.parameters() if id(value) in names]
            if own and isinstance(part, torch.jit.ScriptModule):
                what = f"model's layer {path!r}" if path else "model"
                raise TypeError(
                    f"{what} is scripted or traced (a {type(part).__name__} of torch.jit), and its parameter "
                    f"{own[0]!r} cannot be replaced: pass the original module; for speed use engine='compiled'"
                )

    def pair(self, batch: Any) -> tuple[Any, Any]:
        """Return ``(X, y)``: the inputs that the model receives, and the targets that the loss function receives.

        The targets may be computed by the user's code. Call this method only where the guard undoes side effects. Other
        code calls `inputs` and `targets`, or reads the attribute ``y`` of a `BatchLoss`.
        """
        X, y = batch
        return X, y

    def inputs(self, batch: Any) -> Any:
        """Return the inputs that the model receives, without running any of the user's code."""
        return batch[0]

    def targets(self, batch: Any) -> Any:
        """Return the targets that the loss function receives, without side effects on modules or on the batch."""
        return batch[1]

    def predict(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        """Return the model's prediction for a batch as a differentiable function of `leaves`.

        Within the `slow_backends` context, the prediction can be differentiated twice.
        """
        return self._run(self._prediction, leaves, batch, "prediction")

    def split(
        self,
        leaves: Mapping[str, Tensor],
        index: int,
        batch: Any,
        cut: Cut,
        recorder: AbstractContextManager[Any] | None = None,
    ) -> tuple[Any, Any, list[Tensor], BatchLoss]:
        """Evaluate the model, and evaluate the loss function on a detached copy of the prediction.

        If `recorder` is given, this context manager is active while the model runs. It is entered again if the model
        has to run again.

        Returns
        -------
        prediction : Any
            The prediction as a differentiable function of `leaves`.
        copy : Any
            A detached copy of the prediction.
        parts : list of Tensor
            The tensors in `copy` with respect to which the loss is differentiated.
        loss : BatchLoss
            The loss as a differentiable function of `parts`, with the targets of the batch.

        Raises
        ------
        ValueError
            If the loss depends on a parameter directly, and not only through the prediction. A matrix computed from
            the prediction would then be incomplete.
        """

        def evaluate(leaves: Mapping[str, Tensor], own: Any) -> _Split:
            X, y = self.pair(own)
            with self._evaluating(self._apart):
                with contextlib.nullcontext() if recorder is None else recorder:
                    prediction = self._predict(leaves, X)
                copy, parts = cut(prediction)
                return _Split(prediction, copy, parts, self._criterion(copy, X, y), y)

        with at_batch(index):
            prediction, copy, parts, evaluated, y = self._run(evaluate, leaves, batch, "split", recorder is None)
        loss = self._batch_loss(evaluated, index, batch)
        loss.y = y
        return prediction, copy, parts, loss

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> EvaluatedLoss:
        X, y = self.pair(batch)
        with self._evaluating(self._apart):
            return self._criterion(self._predict(leaves, X), X, y)

    def _loss_once(self, leaves: Mapping[str, Tensor], batch: Any) -> EvaluatedLoss:
        X, y = self.pair(batch)
        with self._evaluating(self._apart):
            prediction = self._predict(leaves, X)
            with _without_mode(prediction):
                # With a coarse dtype, autograd would round each step.
                is_tensor = isinstance(prediction, Tensor)
                closed = is_tensor and (prediction.numel() >= _LARGE or prediction.dtype.itemsize < 4)
            return (self._criterion if closed else self._autograd_criterion)(prediction, X, y)

    def _prediction(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        with self._evaluating(self._apart):
            return self._predict(leaves, self.inputs(batch))

    def _evaluating(self, apart: bool) -> AbstractContextManager[None]:
        """If `apart` is True, make gradient checkpointing raise an error while the context is active.

        PyTorch recomputes checkpointed layers with the model's own parameters. If derivatives are taken with respect to
        other tensors (`apart` is True), the recomputed layers would be wrong.
        """
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True) if apart else None  # the user's hooks, if any
        if apart and hooks is None and self._recomputes():
            return torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES)
        return contextlib.nullcontext()

    def _recomputes(self) -> bool:
        """Return True if checkpointed layers would be recomputed with parameters other than the leaves."""
        return isinstance(self._model, nn.Module)

    def _check_batch(self, index: int, batch: Any) -> None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"data must yield pairs (X, y), such as [(X, y)], but it yielded a {type(batch).__name__}")

    def _criterion(self, prediction: Any, X: Any, y: Any) -> EvaluatedLoss:
        if self._derivative is not None:
            with _without_mode(prediction, X, y):
                check_classes(self.loss_function, prediction)
                with torch.no_grad():
                    loss, divisor = loss_value(self.loss_function, prediction, y), self._divisor(prediction, X, y)
                closed_form = self._derivative(prediction, y, divisor)
            if closed_form is not None:
                return loss, divisor, prediction, closed_form
        return self._autograd_criterion(prediction, X, y)

    def _autograd_criterion(self, prediction: Any, X: Any, y: Any) -> EvaluatedLoss:
        with _without_mode(prediction):
            check_classes(self.loss_function, prediction)
        loss = self.loss_function(prediction, y)
        with _without_mode(prediction, X, y), torch.no_grad():
            return loss, self._divisor(prediction, X, y), loss, None

    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss of a batch by calling the model and the loss function.

        If the objective belongs to a Jacobian and has no loss function, return the sum of the predictions.
        """
        X, y = self.pair(batch)
        prediction = self._predict(leaves, X)
        if getattr(self.loss_function, "stands_in", False):  # a plain sum is cheaper than `prediction_sum`
            return torch.stack([part.sum() for part in leaves_of(prediction) if part.is_floating_point()]).sum()
        return self.loss_function(prediction, y)

    def divisor_of(self, prediction: Any, index: int, batch: Any, y: Any) -> float:
        """Return the number by which the loss function divides the sum over the examples of batch number `index`.

        Only the shape of `prediction` is used. `y` are the targets of the batch.

        Raises
        ------
        ValueError
            If the number is unknown and no ``batch_weight`` was passed.
        """
        divisor = self._divisor(prediction, self.inputs(batch), y)
        overridden = self._batch_weight is not None and loss_kind(self.loss_function) is None
        if divisor is not None and not overridden:
            return divisor
        if self._batch_weight is None:
            raise ValueError(
                f"the number of examples that the loss of batch {index} averages over is not known: pass "
                "batch_weight=, a function of the batch"
            )
        return self._weight(index, batch, None)

    def state(self) -> tuple[object, ...]:
        """Return a tuple that represents the current state of the objective and the settings of the loss function.

        The tuples returned before and after a change are not equal.
        """
        own = self.loss_function
        settings = [value for value in vars(own).values() if isinstance(value, _SETTINGS)] if self._has_state else ()
        return *super().state(), settings

    def _is_pure(self, record: Record, batch: Any) -> bool:
        return (
            self._is_standard
            and all(type(part) is Tensor and not part.requires_grad for part in batch)
            and torch._C._len_torch_function_stack() == 0  # the user's modes need not be pure
            and record.is_pure
        )

    def _check_result(self, result: Any, leaves: Mapping[str, Tensor]) -> None:
        if isinstance(result, _Split):
            direct = reached(leaves_of(result.loss), {name: [leaf] for name, leaf in leaves.items()})
            if direct:
                raise ValueError(
                    f"the loss depends on {min(direct, key=list(leaves).index)!r} in another way than through the "
                    "prediction, as a penalty does, but this matrix covers the prediction only: use "
                    "HessianLinearOperator, or take the penalty out of loss_function and add its curvature to the "
                    "matrix G: for decay times the sum of squares this is G + 2 * decay * I, G.damped(2 * decay)"
                )

    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        return self._divisor(prediction, self.inputs(batch), self.targets(batch))

    def assumes_weights(self) -> bool:
        """Return True if the weights of the batches are only assumed, and should be verified.

        Weights are assumed if `loss_kind` does not recognize the loss function and no ``batch_weight`` was passed. The
        objective of a Jacobian has no loss, and needs no weights.
        """
        known = loss_kind(self.loss_function) is not None or self._batch_weight is not None
        return not known and not getattr(self.loss_function, "stands_in", False)

    def assumes_curvature(self) -> bool:
        """Return True if a loss that is linear in the prediction is probably a mistake.

        A loss function that `loss_kind` recognizes, such as ``L1Loss``, may be linear on purpose.
        """
        return loss_kind(self.loss_function) is None

    def reached_directly(self, name: str) -> str:
        """Return the error message for a function that uses the parameter `name` directly."""
        return (
            f"params[{name!r}] is reached directly: a function holds the tensor itself, so it cannot be replaced, and "
            "part of the loss would not be differentiated; read it from the model inside the function "
            "(model.get_parameter, model.parameters()), or from the function's argument"
        )

    def originals(self) -> dict[str, list[Tensor]]:
        """Return a dict that maps each parameter name to a list of the tensors that the leaf of this name replaces.

        Each list contains the tensor in `params`. If the model's own parameter is a different tensor, the list contains
        this tensor, too.
        """
        if not isinstance(self._model, nn.Module):
            return super().originals()
        own = dict(self._model.named_parameters(remove_duplicate=False))
        return {
            name: list({id(tensor): tensor for tensor in (value, own[name])}.values())
            for name, value in self.params.items()
        }

    def _predict(self, leaves: Mapping[str, Tensor], X: Any) -> Any:
        if not isinstance(self._model, nn.Module):
            return self._model(dict(leaves), X)
        return self._called(X, self._takes_keywords(X)) if isinstance(X, Mapping) else self._own_model()(X)

    def _own_model(self) -> nn.Module:
        """Return the module to call.

        DataParallel would copy the model's own parameters to several devices, and would not use the leaves.
        """
        model: nn.Module = self._model  # type: ignore[assignment]  # called for modules only
        return model.module if isinstance(model, nn.DataParallel) else model

    def _run(
        self, function: Evaluation[T], leaves: Mapping[str, Tensor], batch: Any, what: str, compares_flags: bool = True
    ) -> T:
        X = self.inputs(batch) if isinstance(self._model, nn.Module) else None
        if isinstance(X, Mapping) and tuple(X) not in self._calls:
            own_leaves = self.replacements(leaves)
            self.guard.run(lambda own: self._takes_keywords(self.inputs(own)), batch, own_leaves, hold=False)
        return super()._run(function, leaves, batch, what, compares_flags)

    def _takes_keywords(self, X: Mapping[Any, Any]) -> bool:
        """Return True if the model is called as ``model(**X)``, and False if it is called as ``model(X)``.

        If the signature of ``forward`` allows both, the model is called as ``model(X)`` with the first batch. If this
        call raises an error, the model is called as ``model(**X)``. The decision is kept for all mappings with the same
        keys.
        """
        keys = tuple(X)
        if keys not in self._calls:
            fits, reason = _as_keywords(self._own_model(), X), ""
            if fits is None:
                try:
                    self._own_model()(X)
                except Exception as error:
                    if _adds_no_note(error):
                        raise
                    fits, reason = True, f" As one argument, model(X), it raised {_described(error)}."
            self._calls[keys] = bool(fits), reason
        return self._calls[keys][0]

    def _called(self, X: Mapping[Any, Any], keywords: bool) -> Any:
        """Call the model. If it fails, add a note to the error: how `X` was passed, and the other way to pass it."""
        model = self._own_model()
        before = self._calls[tuple(X)][1]
        names = {"keys": ", ".join(map(repr, X))}
        try:
            return model(**X) if keywords else model(X)
        except Exception as error:
            if _adds_no_note(error):
                raise
            names["parameters"] = ", ".join(_forward_parameters(model))
            note = _CALLS[keywords].format(before=before, **names)
            if before:  # both ways failed: decide again after the user has changed the model
                self._calls.pop(tuple(X), None)
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise

    def _constants(self) -> dict[str, Tensor]:
        """Return a dict of the tensors of the modules that are not differentiated, by name.

        The dict contains copies of the buffers, and the detached parameters that are not in `params`. Tensors of a loss
        function that is a module are not included.
        """
        selected = {id(tensor) for tensors in self.originals().values() for tensor in tensors}
        values: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}
        for prefix, module in self._named_modules():
            own = module.named_parameters(prefix)
            values |= {name: _detached(value) for name, value in own if id(value) not in selected}
            buffers |= {name: buffer.clone() for name, buffer in module.named_buffers(prefix)}
        if self._renormalized:
            values = {name: value.clone() for name, value in values.items()}
        return values | buffers

    def buffers(self, leaves: Mapping[str, Tensor]) -> Buffers:
        """Return the constant tensors of the modules (see `_constants`) and the tensors of the loss function."""
        loss: dict[str, Tensor] = {}
        if isinstance(self.loss_function, nn.Module):
            shared = {id(tensor) for tensor in self._model_tensors().values()}  # already among the model's constants
            loss = {name: buffer.clone() for name, buffer in self.loss_function.named_buffers()}
            loss |= {name: value.detach() for name, value in self.loss_function.named_parameters()}
            named = (*self.loss_function.named_buffers(), *self.loss_function.named_parameters())
            loss = {name: loss[name] for name, own in named if id(own) not in shared}
        elif isinstance(self.loss_function, functools.partial):
            keywords = self.loss_function.keywords
            loss = {name: value for name, value in keywords.items() if isinstance(value, Tensor)}
        return {"model": self._constants(), "loss": loss}

    def _model_tensors(self) -> dict[str, Tensor]:
        """Return a dict of the parameters and buffers of all modules except the loss function, by name."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self._named_modules():
            tensors |= dict(module.named_parameters(prefix, remove_duplicate=False)) | dict(
                module.named_buffers(prefix)
            )
        return tensors

    def _named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules except the loss function, each with a prefix for the names of its tensors.

        If the model is a module, its prefix is empty. All other prefixes start with ``modules.``. No name in the model
        starts with ``modules.``, because a module cannot have a submodule with the name ``modules``.
        """
        for number, module in enumerate(self.modules):
            if module is self._model:
                yield "", module
            elif module is not self.loss_function:
                yield f"modules.{number}", module

    @contextlib.contextmanager
    def _substituted(self, leaves: Mapping[str, Tensor], buffers: Buffers) -> Iterator[None]:
        """Replace the tensors of the modules by `leaves` and `buffers` while the context is active."""
        own = self._model_tensors()
        swaps = {id(own[name]): value for name, value in buffers["model"].items()}
        if isinstance(self.loss_function, nn.Module):
            named = dict(self.loss_function.named_parameters()) | dict(self.loss_function.named_buffers())
            swaps |= {id(named[name]): value for name, value in buffers["loss"].items()}
        originals = self.originals()
        swaps |= {id(original): leaf for name, leaf in leaves.items() for original in originals[name]}
        with replaced(self.modules, swaps):
            yield

    def traced(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Any]:
        """Return ``(loss, prediction)`` for a batch, as a pure function of the arguments."""
        own = own_batch(batch, self.guard.writes)
        with self._substituted(leaves, buffers), self._evaluating(True):
            X, y = self.pair(own)
            prediction = self._predict(leaves, X)
            return self._traced_criterion(prediction, buffers, y), prediction

    def traced_split(
        self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any, cut: Cut
    ) -> tuple[Any, list[Tensor], Tensor, Any]:
        """Return ``(prediction, parts, loss, y)`` for a batch, as a pure function of the arguments.

        As in `split`, ``parts`` are tensors in a detached copy of the prediction, and ``loss`` is a function of them.
        ``y`` are the targets of the batch.
        """
        own = own_batch(batch, self.guard.writes)
        with self._substituted(leaves, buffers), self._evaluating(True):
            X, y = self.pair(own)
            prediction = self._predict(leaves, X)
            copy, parts = cut(prediction)
            return prediction, parts, self._traced_criterion(copy, buffers, y), y

    def traced_targets(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> Any:
        """Return the targets of a batch as a pure function of the arguments."""
        own = own_batch(batch, self.guard.writes)
        with self._substituted(leaves, buffers):
            return self.pair(own)[1]

    def traced_prediction(self, leaves: Mapping[str, Tensor], buffers: Buffers, X: Any) -> Any:
        """Return the prediction for the inputs `X` as a pure function of the arguments."""
        own = own_batch(X, self.guard.writes)
        with self._substituted(leaves, buffers), self._evaluating(True):
            return self._predict(leaves, own)

    def traced_loss(self, leaves: Mapping[str, Tensor], prediction: Any, buffers: Buffers, y: Any) -> Tensor:
        """Return the loss of a prediction with the targets `y` as a pure function of the arguments."""
        own = own_batch(y, self.guard.writes)
        with self._substituted(leaves, buffers), self._evaluating(True):
            return self._traced_criterion(prediction, buffers, own)

    def _traced_criterion(self, prediction: Any, buffers: Buffers, y: Any) -> Tensor:
        keywords = buffers["loss"] if isinstance(self.loss_function, functools.partial) else {}
        return self.loss_function(prediction, y, **keywords)


class _Split(NamedTuple):
    """The results of `ModelObjective.split`, except that `loss` is an `EvaluatedLoss`."""

    prediction: Any
    copy: Any
    parts: list[Tensor]
    loss: EvaluatedLoss
    y: Any


def _without_mode(*values: Any) -> AbstractContextManager[None]:
    """Return a context manager that disables the function mode of the evaluator.

    Within the mode, reading a property of a tensor takes as long as an operation. The mode is not disabled if `values`
    contain anything but plain tensors, or if the user has enabled another mode.
    """
    if torch._C._len_torch_function_stack() == 1 and all(type(value) is Tensor for value in values):
        return torch._C.DisableTorchFunction()
    return contextlib.nullcontext()


def _detached(parameter: Tensor) -> Tensor:
    """Return a detached tensor with the values of a parameter.

    Instances of tensor subclasses are returned unchanged, because ``detach`` may lose their attributes.
    """
    if type(parameter) not in (Tensor, nn.Parameter):
        return parameter
    if parameter.is_inference():
        return parameter.detach().clone()  # autograd cannot save a tensor made under inference mode
    return parameter.detach()


def _as_keywords(model: nn.Module, X: Mapping[Any, Any]) -> bool | None:
    """Return True if a module must be called as ``model(**X)``, False for ``model(X)``, and None if both ways fit.

    A way fits if the arguments can be bound to the signature of ``forward``. If the first parameter of ``forward`` is
    annotated as a mapping, keywords do not fit.

    Raises
    ------
    TypeError
        If neither way fits.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # the signature of a scripted module is not available
        return False
    as_keywords = all(isinstance(key, str) for key in X) and _binds(signature, **X)
    as_one = _binds(signature, X)
    if not as_one and not as_keywords:
        raise TypeError(
            f"X is a mapping with the keys {', '.join(map(repr, X))}, which fits the model's "
            f"forward({', '.join(_forward_parameters(model))}) neither as one argument, model(X), nor as keywords, "
            "model(**X): make data yield a mapping whose keys are parameters of forward"
        )
    if as_one and as_keywords:
        first = next(iter(signature.parameters.values()))
        return False if _is_mapping_type(_annotation(model.forward, first)) else None
    return as_keywords


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    try:
        return inspect.signature(function, eval_str=True).parameters[parameter.name].annotation
    except Exception:  # a name that is imported for type checkers only
        return parameter.annotation


def _is_mapping_type(annotation: Any) -> bool:
    """Return True if an annotation is a mapping type, or an optional, union or ``Annotated`` type that includes one."""
    if isinstance(annotation, str):
        return re.search(r"\b(dict|Dict|\w*Mapping|\w*Encoding)\b", annotation) is not None
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(map(_is_mapping_type, typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Annotated:
        return _is_mapping_type(typing.get_args(annotation)[0])
    kind = typing.get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, Mapping)


def _forward_parameters(model: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a scripted module
        return ["..."]
    return [str(parameter.replace(annotation=parameter.empty)) for parameter in parameters]


def _adds_no_note(error: Exception) -> bool:
    """Return True if this package raised the error, or if the way the model was called is not its cause."""
    of_package = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    return of_package or out_of_memory(error) or _RECOMPUTES in str(error)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


_CALLS = {
    True: (
        "X is a mapping with the keys {keys}, which the model's forward({parameters}) accepts as keywords, so it was "
        "passed as model(**X).{before} To pass it as one argument, model(X), annotate the first parameter of forward "
        "as a Mapping."
    ),
    False: (
        "X is a mapping with the keys {keys}, and was passed to the model's forward({parameters}) as one argument, "
        "model(X). To pass it as keywords, model(**X), use the function lambda params, X: "
        "torch.func.functional_call(model, params, (), X) in place of the model."
    ),
}
