"""Operations whose second derivative torch lacks, gets wrong or wastes work on, and what stands in for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.backends import cuda, cudnn, mha
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _pop_mode

from curvop.kernels.batches import leaves
from curvop.kernels.graph import nodes

__all__ = ["CONVOLUTIONS", "NORMS", "STAND_INS", "ElementaryNorms", "Evaluator", "TwiceDifferentiable", "slow_backends"]

T = TypeVar("T")


@contextmanager
def slow_backends(recurrent: bool) -> Iterator[None]:
    """Run attention on its math backend and, if asked, recurrent layers without cuDNN; restore what was chosen.

    The fused ones have no second derivative. Encoder layers leave their inference path besides, which they would take
    where nothing below a block requires grad. Attributes and setters, not the context managers, which cost several
    times as much or write the TF32 settings too.
    """
    chosen = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
        mha.get_fastpath_enabled(),
        cudnn.enabled,
    )
    depth, grad = torch._C._len_torch_function_stack(), torch.is_grad_enabled()
    try:
        try:
            _choose(False, False, False, True, False, chosen[-1] and not recurrent)
            yield
        finally:
            _put_back(chosen, depth, grad)
    except BaseException:  # Ctrl-C may have come while it was put back
        _put_back(chosen, depth, grad)
        raise


def _choose(flash: bool, efficient: bool, fused: bool, math: bool, fastpath: bool, cudnn_enabled: bool) -> None:
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(fused)
    cuda.enable_math_sdp(math)
    mha.set_fastpath_enabled(fastpath)
    if cudnn.enabled != cudnn_enabled:
        cudnn.enabled = cudnn_enabled


def _put_back(chosen: tuple[bool, ...], depth: int, grad: bool) -> None:
    _choose(*chosen)
    _leave_modes(depth)
    torch.set_grad_enabled(grad)


def _leave_modes(depth: int) -> None:
    """Leave all modes that were entered since the stack of them was so deep."""
    while torch._C._len_torch_function_stack() > depth:
        _pop_mode()


class Evaluator:
    """Evaluates code whose result can be differentiated twice, also if the result holds derivatives itself.

    Attributes
    ----------
    elementary_norms : bool
        Whether a result held a derivative of a normalisation, so that normalisations are computed by elementary
        operations from now on.
    """

    def __init__(self) -> None:
        self.elementary_norms = False

    def __call__(self, function: Callable[[], T]) -> T:
        """Return ``function()``; call it again if its first result holds a derivative of a fused normalisation.

        Raises
        ------
        RuntimeError
            If the second result still holds one, as that of a scripted module does.
        """
        with torch.enable_grad(), TwiceDifferentiable(self.elementary_norms) as mode:
            result = function()
        roots = [leaf.grad_fn for leaf in leaves(result) if leaf.grad_fn is not None]
        fused = next((node.name() for node in nodes(roots) if _is_derivative_of_norm(node)), None)
        if fused is None:
            self.elementary_norms = mode.elementary_norms
            return result
        if self.elementary_norms:
            raise RuntimeError(
                f"the model or the loss holds a derivative of a fused normalisation ({fused}), which torch "
                "differentiates wrongly (pytorch#186256): write it with elementary operations (mean, var, rsqrt)"
            )
        self.elementary_norms = True
        return self(function)


class TwiceDifferentiable(TorchFunctionMode):
    """Computes in another way what torch differentiates wrongly, or slowly, a second time.

    Parameters
    ----------
    elementary_norms : bool
        Whether normalisations are computed by elementary operations. They are from the first one on within a derivative
        of ``torch.func`` or of forward mode.
    """

    def __init__(self, elementary_norms: bool = False) -> None:
        super().__init__()
        self.elementary_norms = elementary_norms

    def __enter__(self) -> Self:
        """Enter the mode."""
        self._depth = torch._C._len_torch_function_stack()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        """Leave the mode, unless Ctrl-C has come while torch had left it for a moment."""
        _leave_modes(self._depth)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what stands in for `func`, or `func` itself."""
        if func in NORMS and (self.elementary_norms or _in_derivative()):
            self.elementary_norms = True
            return NORMS[func](*args, **(kwargs or {}))
        return _DEFINITIONS.get(func, func)(*args, **(kwargs or {}))


class ElementaryNorms(TorchFunctionMode):
    """Computes normalisations by elementary operations."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call what stands in for `func`, or `func` itself."""
        return NORMS.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return ``g v / ||v||``; the derivative of torch's fused one takes the norms that it saved for constants."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _attention(*args: Any, **kwargs: Any) -> Any:
    """Return attention by the math backend, also where the model itself has chosen another around the call."""
    with slow_backends(recurrent=False):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _logcumsumexp(function: Callable[..., Any], input: Tensor, dim: int, **kwargs: Any) -> Any:  # noqa: A002
    """Return ``log(cumsum(exp(input)))`` of real numbers by a scan of log2(n) steps.

    Torch's own gradient takes the logarithm of its cotangent: where that is zero, as behind a mask, the gradient's
    derivative is wrong or NaN.
    """
    if kwargs or not input.is_floating_point():
        return function(input, dim, **kwargs)
    total, shift = torch.atleast_1d(input).movedim(dim, 0), 1
    while shift < len(total):
        pairs = torch.stack([total[shift:], total[:-shift]])
        empty = (pairs == -torch.inf).all(0)  # of which logsumexp has no derivative
        sums = pairs.masked_fill(empty, 0.0).logsumexp(0).masked_fill(empty, -torch.inf)
        total, shift = torch.cat([total[:shift], sums]), 2 * shift
    return total.movedim(0, dim).view_as(input)


def _norm(function: Callable[..., Any], names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Return a normalisation, of arguments of these `names`, by elementary operations.

    The second derivative of torch's fused ones takes the mean and the variance that they saved for constants, and so
    does the first derivative of their forward mode (pytorch#186256, #175754, #196699, #196700). Running statistics are
    constants.
    """
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    of_batch = "training" in names
    if "normalized_shape" in names:
        axes = tuple(range(-len(given["normalized_shape"]), 0))
    elif given.get("training", False) if of_batch else given.get("use_input_stats", True):
        axes = (*[0] * of_batch, *range(2, x.ndim))
        weight, bias = (one if one is None else one.view(-1, *[1] * (x.ndim - 2)) for one in (weight, bias))
    else:
        return function(*args, **kwargs)
    with torch.no_grad():  # checks its arguments, updates running statistics and chooses the dtype
        fused = function(*args, **kwargs)
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    normed = (x - mean) * (variance + given.get("eps", 1e-5)).rsqrt()
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(fused.dtype)


def _in_derivative() -> bool:
    """Whether a derivative of ``torch.func`` or of forward mode is under way."""
    if peek_interpreter_stack() is None:
        return forward_ad._current_level >= 0
    return any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in get_interpreter_stack() or ())


def _is_derivative_of_norm(node: Node) -> bool:
    """Whether a node differentiates the gradient of a fused normalisation, by the statistics of its input."""
    return node.name() in _DERIVATIVES_OF_NORMS and getattr(node, "_saved_train", True)


# Convolutions whose second derivative does no more work than it must.
#
# A convolution is bilinear, :math:`y = x * W`, and so are its two derivatives. With cotangents `g` of `y`, and `u` and
# `V` of the two gradients,
#
# .. math:: (x, W) \mapsto x * W, \qquad (g, x, W) \mapsto (g \star W, \; x \star g),
#
# the second map's own derivative is :math:`(u * W + x * V, \; g \star V, \; u \star g)`: the first map twice, and the
# second map once, with other arguments. So these two functions are closed under differentiation, of any order. Torch's
# own second derivative computes what is asked of no one (the image's part in the first layer), and the part of the
# weights by a convolution with the gradient for a kernel, which is several times slower than the routine for it.

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


# What stands in for which function of torch.

_DERIVATIVES_OF_NORMS = {
    f"{name}NormBackwardBackward0" for name in ("NativeLayer", "NativeBatch", "CudnnBatch", "MiopenBatch")
}
_AFFINE, _RUNNING = ("weight", "bias"), ("running_mean", "running_var")
_NAMES: dict[Callable[..., Any], Sequence[str]] = {
    functional.layer_norm: ("input", "normalized_shape", *_AFFINE, "eps"),
    torch.layer_norm: ("input", "normalized_shape", *_AFFINE, "eps"),
    functional.batch_norm: ("input", *_RUNNING, *_AFFINE, "training", "momentum", "eps"),
    torch.batch_norm: ("input", *_AFFINE, *_RUNNING, "training", "momentum", "eps"),
    functional.instance_norm: ("input", *_RUNNING, *_AFFINE, "use_input_stats", "momentum", "eps"),
    torch.instance_norm: ("input", *_AFFINE, *_RUNNING, "use_input_stats", "momentum", "eps"),
}
#: What stands in for normalisations that are differentiated three times, or in forward mode and once more.
NORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    function: functools.partial(_norm, function, names) for function, names in _NAMES.items()
}
STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    torch.logcumsumexp: functools.partial(_logcumsumexp, torch.logcumsumexp),
    Tensor.logcumsumexp: functools.partial(_logcumsumexp, Tensor.logcumsumexp),
    functional.scaled_dot_product_attention: _attention,
}
_DEFINITIONS: dict[Callable[..., Any], Callable[..., Any]] = {**STAND_INS, **CONVOLUTIONS}
