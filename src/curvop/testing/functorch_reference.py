"""Dense curvature matrices of a small model, computed from their definitions with `torch.func`.

The operators of this package are tested against these matrices. This file shares no code with the operators, and
evaluates the whole data set as one batch. Second derivatives are computed by differentiating a reverse-mode gradient in
forward mode. `_check` compares these second derivatives with those computed by double backward.

The file has four sections:

1. functions that compute the matrices;
2. functions that convert the data set to one batch, and the parameters to one vector;
3. functions that compute dense first and second derivatives;
4. replacements for operations that torch cannot differentiate in forward mode.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
import typing
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

_WORKSPACE_BYTES = 1 << 28  # memory limit for the columns of a Hessian that are computed together


class NoHessianError(RuntimeError):
    """Raised if the loss is random, or if torch's derivatives of the loss contradict each other."""


@torch.inference_mode(mode=False)
def functorch_hessian(model: Model, loss_function: Loss, params: Params, data: Data) -> Tensor:
    r"""Compute the dense Hessian of the loss of a whole data set.

    Use this function to check an operator on a model with up to a few thousand parameters. Time and memory grow with
    the square of the number of parameters. For larger models, use `curvop.check`.

    Let ``theta`` be the flattened and concatenated `params`, and ``(X, y)`` the whole data set as one batch. The matrix
    contains the second derivatives of ``f(theta) = loss_function(model(theta, X), y)``. The loss function is thus
    averaged (reduction 'mean') or summed (reduction 'sum') over the whole data set. The matrix does not depend on how
    `data` is split into batches.

    Parameters
    ----------
    model : torch.nn.Module or callable
        A module, called as ``model(X)``, or a callable ``(params_dict, X) -> prediction``. Parameters of the module
        that are not in `params` are constants. The module runs in its present training mode and with its present
        buffers. The buffers do not change.
    loss_function : callable
        A loss module with reduction 'mean' or 'sum', or any function ``(prediction, y) -> scalar tensor``.
    params : dict of str to torch.Tensor, or iterable of torch.nn.Parameter
        A dict of parameters by name, or an iterable of the module's own parameters. The order of the parameters is the
        order of the rows and columns. The tensors in a dict can have values that differ from those of the module's
        parameters. All parameters must be on one device.
    data : iterable of (X, y)
        Batches. The iterable is read once. X and y are tensors with the examples along dimension 0, or (nested)
        mappings, lists and tuples of such tensors. The batches are concatenated and moved to the device of the
        parameters.

    Returns
    -------
    torch.Tensor, shape (P, P)
        The Hessian, in the dtype and on the device of the parameters. Rows and columns are zero for parameters that the
        loss does not depend on.

    Raises
    ------
    ValueError
        If `data` is empty, or if its batches cannot be concatenated. (Sequences must be padded to the same length.) If
        `params` is empty, or if its tensors are on several devices or do not belong to the model. If the loss is not a
        scalar.
    TypeError
        If X or y contains objects other than tensors and collections of tensors.
    NoHessianError
        If two evaluations of the loss differ, for example because of dropout in training mode. If the matrix is not
        symmetric, or differs from the result of double backward, by more than rounding errors.

    See Also
    --------
    curvop.HessianLinearOperator : The same matrix as an operator, for models of any size.
    curvop.allclose_report : Compare two matrices and print where they differ.

    Notes
    -----
    Column i is the directional derivative of the gradient along the i-th basis vector, computed as ``jvp(grad(f))``. In
    the notation of [1]_, this derivative is ``R_v{grad} = H v``. The number of columns that are computed together is
    limited so that they need a workspace of about 256 MiB. Columns are computed one by one if ``torch.func.vmap`` does
    not support an operation. If an operation has no forward-mode derivative, the gradient is differentiated in reverse
    mode. The row of an embedding at ``padding_idx`` is treated as a constant, as in PyTorch's gradient.

    References
    ----------
    .. [1] B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), p. 147, 1994,
       doi:10.1162/neco.1994.6.1.147.

    Examples
    --------
    Compare an operator with the dense Hessian:

    >>> import torch
    >>> from torch import nn
    >>> from curvop import HessianLinearOperator, allclose_report, functorch_hessian
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    >>> params = dict(model.named_parameters())
    >>> data = [(torch.randn(n, 3).double(), torch.randint(0, 2, (n,))) for n in (7, 5)]
    >>> dense = functorch_hessian(model, nn.CrossEntropyLoss(), params, data)
    >>> H = HessianLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    >>> allclose_report(H @ torch.eye(26).double(), dense, rtol=1e-9, atol=1e-12)
    True
    """
    flat = _FlatModel(model, params, data)

    def f(vector: Tensor) -> Tensor:
        return loss_function(flat.predict(vector), flat.y)

    with _differentiable(flat.theta.device):
        return _dense_hessian(f, flat.theta, flat.eps)


@torch.inference_mode(mode=False)
def functorch_ggn(model: Model, loss_function: Loss, params: Params, data: Data) -> Tensor:
    r"""Compute the dense generalized Gauss-Newton matrix of the loss of a whole data set.

    The matrix is :math:`J^\top \nabla^2_z \ell \, J` [1]_, where J is the Jacobian of the predictions z.

    Parameters
    ----------
    model : torch.nn.Module or callable
        A module, called as ``model(X)``, or a callable ``(params_dict, X) -> prediction``. Parameters of the module
        that are not in `params` are constants. The module runs in its present training mode and with its present
        buffers. The buffers do not change.
    loss_function : callable
        A loss module with reduction 'mean' or 'sum', or any function ``(prediction, y) -> scalar tensor``.
    params : dict of str to torch.Tensor, or iterable of torch.nn.Parameter
        A dict of parameters by name, or an iterable of the module's own parameters. The order of the parameters is the
        order of the rows and columns. The tensors in a dict can have values that differ from those of the module's
        parameters. All parameters must be on one device.
    data : iterable of (X, y)
        Batches. The iterable is read once. X and y are tensors with the examples along dimension 0, or (nested)
        mappings, lists and tuples of such tensors. The batches are concatenated and moved to the device of the
        parameters.

    Returns
    -------
    torch.Tensor, shape (P, P)
        The matrix, in the dtype and on the device of the parameters.

    Raises
    ------
    ValueError
        If `data` is empty, or if its batches cannot be concatenated. (Sequences must be padded to the same length.) If
        `params` is empty, or if its tensors are on several devices or do not belong to the model.
    TypeError
        If X or y contains objects other than tensors and collections of tensors.
    NoHessianError
        If the loss is random, or if torch's derivatives of the loss contradict each other.

    References
    ----------
    .. [1] N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
       Computation 14(7), section 3, 2002, doi:10.1162/08997660260028683.
    """
    flat = _FlatModel(model, params, data)
    with _differentiable(flat.theta.device):
        jacobian = _dense_jacobian(lambda vector: _flattened(flat.predict(vector))[0], flat.theta, flat.eps)
        z, restore = _flattened(flat.predict(flat.theta))

        def f(z: Tensor) -> Tensor:
            return loss_function(restore(z), flat.y)

        return _dense_ggn_like(f, z, jacobian.to(z.dtype), flat.eps).to(jacobian.dtype)


@torch.inference_mode(mode=False)
def functorch_empirical_fisher(model: Model, loss_function: Loss, params: Params, data: Data) -> Tensor:
    r"""Compute the dense empirical Fisher matrix of the loss of a whole data set.

    The matrix is :math:`\frac{1}{W} \sum_n g_n g_n^\top` [1]_, where :math:`g_n` is the gradient of the loss of example
    n. W is the number by which the loss function divides: the sum of the unreduced loss terms, divided by the loss.

    For ``CrossEntropyLoss`` and ``NLLLoss``, an example consists of the entries for all classes at one position of the
    prediction. For other ``torch.nn`` losses, an example is a row of the prediction. A loss function that is not from
    ``torch.nn`` is called once for each example. If the attribute ``reduction`` of such a function is 'sum', the
    function is assumed to sum over the examples. Otherwise, it is assumed to average over the examples.

    Parameters
    ----------
    model : torch.nn.Module or callable
        A module, called as ``model(X)``, or a callable ``(params_dict, X) -> prediction``. Parameters of the module
        that are not in `params` are constants. The module runs in its present training mode and with its present
        buffers. The buffers do not change.
    loss_function : callable
        A loss module with reduction 'mean' or 'sum', or any function ``(prediction, y) -> scalar tensor``.
    params : dict of str to torch.Tensor, or iterable of torch.nn.Parameter
        A dict of parameters by name, or an iterable of the module's own parameters. The order of the parameters is the
        order of the rows and columns. The tensors in a dict can have values that differ from those of the module's
        parameters. All parameters must be on one device.
    data : iterable of (X, y)
        Batches. The iterable is read once. X and y are tensors with the examples along dimension 0, or (nested)
        mappings, lists and tuples of such tensors. The batches are concatenated and moved to the device of the
        parameters.

    Returns
    -------
    torch.Tensor, shape (P, P)
        The matrix, in the dtype and on the device of the parameters.

    Raises
    ------
    ValueError
        If `data` is empty, or if its batches cannot be concatenated. (Sequences must be padded to the same length.) If
        `params` is empty, or if its tensors are on several devices or do not belong to the model.
    TypeError
        If X or y contains objects other than tensors and collections of tensors.
    NoHessianError
        If forward mode and reverse mode yield different gradients.

    References
    ----------
    .. [1] F. Kunstner, L. Balles, P. Hennig, "Limitations of the empirical Fisher approximation for natural gradient
       descent", NeurIPS 2019, eq. (3), arXiv:1905.12558.
    """
    flat = _FlatModel(model, params, data)
    unreduced, reduction = _unreduced(loss_function), getattr(loss_function, "reduction", "mean")

    def examples(vector: Tensor) -> Tensor:
        prediction = flat.predict(vector)
        if unreduced is None:
            pairs = zip(prediction.split(1), flat.y.split(1), strict=True)
            return torch.stack([loss_function(example, target) for example, target in pairs])
        terms = unreduced(prediction, flat.y)
        if terms.shape == prediction.shape and terms.ndim > 1:
            terms = terms.sum(-1)
        return terms.reshape(-1)

    with _differentiable(flat.theta.device):
        gradients = _dense_jacobian(examples, flat.theta, flat.eps)
        losses = examples(flat.theta)
        if unreduced is None:
            divisor = losses.new_tensor(1.0 if reduction == "sum" else len(losses))
        else:
            loss = loss_function(flat.predict(flat.theta), flat.y)
            divisor = losses.sum() / loss if loss else losses.new_tensor(1.0)
    return gradients.T @ gradients / divisor


@torch.inference_mode(mode=False)
def functorch_jacobian(model: Model, params: Params, data: Data) -> Tensor:
    """Compute the dense Jacobian of the flattened predictions for a whole data set.

    The Jacobian is computed in forward mode, or row by row in reverse mode if an operation has no forward-mode
    derivative.

    Parameters
    ----------
    model : torch.nn.Module or callable
        A module, called as ``model(X)``, or a callable ``(params_dict, X) -> prediction``. Parameters of the module
        that are not in `params` are constants. The module runs in its present training mode and with its present
        buffers. The buffers do not change.
    params : dict of str to torch.Tensor, or iterable of torch.nn.Parameter
        A dict of parameters by name, or an iterable of the module's own parameters. The order of the parameters is the
        order of the columns. The tensors in a dict can have values that differ from those of the module's parameters.
        All parameters must be on one device.
    data : iterable of (X, y)
        Batches. The iterable is read once. X and y are tensors with the examples along dimension 0, or (nested)
        mappings, lists and tuples of such tensors. The batches are concatenated and moved to the device of the
        parameters.

    Returns
    -------
    torch.Tensor, shape (N_out, P)
        The Jacobian, on the device of the parameters.

    Raises
    ------
    ValueError
        If `data` is empty, or if its batches cannot be concatenated. (Sequences must be padded to the same length.) If
        `params` is empty, or if its tensors are on several devices or do not belong to the model.
    TypeError
        If X or y contains objects other than tensors and collections of tensors.
    NoHessianError
        If forward mode and reverse mode yield different derivatives.
    """
    flat = _FlatModel(model, params, data)
    with _differentiable(flat.theta.device):
        return _dense_jacobian(lambda vector: _flattened(flat.predict(vector))[0], flat.theta, flat.eps)


@torch.inference_mode(mode=False)
def functorch_gradient_and_loss(model: Model, loss_function: Loss, params: Params, data: Data) -> tuple[Tensor, Tensor]:
    """Compute the gradient and the value of the loss of a whole data set.

    Parameters
    ----------
    model : torch.nn.Module or callable
        A module, called as ``model(X)``, or a callable ``(params_dict, X) -> prediction``. Parameters of the module
        that are not in `params` are constants. The module runs in its present training mode and with its present
        buffers. The buffers do not change.
    loss_function : callable
        A loss module with reduction 'mean' or 'sum', or any function ``(prediction, y) -> scalar tensor``.
    params : dict of str to torch.Tensor, or iterable of torch.nn.Parameter
        A dict of parameters by name, or an iterable of the module's own parameters. The order of the parameters is the
        order of the entries of the gradient. The tensors in a dict can have values that differ from those of the
        module's parameters. All parameters must be on one device.
    data : iterable of (X, y)
        Batches. The iterable is read once. X and y are tensors with the examples along dimension 0, or (nested)
        mappings, lists and tuples of such tensors. The batches are concatenated and moved to the device of the
        parameters.

    Returns
    -------
    gradient : torch.Tensor, shape (P,)
        The gradient, in the dtype and on the device of the parameters.
    loss : torch.Tensor
        The loss, a scalar.

    Raises
    ------
    ValueError
        If `data` is empty, or if its batches cannot be concatenated. (Sequences must be padded to the same length.) If
        `params` is empty, or if its tensors are on several devices or do not belong to the model.
    TypeError
        If X or y contains objects other than tensors and collections of tensors.
    """
    flat = _FlatModel(model, params, data)
    leaf = flat.theta.clone().requires_grad_()
    with _differentiable(leaf.device), torch.enable_grad():
        loss = loss_function(flat.predict(leaf), flat.y)
        [gradient] = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    return gradient, loss.detach()


def _flattened(prediction: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Flatten the floating-point tensors of a prediction into one vector.

    Return ``(vector, restore)``, where ``restore`` is a function that converts such a vector to a prediction.
    """
    leaves, structure = pytree.tree_flatten(prediction)
    indices = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def restore(vector: Tensor) -> Any:
        pieces = vector.split([leaves[i].numel() for i in indices])
        filled = list(leaves)
        for i, piece in zip(indices, pieces, strict=True):
            filled[i] = piece.view(leaves[i].shape)
        return pytree.tree_unflatten(filled, structure)

    return torch.cat([leaves[i].reshape(-1) for i in indices]), restore


def _unreduced(loss_function: Any) -> Loss | None:
    """Return a copy of a PyTorch loss function with reduction 'none'. For any other function, return None."""
    unreduced: Any = None
    inner = loss_function.func if isinstance(loss_function, functools.partial) else loss_function
    if getattr(inner, "__module__", "") == "torch.nn.functional":
        unreduced = functools.partial(loss_function, reduction="none")
    elif isinstance(loss_function, nn.Module) and type(loss_function).__module__ == "torch.nn.modules.loss":
        unreduced = copy.copy(loss_function)
        unreduced.reduction = "none"
    return cast("Loss | None", unreduced)


# Conversion of the data set to one batch, and of the parameters to one vector.


class _FlatModel:
    """The predictions of a model for a whole data set, as a function of one vector of parameters.

    Attributes
    ----------
    theta : Tensor, shape (P,)
        The parameters.
    y : Any
        The targets of the whole data set.
    eps : float
        The largest machine epsilon among the dtypes of the parameters.
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
            _concatenated([batch[i] for batch in batches], self.theta.device, name) for i, name in enumerate("Xy")
        )

    def predict(self, vector: Tensor) -> Any:
        """Return the prediction for the whole data set, with the parameters taken from `vector` of shape ``(P,)``."""
        pieces = vector.split([value.numel() for value in self._params.values()])
        state = {
            name: piece.view(value.shape).to(value.dtype)
            for (name, value), piece in zip(self._params.items(), pieces, strict=True)
        }
        if not isinstance(self._model, nn.Module):
            return self._model(state, self._X)
        # Use copies of the buffers: batch norm writes to its buffers, and torch.func does not allow that.
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        return functional_call(self._model, buffers | state, *call_arguments(self._model, self._X))


def call_arguments(model: nn.Module, X: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional arguments and the keyword arguments with which the user would call a module.

    A mapping is passed as keywords if ``forward`` accepts its keys as keywords, and if ``forward`` does not accept the
    mapping as one argument. If ``forward`` accepts both and the first parameter is annotated as a mapping, the mapping
    is passed as one argument. Without this annotation, the mapping is passed as keywords if the call with one argument
    raises an error, and as one argument otherwise.
    """
    if not isinstance(X, Mapping):
        return (X,), {}
    own = model.module if isinstance(model, nn.DataParallel) else model
    try:
        parameters = inspect.signature(own.forward).parameters
    except (TypeError, ValueError):
        return (X,), {}
    named = {name for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    needed = {
        name
        for name, one in parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    keywords = needed <= set(X) & named and (takes_any or set(X) <= named) and all(isinstance(key, str) for key in X)
    first = next(iter(parameters.values()), None)
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        return ((), dict(X)) if keywords else ((X,), {})
    if not keywords or _is_mapping(own.forward, first):
        return (X,), {}
    if needed - {first.name}:  # X alone is too few arguments
        return (), dict(X)
    state = {name: value.detach().clone() for name, value in (*own.named_parameters(), *own.named_buffers())}
    try:
        functional_call(own, state, (copy.deepcopy(X),))
    except Exception:
        return (), dict(X)
    return (X,), {}


def _is_mapping(function: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    """Return True if a parameter is annotated as a mapping, or as a union that includes a mapping."""
    kind = parameter.annotation
    with suppress(Exception):  # a name may exist for type checkers only
        kind = typing.get_type_hints(inspect.unwrap(function)).get(parameter.name, kind)
    parts = [kind]
    if isinstance(kind, str):
        return bool({"dict", "Dict", "Mapping", "MutableMapping", "BatchEncoding"} & set(re.findall(r"\w+", kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = list(typing.get_args(kind))
    origins = [typing.get_origin(part) or part for part in parts]
    return any(isinstance(origin, type) and issubclass(origin, Mapping | dict) for origin in origins)


def _named(model: object, params: Mapping[str, Tensor] | Iterable[Tensor]) -> dict[str, Tensor]:
    """Return a dict of the parameters by name, in the given order.

    Raises
    ------
    ValueError
        If `params` is empty, or if its tensors do not belong to the model or are on several devices.
    """
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


def _concatenated(parts: list[Any], device: torch.device, where: str) -> Any:
    """Concatenate corresponding tensors of all batches along dimension 0.

    `parts` has one tensor, or one collection of tensors, for each batch. `where` is the name of this tensor or
    collection in error messages.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
        if len(shapes) < len(parts) or (len(parts) > 1 and (() in shapes or len({s[1:] for s in shapes}) > 1)):
            raise _cannot_concatenate(where, f"of shapes {sorted(set(shapes))}")
        return torch.cat([part.to(device) for part in parts]) if shapes[0] else first.to(device)
    if any(type(part) is not type(first) for part in parts):
        raise _cannot_concatenate(where, f"of types {sorted({type(part).__name__ for part in parts})}")
    if isinstance(first, nn.utils.rnn.PackedSequence):
        if len(parts) > 1:
            raise _cannot_concatenate(where, "packed")
        return first.to(device)  # type: ignore[arg-type]
    if isinstance(first, Mapping):
        if any(set(part) != set(first) for part in parts):
            raise _cannot_concatenate(where, "mappings with different keys")
        # Copy the mapping: the constructors of Hugging Face's BatchEncoding and defaultdict need other arguments.
        mapping: MutableMapping[Any, Any] = copy.copy(first) if isinstance(first, MutableMapping) else {}
        mapping.update(
            {key: _concatenated([part[key] for part in parts], device, f"{where}[{key!r}]") for key in first}
        )
        return mapping
    if isinstance(first, list | tuple):
        if len({len(part) for part in parts}) > 1:
            raise _cannot_concatenate(where, f"of lengths {sorted({len(part) for part in parts})}")
        leaves = [_concatenated(list(leaf), device, f"{where}[{i}]") for i, leaf in enumerate(zip(*parts, strict=True))]
        return type(first)(*leaves) if hasattr(first, "_fields") else type(first)(leaves)
    if first is None or (isinstance(first, bool | str) and len(set(parts)) == 1):
        return first
    raise TypeError(f"{where} is a {type(first).__name__}: batches must hold tensors, or collections of tensors")


def _cannot_concatenate(where: str, what: str) -> ValueError:
    return ValueError(
        f"the batches cannot be joined into one: {where} is {what}. All but the first dimension must agree; pad "
        "sequences of different lengths to one length"
    )


# Dense first and second derivatives.


def _dense_hessian(f: Callable[[Tensor], Tensor], theta: Tensor, eps: float) -> Tensor:
    """Return the Hessian ``(P, P)`` of a scalar function that is evaluated with machine epsilon `eps`."""
    identity = torch.eye(theta.numel(), dtype=theta.dtype, device=theta.device)
    hessian = _products(f, theta, identity, _columns_at_a_time(f, theta))
    _check(hessian, hessian, identity, f, theta, eps)
    return hessian


def _dense_ggn_like(f: Callable[[Tensor], Tensor], z: Tensor, jacobian: Tensor, eps: float) -> Tensor:
    """Return ``J' H J``, where ``H`` is the Hessian of a scalar function at `z`. The Hessian itself is not formed."""
    products = _products(f, z, jacobian.T, _columns_at_a_time(f, z))
    matrix = jacobian.T @ products
    _check(matrix, products, jacobian.T, f, z, eps)
    return matrix


def _dense_jacobian(f: Callable[[Tensor], Tensor], theta: Tensor, eps: float) -> Tensor:
    """Return the Jacobian ``(M, P)`` of a function that returns vectors of shape ``(M,)``."""
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
        raise NoHessianError("the Jacobian is wrong: forward and reverse mode disagree")
    return jacobian


def _forward_jacobian(f: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor | None:
    """Return the Jacobian computed in forward mode, or None if an operation has no forward-mode derivative."""

    def column(tangent: Tensor) -> Any:
        return jvp(f, (theta,), (tangent,))[1]

    batched = vmap(column, randomness="same", chunk_size=64)
    for columns in (batched, lambda basis: torch.stack([column(e) for e in basis])):
        try:
            derivative: Tensor = columns(torch.eye(len(theta), dtype=theta.dtype, device=theta.device))
            return derivative.T
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return None


def _columns_at_a_time(f: Callable[[Tensor], Tensor], theta: Tensor) -> int:
    """Return the number of Hessian columns that can be computed together within the workspace.

    Raises
    ------
    ValueError
        If the loss is not a scalar.
    NoHessianError
        If the loss is random.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = max(tensor.nbytes, saved.get(tensor.data_ptr(), 0))
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = f(theta.clone().requires_grad_())
    if not isinstance(value, Tensor) or value.ndim != 0:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss must be a scalar tensor, not {shape}: use reduction 'mean' or 'sum'")
    with torch.enable_grad():  # the loss may contain derivatives
        again = f(theta).detach()
    # The square root of epsilon is far above the effect of a reordered sum and far below that of dropout.
    if not torch.isclose(value, again, rtol=torch.finfo(value.dtype).eps ** 0.5, equal_nan=True):
        raise NoHessianError(
            f"the loss is random: {value.item():.6g}, then {again.item():.6g}. "
            "Put modules such as dropout into evaluation mode"
        )
    # In addition to the tensors that a gradient saves, a column needs the tangents and cotangents of these tensors, and
    # temporary tensors. Measurements showed that a column needs 6 to 12 times the memory of the saved tensors.
    return max(1, _WORKSPACE_BYTES // (8 * (sum(saved.values()) + theta.nbytes)))


def _products(f: Callable[[Tensor], Tensor], theta: Tensor, basis: Tensor, columns_at_a_time: int) -> Tensor:
    """Return a matrix whose columns are the products of the Hessian of `f` with the rows of `basis`."""
    chunks = basis.split(columns_at_a_time)

    def column(tangent: Tensor) -> Any:
        return jvp(grad(f), (theta,), (tangent,))[1]

    # Keep vmap outermost. If vmap is inside the forward-mode derivative, as in jvp(jacrev(f)), the saved statistics of
    # LayerNorm, InstanceNorm and BatchNorm are treated as constants, and the result is silently wrong.
    batched = vmap(column, out_dims=1, randomness="same")
    for columns in (batched, lambda basis: torch.stack([column(e) for e in basis], dim=1)):
        try:
            return torch.cat([columns(chunk) for chunk in chunks], dim=1)
        except RuntimeError as error:  # no batching rule or no forward-mode derivative: try the next method
            if isinstance(error, torch.OutOfMemoryError):
                raise
    return torch.cat([_double_backward(f, theta, chunk) for chunk in chunks], dim=1)


def _double_backward(f: Callable[[Tensor], Tensor], theta: Tensor, basis: Tensor) -> Tensor:
    """Compute the same products as `_products`, but differentiate the gradient in reverse mode."""
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
    """Raise a NoHessianError if a matrix is not symmetric, or differs from the result of double backward.

    For example, torch 2.13 computes a wrong derivative of ``scatter_reduce`` with 'prod'.
    """
    # The limit is far above rounding errors, including those of TF32 or float32 inside a float64 model, and far below
    # the effect of a wrong formula. The term with the loss is needed if the matrix is zero. The rounding errors of a
    # zero matrix are small compared with the loss, provided that the parameters are of order one.
    with torch.enable_grad():
        value = float(f(theta).detach())
    allowed = max(1e-4, eps ** (1 / 3)) * products.norm() + eps**0.5 * abs(value)
    contradictions = {"it is not symmetric": matrix - matrix.T}
    with suppress(RuntimeError):  # no comparison if an operation has no second derivative in reverse mode
        signs = torch.randn(len(basis), dtype=theta.dtype, device=theta.device).sign()
        reverse = _double_backward(f, theta, (signs @ basis)[None])[:, 0]
        contradictions["forward and reverse mode disagree"] = products @ signs - reverse
    for contradiction, difference in contradictions.items():
        if difference.norm() > allowed:
            raise NoHessianError(
                f"the Hessian is wrong: {contradiction} (by {difference.norm() / products.norm():.1e} of its norm), "
                "because an operation of the model or the loss has a wrong derivative, in torch or in an "
                "autograd.Function"
            )


# Replacements for operations whose forward-mode derivative is wrong or missing in torch.


@contextmanager
def _differentiable(device: torch.device) -> Iterator[None]:
    """Disable operations that have no second derivatives, such as fused attention, within a ``with`` block."""
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    enabled = [backend.enabled for backend in backends]
    cpu = device.type == "cpu"
    random_state = torch.random.fork_rng([] if cpu else [device], device_type="cuda" if cpu else device.type)
    # no_grad does not affect derivatives of torch.func. It keeps torch from recording graphs for constant parameters.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _TwiceDifferentiable(), random_state, warnings.catch_warnings():
        # Hide two warnings that users cannot avoid: torch.func issues one of them on first use, and the other one if
        # vmap loops over an operation.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated|There is a performance drop")
        try:
            # Do not use the flags() context managers, which also write the TF32 settings and issue warnings about them.
            for backend in backends:
                backend.enabled = False
            yield
        finally:
            for backend, was_enabled in zip(backends, enabled, strict=True):
                backend.enabled = was_enabled


class _TwiceDifferentiable(TorchFunctionMode):
    """Replace functions whose gradient has a wrong or missing forward-mode derivative by equivalent functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _mse_loss(prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
    # The second derivative of the fused mean raises an error, because it divides a ZeroTensor (the tangent of the
    # target) in place.
    if options.get("reduction") == "mean" and options.get("weight") is None:
        return functional.mse_loss(prediction, target, **(options | {"reduction": "none"})).mean()
    return functional.mse_loss(prediction, target, **options)


def _huber_loss(prediction: Tensor, target: Tensor, **options: Any) -> Tensor:
    # The gradient of the Huber loss has no forward-mode derivative, but the gradient of the smooth L1 loss has one.
    # The two losses differ by a constant factor.
    if options.get("weight") is not None:
        return functional.huber_loss(prediction, target, **options)
    delta: float = options["delta"]
    return delta * functional.smooth_l1_loss(prediction, target, reduction=options["reduction"], beta=delta)


def _embedding(indices: Tensor, weight: Tensor, padding_idx: int | None = None, **options: Any) -> Tensor:
    # The padding row is a constant in reverse mode but not in forward mode. Without this replacement, the matrix would
    # not be symmetric.
    rows = functional.embedding(indices, weight, padding_idx, **options)
    if padding_idx is None:
        return rows
    return torch.where((indices == padding_idx % weight.shape[0]).unsqueeze(-1), rows.detach(), rows)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    # In forward and reverse mode, the second derivative of the fused kernel wrongly treats the norms as constants.
    return v * (g / torch.norm_except_dim(v, 2, dim))


_REPLACEMENTS: dict[Any, Callable[..., Tensor]] = {
    functional.mse_loss: _mse_loss,
    functional.huber_loss: _huber_loss,
    functional.embedding: _embedding,
    torch._weight_norm: _weight_norm,
}
