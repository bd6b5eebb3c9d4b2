"""The dense curvature matrices of a small model, from their definitions, with `torch.func`.

The references that the operators are tested against. They share no code with them: the data set is evaluated as one
batch, and what the operators differentiate in reverse mode is differentiated in forward mode here.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = [
    "NoHessianError",
    "Problem",
    "dense_ggn_like",
    "dense_hessian",
    "dense_jacobian",
    "differentiable",
    "functorch_empirical_fisher",
    "functorch_ggn",
    "functorch_gradient_and_loss",
    "functorch_hessian",
    "functorch_jacobian",
]

Model = nn.Module | Callable[[dict[str, Tensor], Any], Any]
Params = Mapping[str, Tensor] | Iterable[Tensor]
Data = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]


@torch.inference_mode(mode=False)
def functorch_hessian(model: Model, loss_function: Loss, params: Params, data: Data) -> Tensor:
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
    problem = Problem(model, params, data)

    def f(vector: Tensor) -> Tensor:
        return loss_function(problem.predict(vector), problem.y)

    with differentiable(problem.theta.device):
        return dense_hessian(f, problem.theta, problem.eps)


@torch.inference_mode(mode=False)
def functorch_gradient_and_loss(model: Model, loss_function: Loss, params: Params, data: Data) -> tuple[Tensor, Tensor]:
    """Compute the gradient ``(P,)`` of the loss of a whole data set, and the loss; see `functorch_hessian`."""
    problem = Problem(model, params, data)
    leaf = problem.theta.clone().requires_grad_()
    with differentiable(leaf.device), torch.enable_grad():
        loss = loss_function(problem.predict(leaf), problem.y)
        [gradient] = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    return gradient, loss.detach()


@torch.inference_mode(mode=False)
def functorch_jacobian(model: Model, params: Params, data: Data) -> Tensor:
    """Compute the Jacobian ``(N_out, P)`` of the predictions for a whole data set, flattened; see `functorch_hessian`.

    Column by column in forward mode where torch can, else row by row.
    """
    problem = Problem(model, params, data)
    with differentiable(problem.theta.device):
        return dense_jacobian(lambda vector: _flat(problem.predict(vector))[0], problem.theta, problem.eps)


@torch.inference_mode(mode=False)
def functorch_ggn(model: Model, loss_function: Loss, params: Params, data: Data) -> Tensor:
    r"""Compute the generalized Gauss-Newton matrix ``(P, P)`` of the loss of a whole data set.

    :math:`J^\top \nabla^2_z \ell \, J`, with the dense Jacobian of the predictions `z`. The parameters are
    those of `functorch_hessian`.

    References
    ----------
    Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", Neural Computation
    14(7), section 3.
    """
    problem = Problem(model, params, data)
    with differentiable(problem.theta.device):
        jacobian = dense_jacobian(lambda vector: _flat(problem.predict(vector))[0], problem.theta, problem.eps)
        z, restored = _flat(problem.predict(problem.theta))
        return dense_ggn_like(
            lambda flat: loss_function(restored(flat), problem.y), z, jacobian.to(z.dtype), problem.eps
        ).to(jacobian.dtype)


@torch.inference_mode(mode=False)
def functorch_empirical_fisher(model: Model, loss_function: Loss, params: Params, data: Data) -> Tensor:
    r"""Compute the empirical Fisher matrix ``(P, P)`` of the loss of a whole data set.

    :math:`\frac{1}{W} \sum_n g_n g_n^\top`, with the gradients of the examples' losses, each of them formed. The loss's
    own divisor `W` is what its unreduced terms add up to, over the loss. Examples are positions for
    ``CrossEntropyLoss`` and ``NLLLoss``, and rows for the other losses of ``torch.nn``; any other function is evaluated
    for each example alone, and averages over them unless its `reduction` is 'sum'.

    The parameters are those of `functorch_hessian`.

    References
    ----------
    Kunstner, Hennig, Balles (2019), "Limitations of the empirical Fisher approximation for natural gradient descent",
    eq. (3).
    """
    problem = Problem(model, params, data)
    terms_of, reduced = _terms(loss_function), getattr(loss_function, "reduction", "mean")

    def examples(vector: Tensor) -> Tensor:
        prediction = problem.predict(vector)
        if terms_of is None:
            pairs = zip(prediction.split(1), problem.y.split(1), strict=True)
            return torch.stack([loss_function(one, target) for one, target in pairs])
        terms = terms_of(prediction, problem.y)
        if terms.shape == prediction.shape and terms.ndim > 1:
            terms = terms.sum(-1)
        return terms.reshape(-1)

    with differentiable(problem.theta.device):
        gradients = dense_jacobian(examples, problem.theta, problem.eps)
        losses = examples(problem.theta)
        if terms_of is None:
            divisor = losses.new_tensor(1.0 if reduced == "sum" else len(losses))
        else:
            loss = loss_function(problem.predict(problem.theta), problem.y)
            divisor = losses.sum() / loss if loss else losses.new_tensor(1.0)
    return gradients.T @ gradients / divisor


def _flat(prediction: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the floating-point entries of a prediction as one vector, and the way back."""
    parts, structure = pytree.tree_flatten(prediction)
    where = [index for index, part in enumerate(parts) if isinstance(part, Tensor) and part.is_floating_point()]

    def restored(flat: Tensor) -> Any:
        pieces = flat.split([parts[index].numel() for index in where])
        filled = list(parts)
        for index, piece in zip(where, pieces, strict=True):
            filled[index] = piece.view(parts[index].shape)
        return pytree.tree_unflatten(filled, structure)

    return torch.cat([parts[index].reshape(-1) for index in where]), restored


def _terms(loss_function: Any) -> Loss | None:
    """Return torch's own loss without its reduction, None for any other function."""
    unreduced: Any = None
    inner = loss_function.func if isinstance(loss_function, functools.partial) else loss_function
    if getattr(inner, "__module__", "") == "torch.nn.functional":
        unreduced = functools.partial(loss_function, reduction="none")
    elif isinstance(loss_function, nn.Module) and type(loss_function).__module__ == "torch.nn.modules.loss":
        unreduced = copy.copy(loss_function)
        unreduced.reduction = "none"
    return cast("Loss | None", unreduced)


# A whole data set as one batch, and a model's parameters as one vector.


class Problem:
    """A model and a whole data set, as a function of one vector.

    Attributes
    ----------
    theta : Tensor, shape (P,)
        The parameters.
    y : Any
        All targets.
    eps : float
        The precision of the least precise parameter.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Any],
        params: Mapping[str, Tensor] | Iterable[Tensor],
        data: Iterable[tuple[Any, Any]],
    ) -> None:
        self._model = model
        self._params = _named(model, params)
        self.theta = torch.cat([value.detach().reshape(-1) for value in self._params.values()])
        self.eps = max(torch.finfo(value.dtype).eps for value in self._params.values())
        batches = [(X, y) for X, y in data]
        if not batches:
            raise ValueError("data holds no batches (an iterator that was used before is empty)")
        self._X, self.y = (
            _joined([batch[i] for batch in batches], self.theta.device, name) for i, name in enumerate("Xy")
        )

    def predict(self, vector: Tensor) -> Any:
        """Return the prediction for all inputs at the parameters `vector` ``(P,)``."""
        pieces = vector.split([value.numel() for value in self._params.values()])
        state = {
            name: piece.view(value.shape).to(value.dtype)
            for (name, value), piece in zip(self._params.items(), pieces, strict=True)
        }
        if not isinstance(self._model, nn.Module):
            return self._model(state, self._X)
        # Batch norm writes into its buffers: let it write into copies, which torch.func also insists on.
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        return functional_call(self._model, buffers | state, (self._X,))


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


# Dense first and second derivatives, in forward mode where torch can, and checked against reverse mode.

_WORKSPACE_BYTES = 1 << 28


class NoHessianError(RuntimeError):
    """The loss is random, or torch's derivatives of it contradict each other."""


def dense_hessian(f: Callable[[Tensor], Tensor], theta: Tensor, eps: float) -> Tensor:
    """Return the second derivatives ``(P, P)`` of a scalar function, whose precision is `eps`."""
    identity = torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device)
    hessian = _products(f, theta, identity, _columns_at_a_time(f, theta))
    _check(hessian, hessian, identity, f, theta, eps)
    return hessian


def dense_ggn_like(f: Callable[[Tensor], Tensor], z: Tensor, jacobian: Tensor, eps: float) -> Tensor:
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


# What torch differentiates in forward mode wrongly or not at all, and what stands in for it in the references.


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
def differentiable(device: torch.device) -> Iterator[None]:
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
