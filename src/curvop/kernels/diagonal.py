r"""The exact diagonal of a GGN-like matrix :math:`\sum_n J_n^\top M_n J_n`, computed example by example.

With the eigendecomposition :math:`M_n = \sum_c \lambda_{nc} u_{nc} u_{nc}^\top`, the diagonal is
:math:`\sum_{nc} \lambda_{nc} (J_n^\top u_{nc})^2` with an elementwise square. For each example, the sum over c takes
one backward pass per nonzero eigenvalue of :math:`M_n`: at most one per output, and only one for an empirical Fisher
matrix. The number of backward passes does not depend on the number of parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.batches import map_leaves
from curvop.kernels.errors import NonFiniteProductError, not_finite
from curvop.kernels.ggn_kernel import GGNLikeKernel, OutputHessian, couples_examples, cut_off, outputs_of
from curvop.kernels.memory import out_of_memory
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.parameters import ParameterLayout

__all__ = ["over_examples", "write_diagonal"]

#: Largest supported number of outputs per example. With c outputs, the block of `M` for an example has c * c entries.
_MAX_OUTPUTS = 256
#: Largest total number of entries in the per-example gradients that are computed at once.
_MAX_ENTRIES = 1 << 23


def write_diagonal(kernel: GGNLikeKernel, names: Sequence[str], out: Tensor) -> None:
    """Compute the diagonal entries of the parameters `names`, and write them into `out`, a tensor of shape (N,).

    The computation takes one pass over the data.

    Raises
    ------
    NotImplementedError
        If the prediction is not one tensor with the examples along dimension 0, or if an example has more than 256
        outputs. Also if ``torch.func.vmap`` cannot map the model over the examples. Also if the result for an example
        depends on other examples, as with batch normalization in training mode.
    NonFiniteProductError
        If the diagonal contains NaN or infinity.
    """
    objective, totals = kernel.objective, kernel.objective.totals()
    values = objective.leaves(())
    parts = ParameterLayout(objective.params, names).split(out.zero_())
    with objective.slow_backends():
        for index, batch in objective.batches():
            _, prediction, [z, *more], loss = objective.split(values, index, batch, cut_off)
            totals.add(loss.value, loss.weight, *values.values())
            if not loss.weight:
                continue
            if more:
                raise _not_available("the prediction is not one tensor with the examples along dimension 0")
            # Check for NaN before the examples are compared: NaN differs from itself, so a NaN would look as if the
            # model coupled its examples.
            describe = functools.partial(not_finite, "diagonal", index, float(loss.value))
            if z.isnan().any():  # infinity may come from a mask
                raise NonFiniteProductError(describe("the prediction"))
            extra = kernel.extra(index, prediction, batch, loss.y)
            output_hessian = kernel.output_hessian([z], extra, loss)
            eigenvalues, vectors = _decompose(output_hessian, z, describe)
            _check_gradient(kernel, names, batch, z, describe)
            X = objective.inputs(batch)
            for part, value in zip(parts, _sum_powers(kernel, names, X, z, eigenvalues, vectors), strict=True):
                part.add_(value.to(part.device), alpha=loss.weight)
        objective.conclude(totals)
    out.div_(objective.divisor(totals.weights))
    if not out.isfinite().all():
        raise NonFiniteProductError("the diagonal holds NaN or infinity")


def _not_available(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"the exact diagonal is not available because {reason}: curvop.spectrum.diagonal estimates it from products"
    )


def _check_finite(tensor: Tensor, where: str, describe: Callable[[str], str]) -> None:
    if not tensor.isfinite().all():
        raise NonFiniteProductError(describe(where))


def _decompose(output_hessian: OutputHessian, z: Tensor, describe: Callable[[str], str]) -> tuple[Tensor, Tensor]:
    """Compute the eigenvalues and eigenvectors of the block of `M` for each of the n examples.

    Returns
    -------
    eigenvalues : Tensor, shape (C, n)
        Rows in which the eigenvalues of all examples are zero are omitted.
    eigenvectors : Tensor, shape (C, n, ...)
    """
    count = _count(z)
    outputs = z.numel() // max(count, 1)
    if outputs > _MAX_OUTPUTS:
        raise _not_available(f"an example has {outputs:,} outputs, more than {_MAX_OUTPUTS}")

    def multiply(vectors: Tensor) -> Tensor:
        [product] = output_hessian([vectors.view_as(z)])
        return torch.zeros_like(vectors) if product is None else product.detach().reshape(count, outputs)

    units = torch.eye(outputs, dtype=z.dtype, device=z.device)
    blocks = torch.stack([multiply(unit.expand(count, outputs).contiguous()) for unit in units], dim=-1)
    _check_finite(blocks, "the curvature of the loss", describe)
    if couples_examples(multiply, blocks):
        raise _not_available("the loss couples its examples")
    eigenvalues, vectors = torch.linalg.eigh(blocks.double())
    eigenvalues, vectors = eigenvalues.to(z.dtype).T, vectors.to(z.dtype).permute(2, 0, 1)
    # Drop eigenvalues that are rounding errors. If a block is the outer product of one gradient with itself, only one
    # eigenvalue remains.
    threshold = outputs * torch.finfo(z.dtype).eps * eigenvalues.abs().max()
    nonzero = eigenvalues.abs().amax(1) > threshold
    return eigenvalues[nonzero], vectors[nonzero].reshape(-1, count, *z.shape[1:])


def _count(z: Tensor) -> int:
    """Return the number of examples in a prediction. A prediction without dimensions counts as one example."""
    return len(z) if z.ndim else 1


def _check_gradient(
    kernel: GGNLikeKernel, names: Sequence[str], batch: Any, z: Tensor, describe: Callable[[str], str]
) -> None:
    """Raise a NotImplementedError if the gradient for an example depends on other examples of the batch.

    The function compares the gradient of the whole batch with the sum of the gradients of all examples.
    """
    objective = kernel.objective
    probe = torch.linspace(1, 2, z.numel(), dtype=z.dtype, device=z.device).cos().view_as(z)
    leaves = objective.leaves(names)
    [output] = outputs_of(objective.predict(leaves, batch))
    if not output.requires_grad:
        return
    chosen = [leaves[name] for name in names]
    whole = torch.autograd.grad(output, chosen, probe, allow_unused=True)
    for name, part in zip(names, whole, strict=True):
        if part is not None:
            _check_finite(part, f"parameter {name!r}", describe)
    sums = _sum_powers(
        *(kernel, names, objective.inputs(batch), z, torch.ones(1, _count(z), dtype=z.dtype, device=z.device)),
        probe.view(1, _count(z), *z.shape[1:]),
        power=1,
    )
    expected = [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(chosen, whole, strict=True)]
    eps = torch.finfo(z.dtype).eps
    # The absolute term allows for gradients that consist of rounding errors, such as the gradient of a bias before a
    # normalization layer. The term assumes parameters of order one. Gradients smaller than this term are not compared,
    # because the diagonal contains only their squares, which are negligible.
    allowed = eps**0.5 * sum(float(part.norm()) for part in expected) + 100 * eps * float(probe.norm())
    for found, part in zip(sums, expected, strict=True):
        if not float((found - part).norm()) <= allowed:
            raise _not_available("the model couples its examples in their derivatives")


def _sum_powers(
    kernel: GGNLikeKernel,
    names: Sequence[str],
    X: Any,
    z: Tensor,
    weights: Tensor,
    vectors: Tensor,
    power: int = 2,
) -> Sequence[Tensor]:
    """Sum ``weights[c, n] * (J_n' vectors[c, n]) ** power`` over c and n, with an elementwise power.

    Return one tensor for each parameter in `names`.
    """

    def sum_of_example(pullback: Pullback, weights: Tensor, vectors: Tensor) -> list[Tensor]:
        total: list[Tensor] = []
        for weight, vector in zip(weights, vectors, strict=True):
            terms = [weight * value**power for value in pullback(vector)]
            total = [part + term for part, term in zip(total, terms, strict=True)] if total else terms
        return total

    sums = [torch.zeros_like(kernel.objective.params[name]) for name in names]
    if not len(weights):
        return sums
    for _, totals in over_examples(kernel.objective, names, X, z, sum_of_example, (weights, vectors)):
        for total, value in zip(sums, totals, strict=True):
            total += value.sum(0)
    return sums


#: A function that multiplies the transposed Jacobian of the prediction for one example by a vector with the shape of
#: this prediction. The result is a sequence with one tensor for each parameter.
Pullback = Callable[[Tensor], Sequence[Tensor]]


def over_examples(
    objective: ModelObjective,
    names: Sequence[str],
    X: Any,
    z: Tensor,
    function: Callable[..., list[Tensor]],
    operands: tuple[Tensor, ...],
    entries: int = 1,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Map a function over the examples of a batch with ``torch.func.vmap``, chunk by chunk.

    Parameters
    ----------
    objective : ModelObjective
    names : sequence of str
        Names of parameters.
    X : tree of Tensor
        The input of the batch.
    z : Tensor
        The prediction for the batch, with the examples along dimension 0.
    function : callable
        ``function(pullback, *operands) -> list of Tensor``, for a single example. See `Pullback`.
    operands : tuple of Tensor
        Tensors with the examples along dimension 1.
    entries : int
        Number of gradients in the results for one example. The larger `entries` is, the fewer examples a chunk
        contains.

    Yields
    ------
    rows : slice
        The indices of the examples of a chunk.
    results : list of Tensor
        The results of the function, with the examples of the chunk along dimension 0.

    Raises
    ------
    NotImplementedError
        If the function cannot be mapped over the examples, or if the model couples its examples.
    """
    single = not z.ndim  # the batch is one example
    if single:
        z = z[None]

    def is_mapped(leaf: Tensor) -> bool:
        """Return True if `leaf` has one row per example. Any other tensor is passed unchanged with every example."""
        return not single and leaf.ndim > 0 and len(leaf) == len(z)

    mapped = [leaf for leaf in leaves_of(X) if is_mapped(leaf)]
    if not mapped and not single:
        raise _not_available("no tensor of the inputs has the examples of the prediction along its first dimension")
    params = {name: objective.params[name].detach() for name in names}
    leaves = objective.leaves(())
    buffers = objective.buffers(leaves)

    def of_example(inputs: list[Tensor], *own_operands: Tensor) -> tuple[Tensor, list[Tensor]]:
        remaining = iter(inputs)
        example = map_leaves(lambda leaf: next(remaining)[None] if is_mapped(leaf) else leaf, X)
        output, transposed, *_ = vjp(lambda own: objective.traced_prediction(leaves | own, buffers, example), params)
        pullback = lambda vector: list(transposed(vector.view_as(output))[0].values())  # noqa: E731
        return output.reshape(z.shape[1:]), function(pullback, *own_operands)

    size = max(1, _MAX_ENTRIES // (entries * sum(value.numel() for value in params.values())))
    for start in range(0, len(z), size):
        rows = slice(start, start + size)
        try:
            with torch.no_grad():  # torch would otherwise retain graphs for other parameters
                outputs, results = vmap(of_example, in_dims=(0, *[1] * len(operands)))(
                    [leaf[rows] for leaf in mapped],
                    *(operand[:, rows] for operand in operands),
                )
        except Exception as error:  # the model accepts the whole batch, so vmap caused the error
            if out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise _not_available(f"the model cannot be mapped over its examples: {reason}") from error
        _check_agreement(
            outputs, z[rows], "the model couples its examples, as batch normalization in training mode does"
        )
        yield rows, results


def _check_agreement(found: Tensor, expected: Tensor, reason: str) -> None:
    found, expected = found.detach(), expected.detach()
    same = found == expected  # equal infinities (from a mask) have the difference NaN
    size = expected.masked_fill(expected.isinf(), 0.0).norm()
    difference = (found - expected).masked_fill(same, 0.0).norm()
    if not difference <= torch.finfo(expected.dtype).eps ** 0.5 * size:
        raise _not_available(reason)
