r"""Standard loss functions: recognition, divisors, derivatives, likelihoods and examples.

*Divisors* (`loss_divisor`). The divisor of a batch is the number by which a loss function divides when it averages over
the batch. Every batch is weighted by its divisor: ``L = sum_b w_b l_b / sum_b w_b``. The loss of a data set therefore
does not depend on how the data set is divided into batches. The divisors of batches differ if the last batch is
smaller, and often if the loss function ignores padding or has class weights.

*Derivatives* (`loss_derivative`). Differentiating ``nn.CrossEntropyLoss`` twice with autograd retains three tensors of
the size of the logits (the log-softmax, its gradient, and the gradient of the loss) and runs seven operations per
product. A closed form of the derivative :math:`r(z) = \partial \ell / \partial z` costs less. The gradient with respect
to the parameters is :math:`J_z^\top r(z)`. Autograd then only needs to differentiate :math:`r`, which contains at most
one softmax. For the second derivative of the cross-entropy, see `curvop.kernels.cross_entropy`. The table lists the
derivatives ([1]_, eq. 4.109 and 4.91). Here :math:`D` is the divisor, and :math:`w` is the tensor of weights of the
entries. The targets :math:`T` are one-hot vectors, smoothed one-hot vectors or probabilities, multiplied by the class
weights:

=============================  =============================================================================
``CrossEntropyLoss``           :math:`r = (\mathrm{softmax}(z) \sum_c T_c - T) / D`
``BCEWithLogitsLoss``          :math:`r = w\,(\sigma(z) (1 - y + p y) - p y) / D`, where `p` is `pos_weight`
``MSELoss``                    :math:`r = 2 (z - y) / D`
=============================  =============================================================================

*Likelihoods* (`Likelihood`). If the target is drawn from the likelihood of the loss, the derivative of the loss is a
random vector. The Fisher information is the expected Hessian of the negative log-likelihood. With the scaling in the
table, the second moment of the derivative is therefore the Hessian of the loss with respect to the prediction,
:math:`E[r r^\top] = \nabla^2_z \ell` ([2]_, section 2; [3]_, section 9):

=======================  ===================================  ======================================================
loss                     target                               :math:`r \sqrt{D}`
=======================  ===================================  ======================================================
``CrossEntropyLoss``     class c, probability :math:`p_c`     :math:`\sqrt{s}\,(p - e_c)`
``BCEWithLogitsLoss``    1, probability :math:`\sigma`        :math:`\sqrt{s}\,(\sigma - y)`
``MSELoss``              :math:`N(z, 1/2)`                    :math:`-\sqrt{2}\,\varepsilon`, where
                                                              :math:`\varepsilon` is standard normal
=======================  ===================================  ======================================================

Here `s` is the weight of the target, :math:`p` is the softmax of the prediction, :math:`\sigma` is its sigmoid, and
:math:`e_c` is a unit vector.

*Examples* (`Examples`). An example consists of the entries of a prediction that belong to one draw of the target. Which
entries form an example depends on the loss function:

=============================================  ===================================================================
loss                                           entries of an example
=============================================  ===================================================================
``CrossEntropyLoss``, ``NLLLoss``              all classes (axis 1 of the prediction) at one position
other recognized ``torch.nn`` losses           all entries along the last axis; one entry if the prediction is 1-D
any other function                             all entries with the same index along the first axis
=============================================  ===================================================================

A prediction that is a scalar or contains a scalar counts as one example. For example, a model may predict the energy
of a molecule and the forces on its atoms.

References
----------
.. [1] C. M. Bishop, "Pattern Recognition and Machine Learning", Springer, 2006.
.. [2] F. Kunstner, L. Balles, P. Hennig, "Limitations of the empirical Fisher approximation for natural gradient
   descent", NeurIPS 2019, arXiv:1905.12558.
.. [3] J. Martens, "New insights and perspectives on the natural gradient method", Journal of Machine Learning Research
   21, 2020, arXiv:1412.1193.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from curvop.kernels.batches import batch_size
from curvop.kernels.cross_entropy import SoftmaxHessian, chunks, draw_classes, hard_residual

__all__ = [
    "ClosedForm",
    "Divisor",
    "Examples",
    "Likelihood",
    "LossDerivative",
    "check_classes",
    "check_loss",
    "checked_weight",
    "class_targets",
    "is_elementwise",
    "is_torch_loss",
    "loss_derivative",
    "loss_divisor",
    "loss_kind",
    "loss_reduction",
    "loss_setting",
    "loss_value",
]

#: A function ``(prediction, X, y) -> w_b`` that returns the divisor of a batch, or None if it is unknown.
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
# The functional forms of these losses have a `weight` argument for weights of elements, and divide by the sum of the
# weights. The corresponding loss modules do not have this argument.
_WEIGHTED_MEAN = (nn.HuberLoss, nn.L1Loss, nn.MSELoss, nn.SmoothL1Loss)


def loss_reduction(loss_function: Callable[..., Any], name: str = "loss_function") -> str:
    """Return the reduction of `loss_function` over a batch, ``'mean'`` or ``'sum'``.

    `name` is the name of the user's argument in error messages.

    Raises
    ------
    ValueError
        If the reduction is neither a mean nor a sum, or is set by a deprecated argument.
    """
    if isinstance(loss_function, functools.partial) and {"size_average", "reduce"} & set(loss_function.keywords):
        raise ValueError(f"{name} has size_average= or reduce=, which torch has deprecated: use reduction=")
    reduction = loss_setting(loss_function, "reduction", "mean")
    if reduction == "batchmean":
        return "mean"
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"{name} has reduction={reduction!r}, but curvature needs one number per batch: "
            "use reduction='mean' or reduction='sum'"
        )
    return str(reduction)


def loss_divisor(loss_function: Callable[..., Any]) -> Divisor:
    """Return a function that computes the divisor of a batch.

    If `loss_function` is a sum, the divisor is 1. If it is a mean that `loss_kind` recognizes, the divisor is the
    number by which `loss_function` divides. However, the divisor is unknown for ``mse_loss``, ``l1_loss``,
    ``smooth_l1_loss`` and ``huber_loss`` with ``weight=``. For any other mean, such as a subclass of a loss with its
    own ``forward``, the divisor is the batch size.
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


# The following divisors are functions rather than lambdas, because operators must be picklable.


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
    if y.is_floating_point():  # class probabilities: torch divides by the number of positions, even with class weights
        return prediction.numel() / prediction.shape[min(1, prediction.ndim - 1)]
    weight, counted = setting("weight", None), y != setting("ignore_index", -100)
    return float(counted.count_nonzero().item()) if weight is None else weight[y[counted]].double().sum().item()


def loss_kind(loss_function: Callable[..., Any]) -> type[nn.Module] | None:
    """Return the ``torch.nn`` class of a recognized loss function, or None for any other function.

    The loss classes listed in this module and their functional forms are recognized. A functional form may be wrapped
    in a ``functools.partial`` that sets keywords only.
    """
    if isinstance(loss_function, functools.partial):
        return None if loss_function.args else _FUNCTIONS.get(loss_function.func)
    if isinstance(loss_function, nn.Module):
        for kind in (*_BY_ELEMENT, *_BY_CLASS):
            if isinstance(loss_function, kind) and type(loss_function).forward is kind.forward:
                return kind
        return None
    try:
        return _FUNCTIONS.get(loss_function)
    except TypeError:  # an unhashable callable is not one of torch's functions
        return None


def is_elementwise(loss_function: Callable[..., Any]) -> bool:
    """Return True if a loss is known to be a sum of functions of single entries of the prediction."""
    kind = loss_kind(loss_function)
    return kind is not None and issubclass(kind, _BY_ELEMENT)


def is_torch_loss(loss_function: Any) -> bool:
    """Return True if `loss_function` is defined in ``torch.nn``, even if `loss_kind` does not recognize it."""
    while isinstance(loss_function, functools.partial):
        loss_function = loss_function.func
    definition = type(loss_function) if isinstance(loss_function, nn.Module) else loss_function
    return (getattr(definition, "__module__", None) or "").startswith("torch.nn")


def loss_setting(loss_function: Callable[..., Any], name: str, default: Any) -> Any:
    """Return the current value of an attribute of a loss module, or of a keyword of a ``functools.partial``."""
    if isinstance(loss_function, functools.partial):
        return loss_function.keywords.get(name, loss_setting(loss_function.func, name, default))
    return getattr(loss_function, name, default)


def check_loss(loss: Any, index: int) -> None:
    """Raise an error if the loss of batch number `index` is not a real scalar tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss of batch {index} is a {type(loss).__name__}, but must be a tensor")
    if loss.ndim != 0 or not loss.is_floating_point():
        raise ValueError(
            f"the loss of batch {index} has shape {tuple(loss.shape)} and dtype {loss.dtype}, but must be a real "
            "scalar: reduce it with mean() or sum()"
        )


def checked_weight(value: Any, index: int) -> float:
    """Convert the result of ``batch_weight`` for batch number `index` to a float; raise an error if it is invalid."""
    try:
        weight = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"batch_weight returned a {type(value).__name__} for batch {index}: it must be one number"
        ) from None
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"batch_weight returned {weight} for batch {index}: it must be finite and not negative")
    return weight


# Closed-form derivatives.


@dataclasses.dataclass
class ClosedForm:
    """Derivatives of a loss with respect to the prediction `z`, computed without differentiating the loss.

    Attributes
    ----------
    first : callable
        ``first(None)`` returns the first derivative, a tensor that can be differentiated with respect to `z`. With a
        tensor `out`, ``first(out)`` may return the derivative in the memory of `out`. It can then not be
        differentiated.
    second : callable, optional
        ``second(out)`` returns the second derivative of the cross-entropy at `z`, for logits with the classes on the
        axis `axis`. If `out` is a tensor, the result uses its memory. None for other losses, whose first derivative is
        cheap to differentiate.
    axis : int
    """

    first: Callable[[Tensor | None], Tensor]
    second: Callable[[Tensor | None], SoftmaxHessian] | None = None
    axis: int = -1


#: A function ``(prediction, y, divisor) -> closed_form``. If no closed form applies to the arguments, the result is
#: None, and autograd must differentiate the loss.
LossDerivative = Callable[[Any, Any, float | None], ClosedForm | None]
Setting = Callable[[str, Any], Any]

#: The settings of the loss functions that have a closed form, with their defaults.
_SETTINGS: dict[str, Any] = {"weight": None, "pos_weight": None, "ignore_index": -100, "label_smoothing": 0.0}
_CLASS_SETTINGS = ("weight", "ignore_index", "label_smoothing")


def loss_value(loss_function: Callable[..., Any], prediction: Any, y: Any) -> Any:
    """Return ``loss_function(prediction, y)``, and save memory if the loss is the cross-entropy of large logits."""
    if (
        not (type(prediction) is Tensor and type(y) is Tensor)
        or len(list(chunks(prediction))) == 1
        or loss_kind(loss_function) is not nn.CrossEntropyLoss
        or _is_customised(loss_function)
    ):
        return loss_function(prediction, y)
    logits = prediction.movedim(1, -1)
    targets = y.movedim(1, -1) if y.shape == prediction.shape else y
    if targets.shape not in (logits.shape, logits.shape[:-1]):
        return loss_function(prediction, y)
    settings = {name: loss_setting(loss_function, name, _SETTINGS[name]) for name in _CLASS_SETTINGS}
    losses = []
    for at in chunks(logits):
        own, aims = logits[at].flatten(0, -2), targets[at]
        aims = aims.flatten() if aims.ndim < logits[at].ndim else aims.flatten(0, -2)
        losses.append(functional.cross_entropy(own, aims, reduction="sum", **settings))
    divisor = loss_divisor(loss_function)(prediction, None, y)
    total = torch.stack(losses)
    return (total.double().sum() / (divisor or math.nan)).to(total.dtype)


def loss_derivative(loss_function: Callable[..., Any]) -> LossDerivative | None:
    """Return a function that computes the derivatives of `loss_function` in closed form, or None."""
    kind = loss_kind(loss_function)
    if kind not in _CLOSED_FORMS or _is_customised(loss_function):
        return None
    return functools.partial(_closed_form, _CLOSED_FORMS[kind], functools.partial(loss_setting, loss_function))


def _is_customised(loss_function: Any) -> bool:
    """Return True if a loss function has hooks, a ``forward`` that replaces PyTorch's, or unknown keywords."""
    if isinstance(loss_function, functools.partial):
        return not set(loss_function.keywords) <= {"reduction", *_SETTINGS}
    if isinstance(loss_function, nn.Module):
        return bool(
            loss_function._forward_hooks
            or loss_function._forward_pre_hooks
            or loss_function._backward_hooks
            or loss_function._backward_pre_hooks
            or "forward" in vars(loss_function)
        )
    return False


def _closed_form(
    form: Callable[[Setting, Tensor, Tensor, float], ClosedForm | None],
    setting: Setting,
    prediction: Any,
    y: Any,
    divisor: float | None,
) -> ClosedForm | None:
    plain = type(prediction) is Tensor and type(y) is Tensor and prediction.is_floating_point()
    if not plain or not divisor:
        return None
    if y.is_floating_point() and (y.shape, y.dtype) != (prediction.shape, prediction.dtype):
        return None
    # Read the settings now, because the derivatives are computed later, when tensors of the loss function that were
    # replaced for this evaluation are put back.
    settings = {name: setting(name, default) for name, default in _SETTINGS.items()}
    if any(isinstance(value, Tensor) and value.requires_grad for value in settings.values()):
        return None
    return form(lambda name, default: settings[name], prediction, y.detach(), divisor)


def _cross_entropy(setting: Setting, z: Tensor, y: Tensor, divisor: float) -> ClosedForm:
    axis = min(1, z.ndim - 1)
    index, weights, _ = row_weights(setting, z, y)
    weights = weights / divisor
    is_last = axis == z.ndim - 1  # views take time, also in each product
    logits = z if is_last else z.movedim(axis, -1)

    def rows(out: Tensor | None) -> Tensor | None:
        return None if out is None else out.movedim(axis, -1)

    def first(out: Tensor | None) -> Tensor:
        if index is not None and not setting("label_smoothing", 0.0):
            residual = hard_residual(logits, index, weights, rows(out))
            return residual if is_last else residual.movedim(-1, axis)
        targets = class_targets(setting, z, y).detach() / divisor
        return (z.softmax(axis) * targets.sum(axis, keepdim=True) - targets).to(z.dtype)

    return ClosedForm(first, lambda out: SoftmaxHessian(logits, weights, rows(out)), axis)


def row_weights(setting: Setting, z: Tensor, y: Tensor) -> tuple[Tensor | None, Tensor, Any]:
    """Return ``(index, weights, divisor)`` for cross-entropy with the logits `z` and the targets `y`.

    Returns
    -------
    index : Tensor of int64 or None
        The target classes, with 0 for ignored targets. The classes of `z` are replaced by one entry on the last axis.
        None if the targets are probabilities.
    weights : Tensor
        The sum of the targets ``T`` of each row (see `class_targets`), in the shape of `index`, at least in single
        precision.
    divisor : Tensor or float
        The divisor of the mean.
    """
    axis = min(1, z.ndim - 1)
    weight, smoothing, classes = setting("weight", None), setting("label_smoothing", 0.0), z.shape[axis]
    dtype = torch.promote_types(z.dtype, torch.float32)
    weight = None if weight is None else weight.detach().to(dtype)
    spread = smoothing if weight is None else smoothing / classes * weight.sum()
    if y.is_floating_point():
        rows = y.movedim(axis, -1)
        sums = torch.empty((*rows.shape[:-1], 1), dtype=dtype, device=z.device)
        for at in chunks(rows):
            own = rows[at].to(dtype)
            sums[at] = (own if weight is None else own * weight).sum(-1, keepdim=True)
        return None, sums * (1 - smoothing) + spread, z.numel() / classes
    counted = (y != setting("ignore_index", -100)).unsqueeze(-1)
    index, counted = torch.where(counted, y.long().unsqueeze(-1), 0), counted.to(dtype)
    weights = counted if weight is None else counted * weight[index]
    return index, weights * (1 - smoothing) + counted * spread if smoothing else weights, weights.sum()


def class_targets(setting: Setting, z: Tensor, y: Tensor) -> Tensor:
    """Return the targets ``T`` of cross-entropy, in the shape of the prediction `z`."""
    axis = min(1, z.ndim - 1)
    weight, smoothing, classes = setting("weight", None), setting("label_smoothing", 0.0), z.shape[axis]
    targets: Tensor
    if y.is_floating_point():
        targets = y * (1 - smoothing) + smoothing / classes
    else:
        counted = (y != setting("ignore_index", -100)).unsqueeze(axis)
        index = torch.where(counted, y.long().unsqueeze(axis), 0)
        targets = torch.full_like(z, smoothing / classes).scatter_add_(
            axis, index, torch.full_like(index, 1 - smoothing, dtype=z.dtype)
        )
        targets = targets * counted
    return targets if weight is None else targets * weight.view(-1, *[1] * (z.ndim - 1 - axis))


def _binary_cross_entropy(setting: Setting, z: Tensor, y: Tensor, divisor: float) -> ClosedForm | None:
    if not y.is_floating_point():
        return None
    weight: Tensor | None = setting("weight", None)
    pos_weight: Tensor | None = setting("pos_weight", None)

    def first(out: Tensor | None) -> Tensor:
        scale = 1 / divisor if weight is None else weight / divisor
        if pos_weight is None:
            return ((z.sigmoid() - y) * scale).to(z.dtype)
        return (z.sigmoid() * ((1 - y + pos_weight * y) * scale) - pos_weight * y * scale).to(z.dtype)

    return ClosedForm(first)


def _squared_error(setting: Setting, z: Tensor, y: Tensor, divisor: float) -> ClosedForm | None:
    if not y.is_floating_point() or setting("weight", None) is not None:
        return None
    return ClosedForm(lambda out: (z - y) * (2 / divisor))


_CLOSED_FORMS: dict[type[nn.Module] | None, Callable[[Setting, Tensor, Tensor, float], ClosedForm | None]] = {
    nn.BCEWithLogitsLoss: _binary_cross_entropy,
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _squared_error,
}


# Draws from the likelihoods of standard losses.


class Likelihood:
    """The likelihood whose negative logarithm is `loss_function`.

    Parameters
    ----------
    loss_function : callable
        ``MSELoss``, ``CrossEntropyLoss`` or ``BCEWithLogitsLoss``, or their functional forms.
    name : str
        The name of the user's argument in error messages.

    Raises
    ------
    ValueError
        If `loss_function` is any other loss, or ``mse_loss`` with a `weight`.
    """

    def __init__(self, loss_function: Callable[..., Any], name: str = "loss_function") -> None:
        kind = loss_kind(loss_function)
        if kind not in _DRAWS:
            raise ValueError(
                f"{name} is no known log-likelihood, so it has no Fisher matrix: pass MSELoss, "
                "CrossEntropyLoss or BCEWithLogitsLoss, or use GGNLinearOperator or EFLinearOperator"
            )
        self._kind = kind
        self._setting = functools.partial(loss_setting, loss_function)
        if kind is nn.MSELoss and self._setting("weight", None) is not None:
            raise ValueError(
                f"{name} has an element weight=, which the Fisher matrix does not support: use GGNLinearOperator"
            )

    def noise(self, shape: torch.Size, draws: int, generator: torch.Generator) -> Tensor:
        """Return the random numbers that determine `draws` targets for a prediction of shape `shape`."""
        if self._kind is nn.MSELoss:
            return torch.randn(draws, *shape, generator=generator, dtype=torch.float64)
        if self._kind is nn.CrossEntropyLoss:
            axis = min(1, len(shape) - 1)
            shape = torch.Size([*shape[:axis], 1, *shape[axis + 1 :]])
        return torch.rand(draws, *shape, generator=generator, dtype=torch.float64)

    def derivative(
        self, z: Tensor, y: Tensor, noise: Tensor, tensors: Mapping[str, Tensor], out: Tensor | None = None
    ) -> Tensor:
        """Return `r`, the derivative of the loss for a randomly drawn target; see the module docstring.

        Parameters
        ----------
        z, y : Tensor
            Prediction and target. The target determines only the weights of the entries.
        noise : Tensor
            The random numbers for one draw of the targets: a slice, along the first dimension, of the tensor that the
            method `noise` returns.
        tensors : dict of str to Tensor
            Tensors that replace settings of the loss, such as its class weights.
        out : Tensor, optional
            A tensor with the shape of `z`. The result may use its memory.
        """

        def setting(name: str, default: Any) -> Any:
            return tensors[name] if name in tensors else self._setting(name, default)

        return _DRAWS[self._kind](setting, z, y, noise, out)


def _scaled(setting: Setting, scale: Any, divisor: Any) -> Any:
    return scale if setting("reduction", "mean") == "sum" else scale / divisor


def _drawn_class(setting: Setting, z: Tensor, y: Tensor, noise: Tensor, out: Tensor | None) -> Tensor:
    axis = min(1, z.ndim - 1)
    _, weights, divisor = row_weights(setting, z, y)
    scale = _scaled(setting, weights, divisor).sqrt()
    rows = None if out is None else out.movedim(axis, -1)
    return draw_classes(z.movedim(axis, -1), noise.movedim(axis, -1), scale, rows).movedim(-1, axis)


def _drawn_binary(setting: Setting, z: Tensor, y: Tensor, noise: Tensor, out: Tensor | None) -> Tensor:
    scale = torch.ones_like(z)
    if (pos_weight := setting("pos_weight", None)) is not None:
        scale = 1 - y + pos_weight * y
    if (weight := setting("weight", None)) is not None:
        scale = scale * weight
    p = z.sigmoid()
    derivative: Tensor = (p - (noise < z.double().sigmoid()).to(z.dtype)) * _scaled(setting, scale, z.numel()).sqrt()
    return derivative


def _drawn_normal(setting: Setting, z: Tensor, y: Tensor, noise: Tensor, out: Tensor | None) -> Tensor:
    return noise.to(z.dtype) * math.sqrt(_scaled(setting, 2.0, z.numel()))


_DRAWS: dict[type[nn.Module] | None, Callable[[Setting, Tensor, Tensor, Tensor, Tensor | None], Tensor]] = {
    nn.BCEWithLogitsLoss: _drawn_binary,
    nn.CrossEntropyLoss: _drawn_class,
    nn.MSELoss: _drawn_normal,
}


# Examples.

Parts = Sequence[Tensor | None]


class Examples:
    """Divides predictions into examples. The last table in the module docstring defines what an example is.

    Parameters
    ----------
    loss_function : callable

    Attributes
    ----------
    by_class : bool
        Whether `loss_function` is ``CrossEntropyLoss`` or ``NLLLoss``, which have classes as targets.
    """

    def __init__(self, loss_function: Callable[..., Any]) -> None:
        self._loss_function = loss_function
        self._kind = loss_kind(loss_function)
        self.by_class = self._kind is not None and issubclass(self._kind, nn.CrossEntropyLoss | nn.NLLLoss)

    def flatten(self, parts: Parts, shapes: Sequence[torch.Size]) -> Tensor | None:
        """Return a tensor of shape (..., n, m) with the m entries of each of n examples.

        Return None if all entries of `parts` are None.

        Parameters
        ----------
        parts : sequence of Tensor or None
            One entry for each tensor in the prediction. An entry is a tensor with the shape of the tensor in the
            prediction, after any leading dimensions. None stands for a tensor of zeros.
        shapes : sequence of torch.Size
            The shapes of the tensors in the prediction.

        Raises
        ------
        ValueError
            If the tensors in the prediction have different first dimensions, so that examples cannot be identified.
        """
        given = next((index for index, part in enumerate(parts) if part is not None), None)
        if given is None:
            return None
        some = cast("Tensor", parts[given])
        leading = some.shape[: some.ndim - len(shapes[given])]
        if self._kind is not None:
            return self._entries_last(some, len(shapes[0])).reshape(*leading, *self._size(shapes))
        count = _shared_count(shapes)
        sizes = [(*leading, count, shape.numel() // max(count, 1)) for shape in shapes]
        pairs = zip(parts, sizes, strict=True)
        flat = [some.new_zeros(size) if part is None else part.reshape(size) for part, size in pairs]
        return flat[0] if len(flat) == 1 else torch.cat(flat, -1)

    def restore(self, flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Invert `flatten`: return the tensors from which `flatten` computes `flat`, of shape (..., n, m)."""
        leading = flat.shape[:-2]
        if self._kind is not None:
            [shape] = shapes
            axis = self.axis(len(shape))
            if axis is None:
                return [flat.reshape((*leading, *shape))]
            moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
            return [flat.reshape(*leading, *moved).movedim(-1, len(leading) + axis)]
        count = _shared_count(shapes)
        parts = flat.split([shape.numel() // max(count, 1) for shape in shapes], -1)
        return [part.reshape((*leading, *shape)) for part, shape in zip(parts, shapes, strict=True)]

    def terms(self, shapes: Sequence[torch.Size]) -> tuple[int, int]:
        """Return ``(n, m)``: the number of examples in a prediction, and the number of entries of each example.

        Examples whose targets are ignored are counted.
        """
        if self._kind is not None:
            return self._size(shapes)
        count = _shared_count(shapes)
        return count, sum(shape.numel() // max(count, 1) for shape in shapes)

    def _size(self, shapes: Sequence[torch.Size]) -> tuple[int, int]:
        [shape] = shapes
        axis = self.axis(len(shape))
        entries = 1 if axis is None else shape[axis]
        return shape.numel() // max(entries, 1), entries

    def _entries_last(self, part: Tensor, ndim: int) -> Tensor:
        """Move the axis with the entries of an example to the end; `ndim` is the dimension of the prediction."""
        axis = self.axis(ndim)
        return part if axis is None else part.movedim(axis - ndim, -1)

    def axis(self, ndim: int) -> int | None:
        """Return the axis along which the entries of a prediction form one example.

        Return None if each entry is an example.

        This method applies only to loss functions that `loss_kind` recognizes.
        """
        if self.by_class:
            return min(1, ndim - 1)
        return ndim - 1 if ndim > 1 else None

    def count(self, outputs: Sequence[Tensor], y: Any) -> int:
        """Return the number of examples whose targets are not ignored."""
        if self.by_class and not y.is_floating_point():
            return int((y != loss_setting(self._loss_function, "ignore_index", -100)).sum())
        return self.terms([output.shape for output in outputs])[0]


def check_classes(loss_function: Callable[..., Any], prediction: Any) -> None:
    """Raise a ValueError if the targets of a loss are classes, but the prediction is a scalar.

    PyTorch's own error message does not name the cause.
    """
    if isinstance(prediction, Tensor) and not prediction.ndim and Examples(loss_function).by_class:
        raise ValueError(
            "a prediction has no dimensions, but the loss needs one for the classes: make the model return scores of "
            "shape (C,) or (N, C)"
        )


def _shared_count(shapes: Sequence[torch.Size]) -> int:
    """Return the number of examples in a prediction. Raise a ValueError if its tensors have different lengths."""
    if any(not shape for shape in shapes):
        return 1
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "per-example gradients need predictions with the examples along dimension 0, but these have shapes "
            f"{[tuple(shape) for shape in shapes]}: make the model return one row per example"
        )
    return shapes[0][0]
