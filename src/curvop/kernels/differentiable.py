"""Replacements for operations whose second derivative is missing, wrong or slow in torch.

Fused attention and cuDNN's recurrent layers have no second derivative; `slow_backends` turns them off. A torch function
mode, `TwiceDifferentiable`, replaces other operations by the functions in `CONVOLUTIONS` and `STAND_INS`. If the
objective itself contains derivatives, the mode also replaces normalizations by the functions in `NORMS`.
"""

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

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "STAND_INS",
    "ElementaryNorms",
    "Evaluator",
    "ReplacementMode",
    "TwiceDifferentiable",
    "slow_backends",
]

T = TypeVar("T")


@contextmanager
def slow_backends(recurrent: bool) -> Iterator[None]:
    """Within a ``with`` block, disable backends that have no second derivatives.

    Attention uses its math backend. Recurrent layers run without cuDNN if `recurrent` is True. Transformer encoder
    layers do not use their inference fast path, which they would otherwise use if no tensor in a layer requires grad.

    This function calls torch's setter functions. Torch's context managers would take several times as long, or would
    also change the TF32 settings.
    """
    before = (
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
            _set_backends(False, False, False, True, False, before[-1] and not recurrent)
            yield
        finally:
            _restore(before, depth, grad)
    except BaseException:  # Ctrl-C may have interrupted `_restore`
        _restore(before, depth, grad)
        raise


def _set_backends(flash: bool, efficient: bool, fused: bool, math: bool, fastpath: bool, cudnn_enabled: bool) -> None:
    cuda.enable_flash_sdp(flash)
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(fused)
    cuda.enable_math_sdp(math)
    mha.set_fastpath_enabled(fastpath)
    if cudnn.enabled != cudnn_enabled:
        cudnn.enabled = cudnn_enabled


def _restore(backends: tuple[bool, ...], depth: int, grad: bool) -> None:
    _set_backends(*backends)
    _leave_modes(depth)
    torch.set_grad_enabled(grad)


def _leave_modes(depth: int) -> None:
    """Pop torch function modes until `depth` of them are left on the stack."""
    while torch._C._len_torch_function_stack() > depth:
        _pop_mode()


class Evaluator:
    """Evaluate functions such that their values can be differentiated twice, even if the values contain derivatives.

    Attributes
    ----------
    elementary_norms : bool
        Whether normalizations are computed with elementary operations. The attribute becomes True when a result
        contains the derivative of a normalization, and stays True in all later evaluations.
    """

    def __init__(self) -> None:
        self.elementary_norms = False
        self._used_elementary_norms = False
        self._differentiated = False

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """Return ``function(*args)``, evaluated while `TwiceDifferentiable` replaces some of torch's functions.

        Call this method only where grad mode is enabled. Afterwards, pass the result to the method `accepts`.
        """
        self._used_elementary_norms = self.elementary_norms
        with TwiceDifferentiable(self.elementary_norms) as mode:
            result = function(*args)
        self.elementary_norms, self._differentiated = mode.elementary_norms, mode.differentiated
        return result

    def accepts(self, result: Any, searched: bool) -> bool:
        """Return False if the last evaluation must be repeated because `result`, its result, cannot be differentiated.

        This is the case if `result` contains a derivative of a fused normalization. In the next evaluation,
        normalizations are computed by elementary operations. If `searched` is True, earlier results contained no such
        derivative, and the graph of `result` is only searched if the evaluation called ``torch.autograd.grad``.

        Raises
        ------
        RuntimeError
            If the result contains a derivative of a fused normalization although normalizations were computed by
            elementary operations. For example, the operations of a scripted module cannot be replaced.
        """
        if searched and not self._differentiated:
            return True
        roots = [leaf.grad_fn for leaf in leaves(result) if leaf.grad_fn is not None]
        fused = next((node.name() for node in nodes(roots) if _is_derivative_of_norm(node)), None)
        if fused is None:
            return True
        if self._used_elementary_norms:
            raise RuntimeError(
                f"the model or the loss contains a derivative of a fused normalization ({fused}), which torch "
                "differentiates wrongly (pytorch#186256): write it with elementary operations (mean, var, rsqrt)"
            )
        self.elementary_norms = True
        return False


class ReplacementMode(TorchFunctionMode):
    """A torch function mode that replaces some functions of torch. Subclasses define the method `replacement`."""

    def replacement(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function to call in place of `func`, or `func` itself."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the replacement of `func`."""
        func = self.replacement(func)
        return func(*args, **kwargs) if kwargs else func(*args)


class TwiceDifferentiable(ReplacementMode):
    """Replace functions whose second derivative is missing, wrong or slow in torch.

    Parameters
    ----------
    elementary_norms : bool
        Whether to compute normalizations with elementary operations. The mode sets its attribute ``elementary_norms``
        to True when a normalization is called inside a ``torch.func`` or forward-mode derivative.

    Attributes
    ----------
    differentiated : bool
        Whether ``torch.autograd.grad`` or ``Tensor.backward`` was called. Functions of ``torch.func`` call the former.
    """

    def __init__(self, elementary_norms: bool = False) -> None:
        super().__init__()
        self.elementary_norms = elementary_norms
        self.differentiated = False

    def __enter__(self) -> Self:
        """Enter the mode."""
        self._depth = torch._C._len_torch_function_stack()
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: object) -> None:
        """Leave the mode.

        Modes are popped by depth, because this mode may be missing from the stack. Torch temporarily removes a mode
        from the stack, and Ctrl-C may have interrupted torch during that time.
        """
        _leave_modes(self._depth)

    def replacement(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function to call in place of `func`, or `func` itself."""
        if func not in _HANDLED:
            return func
        if func in NORMS and (self.elementary_norms or _in_derivative()):
            self.elementary_norms = True
            return NORMS[func]
        if func in _DERIVATIVES:
            self.differentiated = True
        return _REPLACEMENTS.get(func, func)


class ElementaryNorms(ReplacementMode):
    """Replace fused normalizations by elementary operations."""

    def replacement(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function to call in place of `func`, or `func` itself."""
        return NORMS.get(func, func)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return ``g v / ||v||``.

    The second derivative of torch's fused version is wrong, because it treats the saved norms as constants. This
    function replaces the fused version.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _attention(*args: Any, **kwargs: Any) -> Any:
    """Compute attention with the math backend, even if the model selects another backend for the call."""
    with slow_backends(recurrent=False):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _logcumsumexp(function: Callable[..., Any], input: Tensor, dim: int, **kwargs: Any) -> Any:  # noqa: A002
    """Compute ``log(cumsum(exp(input)))`` of real numbers with a scan of log2(n) steps.

    This function replaces torch's version, whose gradient takes the logarithm of the cotangent. If the cotangent is
    zero, for example because a mask follows, the derivative of that gradient is wrong or NaN.
    """
    if kwargs or not input.is_floating_point():
        return function(input, dim, **kwargs)
    total, shift = torch.atleast_1d(input).movedim(dim, 0), 1
    while shift < len(total):
        pairs = torch.stack([total[shift:], total[:-shift]])
        empty = (pairs == -torch.inf).all(0)  # logsumexp has no derivative if both entries are -inf
        sums = pairs.masked_fill(empty, 0.0).logsumexp(0).masked_fill(empty, -torch.inf)
        total, shift = torch.cat([total[:shift], sums]), 2 * shift
    return total.movedim(0, dim).view_as(input)


def _norm(function: Callable[..., Any], names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Compute a normalization with elementary operations.

    `function` is torch's normalization, and `names` are the names of its arguments.

    Third derivatives of torch's fused normalizations are wrong, because the second derivative treats the saved mean and
    variance as constants. Derivatives of the forward-mode derivative are wrong for the same reason (pytorch#186256,
    #175754, #196699, #196700). If a normalization uses running statistics, which are constants, call `function`.
    """
    arguments = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = arguments["input"], arguments.get("weight"), arguments.get("bias")
    is_batch_norm = "training" in names
    if "normalized_shape" in names:
        axes = tuple(range(-len(arguments["normalized_shape"]), 0))
    elif arguments.get("training", False) if is_batch_norm else arguments.get("use_input_stats", True):
        axes = (*[0] * is_batch_norm, *range(2, x.ndim))
        weight, bias = (param if param is None else param.view(-1, *[1] * (x.ndim - 2)) for param in (weight, bias))
    else:
        return function(*args, **kwargs)
    with torch.no_grad():  # call torch to check the arguments, update running statistics and find the dtype
        fused = function(*args, **kwargs)
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    normed = (x - mean) * (variance + arguments.get("eps", 1e-5)).rsqrt()
    normed = normed if weight is None else normed * weight
    return (normed if bias is None else normed + bias).to(fused.dtype)


def _in_derivative() -> bool:
    """Return True if the caller runs inside a ``torch.func`` or forward-mode derivative."""
    if peek_interpreter_stack() is None:
        return forward_ad._current_level >= 0
    return any(level.key() in (TransformType.Grad, TransformType.Jvp) for level in get_interpreter_stack() or ())


def _is_derivative_of_norm(node: Node) -> bool:
    """Return True if `node` is the double backward of a fused normalization that uses no running statistics."""
    return node.name() in _DERIVATIVES_OF_NORMS and getattr(node, "_saved_train", True)


# Convolutions without unnecessary work in the second derivative.
#
# A convolution y = x * W is bilinear in x and W, and its two gradients are bilinear as well. Consider the maps
#
#     (x, W)    -> x * W                      the convolution
#     (g, x, W) -> (g (*) W, x (*) g)         its gradients with respect to x and W; g is the cotangent of y
#
# With cotangents u and V of the two gradients, the derivative of the second map is
#
#     (u * W + x * V,  g (*) V,  u (*) g).
#
# This derivative consists of two calls of the first map and one call of the second map, with other arguments.
# Derivatives of any order therefore need only these two maps. Torch's own second derivative is slower for two reasons.
# First, it computes gradients that are not needed, such as the gradient with respect to the image in the first layer.
# Second, it computes the gradient with respect to the weights as a convolution whose kernel is the cotangent. This
# convolution takes several times as long as the routine for gradients with respect to weights.

_Settings = tuple[list[int], list[int], list[int], bool, list[int], int]
_Parts = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Convolution(torch.autograd.Function):
    """A convolution ``(x, W, b) -> y`` with a bias b: the first map in the comment above this class."""

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
        return *_backward(grad, x, weight, ctx.settings, _needed(ctx)), None


class _Gradient(torch.autograd.Function):
    """The gradients of a convolution with respect to x, W and b: the second map in the comment above `_Convolution`.

    A gradient is None if its entry in the tuple `wanted` is False.
    """

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
        by_grad, by_x, by_weight = _needed(ctx)
        first = None
        if by_grad:
            if v is not None:
                first = _forward(x, v, b, ctx.settings)
            elif b is not None:
                first = b.view(-1, *[1] * (grad.ndim - 2)).expand_as(grad)
            if u is not None:
                through = _forward(u, weight, None, ctx.settings)
                first = through if first is None else first + through
        # The gradient with respect to x needs V, and the gradient with respect to W needs u. If V is None, W is passed
        # in its place but not read. Likewise, x is passed in place of u.
        wanted = (by_x and v is not None, by_weight and u is not None, False)
        second: _Parts = (None, None, None)
        if any(wanted):
            second = _backward(grad, x if u is None else u, weight if v is None else v, ctx.settings, wanted)
        return first, *second[:2], None, None


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    """Return whether the running backward pass needs the derivatives with respect to the first three arguments.

    The attribute ``ctx.needs_input_grad`` only tells whether an argument requires grad. A backward pass needs fewer
    derivatives if it is for some of the leaves only. For example, a Jacobian-vector product differentiates `_Gradient`
    with respect to the cotangent, but not with respect to the image and the weights, although both require grad.
    """
    wanted: list[bool] = list(ctx.needs_input_grad[:3])
    for index, (node, _) in enumerate(ctx.next_functions[:3]):  # a missing bias has no entry, but it is the last one
        # Torch cannot tell whether it needs the gradient of a leaf, hence `_no_leaf`.
        if wanted[index] and node.name() != "torch::autograd::AccumulateGrad":
            wanted[index] = torch._C._will_engine_execute_node(node)
    return wanted[0], wanted[1], wanted[2]


def _no_leaf(tensor: Tensor | None) -> Tensor | None:
    """Return a view of the tensor if the tensor is a leaf that requires grad, or else the tensor itself."""
    return tensor.view_as(tensor) if tensor is not None and tensor.requires_grad and tensor.is_leaf else tensor


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    if backward_only(x, weight, bias):
        return _Convolution.apply(x, weight, bias, settings)  # type: ignore[no-any-return,no-untyped-call]
    return torch.convolution(x, weight, bias, *settings)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, settings: _Settings, wanted: tuple[bool, bool, bool]) -> _Parts:
    if backward_only(grad, x, weight):
        return _Gradient.apply(grad, x, weight, settings, wanted)  # type: ignore[no-any-return,no-untyped-call]
    return _gradient(grad, x, weight, settings, wanted)


def _gradient(grad: Tensor, x: Tensor, weight: Tensor, settings: _Settings, wanted: tuple[bool, bool, bool]) -> _Parts:
    *_, transposed, _, groups = settings
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    parts = torch.ops.aten.convolution_backward(grad, x, weight, [channels], *settings, list(wanted))
    # Torch may also return a gradient that is not wanted. In float32, that of a 1-d convolution has a wrong shape.
    u, v, b = (part if needed else None for part, needed in zip(parts, wanted, strict=True))
    return u, v, b


def _convolve(function: Callable[..., Any], dimensions: int, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
    """Compute a convolution with `_Convolution`, or with torch's `function` if `_Convolution` does not apply.

    `names` are the names of the arguments of `function`.
    """
    if len(args) > len(names) or kwargs.keys() - set(names[len(args) :]):
        return function(*args, **kwargs)  # raises torch's error
    arguments: dict[str, Any] = _DEFAULTS | dict(zip(names, args, strict=False)) | kwargs
    tensors = [arguments.get(name) for name in names[:3]]
    if isinstance(arguments["padding"], str) or not _applies(dimensions, *tensors):
        return function(*args, **kwargs)
    stride, padding, dilation, output_padding = (
        _per_dimension(dimensions, arguments[name]) for name in ("stride", "padding", "dilation", "output_padding")
    )
    settings = (stride, padding, dilation, names is _TRANSPOSED, output_padding, arguments["groups"])
    x, weight, bias = cast("tuple[Tensor, Tensor, Tensor | None]", map(_no_leaf, tensors))
    return _forward(x, weight, bias, settings)


def _per_dimension(dimensions: int, setting: int | Sequence[int]) -> list[int]:
    """Expand a setting, such as the stride, to a list with one number for each dimension."""
    numbers = list(setting) if isinstance(setting, Sequence) else [int(setting)]
    return numbers * dimensions if len(numbers) == 1 else numbers


def _applies(dimensions: int, *tensors: Tensor | None) -> bool:
    """Return True if `_Convolution` can replace a convolution of these tensors (input, weight and bias).

    The input must be a batch of real numbers. At least one of the tensors must require grad. Autocast must be off.
    """
    present = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if len(present) < 2:
        return False
    device = present[0].device.type
    return (
        present[0].ndim == dimensions + 2
        and backward_only(*tensors)
        and any(tensor.requires_grad for tensor in present)
        and not any(tensor.is_complex() for tensor in present)
        and device != "meta"
        and not torch.is_autocast_enabled(device)
    )


def backward_only(*tensors: Tensor | None) -> bool:
    """Return True if grad mode is on, and neither ``torch.func`` nor forward mode is active.

    Both ``torch.func`` transforms and forward mode need torch's own derivative rules.
    """
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

#: Replacements for torch's convolutions.
CONVOLUTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    function: functools.partial(_convolve, function, dimensions, names)
    for names, functions in _FUNCTIONS.items()
    for dimensions, function in enumerate(functions, start=1)
}

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
#: Replacements for normalizations, used for third derivatives and for derivatives of forward-mode derivatives.
NORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    function: functools.partial(_norm, function, names) for function, names in _NAMES.items()
}
#: Replacements for functions whose second derivative is wrong or missing.
STAND_INS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,
    torch.logcumsumexp: functools.partial(_logcumsumexp, torch.logcumsumexp),
    Tensor.logcumsumexp: functools.partial(_logcumsumexp, Tensor.logcumsumexp),
    functional.scaled_dot_product_attention: _attention,
}
_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {**STAND_INS, **CONVOLUTIONS}
_DERIVATIVES = {torch.autograd.grad, Tensor.backward}
#: The functions for which `TwiceDifferentiable` does more than call the function.
_HANDLED = {*_REPLACEMENTS, *NORMS, *_DERIVATIVES}
