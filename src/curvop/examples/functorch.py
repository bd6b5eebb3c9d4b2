"""The dense Hessian of a small model, from its definition, with `torch.func`.

The reference that the operators are tested against. It shares no code with them: the data set is evaluated as one
batch, and the gradient is differentiated in forward mode where the operators differentiate it in reverse mode.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

__all__ = ["NoHessianError", "functorch_hessian"]

_WORKSPACE_BYTES = 1 << 28


class NoHessianError(RuntimeError):
    """The loss is random, or torch's derivatives of it contradict each other."""


@torch.inference_mode(mode=False)
def functorch_hessian(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
    loss_function: Callable[[Any, Any], Tensor],
    params: Mapping[str, Tensor] | Iterable[Tensor],
    data: Iterable[tuple[Any, Any]],
) -> Tensor:
    r"""Compute the Hessian of the loss of a whole data set as a dense matrix.

    With `theta` the flattened and concatenated `params` and `(X, y)` the whole data set as one batch, it is the matrix
    of second derivatives of ``f(theta) = loss_function(model(theta, X), y)``. A loss that averages therefore averages
    over the data set, and one that sums adds over it, however `data` is cut into batches. For a check of an operator
    on a model of up to some thousand parameters; time and memory grow with their square.

    Parameters
    ----------
    model : torch.nn.Module or callable
        A module, called as ``model(X)``, or a callable ``(params_dict, X) -> prediction``. A module's remaining
        parameters are constants; its flags and buffers are used as they are and left as they are.
    loss_function : callable
        ``(prediction, y) -> scalar tensor``: a loss module with reduction 'mean' or 'sum', or any function.
    params : dict of str to torch.Tensor, or iterable of torch.nn.Parameter
        Any of the module's parameters by name, in the order of rows and columns; the values given are used, even where
        they differ from the module's own. Or some of the module's own parameters. All on one device.
    data : iterable of (X, y)
        Batches, iterated over once. X and y are tensors with the examples along dimension 0, or (nested) mappings,
        lists and tuples of them, joined leaf by leaf and moved to the parameters' device.

    Returns
    -------
    torch.Tensor, shape (P, P)
        In the parameters' dtype, on their device; zero where the loss does not reach a parameter.

    Raises
    ------
    ValueError
        If `data` is empty, or its batches cannot be joined (sequences of different lengths need padding); if `params`
        is empty, spread over devices or not the model's; if the loss is not a scalar.
    TypeError
        If X or y holds what is neither a tensor nor a collection of tensors.
    NoHessianError
        If two evaluations of the loss differ, as they do with dropout in training mode, or if the matrix is wrong
        beyond rounding: not symmetric, or not what the gradient gives when it is differentiated in reverse mode.

    Notes
    -----
    Column i is ``jvp(grad(f))`` along the i-th basis vector, the directional derivative of the gradient (Pearlmutter
    1994, "Fast exact multiplication by the Hessian", Neural Computation 6, p. 147: ``R_v{grad} = H v``), as many
    columns at a time as about 256 MiB hold. Columns that `vmap` cannot batch are computed one by one; where an
    operation has no forward-mode derivative, the gradient is differentiated in reverse mode. An embedding's row at
    `padding_idx` is a constant, as in PyTorch's gradient.

    Examples
    --------
    >>> import torch
    >>> from curvop.examples.functorch import functorch_hessian
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = [(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1)), (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1))]
    >>> functorch_hessian(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
    tensor([[2., 2.],
            [2., 4.]])
    """
    named = _named(model, params)
    theta = torch.cat([value.detach().reshape(-1) for value in named.values()])
    batches = [(X, y) for X, y in data]
    if not batches:
        raise ValueError("data holds no batches (an iterator that was used before is empty)")
    X, y = (_joined([batch[i] for batch in batches], theta.device, name) for i, name in enumerate("Xy"))

    def f(vector: Tensor) -> Tensor:
        pieces = zip(named.items(), vector.split([value.numel() for value in named.values()]), strict=True)
        state = {name: piece.view(value.shape).to(value.dtype) for (name, value), piece in pieces}
        if not isinstance(model, nn.Module):
            return loss_function(model(state, X), y)
        # Batch norm writes into its buffers: let it write into copies, which torch.func also insists on.
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return loss_function(functional_call(model, buffers | state, (X,)), y)

    with _differentiable(theta.device):
        hessian = _dense_hessian(f, theta, _columns_at_a_time(f, theta))
        _check(hessian, f, theta, max(torch.finfo(value.dtype).eps for value in named.values()))
        return hessian


def _named(model: object, params: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the parameters by name, in the order given, or say what is wrong with them."""
    own = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    if isinstance(params, Mapping):
        named = dict(params)
    else:
        names = {id(parameter): name for name, parameter in reversed(own.items())}
        chosen = list(params)
        if any(id(parameter) not in names for parameter in chosen):
            raise ValueError("a list of params must hold the module's own parameters; otherwise pass a dict by name")
        named = {names[id(parameter)]: parameter for parameter in chosen}
    if not named:
        raise ValueError("params is empty: there is nothing to differentiate with respect to")
    if isinstance(model, nn.Module) and (unknown := [name for name in named if name not in own]):
        raise ValueError(f"the model has no parameters named {', '.join(map(repr, unknown))}")
    if len(devices := {value.device for value in named.values()}) > 1:
        raise ValueError(f"params must be on one device, not on {', '.join(sorted(map(str, devices)))}")
    return named


def _joined(parts: list[Any], device: torch.device, where: str) -> Any:
    """Concatenate the same leaf, or collection of leaves, of all batches along dimension 0."""
    first = parts[0]
    if isinstance(first, Tensor):
        shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
        if len(shapes) < len(parts) or (len(parts) > 1 and (() in shapes or len({s[1:] for s in shapes}) > 1)):
            raise _cannot_join(where, f"of shapes {sorted(set(shapes))}")
        return torch.cat([part.to(device) for part in parts]) if shapes[0] else first.to(device)
    if any(type(part) is not type(first) for part in parts):
        raise _cannot_join(where, f"of types {sorted({type(part).__name__ for part in parts})}")
    if isinstance(first, nn.utils.rnn.PackedSequence):
        if len(parts) > 1:
            raise _cannot_join(where, "packed")
        return first.to(device)  # type: ignore[arg-type]
    if isinstance(first, Mapping):
        if any(set(part) != set(first) for part in parts):
            raise _cannot_join(where, "mappings with different keys")
        # A copy keeps what a constructor may not take: Hugging Face's BatchEncoding, a default factory.
        mapping: MutableMapping[Any, Any] = copy.copy(first) if isinstance(first, MutableMapping) else {}
        mapping.update({key: _joined([part[key] for part in parts], device, f"{where}[{key!r}]") for key in first})
        return mapping
    if isinstance(first, list | tuple):
        if len({len(part) for part in parts}) > 1:
            raise _cannot_join(where, f"of lengths {sorted({len(part) for part in parts})}")
        leaves = [_joined(list(leaf), device, f"{where}[{i}]") for i, leaf in enumerate(zip(*parts, strict=True))]
        return type(first)(*leaves) if hasattr(first, "_fields") else type(first)(leaves)
    if first is None or (isinstance(first, bool | str) and len(set(parts)) == 1):
        return first
    raise TypeError(f"{where} is a {type(first).__name__}: batches must hold tensors, or collections of tensors")


def _cannot_join(where: str, what: str) -> ValueError:
    return ValueError(
        f"the batches cannot be joined into one: {where} is {what}. All but the first dimension must agree; pad "
        "sequences of different lengths to one length"
    )


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
    again = f(theta)
    # The square root of the precision is far above what a reordered sum changes, and far below what dropout does.
    if not torch.isclose(value, again, rtol=torch.finfo(value.dtype).eps ** 0.5, equal_nan=True):
        raise NoHessianError(
            f"the loss is random: {value.item():.6g}, then {again.item():.6g}. Dropout, for one, needs evaluation mode"
        )
    # A column holds tangents of what a gradient saves, their cotangents, and temporaries: measured, 6 to 12 times.
    return max(1, _WORKSPACE_BYTES // (8 * (sum(saved.values()) + theta.nbytes)))


def _dense_hessian(f: Callable[[Tensor], Tensor], theta: Tensor, columns_at_a_time: int) -> Tensor:
    identity = torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device).split(columns_at_a_time)

    def column(tangent: Tensor) -> Any:
        return jvp(grad(f), (theta,), (tangent,))[1]

    # vmap stays outermost. Inside the forward-mode derivative (as in jvp(jacrev(f))) it freezes the statistics that
    # LayerNorm, InstanceNorm and BatchNorm save, and the result is wrong without a word.
    together = vmap(column, out_dims=1, randomness="same")
    for columns in (together, lambda basis: torch.stack([column(e) for e in basis], dim=1)):
        try:
            return torch.cat([columns(basis) for basis in identity], dim=1)
        except RuntimeError as error:  # no batching rule, or no forward-mode derivative: the next way needs less
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return torch.cat([_double_backward(f, theta, basis) for basis in identity], dim=1)


def _double_backward(f: Callable[[Tensor], Tensor], theta: Tensor, basis: Tensor) -> Tensor:
    leaf = theta.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        return torch.zeros_like(basis.T)
    products = [torch.autograd.grad(gradient, leaf, e, retain_graph=True, materialize_grads=True)[0] for e in basis]
    return torch.stack(products, dim=1)


def _check(hessian: Tensor, f: Callable[[Tensor], Tensor], theta: Tensor, eps: float) -> None:
    """Refuse a matrix that is not symmetric, or that reverse mode contradicts (torch 2.13: scatter_reduce's 'prod')."""
    # Far above rounding, also that of TF32 or of single precision inside a double model, and below what a wrong formula
    # does. A matrix of nothing but rounding errors is small beside the loss, for parameters of order one.
    allowed = max(1e-4, eps ** (1 / 3)) * hessian.norm() + eps**0.5 * f(theta).abs()
    wrong = {"it is not symmetric": hessian - hessian.T}
    with suppress(RuntimeError):  # an operation without a second derivative in reverse mode leaves nothing to compare
        signs = torch.randn_like(theta).sign()
        wrong["forward and reverse mode disagree"] = hessian @ signs - _double_backward(f, theta, signs[None])[:, 0]
    for what, difference in wrong.items():
        if difference.norm() > allowed:
            raise NoHessianError(
                f"the Hessian is wrong, for {what} (by {difference.norm() / hessian.norm():.1e} of its norm): an "
                "operation of the model or the loss has a wrong derivative, in torch or in an autograd.Function"
            )


class _TwiceDifferentiable(TorchFunctionMode):
    """Replace calls whose forward-mode derivative of the gradient is missing or wrong by others of the same value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _mse_loss(prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
    # The second derivative of the fused mean divides a ZeroTensor (the tangent of the target) in place, and raises.
    if options.get("reduction") == "mean" and options.get("weight") is None:
        return functional.mse_loss(prediction, target, **(options | {"reduction": "none"})).mean()
    return functional.mse_loss(prediction, target, **options)


def _huber_loss(prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
    # huber_loss_backward has no forward-mode derivative; the smooth L1 loss, the same up to a factor, has one.
    if options.get("weight") is not None:
        return functional.huber_loss(prediction, target, **options)
    delta: float = options["delta"]
    return delta * functional.smooth_l1_loss(prediction, target, reduction=options["reduction"], beta=delta)


def _embedding(indices: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any) -> Tensor:
    # Reverse mode holds the padding row constant and forward mode does not, so the matrix would not be symmetric.
    rows = functional.embedding(indices, weight, padding_idx, **options)
    if padding_idx is None:
        return rows
    return torch.where((indices == padding_idx % weight.shape[0]).unsqueeze(-1), rows.detach(), rows)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # The derivative of the fused kernel's gradient takes the norms for constants, in both modes.
    return v * (g / torch.norm_except_dim(v, 2, dim))


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    functional.mse_loss: _mse_loss,
    functional.huber_loss: _huber_loss,
    functional.embedding: _embedding,
    torch._weight_norm: _weight_norm,
}


@contextmanager
def _differentiable(device: torch.device) -> Iterator[None]:
    """Choose kernels with second derivatives (no fused attention or recurrent cell), and restore what was chosen."""
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [backend.enabled for backend in backends]
    cpu = device.type == "cpu"
    random_state = torch.random.fork_rng([] if cpu else [device], device_type="cuda" if cpu else device.type)
    # no_grad concerns what surrounds torch.func's own derivatives: parameters that were not chosen leave no graph.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable(), random_state, warnings.catch_warnings():
        # torch.func's own, on first use and for operations that vmap loops over; nothing that a caller could act on.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated|There is a performance drop")
        try:
            # Attributes, not the flags() managers, which write the TF32 settings too and warn about them.
            for backend in backends:
                backend.enabled = False
            yield
        finally:
            for backend, was_enabled in zip(backends, enabled, strict=True):
                backend.enabled = was_enabled
