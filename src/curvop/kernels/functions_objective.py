"""The objective of two functions, ``loss(predict(params, batch), batch)``, over batches of any type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from curvop.kernels.batches import batch_size_of
from curvop.kernels.guard import referenced_modules
from curvop.kernels.losses import is_torch_loss, loss_kind, loss_reduction
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchWeight
from curvop.kernels.parameters import check_callable

__all__ = ["FunctionsObjective", "TargetLoss"]


class TargetLoss:
    """Loss function ``(prediction, batch) -> scalar`` that applies a PyTorch loss function to targets in the batch.

    Pass it as ``loss`` to the class methods ``from_functions`` of the operators. A function that computes the same loss
    gives the same Hessian and the same GGN, if its batches are weighted by ``batch_weight=``. With a `TargetLoss`, the
    operators also know the loss function. Batches are then weighted by the divisor of the loss function (for example,
    the number of targets that are not ignored), `curvop.FisherLinearOperator` knows the likelihood, and the examples of
    `curvop.EFLinearOperator` are the targets.

    Parameters
    ----------
    loss_function : nn.Module or callable
        Loss function ``(prediction, y) -> scalar``, such as ``nn.CrossEntropyLoss()``. Its attribute ``reduction``
        ('mean' or 'sum') specifies whether the loss is a mean or a sum over the batch.
    targets : callable
        Function ``batch -> y`` that returns the targets.

    Attributes
    ----------
    loss_function, targets : callable
        The arguments.
    reduction : str
        The reduction of the loss function.

    Raises
    ------
    TypeError
        If an argument cannot be called.

    See Also
    --------
    curvop.GGNLinearOperator.from_functions : GGN of two functions.
    curvop.FisherLinearOperator.from_functions : Fisher matrix of two functions.

    Examples
    --------
    The second of three targets is ignored, so the loss is a mean over two targets:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import TargetLoss
    >>> loss = TargetLoss(nn.CrossEntropyLoss(), lambda batch: batch["labels"])
    >>> batch = {"inputs": torch.ones(3, 2), "labels": torch.tensor([0, -100, 1])}
    >>> round(float(loss(torch.zeros(3, 4), batch)), 4)
    1.3863
    """

    def __init__(self, loss_function: Callable[[Any, Any], Tensor], targets: Callable[[Any], Any]) -> None:
        check_callable("loss_function", loss_function, "a loss of torch.nn, or a function (prediction, y) -> scalar")
        check_callable("targets", targets, "a function of the batch that returns the targets")
        self.loss_function = loss_function
        self.targets = targets

    @property
    def reduction(self) -> str:  # noqa: D102  # see Attributes
        return loss_reduction(self.loss_function)

    def __call__(self, prediction: Any, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        return self.loss_function(prediction, self.targets(batch))


class FunctionsObjective(ModelObjective):
    """The loss ``loss(predict(params, batch), batch)`` over batches of any type.

    The objective extends `ModelObjective`, so all kernels accept it. The inputs X of a batch are the batch itself. The
    targets y are the targets that a `TargetLoss` returns, or the batch itself for any other loss.

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
        if isinstance(loss, TargetLoss):
            loss_function, self._targets = loss.loss_function, loss.targets
        modules = referenced_modules(predict), referenced_modules(loss)
        self._set_up(predict, modules[0], loss_function, modules[1], params, data, batch_weight)
        if self._targets is None and loss_kind(loss_function) is None and self.reduction == "mean":
            self._divisor = _batch_divisor

    def pair(self, batch: Any) -> tuple[Any, Any]:
        """Return the batch and its targets. For a loss that is no `TargetLoss`, the targets are the batch itself."""
        return batch, batch if self._targets is None else self._targets(batch)

    def _recomputes(self) -> bool:
        return bool(self._model_modules)

    def _check_batch(self, index: int, batch: Any) -> None:
        if self._targets is None and is_torch_loss(self.loss_function) and not isinstance(batch, Tensor):
            raise TypeError(
                f"loss is a loss function of torch.nn, but batch {index} is a {type(batch).__name__}, and not a tensor "
                "of targets: pass TargetLoss(loss, targets), where targets is a function of the batch"
            )


def _batch_divisor(prediction: Any, batch: Any, y: Any) -> float | None:
    return batch_size_of(batch)
