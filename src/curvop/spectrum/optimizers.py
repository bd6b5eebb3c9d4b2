r"""Preconditioned curvature matrices and stability thresholds of PyTorch optimizers, for `track`.

On a quadratic loss with Hessian H, a step of an optimizer with fixed second moments is a linear map. There is a
sequence of steps that all multiply the parameters by the same number z if, for some vector x,

.. math:: (H + W) \, x = D(z) \, x,

where W is the weight decay that is added to the gradient, and D(z) is diagonal. For heavy-ball momentum, for example,
:math:`D(z) = -(z - 1) (z - \beta) / (\eta z)`. The steps are unstable if such a z lies outside the unit circle. This
module uses the factorization :math:`D(-1) = \tau P` into a threshold :math:`\tau`, which depends only on the momentum
and dampening, and a positive diagonal matrix P. The steps become unstable when the largest eigenvalue of
:math:`P^{-1/2} (H + W) P^{-1/2}` exceeds :math:`\tau`.

If H + W is positive definite, no z on the unit circle other than -1 is possible. If z is not real, the imaginary parts
of all entries of D(z) have the same sign. The matrix D(1) is zero or negative. These statements also hold if the groups
of parameters have different settings.

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

__all__ = ["Positions", "check_optimizer", "preconditioned"]

Group = Mapping[str, Any]
State = Mapping[str, Any]

#: For each parameter of an operator, the index of its group and its index in the group.
Positions = Mapping[str, tuple[int, int]]


def check_optimizer(A: Any, optimizer: Any) -> Positions:
    """Return the positions of the parameters of `A` in the groups of the optimizer.

    A parameter of `A` may also be an alias of the optimizer's tensor, such as ``parameter.detach()``. Raise an error if
    `track` does not support this optimizer, or this combination of operator and optimizer.
    """
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
    known_positions = {
        _address(tensor): (index, place)
        for index, group in enumerate(optimizer.param_groups)
        for place, tensor in enumerate(group["params"])
    }
    for name in A.params_slices:
        if _address(A._params[name]) not in known_positions:
            raise ValueError(
                f"optimizer does not have the parameter {name!r} of A: pass the optimizer that trains it, or track "
                "A.block(names)"
            )
    positions = {name: known_positions[_address(A._params[name])] for name in A.params_slices}
    _check_groups([group for _, group in _owners(A, optimizer, positions).values()])
    return positions


def preconditioned(
    A: ParameterVectors, optimizer: Optimizer, positions: Positions
) -> tuple[LinearOperator | None, float]:
    r"""Return :math:`P^{-1/2} (A + W) P^{-1/2}` for the current state of the optimizer, and the stability threshold.

    If the optimizer maximizes, A is replaced by -A. If groups of parameters have different thresholds, the entries of P
    for each group are multiplied by the ratio of its threshold to that of the first parameter. The threshold of the
    first parameter then applies to all groups.

    Parameters
    ----------
    A : ParameterVectors, shape (N, N)
        The symmetric operator.
    optimizer : torch.optim.Optimizer
        The optimizer.
    positions : dict
        The result of `check_optimizer` for `A` and `optimizer`.

    Returns
    -------
    operator : LinearOperator, shape (N, N), or None
        The operator. None if the optimizer uses second moments but has not taken a step yet.
    threshold : float
        The stability threshold of the first parameter of `A`.

    Raises
    ------
    ValueError
        If the optimizer no longer has the parameters, has second moments of only some of the parameters, or has
        settings for which no preconditioner exists.
    """
    owners, rule = _owners(A, optimizer, positions), _RULES[type(optimizer)]
    maximize = _check_groups([group for _, group in owners.values()])
    updates = {name: rule(group, _State(name, optimizer.state.get(own, {}))) for name, (own, group) in owners.items()}
    threshold = next(iter(updates.values())).threshold
    unknown = [name for name, update in updates.items() if update.denominator is None]
    if len(unknown) == len(updates):
        return None, threshold
    if unknown:
        raise ValueError(
            f"optimizer has no second moments of {unknown[0]!r}, because this parameter had no gradient: track "
            "A.block(names) for the other parameters"
        )
    scales, decays = [], []
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
    return S @ ((-A if maximize else A) + W) @ S, threshold


def _check_groups(groups: list[Group]) -> bool:
    """Check the settings of the groups, and return whether the optimizer maximizes.

    The constructors of torch validate only the default settings, and settings may change during training.
    """
    for group in groups:
        for name in ("lr", "weight_decay"):
            if not float(group[name]) >= 0:
                raise ValueError(f"optimizer has {name} {float(group[name]):g}, but must have {name} >= 0")
        momentum = float(group.get("momentum", 0.0))
        rates = {"momentum": momentum}
        rates |= {f"beta{index}": float(beta) for index, beta in enumerate(group.get("betas", ()), 1)}
        for name, rate in rates.items():
            if not 0 <= rate < 1:
                raise ValueError(
                    f"optimizer has {name} {rate:g}, for which it has no stability threshold: use a {name} >= 0 and "
                    "less than 1"
                )
        if momentum and not float(group.get("dampening", 0.0)) < 1:
            raise ValueError("optimizer has dampening >= 1, but must have a dampening less than 1, or no momentum")
    maximize = {bool(group["maximize"]) for group in groups}
    if len(maximize) > 1:
        raise ValueError("optimizer has groups with maximize=True and False: track A.block(names) for one of them")
    return maximize.pop()


def _owners(A: ParameterVectors, optimizer: Optimizer, positions: Positions) -> dict[str, tuple[Tensor, Group]]:
    """Return a dict from the name of each parameter of `A` to the optimizer's tensor and its group.

    Pickling `A` and the optimizer turns aliases into copies. A copy is accepted if its values equal those of the
    optimizer's tensor.
    """
    groups = optimizer.param_groups
    owners: dict[str, tuple[Tensor, Group]] = {}
    for name, (index, place) in positions.items():
        group = groups[index] if index < len(groups) else {"params": []}
        own = group["params"][place] if place < len(group["params"]) else None
        if own is None or not _same(own, A._params[name]):
            raise ValueError(
                f"optimizer no longer trains the parameter {name!r} of A: create A from the parameters that the "
                "optimizer trains, and call track again"
            )
        owners[name] = own, group
    return owners


def _same(own: Tensor, tensor: Tensor) -> bool:
    """Return True if two tensors share their memory, or are equal."""
    if _address(own) == _address(tensor):
        return True
    return own.device == tensor.device and own.dtype == tensor.dtype and torch.equal(own, tensor)


def _address(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


class _State:
    """The optimizer's state for one parameter. If an entry is missing, an error says why.

    Parameters
    ----------
    name : str
        The name of the parameter.
    entries : dict
        The state of the optimizer for this parameter.
    """

    def __init__(self, name: str, entries: State) -> None:
        self._name, self._entries = name, entries

    @property
    def steps(self) -> float:
        """The number of steps so far. It stays 0 if a gradient scaler skips the first step of a fused optimizer."""
        return float(self._entries.get("step", 0.0))

    def tensor(self, key: str, option: str = "") -> Tensor:
        """Return an entry in float64. The entry exists only if the given option was set in all steps."""
        if key not in self._entries:
            cause = f", because {option}=True was set after the first step" if option else ""
            remedy = f"create a new optimizer with {option}=True" if option else "load a complete state"
            raise ValueError(f"optimizer has no state {key!r} of {self._name!r}{cause}: {remedy}")
        entry: Tensor = self._entries[key].double()
        return entry


@dataclasses.dataclass(frozen=True)
class _Update:
    """The update of one parameter.

    Attributes
    ----------
    denominator : Tensor, float or None
        The divisor of each entry of the momentum (without the learning rate). It is None if the optimizer uses second
        moments but has not taken a step yet.
    threshold : float
        The stability threshold.
    decoupled : bool
        Whether weight decay multiplies the parameter by ``1 - lr * weight_decay``. Otherwise, it is added to the
        gradient.
    """

    denominator: Any
    threshold: float
    decoupled: bool = False


def _sgd(group: Group, state: _State) -> _Update:
    momentum = float(group["momentum"])
    if not momentum:
        return _Update(1.0, 2.0)
    weight = 1 - float(group["dampening"])
    return _Update(1.0, (2 + 2 * momentum) / (1 + momentum + momentum * weight if group["nesterov"] else weight))


def _adam(group: Group, state: _State) -> _Update:
    beta1, beta2 = map(float, group["betas"])
    denominator = None
    if step := state.steps:
        squares = state.tensor("max_exp_avg_sq", "amsgrad") if group["amsgrad"] else state.tensor("exp_avg_sq")
        denominator = (1 - beta1**step) * ((squares / (1 - beta2**step)).sqrt() + float(group["eps"]))
    return _Update(denominator, (2 + 2 * beta1) / (1 - beta1), bool(group["decoupled_weight_decay"]))


def _rmsprop(group: Group, state: _State) -> _Update:
    denominator = None
    if state.steps:
        squares = state.tensor("square_avg")
        if group["centered"]:
            squares = (squares - state.tensor("grad_avg", "centered") ** 2).clamp(min=0)
        denominator = squares.sqrt() + float(group["eps"])
    return _Update(denominator, 2 + 2 * float(group["momentum"]))


#: The update of each optimizer. Subclasses are excluded, because they may change the update.
_RULES: dict[type[Optimizer], Callable[[Group, _State], _Update]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adam,
    RMSprop: _rmsprop,
}
