"""Loss functions that receive a whole batch and take their targets from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from curvop.kernels.losses import loss_reduction
from curvop.kernels.parameters import check_callable

__all__ = ["TargetLoss"]


class TargetLoss:
    """Loss function ``(prediction, batch) -> scalar`` that applies a PyTorch loss function to targets in the batch.

    Pass it as ``loss`` to the class methods ``from_functions`` of the operators. A `TargetLoss` has these advantages
    over a plain function that computes the same loss:

    - Each batch is weighted by the divisor of the loss function (for example, the number of targets that are not
      ignored). With a plain function, pass ``batch_weight=`` to obtain the same Hessian and the same GGN.
    - `curvop.FisherLinearOperator` knows the likelihood.
    - The examples of `curvop.EFLinearOperator` are the targets.

    Parameters
    ----------
    loss_function : nn.Module or callable
        Loss function ``(prediction, y) -> scalar``, such as ``nn.CrossEntropyLoss()``. Its attribute ``reduction``
        ('mean' or 'sum') specifies whether the loss is a mean or a sum over the targets.
    targets : callable
        Function ``batch -> y`` that returns the targets.

    Attributes
    ----------
    loss_function, targets : callable
        The arguments.
    reduction : str
        The reduction of the loss function: 'mean' or 'sum'.

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
        """Return the loss of a prediction, with the targets in the batch."""
        return self.loss_function(prediction, self.targets(batch))
