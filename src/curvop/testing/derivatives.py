"""Dense first and second derivatives, in forward mode where torch can, and checked against reverse mode."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

__all__ = ["NoHessianError", "dense_hessian", "dense_jacobian", "sandwiched_hessian"]

_WORKSPACE_BYTES = 1 << 28


class NoHessianError(RuntimeError):
    """The loss is random, or torch's derivatives of it contradict each other."""


def dense_hessian(f: Callable[[Tensor], Tensor], theta: Tensor, eps: float) -> Tensor:
    """Return the second derivatives ``(P, P)`` of a scalar function, whose precision is `eps`."""
    identity = torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device)
    hessian = _products(f, theta, identity, _columns_at_a_time(f, theta))
    _check(hessian, hessian, identity, f, theta, eps)
    return hessian


def sandwiched_hessian(f: Callable[[Tensor], Tensor], z: Tensor, jacobian: Tensor, eps: float) -> Tensor:
    """Return ``J' H J`` for the second derivatives ``H`` of a scalar function; only ``H J`` is formed."""
    products = _products(f, z, jacobian.T, _columns_at_a_time(f, z))
    matrix = jacobian.T @ products
    _check(matrix, products, jacobian.T, f, z, eps)
    return matrix


def dense_jacobian(f: Callable[[Tensor], Tensor], theta: Tensor, eps: float) -> Tensor:
    """Return the first derivatives ``(M, P)`` of a function whose values are vectors ``(M,)``."""
    leaf = theta.clone().requires_grad_()
    with torch.enable_grad():
        values = f(leaf)
    if not values.requires_grad:
        return theta.new_zeros(len(values), len(theta))
    signs = torch.randn_like(values).sign()
    [reverse] = torch.autograd.grad(values, leaf, signs, retain_graph=True, materialize_grads=True)
    jacobian = _forward_jacobian(f, theta)
    if jacobian is None:
        rows = [
            torch.autograd.grad(values, leaf, e, retain_graph=True, materialize_grads=True)[0]
            for e in torch.eye(len(values), dtype=values.dtype, device=values.device)
        ]
        jacobian = torch.stack(rows)
    allowed = max(1e-4, eps ** (1 / 3)) * jacobian.norm() + eps**0.5
    if (signs @ jacobian - reverse).norm() > allowed:
        raise NoHessianError("the Jacobian is wrong, for forward and reverse mode disagree")
    return jacobian


def _forward_jacobian(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor | None:
    def column(tangent: Tensor) -> Any:
        return jvp(f, (theta,), (tangent,))[1]

    for columns in (vmap(column, randomness="same", chunk_size=64), lambda e: torch.stack([column(one) for one in e])):
        try:
            derivative: Tensor = columns(torch.eye(len(theta), dtype=theta.dtype, device=theta.device))
            return derivative.T
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return None


def _columns_at_a_time(f: Callable[[Tensor], Tensor], theta: Tensor) -> int:
    """See that the objective has a Hessian, and return how many columns fit the workspace."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = max(tensor.nbytes, saved.get(tensor.data_ptr(), 0))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = f(theta.clone().requires_grad_())
    if not isinstance(value, Tensor) or value.ndim != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be a scalar tensor, not {shape}: use reduction 'mean' or 'sum'")
    with torch.enable_grad():  # an objective may contain derivatives of its own
        again = f(theta).detach()
    # The square root of the precision is far above what a reordered sum changes, and far below what dropout does.
    if not torch.isclose(value, again, rtol=torch.finfo(value.dtype).eps ** 0.5, equal_nan=True):
        raise NoHessianError(
            f"the loss is random: {value.item():.6g}, then {again.item():.6g}. Dropout, for one, needs evaluation mode"
        )
    # A column holds tangents of what a gradient saves, their cotangents, and temporaries: measured, 6 to 12 times.
    return max(1, _WORKSPACE_BYTES // (8 * (sum(saved.values()) + theta.nbytes)))


def _products(f: Callable[[Tensor], Tensor], theta: Tensor, basis: Tensor, columns_at_a_time: int) -> Tensor:
    """Return the Hessian of `f` times the rows of `basis`, as columns."""
    chunks = basis.split(columns_at_a_time)

    def column(tangent: Tensor) -> Any:
        return jvp(grad(f), (theta,), (tangent,))[1]

    # vmap stays outermost. Inside the forward-mode derivative (as in jvp(jacrev(f))) it freezes the statistics that
    # LayerNorm, InstanceNorm and BatchNorm save, and the result is wrong without a word.
    together = vmap(column, out_dims=1, randomness="same")
    for columns in (together, lambda basis: torch.stack([column(e) for e in basis], dim=1)):
        try:
            return torch.cat([columns(chunk) for chunk in chunks], dim=1)
        except RuntimeError as error:  # no batching rule, or no forward-mode derivative: the next way needs less
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return torch.cat([_double_backward(f, theta, chunk) for chunk in chunks], dim=1)


def _double_backward(f: Callable[[Tensor], Tensor], theta: Tensor, basis: Tensor) -> Tensor:
    leaf = theta.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        return torch.zeros_like(basis.T)
    products = [torch.autograd.grad(gradient, leaf, e, retain_graph=True, materialize_grads=True)[0] for e in basis]
    return torch.stack(products, dim=1)


def _check(
    matrix: Tensor,
    products: Tensor,
    basis: Tensor,
    f: Callable[[Tensor], Tensor],
    theta: Tensor,
    eps: float,
) -> None:
    """Refuse a matrix that is not symmetric, or that reverse mode contradicts (torch 2.13: scatter_reduce's 'prod')."""
    # Far above rounding, also that of TF32 or of single precision inside a double model, and below what a wrong formula
    # does. A matrix of nothing but rounding errors is small beside the loss, for parameters of order one.
    with torch.enable_grad():
        value = float(f(theta).detach())
    allowed = max(1e-4, eps ** (1 / 3)) * products.norm() + eps**0.5 * abs(value)
    wrong = {"it is not symmetric": matrix - matrix.T}
    with suppress(RuntimeError):  # an operation without a second derivative in reverse mode leaves nothing to compare
        signs = torch.randn(len(basis), dtype=theta.dtype, device=theta.device).sign()
        reverse = _double_backward(f, theta, (signs @ basis)[None])[:, 0]
        wrong["forward and reverse mode disagree"] = products @ signs - reverse
    for what, difference in wrong.items():
        if difference.norm() > allowed:
            raise NoHessianError(
                f"the Hessian is wrong, for {what} (by {difference.norm() / products.norm():.1e} of its norm): an "
                "operation of the model or the loss has a wrong derivative, in torch or in an autograd.Function"
            )
