"""The dense curvature matrices of a small model, from their definitions, with `torch.func`.

The references that the operators are tested against. They share no code with them: the data set is evaluated as one
batch, and what the operators differentiate in reverse mode is differentiated in forward mode here.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvop.testing.dataset import Problem
from curvop.testing.derivatives import NoHessianError, dense_hessian, dense_jacobian, sandwiched_hessian
from curvop.testing.replacements import differentiable

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
        return sandwiched_hessian(
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
