r"""Draws from the likelihoods behind standard losses: the loss's derivative at targets that the model itself draws.

For a drawn target the derivative is a random vector `r` whose second moment is the loss's Hessian by the prediction,
:math:`E[r r^\top] = \nabla^2_z \ell`, since a likelihood's Fisher information is its expected Hessian:

=======================  ===================================  ==================================================
loss                     target                               :math:`r \sqrt{D}`
=======================  ===================================  ==================================================
``CrossEntropyLoss``     class c with probability p           :math:`\sqrt{s}\,(p - e_c)`, `s` the target's weight
``BCEWithLogitsLoss``    1 with probability :math:`\sigma`    :math:`\sqrt{s}\,(\sigma - y)`, `s` its weight
``MSELoss``              :math:`N(z, 1/2)`                    :math:`-\sqrt{2}\,\varepsilon`, standard normal
=======================  ===================================  ==================================================

(Kunstner, Hennig, Balles, 2019, "Limitations of the empirical Fisher approximation", section 2; Martens, 2020, "New
insights and perspectives on the natural gradient method", section 9.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from curvop.kernels.closed_forms import class_targets
from curvop.kernels.losses import loss_kind, loss_setting

__all__ = ["Likelihood"]

Setting = Callable[[str, Any], Any]


class Likelihood:
    """The likelihood behind `loss_function`.

    Parameters
    ----------
    loss_function : callable
        ``MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss``, or their functional forms.

    Raises
    ------
    ValueError
        For any other.
    """

    def __init__(self, loss_function: Callable[..., Any]) -> None:
        kind = loss_kind(loss_function)
        if kind not in _DRAWS:
            raise ValueError(
                "loss_function is no known log-likelihood, so there is no Fisher matrix of it: pass MSELoss, "
                "CrossEntropyLoss or BCEWithLogitsLoss, or use GGNLinearOperator or EFLinearOperator"
            )
        self._kind = kind
        self._setting = functools.partial(loss_setting, loss_function)
        if kind is nn.MSELoss and self._setting("weight", None) is not None:
            raise ValueError(
                "loss_function has an element weight=, for which there is no Fisher matrix here: use the GGN"
            )

    def noise(self, shape: torch.Size, draws: int, generator: torch.Generator) -> Tensor:
        """Return the random numbers for `draws` targets of a prediction of this shape."""
        if self._kind is nn.MSELoss:
            return torch.randn(draws, *shape, generator=generator, dtype=torch.float64)
        if self._kind is nn.CrossEntropyLoss:
            axis = min(1, len(shape) - 1)
            shape = torch.Size([*shape[:axis], 1, *shape[axis + 1 :]])
        return torch.rand(draws, *shape, generator=generator, dtype=torch.float64)

    def derivative(self, z: Tensor, y: Tensor, noise: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Return `r` at a target drawn by `noise`, without the leading dimension; `given` are tensors of the loss."""

        def setting(name: str, default: Any) -> Any:
            return given[name] if name in given else self._setting(name, default)

        return _DRAWS[self._kind](setting, z, y, noise)


def _divided(setting: Setting, scale: Any, divisor: Any) -> Any:
    return scale if setting("reduction", "mean") == "sum" else scale / divisor


def _class(setting: Setting, z: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    axis = min(1, z.ndim - 1)
    targets, divisor = class_targets(setting, z, y)
    scale = _divided(setting, targets.sum(axis, keepdim=True), divisor)
    p = z.softmax(axis)
    # In double precision: in a lower one many classes would share a sum, and never be drawn.
    drawn = (z.double().softmax(axis).cumsum(axis) < noise).sum(axis, keepdim=True).clamp(max=z.shape[axis] - 1)
    derivative: Tensor = (p - torch.zeros_like(p).scatter(axis, drawn, 1.0)) * scale.sqrt()
    return derivative


def _binary(setting: Setting, z: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    scale = torch.ones_like(z)
    if (pos_weight := setting("pos_weight", None)) is not None:
        scale = 1 - y + pos_weight * y
    if (weight := setting("weight", None)) is not None:
        scale = scale * weight
    p = z.sigmoid()
    derivative: Tensor = (p - (noise < z.double().sigmoid()).to(z.dtype)) * _divided(setting, scale, z.numel()).sqrt()
    return derivative


def _normal(setting: Setting, z: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    return noise.to(z.dtype) * math.sqrt(_divided(setting, 2.0, z.numel()))


_DRAWS: dict[type[nn.Module] | None, Callable[[Setting, Tensor, Tensor, Tensor], Tensor]] = {
    nn.BCEWithLogitsLoss: _binary,
    nn.CrossEntropyLoss: _class,
    nn.MSELoss: _normal,
}
