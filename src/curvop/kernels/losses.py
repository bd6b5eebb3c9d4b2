"""The divisor by which a mean-reduced loss averages a batch.

A data set cut into batches keeps the loss of the whole, evaluated as one batch, only if every batch counts by the
divisor that its own mean used: ``L = sum_b w_b l_b / sum_b w_b``. For equal batches any weight would do; for a ragged
last batch, padding or class weights only the right one does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvop.kernels.batches import batch_size

__all__ = [
    "Divisor",
    "Examples",
    "Likelihood",
    "LossDerivative",
    "check_classes",
    "check_loss",
    "checked_weight",
    "class_targets",
    "loss_derivative",
    "loss_divisor",
    "loss_kind",
    "loss_reduction",
    "loss_setting",
]

#: ``(prediction, X, y) -> w_b``; None where the batch does not tell.
Divisor = Callable[[Any, Any, Any], float | None]

_BY_ELEMENT = (
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.HingeEmbeddingLoss,
    nn.HuberLoss,
    nn.KLDivLoss,
    nn.L1Loss,
    nn.MSELoss,
    nn.PoissonNLLLoss,
    nn.SmoothL1Loss,
    nn.SoftMarginLoss,
)
_BY_CLASS = (nn.CrossEntropyLoss, nn.NLLLoss)

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    functional.binary_cross_entropy: nn.BCELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    functional.huber_loss: nn.HuberLoss,
    functional.kl_div: nn.KLDivLoss,
    functional.l1_loss: nn.L1Loss,
    functional.mse_loss: nn.MSELoss,
    functional.nll_loss: nn.NLLLoss,
    functional.poisson_nll_loss: nn.PoissonNLLLoss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.soft_margin_loss: nn.SoftMarginLoss,
}
# These functions divide by the sum of an element `weight` where one is given; their modules have no such argument.
_WEIGHTED_MEAN = (nn.HuberLoss, nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss)


def loss_reduction(loss_function: Callable[..., Any]) -> str:
    """Return ``'mean'`` or ``'sum'``, how `loss_function` reduces a batch.

    Raises
    ------
    ValueError
        For ``reduction='none'`` and anything else that is neither a mean nor a sum.
    """
    if isinstance(loss_function, functools.partial) and {"size_average", "reduce"} & set(loss_function.keywords):
        raise ValueError("loss_function has size_average= or reduce=, which torch has replaced: use reduction=")
    reduction = loss_setting(loss_function, "reduction", "mean")
    if reduction == "batchmean":
        return "mean"
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss_function has reduction={reduction!r}, but curvature needs one number per batch: "
            "use reduction='mean' or reduction='sum'"
        )
    return str(reduction)


def loss_divisor(loss_function: Callable[..., Any]) -> Divisor:
    """Return the function that computes the divisor of `loss_function`'s mean over a batch, 1 for a sum.

    The ``torch.nn`` losses and their functional forms (bare, or a ``functools.partial`` with keywords) are known; for
    any other callable, also a subclass that computes its loss its own way, the divisor is the batch size.
    """
    kind = loss_kind(loss_function)
    reduction = loss_setting(loss_function, "reduction", "mean")
    if reduction == "sum":
        return _one
    if kind is None:
        return _batch_divisor
    setting = functools.partial(loss_setting, loss_function)
    if issubclass(kind, nn.KLDivLoss) and reduction == "batchmean":
        return _leading_divisor
    if issubclass(kind, _BY_CLASS):
        return functools.partial(_class_divisor, setting)
    if issubclass(kind, _WEIGHTED_MEAN) and setting("weight", None) is not None:
        return _unknown
    return _element_divisor


# Functions, not lambdas: operators are pickled.


def _one(prediction: Any, X: Any, y: Any) -> float:
    return 1.0


def _unknown(prediction: Any, X: Any, y: Any) -> None:
    return None


def _batch_divisor(prediction: Any, X: Any, y: Any) -> float | None:
    return batch_size(X, y)


def _leading_divisor(prediction: Tensor, X: Any, y: Any) -> float:
    return float(prediction.shape[0])


def _element_divisor(prediction: Tensor, X: Any, y: Tensor) -> float:
    return float(math.prod(torch.broadcast_shapes(prediction.shape, y.shape)))


def _class_divisor(setting: Callable[[str, Any], Any], prediction: Tensor, X: Any, y: Tensor) -> float:
    if y.is_floating_point():  # class probabilities: torch averages over the positions, whatever the class weights
        return prediction.numel() / prediction.shape[min(1, prediction.ndim - 1)]
    weight, counted = setting("weight", None), y[y != setting("ignore_index", -100)]
    return float(counted.numel()) if weight is None else weight[counted].double().sum().item()


def loss_kind(loss_function: Callable[..., Any]) -> type[nn.Module] | None:
    """Return the ``torch.nn`` loss that `loss_function` computes, None where it is none of those known here."""
    if isinstance(loss_function, functools.partial):
        return None if loss_function.args else _FUNCTIONS.get(loss_function.func)
    if isinstance(loss_function, nn.Module):
        for kind in (*_BY_ELEMENT, *_BY_CLASS):
            if isinstance(loss_function, kind) and type(loss_function).forward is kind.forward:
                return kind
        return None
    try:
        return _FUNCTIONS.get(loss_function)
    except TypeError:  # an unhashable callable is none of torch's functions
        return None


def loss_setting(loss_function: Callable[..., Any], name: str, default: Any) -> Any:
    """Return a loss module's attribute or a partial function's keyword as it is now."""
    if isinstance(loss_function, functools.partial):
        return loss_function.keywords.get(name, loss_setting(loss_function.func, name, default))
    return getattr(loss_function, name, default)


def check_loss(loss: Any, index: int) -> None:
    """Refuse what cannot be the loss of batch number `index`."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss of batch {index} is a {type(loss).__name__}, but must be a tensor")
    if loss.ndim != 0 or not loss.is_floating_point():
        raise ValueError(
            f"the loss of batch {index} has shape {tuple(loss.shape)} and dtype {loss.dtype}, but must be a real "
            "scalar: reduce it, by mean() or sum()"
        )


def checked_weight(value: Any, index: int) -> float:
    """Return what the user's function gives as the weight of batch number `index`, or refuse it."""
    try:
        weight = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"batch_weight returned a {type(value).__name__} for batch {index}: it must be one number"
        ) from None
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"batch_weight returned {weight} for batch {index}: it must be finite and not negative")
    return weight


# Closed-form derivatives of standard losses with respect to the prediction.
#
# Double backward through ``nn.CrossEntropyLoss`` keeps the logits three times over (the log-softmax, its gradient, the
# loss's own) and runs seven operations a product. With :math:`r(z) = \partial \ell / \partial z` written down, the
# gradient is :math:`J_z^\top r(z)`, and differentiating it again passes `r` alone, one softmax or less.
#
# For targets :math:`T` (one-hot, smoothed, or given as probabilities; class weights multiplied in) and divisor `D`:
#
# =============================  ======================================================================
# ``CrossEntropyLoss``           :math:`r = (\mathrm{softmax}(z) \sum_c T_c - T) / D`
# ``BCEWithLogitsLoss``          :math:`r = w\,(\sigma(z) (1 - y + p y) - p y) / D`, `p` the `pos_weight`
# ``MSELoss``                    :math:`r = 2 (z - y) / D`
# =============================  ======================================================================
#
# (Bishop, 2006, "Pattern Recognition and Machine Learning", eq. 4.109 and 4.91.)

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


# Draws from the likelihoods behind standard losses: the loss's derivative at targets that the model itself draws.
#
# For a drawn target the derivative is a random vector `r` whose second moment is the loss's Hessian by the prediction,
# :math:`E[r r^\top] = \nabla^2_z \ell`, since a likelihood's Fisher information is its expected Hessian:
#
# =======================  ===================================  ==================================================
# loss                     target                               :math:`r \sqrt{D}`
# =======================  ===================================  ==================================================
# ``CrossEntropyLoss``     class c with probability p           :math:`\sqrt{s}\,(p - e_c)`, `s` the target's weight
# ``BCEWithLogitsLoss``    1 with probability :math:`\sigma`    :math:`\sqrt{s}\,(\sigma - y)`, `s` its weight
# ``MSELoss``              :math:`N(z, 1/2)`                    :math:`-\sqrt{2}\,\varepsilon`, standard normal
# =======================  ===================================  ==================================================
#
# (Kunstner, Hennig, Balles, 2019, "Limitations of the empirical Fisher approximation", section 2; Martens, 2020, "New
# insights and perspectives on the natural gradient method", section 9.)


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


# What one example is: the part of a prediction whose loss terms belong to one draw of the model's likelihood.
#
# =============================================  ==================================================================
# loss                                           example
# =============================================  ==================================================================
# ``CrossEntropyLoss``, ``NLLLoss``              a position: all classes of it (axis 1 of the prediction)
# other ``torch.nn`` losses, term by term        a row: all entries along the last axis (of ``[N]``, each entry)
# any other function                             an index of the first axis: everything that has it
# =============================================  ==================================================================
#
# A prediction without dimensions, or with a part without, is one example: the energy of a molecule, with the forces on
# its atoms.

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
