"""What one example is: the part of a prediction whose loss terms belong to one draw of the model's likelihood.

=============================================  ==================================================================
loss                                           example
=============================================  ==================================================================
``CrossEntropyLoss``, ``NLLLoss``              a position: all classes of it (axis 1 of the prediction)
other ``torch.nn`` losses, term by term        a row: all entries along the last axis (of ``[N]``, each entry)
any other function                             an index of the first axis: everything that has it
=============================================  ==================================================================

A prediction without dimensions, or with a part without, is one example: the energy of a molecule, with the forces on
its atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.losses import loss_kind, loss_setting

__all__ = ["Examples", "check_classes"]

Parts = Sequence[Tensor | None]


class Examples:
    """Cuts what belongs to a prediction into examples, as `loss_function` does.

    Parameters
    ----------
    loss_function : callable

    Attributes
    ----------
    by_class : bool
        Whether the loss is one over classes.
    """

    def __init__(self, loss_function: Callable[..., Any]) -> None:
        self._loss_function = loss_function
        self._kind = loss_kind(loss_function)
        self.by_class = self._kind is not None and issubclass(self._kind, nn.CrossEntropyLoss | nn.NLLLoss)

    def outer(self, factors: Parts, vectors: Parts) -> list[Any]:
        r"""Return :math:`r_n \langle r_n, w_n \rangle` for every example, of factors `r` and vectors `w`; None is zero.

        Raises
        ------
        ValueError
            Where the parts of a prediction differ in their first dimension, so that they have no examples in common.
        """
        pairs = [(r, w) for r, w in zip(factors, vectors, strict=True) if r is not None and w is not None]
        if not pairs:
            return [None] * len(factors)
        if self._kind is not None:
            [(factor, vector)] = pairs
            axis = self.axis(factor.ndim)
            inner = factor * vector
            return [factor * (inner if axis is None else inner.sum(axis, keepdim=True))]
        count = _shared_count([factor for factor, _ in pairs])
        inner = torch.stack([(r * w).reshape(count, -1).sum(1) for r, w in pairs]).sum(0)
        return [None if r is None else (r.reshape(count, -1) * inner[:, None]).view_as(r) for r in factors]

    def axis(self, ndim: int) -> int | None:
        """Return the axis of a torch loss's prediction that belongs to one example; None where each entry is one."""
        if self.by_class:
            return min(1, ndim - 1)
        return ndim - 1 if ndim > 1 else None

    def count(self, outputs: Sequence[Tensor], y: Any) -> int:
        """Return how many examples count."""
        if self._kind is None:
            return _shared_count(outputs)
        axis = self.axis(outputs[0].ndim)
        if self.by_class and not y.is_floating_point():
            return int((y != loss_setting(self._loss_function, "ignore_index", -100)).sum())
        return outputs[0].numel() // (1 if axis is None else outputs[0].shape[axis])


def check_classes(loss_function: Callable[..., Any], prediction: Any) -> None:
    """Refuse a prediction without dimensions for a loss over classes, of which torch's own errors do not speak."""
    if isinstance(prediction, Tensor) and not prediction.ndim and Examples(loss_function).by_class:
        raise ValueError(
            "a prediction has no dimensions, but the loss needs one for the classes: make the model return scores of "
            "shape (C,) or (N, C)"
        )


def _shared_count(outputs: Sequence[Tensor]) -> int:
    """Return how many examples the parts of a prediction share."""
    if any(not output.ndim for output in outputs):
        return 1
    if len({len(output) for output in outputs}) > 1:
        raise ValueError(
            "per-example gradients need predictions with the examples along dimension 0, but these have shapes "
            f"{[tuple(output.shape) for output in outputs]}: make the model return one row an example"
        )
    return len(outputs[0])
