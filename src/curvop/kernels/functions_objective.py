"""The objective of two functions, ``loss(predict(params, batch), batch)``, over batches of any type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvop.kernels.batches import batch_size, batch_size_of
from curvop.kernels.guard import ModuleFinder, ModuleFoundError, referenced_modules
from curvop.kernels.losses import is_torch_loss, loss_kind
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight, Evaluation
from curvop.kernels.parameters import check_callable
from curvop.kernels.target_loss import TargetLoss

__all__ = ["FunctionsObjective"]

T = TypeVar("T")

#: Largest number of times that the search for modules interrupts one evaluation; see `FunctionsObjective._run`.
_MAX_INTERRUPTIONS = 100


class FunctionsObjective(ModelObjective):
    """The loss ``loss(predict(params, batch), batch)`` over batches of any type.

    The objective extends `ModelObjective`, so all kernels accept it. The inputs X of a batch are the batch itself. If
    the loss is a `TargetLoss`, it computes the targets y from the batch. For any other loss, the targets y are the
    batch itself.

    Parameters
    ----------
    predict : callable ``(params, batch) -> prediction``
    loss : callable ``(prediction, batch) -> scalar``
    params : dict of str to Tensor
    data : iterable of batches
    batch_weight : callable, optional
        A function ``batch -> w_b`` that returns the weight of a batch.
    """

    loss_name = "loss"

    def __init__(
        self,
        predict: Callable[[dict[str, Tensor], Any], Any],
        loss: Callable[[Any, Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        batch_weight: BatchWeight | None = None,
    ) -> None:
        if isinstance(predict, nn.Module):
            raise TypeError(
                f"predict is a module, {type(predict).__name__}: pass a function (params, batch) -> prediction, which "
                "may call torch.func.functional_call(model, params, (batch,)), or pass the module to the constructor "
                "of the operator"
            )
        check_callable("predict", predict, "a function (params, batch) -> prediction")
        check_callable("loss", loss, "a function (prediction, batch) -> scalar")
        self._targets: Callable[[Any], Any] | None = None
        loss_function = loss
        if isinstance(loss, TargetLoss) and type(loss).__call__ is TargetLoss.__call__:
            loss_function, self._targets = loss.loss_function, loss.targets
        modules = [*referenced_modules(predict), *referenced_modules(loss)]
        self._temporary: set[tuple[int, type]] = set()
        self._set_up(predict, loss_function, modules, params, data, batch_weight)
        if self._targets is None and loss_kind(loss_function) is None and self.reduction == "mean":
            self._divisor = _batch_divisor
        elif self._targets is not None and loss_kind(loss_function) is None and self.reduction == "mean":
            self._divisor = _batch_or_target_divisor

    def pair(self, batch: Any) -> tuple[Any, Any]:
        """Return a tuple of the batch and its targets. If the loss is not a `TargetLoss`, the batch is returned twice.

        User code computes the targets. See `ModelObjective.pair` for the places where this method may be called.
        """
        return batch, batch if self._targets is None else self._checked_targets(self._targets, batch)

    def inputs(self, batch: Any) -> Any:
        """Return the batch itself."""
        return batch

    def targets(self, batch: Any) -> Any:
        """Return the targets of a batch, without side effects on modules or on the batch."""
        if self._targets is None:
            return batch

        def targets(own: Any) -> Any:
            with torch.no_grad():
                return self.pair(own)[1]

        return self.guard.run(targets, batch, self.replacements(self.leaves(())))

    def _checked_targets(self, targets: Callable[[Any], Any], batch: Any) -> Any:
        """Return ``targets(batch)``. Raise a TypeError if the loss is from PyTorch and the result is not a tensor."""
        keys = f", and the batch is a mapping with the keys {_listed(batch)}" if isinstance(batch, Mapping) else ""
        try:
            y = targets(batch)
        except Exception as error:
            note = f"This error was raised by targets(batch), where targets is an argument of TargetLoss{keys}."
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise
        if loss_kind(self.loss_function) is not None and not isinstance(y, Tensor):
            raise TypeError(
                f"targets returned a {type(y).__name__}, but the loss function of TargetLoss needs a tensor: make "
                "targets, the second argument of TargetLoss, return a tensor of the batch"
            )
        return y

    def _recomputes(self) -> bool:
        return bool(self.modules)

    def _run(
        self, function: Evaluation[T], leaves: Mapping[str, Tensor], batch: Any, what: str, compares_flags: bool = True
    ) -> T:
        """Evaluate a function as `Objective._run` does, and search for unknown modules in the first pass over the data.

        Unknown modules are those that `referenced_modules` cannot find, such as attributes of objects that are not
        callable. A hook interrupts the evaluation before the forward pass of an unknown module. The guard can then save
        the state of the module before the forward pass changes the state. Afterwards, the evaluation is repeated.
        """
        if self.checks.is_searched(what):
            return super()._run(function, leaves, batch, what, compares_flags)
        latest: nn.Module | None = None
        for _ in range(_MAX_INTERRUPTIONS):
            finder = ModuleFinder(self.modules, self._temporary, latest)
            try:
                with finder:
                    result = super()._run(function, leaves, batch, what, compares_flags)
            except ModuleFoundError as found:
                if finder.interrupted is not found:
                    raise
                latest = found.module
                self._replace_modules(finder.temporary, latest)
            else:
                self._replace_modules(finder.temporary, None)
                return result
        return super()._run(function, leaves, batch, what, compares_flags)

    def _replace_modules(self, old: nn.Module | None, new: nn.Module | None) -> None:
        """Remove the module `old` from the known modules, and add the module `new`. Ignore a module that is None."""
        if old is None and new is None:
            return
        writes = self.guard.writes
        modules = [module for module in self.modules if module is not old]
        self._set_modules(modules if new is None else [*modules, new])
        self.guard.writes = writes

    def _check_batch(self, index: int, batch: Any) -> None:
        if self._targets is None and is_torch_loss(self.loss_function) and not isinstance(batch, Tensor):
            raise TypeError(
                f"loss is a loss function of torch.nn, but batch {index} is a {type(batch).__name__}, and not a tensor "
                "of targets: pass TargetLoss(loss, targets), where targets is a function of the batch"
            )


def _batch_divisor(prediction: Any, batch: Any, y: Any) -> float | None:
    return batch_size_of(batch)


def _batch_or_target_divisor(prediction: Any, batch: Any, y: Any) -> float | None:
    """Return the number of examples in a batch. If the number is unclear, return the number of targets."""
    size = batch_size(batch, y)
    return batch_size_of(y) if size is None else size


def _listed(batch: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, batch))
