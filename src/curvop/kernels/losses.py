"""The divisor by which a mean-reduced loss averages a batch.

A data set cut into batches keeps the loss of the whole, evaluated as one batch, only if every batch counts by the
divisor that its own mean used: ``L = sum_b w_b l_b / sum_b w_b``. For equal batches any weight would do; for a ragged
last batch, padding or class weights only the right one does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvop.kernels.batches import batch_size

__all__ = ["Divisor", "check_loss", "checked_weight", "loss_divisor", "loss_kind", "loss_reduction", "loss_setting"]

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
