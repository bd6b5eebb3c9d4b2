r"""Closed-form derivatives of standard losses with respect to the prediction.

Double backward through ``nn.CrossEntropyLoss`` keeps the logits three times over (the log-softmax, its gradient, the
loss's own) and runs seven operations a product. With :math:`r(z) = \partial \ell / \partial z` written down, the
gradient is :math:`J_z^\top r(z)`, and differentiating it again passes `r` alone, one softmax or less.

For targets :math:`T` (one-hot, smoothed, or given as probabilities; class weights multiplied in) and divisor `D`:

=============================  ======================================================================
``CrossEntropyLoss``           :math:`r = (\mathrm{softmax}(z) \sum_c T_c - T) / D`
``BCEWithLogitsLoss``          :math:`r = w\,(\sigma(z) (1 - y + p y) - p y) / D`, `p` the `pos_weight`
``MSELoss``                    :math:`r = 2 (z - y) / D`
=============================  ======================================================================

(Bishop, 2006, "Pattern Recognition and Machine Learning", eq. 4.109 and 4.91.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.losses import loss_kind, loss_setting

__all__ = ["LossDerivative", "class_targets", "loss_derivative"]

#: ``(prediction, y, divisor) -> r``, differentiable in the prediction; None where the pair asks for the general way.
LossDerivative = Callable[[Any, Any, float | None], Tensor | None]
Setting = Callable[[str, Any], Any]


def loss_derivative(loss_function: Callable[..., Any]) -> LossDerivative | None:
    """Return the closed form of `loss_function`'s derivative, or None where there is none here."""
    kind = loss_kind(loss_function)
    if kind not in _FORMS or _meddled_with(loss_function):
        return None
    return functools.partial(_checked, _FORMS[kind], functools.partial(loss_setting, loss_function))


def _meddled_with(loss_function: Any) -> bool:
    """Whether calling it does more than torch's own code does, or its keywords are ones that are not known here."""
    if isinstance(loss_function, functools.partial):
        return not set(loss_function.keywords) <= {
            "reduction",
            "weight",
            "pos_weight",
            "ignore_index",
            "label_smoothing",
        }
    if isinstance(loss_function, nn.Module):
        return bool(
            loss_function._forward_hooks
            or loss_function._forward_pre_hooks
            or loss_function._backward_hooks
            or loss_function._backward_pre_hooks
            or "forward" in vars(loss_function)
        )
    return False


def _checked(
    form: Callable[[Setting, Tensor, Tensor, float], Tensor | None],
    setting: Setting,
    prediction: Any,
    y: Any,
    divisor: float | None,
) -> Tensor | None:
    plain = type(prediction) is Tensor and type(y) is Tensor and prediction.is_floating_point()
    if (
        not plain
        or not divisor
        or (y.is_floating_point() and (y.shape, y.dtype) != (prediction.shape, prediction.dtype))
    ):
        return None
    derivative = form(setting, prediction, y.detach(), divisor)
    return None if derivative is None else derivative.to(prediction.dtype)


def _cross_entropy(setting: Setting, z: Tensor, y: Tensor, divisor: float) -> Tensor:
    axis = min(1, z.ndim - 1)
    weight, smoothing = setting("weight", None), setting("label_smoothing", 0.0)
    if not y.is_floating_point() and not smoothing:
        return _hard_cross_entropy(weight, setting("ignore_index", -100), z, y.long().unsqueeze(axis), divisor)
    targets = class_targets(setting, z, y)[0].detach() / divisor
    derivative: Tensor = z.softmax(axis) * targets.sum(axis, keepdim=True) - targets
    return derivative


def class_targets(setting: Setting, z: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    """Return the targets `T` of cross-entropy as a tensor like the prediction `z`, and the divisor of its mean."""
    axis = min(1, z.ndim - 1)
    weight, smoothing, classes = setting("weight", None), setting("label_smoothing", 0.0), z.shape[axis]
    divisor: Any
    if y.is_floating_point():
        targets, divisor = y * (1 - smoothing) + smoothing / classes, z.numel() / classes
    else:
        counted = (y != setting("ignore_index", -100)).unsqueeze(axis)
        index = torch.where(counted, y.long().unsqueeze(axis), 0)
        targets = torch.full_like(z, smoothing / classes).scatter_add_(
            axis, index, torch.full_like(index, 1 - smoothing, dtype=z.dtype)
        )
        targets = targets * counted
        divisor = counted.sum() if weight is None else (weight[index] * counted).sum()
    if weight is not None:
        targets = targets * weight.view(-1, *[1] * (z.ndim - 1 - axis))
    return targets, divisor


def _hard_cross_entropy(weight: Tensor | None, ignore: int, z: Tensor, y: Tensor, divisor: float) -> Tensor:
    axis = min(1, z.ndim - 1)
    counted = y != ignore
    index = torch.where(counted, y, 0)
    scales = counted.to(z.dtype) / divisor if weight is None else counted * weight[index] / divisor
    uniform = weight is None and bool(counted.all())
    derivative = z.softmax(axis) * (1 / divisor if uniform else scales)
    with torch.no_grad():  # the targets do not depend on the prediction: no graph, and no one-hot matrix
        return derivative.scatter_add_(axis, index, -scales)


def _binary_cross_entropy(setting: Setting, z: Tensor, y: Tensor, divisor: float) -> Tensor | None:
    if not y.is_floating_point():
        return None
    weight: Tensor | None = setting("weight", None)
    pos_weight: Tensor | None = setting("pos_weight", None)
    scale = 1 / divisor if weight is None else weight / divisor
    if pos_weight is None:
        return (z.sigmoid() - y) * scale
    return z.sigmoid() * ((1 - y + pos_weight * y) * scale) - pos_weight * y * scale


def _squared_error(setting: Setting, z: Tensor, y: Tensor, divisor: float) -> Tensor | None:
    if not y.is_floating_point() or setting("weight", None) is not None:
        return None
    return (z - y) * (2 / divisor)


_FORMS: dict[type[nn.Module] | None, Callable[[Setting, Tensor, Tensor, float], Tensor | None]] = {
    nn.BCEWithLogitsLoss: _binary_cross_entropy,
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _squared_error,
}
