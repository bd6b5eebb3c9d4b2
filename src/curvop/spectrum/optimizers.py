r"""Preconditioned curvature matrices and stability thresholds of PyTorch optimizers, for `track`.

On a quadratic loss with Hessian H, a step of an optimizer with fixed second moments is a linear map. A sequence of
steps that multiplies the parameters by z each time exists if, for some vector x,

.. math:: (H + W) \, x = D(z) \, x,

where W is the weight decay that is added to the gradient, and D(z) is diagonal. For heavy-ball momentum, for example,
:math:`D(z) = -(z - 1) (z - \beta) / (\eta z)`. The steps are unstable if such a z lies outside the unit circle. This
module uses :math:`D(-1) = \tau P`, with a threshold :math:`\tau` that depends only on the momentum. The steps become
unstable when the largest eigenvalue of :math:`P^{-1/2} (H + W) P^{-1/2}` exceeds :math:`\tau`.

If H + W is positive definite, no other z on the unit circle is possible: the imaginary parts of all entries of D(z)
have the same sign if z is not real, and D(1) is zero or negative. This also holds if the groups of parameters have
different settings.

References
----------
Cohen, Ghorbani, Krishnan, Agarwal, Medapati, Badura, Suo, Cardoze, Nado, Dahl, Gilmer (2022), "Adaptive gradient
methods at the edge of stability", arXiv:2207.14484.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from curvop.operators.diagonal_operator import DiagonalLinearOperator
from curvop.operators.parameter_operator import ParameterVectors

__all__ = ["check_optimizer", "preconditioned", "stability_threshold"]

Group = Mapping[str, Any]
State = Mapping[str, Any]


def check_optimizer(A: Any, optimizer: Any) -> None:
    """Raise an error if `track` does not support this optimizer, or this combination of operator and optimizer."""
    if type(optimizer) not in _RULES:
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}, but must be one of {known} of torch.optim (not a subclass), "
            "because the stability thresholds of others are not known"
        )
    if not isinstance(A, ParameterVectors) or not A.has_diagonal_blocks:
        raise TypeError(
            f"A is a {type(A).__name__}, but with optimizer= its rows and columns must be the same parameters: pass a "
            "curvature operator, such as a HessianLinearOperator, or A.block(names)"
        )
    groups = [group for _, group in _owners(A, optimizer).values()]
    if len({bool(group["maximize"]) for group in groups}) > 1:
        raise ValueError("optimizer has groups with maximize=True and False: track A.block(names) for one of them")
    if any(group.get("dampening", 0) >= 1 for group in groups):
        raise ValueError("optimizer has dampening >= 1, but must have a dampening less than 1, or no momentum")


def stability_threshold(A: ParameterVectors, optimizer: Optimizer) -> float:
    """Return the stability threshold of the first parameter of `A`."""
    _, group = next(iter(_owners(A, optimizer).values()))
    return _RULES[type(optimizer)](group, {}).threshold


def preconditioned(A: ParameterVectors, optimizer: Optimizer) -> LinearOperator | None:
    r"""Return the operator :math:`P^{-1/2} (A + W) P^{-1/2}` for the current state of the optimizer.

    If the optimizer maximizes, A is replaced by -A. If groups have different thresholds, P is multiplied by the ratio
    of the thresholds, so that the threshold of the first parameter holds for all.

    Parameters
    ----------
    A : ParameterVectors, shape (N, N)
        The symmetric operator.
    optimizer : torch.optim.Optimizer
        The optimizer. `check_optimizer` must have accepted `A` and `optimizer`.

    Returns
    -------
    LinearOperator, shape (N, N), or None
        The operator. None if the optimizer uses second moments but has not taken a step yet.

    Raises
    ------
    ValueError
        If the optimizer has second moments of some of the parameters only, or if an entry of P is zero.
    """
    owners, threshold = _owners(A, optimizer), stability_threshold(A, optimizer)
    rule, scales, decays = _RULES[type(optimizer)], [], []
    updates = {name: rule(group, optimizer.state.get(own, {})) for name, (own, group) in owners.items()}
    unknown = [name for name, update in updates.items() if update.denominator is None]
    if len(unknown) == len(updates):
        return None
    if unknown:
        raise ValueError(
            f"optimizer has no second moments of {unknown[0]!r}, because this parameter had no gradient: track "
            "A.block(names) for the other parameters"
        )
    for name, (own, group) in owners.items():
        update, lr, decay = updates[name], float(group["lr"]), float(group["weight_decay"])
        if update.decoupled and lr * decay >= 2:
            raise ValueError(
                f"optimizer has lr {lr:g} and decoupled weight_decay {decay:g}, which is unstable even without a "
                "gradient: use a product of lr and weight_decay less than 2"
            )
        ratio = update.threshold / threshold * (1 - lr * decay / 2 if update.decoupled else 1.0)
        inverses = lr / ratio / torch.as_tensor(update.denominator, dtype=torch.float64).to(A.device)
        if not bool(inverses.isfinite().all()):
            raise ValueError(f"optimizer has eps=0 and a second moment of 0 for {name!r}: use a positive eps")
        scales.append(inverses.sqrt().expand(own.shape).reshape(-1))
        decays.append(torch.full_like(scales[-1], 0.0 if update.decoupled else decay))
    S, W = DiagonalLinearOperator(torch.cat(scales)), DiagonalLinearOperator(torch.cat(decays))
    return S @ ((-A if group["maximize"] else A) + W) @ S


def _owners(A: ParameterVectors, optimizer: Optimizer) -> dict[str, tuple[Tensor, Group]]:
    """Return the optimizer's own tensor and its group for each parameter of `A`, by name.

    The parameter of `A` may also be an alias of the optimizer's tensor, such as ``parameter.detach()``.
    """
    owners = {_address(tensor): (tensor, group) for group in optimizer.param_groups for tensor in group["params"]}
    for name in A.params_slices:
        if _address(A._params[name]) not in owners:
            raise ValueError(
                f"optimizer does not have the parameter {name!r} of A: pass the optimizer that trains it, or track "
                "A.block(names)"
            )
    return {name: owners[_address(A._params[name])] for name in A.params_slices}


def _address(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


@dataclasses.dataclass(frozen=True)
class _Update:
    """The update of one parameter.

    Attributes
    ----------
    denominator : Tensor, float or None
        The number by which each entry of the momentum is divided, without the learning rate. None if the optimizer has
        no state yet.
    threshold : float
        The stability threshold.
    decoupled : bool
        Whether weight decay multiplies the parameter by ``1 - lr * weight_decay``. Otherwise, it is added to the
        gradient.
    """

    denominator: Any
    threshold: float
    decoupled: bool = False


def _sgd(group: Group, state: State) -> _Update:
    momentum = float(group["momentum"])
    if group["nesterov"]:
        return _Update(1.0, (2 + 2 * momentum) / (1 + 2 * momentum))
    return _Update(1.0, (2 + 2 * momentum) / (1 - float(group["dampening"])) if momentum else 2.0)


def _adam(group: Group, state: State) -> _Update:
    beta1, beta2 = map(float, group["betas"])
    denominator = None
    if state:
        step = float(state["step"])
        squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
        denominator = (1 - beta1**step) * ((squares / (1 - beta2**step)).sqrt() + float(group["eps"]))
    return _Update(denominator, (2 + 2 * beta1) / (1 - beta1), bool(group["decoupled_weight_decay"]))


def _rmsprop(group: Group, state: State) -> _Update:
    denominator = None
    if state:
        squares = state["square_avg"].double()
        if group["centered"]:
            squares = (squares - state["grad_avg"].double() ** 2).clamp(min=0)
        denominator = squares.sqrt() + float(group["eps"])
    return _Update(denominator, 2 + 2 * float(group["momentum"]))


#: The update of each optimizer. Subclasses are excluded, because they may change the update.
_RULES: dict[type[Optimizer], Callable[[Group, State], _Update]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
}
