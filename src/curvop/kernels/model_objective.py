"""The loss of a model and a loss function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvop.kernels.batches import at_batch
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.guard import modules_of, own_batch, replaced
from curvop.kernels.losses import check_classes, loss_derivative, loss_divisor, loss_kind, loss_reduction
from curvop.kernels.objective import BatchLoss, BatchWeight, Buffers, Objective
from curvop.kernels.objective_checks import reached
from curvop.kernels.parameters import check_callable, checked_params

__all__ = ["ModelObjective"]

#: ``prediction -> (copy, parts)``; see `curvop.kernels.sandwich.cut_off`.
Cut = Callable[[Any], tuple[Any, list[Tensor]]]

_SETTINGS = (bool, int, float, str)
_RECOMPUTES = (
    "the model recomputes layers in the backward pass (gradient checkpointing), where torch takes its own parameters "
    "for these: pass the model's own, or turn checkpointing off (its own must require grad)"
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
        modules = list(dict.fromkeys((*modules_of(model), *modules_of(loss_function))))
        super().__init__(modules, checked_params(model, params), data, loss_reduction(loss_function), batch_weight)
        self._model = model
        own = {id(value) for value in model.parameters()} if isinstance(model, nn.Module) else set()
        self._apart = self._renormalised or any(
            id(value) not in own or not value.requires_grad for value in self.params.values()
        )
        self.loss_function = loss_function
        self._has_state = isinstance(loss_function, nn.Module)
        self._divisor = loss_divisor(loss_function)
        self._derivative = loss_derivative(loss_function)
        self._check_replaceable()

    def _check_replaceable(self) -> None:
        """Refuse modules that torch has compiled, whose parameters nothing can stand in for."""
        names = {id(one): name for name, tensors in self._users_tensors().items() for one in tensors}
        for where, part in (found for module in self.modules for found in module.named_modules()):
            own = [names[id(value)] for value in part.parameters() if id(value) in names]
            if own and isinstance(part, torch.jit.ScriptModule):
                what = f"model's part {where!r}" if where else "model"
                raise TypeError(
                    f"{what} is scripted or traced (a {type(part).__name__} of torch.jit), and its parameter "
                    f"{own[0]!r} cannot be replaced: pass the module that it was made from; engine='compiled' is the "
                    "fast way here"
                )

    def predict(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        """Return the model's prediction, differentiable twice in `leaves` within `slow_backends`."""
        return self._run(self._prediction, leaves, batch, "prediction")

    def split(
        self, leaves: Mapping[str, Tensor], index: int, batch: Any, cut: Cut
    ) -> tuple[Any, Any, list[Tensor], BatchLoss]:
        """Return a prediction, a copy that is cut off from it, the copy's parts, and the loss as a function of these.

        Raises
        ------
        ValueError
            If the loss depends on parameters in another way, which a matrix of the prediction lacks.
        """

        def evaluate(leaves: Mapping[str, Tensor], own: Any) -> _Split:
            with self._evaluating(self._apart):
                prediction = self._predict(leaves, own[0])
                copy, parts = cut(prediction)
                return _Split(prediction, copy, parts, self._criterion(copy, own))

        with at_batch(index):
            prediction, copy, parts, found = self._run(evaluate, leaves, batch, "split")
        return prediction, copy, parts, self._checked(found, index, batch)

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, float | None, Tensor, Tensor | None]:
        with self._evaluating(self._apart):
            return self._criterion(self._predict(leaves, batch[0]), batch)

    def _prediction(self, leaves: Mapping[str, Tensor], batch: Any) -> Any:
        with self._evaluating(self._apart):
            return self._predict(leaves, batch[0])

    @contextlib.contextmanager
    def _evaluating(self, apart: bool) -> Iterator[None]:
        """Refuse code that recomputes layers later, if the parameters are `apart` from the model's own."""
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True)  # by who measures memory, for one
        refused = apart and hooked is None and isinstance(self._model, nn.Module)
        with torch.autograd.graph.disable_saved_tensors_hooks(_RECOMPUTES) if refused else contextlib.nullcontext():
            yield

    def _check_batch(self, index: int, batch: Any) -> None:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"data must yield pairs (X, y), such as [(X, y)], but it yielded a {type(batch).__name__}")

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

    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss as the user's own call computes it."""
        X, y = batch
        prediction = self._predict(leaves, X)
        if getattr(self.loss_function, "stands_in", False):  # it costs more than any sum does
            return torch.stack([part.sum() for part in leaves_of(prediction) if part.is_floating_point()]).sum()
        return self.loss_function(prediction, y)

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

    def _look(self, found: Any, users: Mapping[str, Sequence[Tensor]], leaves: Mapping[str, Tensor]) -> None:
        if isinstance(found, _Split):
            beside = reached(leaves_of(found.loss), {name: [leaf] for name, leaf in leaves.items()})
            if beside:
                raise ValueError(
                    f"the loss depends on {min(beside, key=list(leaves).index)!r} in another way than through the "
                    "prediction, as a penalty does, but this matrix is of the prediction: use HessianLinearOperator, "
                    "or take the penalty out of loss_function and add its curvature to the matrix G: for decay times "
                    "the sum of squares this is G + 2 * decay * I, G.damped(2 * decay)"
                )
        super()._look(found, users, leaves)

    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        return self._divisor(prediction, *batch)

    def _assumes_weights(self) -> bool:
        known = loss_kind(self.loss_function) is not None or self._batch_weight is not None
        return not known and not getattr(self.loss_function, "stands_in", False)

    def _assumes_curvature(self) -> bool:
        return loss_kind(self.loss_function) is None

    def _reached_directly(self, name: str) -> str:
        return (
            f"params[{name!r}] is reached directly: a function holds the tensor itself, so it cannot be replaced, and "
            "part of the loss would not be differentiated; read it from the model inside the function "
            "(model.get_parameter, model.parameters()), or from the function's argument"
        )

    def _users_tensors(self) -> dict[str, list[Tensor]]:
        if not isinstance(self._model, nn.Module):
            return super()._users_tensors()
        own = dict(self._model.named_parameters(remove_duplicate=False))
        return {
            name: list({id(one): one for one in (value, own[name])}.values()) for name, value in self.params.items()
        }

    def _predict(self, leaves: Mapping[str, Tensor], X: Any) -> Any:
        if not isinstance(self._model, nn.Module):
            return self._model(dict(leaves), X)
        # DataParallel would copy the parameters to several devices.
        model = self._model.module if isinstance(self._model, nn.DataParallel) else self._model
        return model(X)

    def _others(self) -> dict[str, Tensor]:
        """Return the model's other parameters, cut off, and copies of its buffers, by name."""
        if not isinstance(self._model, nn.Module):
            return {}
        selected = {id(one) for tensors in self._users_tensors().values() for one in tensors}
        values = {
            name: value if _is_special(value) else value.detach().clone() if value.is_inference() else value.detach()
            for name, value in self._model.named_parameters()
            if id(value) not in selected
        }
        if self._renormalised:
            values = {name: value.clone() for name, value in values.items()}
        return values | {name: buffer.clone() for name, buffer in self._model.named_buffers()}

    def buffers(self, leaves: Mapping[str, Tensor]) -> Buffers:
        """Return the model's other parameters, cut off, its buffers, and those of the loss function."""
        loss: dict[str, Tensor] = {}
        if isinstance(self.loss_function, nn.Module):
            models = {id(one) for one in self._own_tensors().values()}
            loss = dict(self.loss_function.named_buffers())
            loss |= {name: value.detach() for name, value in self.loss_function.named_parameters()}
            named = (*self.loss_function.named_buffers(), *self.loss_function.named_parameters())
            loss = {name: loss[name] for name, own in named if id(own) not in models}
        elif isinstance(self.loss_function, functools.partial):
            keywords = self.loss_function.keywords
            loss = {name: value for name, value in keywords.items() if isinstance(value, Tensor)}
        return {"model": self._others(), "loss": loss}

    def _own_tensors(self) -> dict[str, Tensor]:
        """Return the model's parameters and buffers by name."""
        if not isinstance(self._model, nn.Module):
            return {}
        return dict(self._model.named_parameters(remove_duplicate=False)) | dict(self._model.named_buffers())

    @contextlib.contextmanager
    def _holding(self, leaves: Mapping[str, Tensor], buffers: Buffers) -> Iterator[None]:
        """Let `leaves`, and what is `held`, stand in for the tensors of all modules."""
        own = self._own_tensors()
        swaps = {id(own[name]): value for name, value in buffers["model"].items()}
        if isinstance(self.loss_function, nn.Module):
            named = dict(self.loss_function.named_parameters()) | dict(self.loss_function.named_buffers())
            swaps |= {id(named[name]): value for name, value in buffers["loss"].items()}
        users = self._users_tensors()
        swaps |= {id(one): leaf for name, leaf in leaves.items() for one in users[name]}
        with replaced(self.modules, swaps):
            yield

    def traced(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> tuple[Tensor, Any]:
        """Return a batch's loss and prediction as a function of the arguments alone."""
        own = own_batch(batch, self.guard.writes)
        with self._holding(leaves, buffers), self._evaluating(True):
            prediction = self._predict(leaves, own[0])
            return self._traced_criterion(prediction, buffers, own), prediction

    def traced_split(
        self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any, cut: Cut
    ) -> tuple[Any, list[Tensor], Tensor]:
        """Return a prediction, the parts of a copy that is cut off from it, and the loss as a function of these."""
        own = own_batch(batch, self.guard.writes)
        with self._holding(leaves, buffers), self._evaluating(True):
            prediction = self._predict(leaves, own[0])
            copy, parts = cut(prediction)
            return prediction, parts, self._traced_criterion(copy, buffers, own)

    def traced_prediction(self, leaves: Mapping[str, Tensor], buffers: Buffers, batch: Any) -> Any:
        """Return a batch's prediction as a function of the arguments alone."""
        own = own_batch(batch, self.guard.writes)
        with self._holding(leaves, buffers), self._evaluating(True):
            return self._predict(leaves, own[0])

    def traced_loss(self, leaves: Mapping[str, Tensor], prediction: Any, buffers: Buffers, batch: Any) -> Tensor:
        """Return a batch's loss as a function of the arguments alone."""
        own = own_batch(batch, self.guard.writes)
        with self._holding(leaves, buffers), self._evaluating(True):
            return self._traced_criterion(prediction, buffers, own)

    def _traced_criterion(self, prediction: Any, buffers: Buffers, batch: Any) -> Tensor:
        keywords = buffers["loss"] if isinstance(self.loss_function, functools.partial) else {}
        return self.loss_function(prediction, batch[1], **keywords)


class _Split(NamedTuple):
    """A prediction, a copy that is cut off, the copy's parts, and what `ModelObjective._criterion` returns for it."""

    prediction: Any
    copy: Any
    parts: list[Tensor]
    loss: tuple[Tensor, float | None, Tensor, Tensor | None]


def _is_special(parameter: Tensor) -> bool:
    """Whether a parameter is of a subclass, which may have attributes that the model needs."""
    return type(parameter) not in (Tensor, nn.Parameter)
