"""The objective of a model and a loss function: ``loss_function(model(X), y)`` over batches ``(X, y)``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvop.kernels.batches import at_batch
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.guard import modules_of, own_batch, replaced
from curvop.kernels.losses import check_classes, loss_derivative, loss_divisor, loss_kind, loss_reduction
from curvop.kernels.objective import BatchLoss, BatchWeight, Buffers, EvaluatedLoss, Objective
from curvop.kernels.objective_checks import reached
from curvop.kernels.parameters import check_callable, checked_params

__all__ = ["ModelObjective"]

#: A function ``prediction -> (copy, parts)``. Here ``copy`` is a detached copy of the prediction, and ``parts`` is a
#: list of tensors in the copy. The loss is differentiated with respect to these tensors.
Cut = Callable[[Any], tuple[Any, list[Tensor]]]

_SETTINGS = (bool, int, float, str)
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
        modules = list(dict.fromkeys((*modules_of(model), *modules_of(loss_function))))
        super().__init__(modules, checked_params(model, params), data, loss_reduction(loss_function), batch_weight)
        self._model = model
        own = {id(value) for value in model.parameters()} if isinstance(model, nn.Module) else set()
        self._apart = self._renormalized or any(
            id(value) not in own or not value.requires_grad for value in self.params.values()
        )
        self.loss_function = loss_function
        self._has_state = isinstance(loss_function, nn.Module)
        self._divisor = loss_divisor(loss_function)
        self._derivative = loss_derivative(loss_function)
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

    def predict(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        """Return the model's prediction for a batch as a differentiable function of `leaves`.

        Within the `slow_backends` context, the prediction can be differentiated twice.
        """
        return self._run(self._prediction, leaves, batch, "prediction")

    def split(
        self, leaves: Mapping[str, Tensor], index: int, batch: Any, cut: Cut
    ) -> tuple[Any, Any, list[Tensor], BatchLoss]:
        """Evaluate the model, and evaluate the loss function on a detached copy of the prediction.

        Returns
        -------
        prediction : Any
            The prediction as a differentiable function of `leaves`.
        copy : Any
            A detached copy of the prediction.
        parts : list of Tensor
            The tensors in `copy` with respect to which the loss is differentiated.
        loss : BatchLoss
            The loss as a differentiable function of `parts`.

        Raises
        ------
        ValueError
            If the loss depends on a parameter directly, and not only through the prediction. A matrix computed from
            the prediction would then be incomplete.
        """

        def evaluate(leaves: Mapping[str, Tensor], own: Any) -> _Split:
            with self._evaluating(self._apart):
                prediction = self._predict(leaves, own[0])
                copy, parts = cut(prediction)
                return _Split(prediction, copy, parts, self._criterion(copy, own))

        with at_batch(index):
            prediction, copy, parts, evaluated = self._run(evaluate, leaves, batch, "split")
        return prediction, copy, parts, self._batch_loss(evaluated, index, batch)

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> EvaluatedLoss:
        with self._evaluating(self._apart):
            return self._criterion(self._predict(leaves, batch[0]), batch)

    def _prediction(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        with self._evaluating(self._apart):
            return self._predict(leaves, batch[0])

    @contextlib.contextmanager
    def _evaluating(self, apart: bool) -> Iterator[None]:
        """If `apart` is True, make gradient checkpointing raise an error while the context is active.

        PyTorch recomputes checkpointed layers with the model's own parameters. If derivatives are taken with respect to
        other tensors (`apart` is True), the recomputed layers would be wrong.
        """
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # the user's hooks, if any
        disabled = apart and hooks is None and isinstance(self._model, nn.Module)
        with torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES) if disabled else contextlib.nullcontext():
            yield

    def _check_batch(self, index: int, batch: Any) -> None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"data must yield pairs (X, y), such as [(X, y)], but it yielded a {type(batch).__name__}")

    def _criterion(self, prediction: Any, batch: Any) -> EvaluatedLoss:
        _, y = batch
        check_classes(self.loss_function, prediction)
        if self._derivative is not None:
            with torch.no_grad():
                loss, divisor = self.loss_function(prediction, y), self._mean_divisor(prediction, batch)
            derivative = self._derivative(prediction, y, divisor)
            if derivative is not None:
                return loss, divisor, prediction, derivative
        loss = self.loss_function(prediction, y)
        with torch.no_grad():
            return loss, self._mean_divisor(prediction, batch), loss, None

    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss of a batch by calling the model and the loss function.

        If the objective belongs to a Jacobian and has no loss function, return the sum of the predictions.
        """
        X, y = batch
        prediction = self._predict(leaves, X)
        if getattr(self.loss_function, "stands_in", False):  # a plain sum is cheaper than `prediction_sum`
            return torch.stack([part.sum() for part in leaves_of(prediction) if part.is_floating_point()]).sum()
        return self.loss_function(prediction, y)

    def divisor_of(self, prediction: Any, index: int, batch: Any) -> float:
        """Return the number by which the loss function divides the sum over the examples of batch number `index`.

        Raises
        ------
        ValueError
            If the number is unknown and no ``batch_weight`` was passed.
        """
        divisor = self._mean_divisor(prediction, batch)
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
        return self._divisor(prediction, *batch)

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
        # DataParallel would copy the model's own parameters to several devices, and would not use the leaves.
        model = self._model.module if isinstance(self._model, nn.DataParallel) else self._model
        return model(X)

    def _constants(self) -> dict[str, Tensor]:
        """Return a dict of the model's tensors that are not differentiated, by name.

        The dict contains copies of the model's buffers, and the detached parameters that are not in `params`.
        """
        if not isinstance(self._model, nn.Module):
            return {}
        selected = {id(tensor) for tensors in self.originals().values() for tensor in tensors}
        values = {name: _detached(value) for name, value in self._model.named_parameters() if id(value) not in selected}
        if self._renormalized:
            values = {name: value.clone() for name, value in values.items()}
        return values | {name: buffer.clone() for name, buffer in self._model.named_buffers()}

    def buffers(self, leaves: Mapping[str, Tensor]) -> Buffers:
        """Return the constant tensors of the model (see `_constants`) and the tensors of the loss function."""
        loss: dict[str, Tensor] = {}
        if isinstance(self.loss_function, nn.Module):
            shared = {id(tensor) for tensor in self._model_tensors().values()}  # already among the model's constants
            loss = dict(self.loss_function.named_buffers())
            loss |= {name: value.detach() for name, value in self.loss_function.named_parameters()}
            named = (*self.loss_function.named_buffers(), *self.loss_function.named_parameters())
            loss = {name: loss[name] for name, own in named if id(own) not in shared}
        elif isinstance(self.loss_function, functools.partial):
            keywords = self.loss_function.keywords
            loss = {name: value for name, value in keywords.items() if isinstance(value, Tensor)}
        return {"model": self._constants(), "loss": loss}

    def _model_tensors(self) -> dict[str, Tensor]:
        """Return a dict of the model's parameters and buffers, by name."""
        if not isinstance(self._model, nn.Module):
            return {}
        return dict(self._model.named_parameters(remove_duplicate=False)) | dict(self._model.named_buffers())

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
            prediction = self._predict(leaves, own[0])
            return self._traced_criterion(prediction, buffers, own), prediction

    def traced_split(
        self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any, cut: Cut
    ) -> tuple[Any, list[Tensor], Tensor]:
        """Return ``(prediction, parts, loss)`` for a batch, as a pure function of the arguments.

        As in `split`, ``parts`` are tensors in a detached copy of the prediction, and ``loss`` is a function of them.
        """
        own = own_batch(batch, self.guard.writes)
        with self._substituted(leaves, buffers), self._evaluating(True):
            prediction = self._predict(leaves, own[0])
            copy, parts = cut(prediction)
            return prediction, parts, self._traced_criterion(copy, buffers, own)

    def traced_prediction(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> Any:
        """Return the prediction of a batch as a pure function of the arguments."""
        own = own_batch(batch, self.guard.writes)
        with self._substituted(leaves, buffers), self._evaluating(True):
            return self._predict(leaves, own[0])

    def traced_loss(self, leaves: Mapping[str, Tensor], prediction: Any, buffers: Buffers, batch: Any) -> Tensor:
        """Return the loss of a batch as a pure function of the arguments."""
        own = own_batch(batch, self.guard.writes)
        with self._substituted(leaves, buffers), self._evaluating(True):
            return self._traced_criterion(prediction, buffers, own)

    def _traced_criterion(self, prediction: Any, buffers: Buffers, batch: Any) -> Tensor:
        keywords = buffers["loss"] if isinstance(self.loss_function, functools.partial) else {}
        return self.loss_function(prediction, batch[1], **keywords)


class _Split(NamedTuple):
    """The results of `ModelObjective.split`, except that `loss` is an `EvaluatedLoss`."""

    prediction: Any
    copy: Any
    parts: list[Tensor]
    loss: EvaluatedLoss


def _detached(parameter: Tensor) -> Tensor:
    """Return a detached tensor with the values of a parameter.

    Instances of tensor subclasses are returned unchanged, because ``detach`` may lose their attributes.
    """
    if type(parameter) not in (Tensor, nn.Parameter):
        return parameter
    if parameter.is_inference():
        return parameter.detach().clone()  # autograd cannot save a tensor made under inference mode
    return parameter.detach()
