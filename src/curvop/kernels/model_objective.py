"""The loss of a model and a loss function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.closed_forms import loss_derivative
from curvop.kernels.examples import check_classes
from curvop.kernels.objective import BatchLoss, BatchWeight, Objective
from curvop.kernels.parameters import check_callable, checked_params
from curvop.kernels.stateless import functional_call
from curvop.kernels.weights import loss_divisor, loss_kind, loss_reduction

__all__ = ["ModelObjective"]

_SETTINGS = (bool, int, float, str)
_RECOMPUTES = (
    "the model recomputes layers in the backward pass (gradient checkpointing), where torch takes its own parameters "
    "for these: pass the model's own, or turn checkpointing off"
)


class ModelObjective(Objective):
    """``loss_function(model(X), y)`` over batches ``(X, y)``; see `curvop.HessianLinearOperator` for the arguments."""

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
        modules = [part for part in (model, loss_function) if isinstance(part, nn.Module)]
        super().__init__(modules, checked_params(model, params), data, loss_reduction(loss_function), batch_weight)
        self._model = model
        own = {id(value) for value in model.parameters()} if isinstance(model, nn.Module) else set()
        self._apart = self._renormalised or any(id(value) not in own for value in self.params.values())
        self.loss_function = loss_function
        self._has_state = isinstance(loss_function, nn.Module)
        self._divisor = loss_divisor(loss_function)
        self._derivative = loss_derivative(loss_function)

    def predict(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        """Return the model's prediction, differentiable twice in `leaves` within `slow_backends`."""
        return self.evaluator(lambda: self.guard.run(lambda own: self._prediction(leaves, own), batch))

    def criterion(self, prediction: Any, index: int, batch: Any) -> BatchLoss:
        """Return the loss of batch number `index` as a function of a prediction."""
        found = self.evaluator(lambda: self.guard.run(lambda own: self._criterion(prediction, own), batch))
        return self._checked(found, index, batch)

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, float | None, Tensor, Tensor | None]:
        return self._criterion(self._prediction(leaves, batch), batch)

    def _prediction(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"data must yield pairs (X, y), such as [(X, y)], but it yielded a {type(batch).__name__}")
        training = isinstance(self._model, nn.Module) and any(part.training for part in self._model.modules())
        return self._predict(leaves, self._others(leaves, buffers=training), batch[0], self._apart)

    def _criterion(self, prediction: Any, batch: Any) -> tuple[Tensor, float | None, Tensor, Tensor | None]:
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

    def divisor_of(self, prediction: Any, index: int, batch: Any) -> float:
        """Return by what the loss of batch number `index` divides the sum over its examples."""
        divisor = self._mean_divisor(prediction, batch)
        told = self._batch_weight is not None and loss_kind(self.loss_function) is None
        if divisor is not None and not told:
            return divisor
        if self._batch_weight is None:
            raise ValueError(
                f"over how many examples the loss of batch {index} is a mean cannot be told: pass batch_weight=, a "
                "function of the batch"
            )
        return self._weight(index, batch, None)

    def state(self) -> tuple[object, ...]:
        """Return a token that changes whenever the objective does, the loss's own settings included."""
        own = self.loss_function
        settings = [value for value in vars(own).values() if isinstance(value, _SETTINGS)] if self._has_state else ()
        return *super().state(), settings

    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        return self._divisor(prediction, *batch)

    def _predict(self, leaves: Mapping[str, Tensor], others: dict[str, Tensor], X: Any, apart: bool) -> Any:
        """Return the prediction; `apart` where the parameters may have other values than the model's own."""
        if not isinstance(self._model, nn.Module):
            return self._model(dict(leaves), X)
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True)  # by who measures memory, for one
        refused = apart and hooked is None
        with torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES) if refused else contextlib.nullcontext():
            return functional_call(self._model, others | dict(leaves), (X,))

    def _others(self, leaves: Mapping[str, Tensor], buffers: bool) -> dict[str, Tensor]:
        """Return the model's other parameters, cut off so that nothing is saved for layers below a block."""
        if not isinstance(self._model, nn.Module):
            return {}
        own = dict(self._model.named_parameters(remove_duplicate=False))
        selected = {id(own[name]) for name in leaves}
        values = {name: value.detach() for name, value in self._model.named_parameters() if id(value) not in selected}
        if self._renormalised:
            values = {name: value.clone() for name, value in values.items()}
        if buffers:  # copies, as modules in training mode write to them
            values |= {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        # Autograd cannot save a tensor made under inference mode; a clone made outside of it can be saved.
        inferred = {name: buffer for name, buffer in self._model.named_buffers() if buffer.is_inference()} | {
            name: value for name, value in values.items() if value.is_inference()
        }
        return values | {name: value.clone() for name, value in inferred.items()}

    def held(self, leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return the model's other parameters, cut off, its buffers, and those of the loss function."""
        loss: dict[str, Tensor] = {}
        if isinstance(self.loss_function, nn.Module):
            loss = dict(self.loss_function.named_buffers())
            loss |= {name: value.detach() for name, value in self.loss_function.named_parameters()}
        elif isinstance(self.loss_function, functools.partial):
            keywords = self.loss_function.keywords
            loss = {name: value for name, value in keywords.items() if isinstance(value, Tensor)}
        return {"model": self._others(leaves, buffers=True), "loss": loss}

    def traced(
        self, leaves: Mapping[str, Tensor], held: dict[str, dict[str, Tensor]], batch: Any
    ) -> tuple[Tensor, Any]:
        """Return a batch's loss and prediction."""
        prediction = self.traced_prediction(leaves, held, batch)
        return self.traced_loss(prediction, held, batch), prediction

    def traced_prediction(self, leaves: Mapping[str, Tensor], held: dict[str, dict[str, Tensor]], batch: Any) -> Any:
        """Return a batch's prediction as a function of its arguments alone."""
        X, _ = self.guard.own(batch)
        return self._predict(leaves, held["model"], X, apart=True)

    def traced_loss(self, prediction: Any, held: dict[str, dict[str, Tensor]], batch: Any) -> Tensor:
        """Return a batch's loss as a function of its arguments alone."""
        _, y = self.guard.own(batch)
        if isinstance(self.loss_function, nn.Module):
            loss: Tensor = functional_call(self.loss_function, held["loss"], (prediction, y))
            return loss
        return self.loss_function(prediction, y, **held["loss"])
