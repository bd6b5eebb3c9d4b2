r"""Convolutions whose second derivative does no more work than it must.

A convolution is bilinear, :math:`y = x * W`, and so are its two derivatives. With cotangents `g` of `y`, and `u` and
`V` of the two gradients,

.. math:: (x, W) \mapsto x * W, \qquad (g, x, W) \mapsto (g \star W, \; x \star g),

the second map's own derivative is :math:`(u * W + x * V, \; g \star V, \; u \star g)`: the first map twice, and the
second map once, with other arguments. So these two functions are closed under differentiation, of any order. Torch's
own second derivative computes what is asked of no one (the image's part in the first layer), and the part of the
weights by a convolution with the gradient for a kernel, which is several times slower than the routine for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["CONVOLUTIONS"]

_Settings = tuple[list[int], list[int], list[int], bool, list[int], int]
_Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Convolution(torch.autograd.Function):
    """``(x, W, b) -> y``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return torch.convolution(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        return *_backward(grad, x, weight, ctx.settings, ctx.needs_input_grad[:3]), None


class _Gradient(torch.autograd.Function):
    """``(g, x, W) -> (gradients by x, W and b)``, None for those that `wanted` leaves out."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, settings: _Settings, wanted: tuple[bool, bool, bool]
    ) -> _Parts:
        ctx.save_for_backward(grad, x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _gradient(grad, x, weight, settings, wanted)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, x, weight = ctx.saved_tensors
        by_grad, by_x, by_weight = ctx.needs_input_grad[:3]
        first = None
        if by_grad:
            if v is not None:
                first = _forward(x, v, b, ctx.settings)
            elif b is not None:
                first = b.view(-1, *[1] * (grad.ndim - 2)).expand_as(grad)
            if u is not None:
                through = _forward(u, weight, None, ctx.settings)
                first = through if first is None else first + through
        # Which of the two there are depends on which of `u` and `V` there are; what is not there is not read.
        wanted = (by_x and v is not None, by_weight and u is not None, False)
        second: _Parts = (None, None, None)
        if any(wanted):
            second = _backward(grad, x if u is None else u, weight if v is None else v, ctx.settings, wanted)
        return first, *second[:2], None, None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    if _own(x, weight, bias):
        return _Convolution.apply(x, weight, bias, settings)  # type: ignore[no-any-return,no-untyped-call]
    return torch.convolution(x, weight, bias, *settings)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, settings: _Settings, wanted: tuple[bool, bool, bool]) -> _Parts:
    if _own(grad, x, weight):
        return _Gradient.apply(grad, x, weight, settings, wanted)  # type: ignore[no-any-return,no-untyped-call]
    return _gradient(grad, x, weight, settings, wanted)


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, settings: _Settings, wanted: tuple[bool, bool, bool]) -> _Parts:
    *_, transposed, _, groups = settings
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    parts: _Parts = torch.ops.aten.convolution_backward(grad, x, weight, [channels], *settings, list(wanted))
    return parts


def _stand_in(function: Callable[..., Any], dimensions: int, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Call torch's `function`, whose arguments have these `names`, by the two maps where they are good for it."""
    if len(args) > len(names) or kwargs.keys() - set(names[len(args) :]):
        return function(*args, **kwargs)  # torch says what is wrong
    given: dict[str, Any] = _DEFAULTS | dict(zip(names, args, strict=False)) | kwargs
    tensors = [given.get(name) for name in names[:3]]
    if isinstance(given["padding"], str) or not _here(dimensions, *tensors):
        return function(*args, **kwargs)
    stride, padding, dilation, output_padding = (
        _each(dimensions, given[name]) for name in ("stride", "padding", "dilation", "output_padding")
    )
    x, weight, bias = cast("tuple[Tensor, Tensor, Tensor | None]", tensors)
    return _forward(x, weight, bias, (stride, padding, dilation, names is _TRANSPOSED, output_padding, given["groups"]))


def _each(dimensions: int, setting: int | Sequence[int]) -> list[int]:
    """Return one number for each dimension."""
    numbers = list(setting) if isinstance(setting, Sequence) else [int(setting)]
    return numbers * dimensions if len(numbers) == 1 else numbers


def _here(dimensions: int, *tensors: Tensor | None) -> bool:
    """Whether a convolution is to be made here: of a batch, with a derivative, by nothing else in its own way."""
    given = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if len(given) < 2:
        return False
    device = given[0].device.type
    return (
        given[0].ndim == dimensions + 2
        and _own(*tensors)
        and any(tensor.requires_grad for tensor in given)
        and not any(tensor.is_complex() for tensor in given)
        and device != "meta"
        and not torch.is_autocast_enabled(device)
    )


def _own(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded, by backward mode alone: transforms and forward mode have torch's own rules."""
    return (
        torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and not any(tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)
    )


_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}
_FUNCTIONS: dict[Sequence[str], tuple[Any, ...]] = {
    _PLAIN: (torch.conv1d, torch.conv2d, torch.conv3d),
    _TRANSPOSED: (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
}

#: What stands in for torch's functions.
CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    function: functools.partial(_stand_in, function, dimensions, names)
    for names, functions in _FUNCTIONS.items()
    for dimensions, function in enumerate(functions, start=1)
}
