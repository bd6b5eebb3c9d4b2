r"""The exact diagonal of a matrix through the prediction, :math:`\sum_n J_n^\top M_n J_n`, example by example.

With :math:`M_n = \sum_c \lambda_{nc} u_{nc} u_{nc}^\top` it is :math:`\sum_{nc} \lambda_{nc} (J_n^\top u_{nc})^2`: a
backward pass of every example for each of its outputs (for a matrix of gradients, one), however many parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from curvop.kernels.batches import leading_size, map_leaves
from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.errors import NonFiniteProductError, not_finite
from curvop.kernels.ggn_kernel import GGNLikeKernel, OutputHessian, cut_off, outputs_of
from curvop.kernels.memory import out_of_memory
from curvop.kernels.parameters import ParameterLayout

__all__ = ["write_diagonal"]

#: Outputs of an example above which its part of the loss's curvature is not decomposed.
_MOST_OUTPUTS = 256
#: Entries of examples' gradients that there are at a time.
_ENTRIES = 1 << 23


def write_diagonal(kernel: GGNLikeKernel, names: Sequence[str], out: Tensor) -> None:
    """Write the diagonal of the block of the parameters `names` into `out` ``(N,)``; one pass over the data.

    Raises
    ------
    NotImplementedError
        Where the prediction is no tensor of examples that are computed apart from each other by what torch can map
        over, or an example has more than 256 outputs.
    NonFiniteProductError
        Where it holds NaN or infinity.
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
                raise _unknown("the prediction is not one tensor with the examples along dimension 0")
            # Before the examples are compared: NaN differs from itself, which is not for coupled examples.
            told = functools.partial(not_finite, "diagonal", index, float(loss.value))
            if z.isnan().any():  # infinity may be a mask
                raise NonFiniteProductError(told("the prediction"))
            given = kernel.extra(index, prediction, batch)
            output_hessian = kernel.output_hessian([z], batch, given, functools.partial(loss.gradient, [z]))
            strengths, vectors = _decomposed(output_hessian, z, told)
            _check_gradient(kernel, names, batch, z, told)
            for part, value in zip(parts, _squares(kernel, names, batch[0], z, strengths, vectors), strict=True):
                part.add_(value.to(part.device), alpha=loss.weight)
        objective.conclude(totals)
    out.div_(objective.divisor(totals.weights))
    if not out.isfinite().all():
        raise NonFiniteProductError("the diagonal holds NaN or infinity")


def _unknown(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"the exact diagonal cannot be told, as {reason}: curvop.spectrum.diagonal estimates it from products"
    )


def _check_finite(tensor: Tensor, where: str, told: Callable[[str], str]) -> None:
    if not tensor.isfinite().all():
        raise NonFiniteProductError(told(where))


def _decomposed(output_hessian: OutputHessian, z: Tensor, told: Callable[[str], str]) -> tuple[Tensor, Tensor]:
    """Return ``(C, n)`` eigenvalues of the examples' blocks of `M`, and their eigenvectors ``(C, n, ...)``."""
    count = _count(z)
    outputs = z.numel() // max(count, 1)
    if outputs > _MOST_OUTPUTS:
        raise _unknown(f"an example has {outputs:,} outputs, more than {_MOST_OUTPUTS}")

    def multiply(vectors: Tensor) -> Tensor:
        [product] = output_hessian([vectors.view_as(z)])
        return torch.zeros_like(vectors) if product is None else product.detach().reshape(count, outputs)

    units = torch.eye(outputs, dtype=z.dtype, device=z.device)
    blocks = torch.stack([multiply(unit.expand(count, outputs).contiguous()) for unit in units], dim=-1)
    _check_finite(blocks, "the curvature of the loss", told)
    probe = torch.linspace(1, 2, z.numel(), dtype=z.dtype, device=z.device).cos().view(count, outputs)
    expected = torch.einsum("nij,nj->ni", blocks, probe)
    # By the blocks' own size: a probe may lie where they vanish, such as the same number for every class.
    size = blocks.norm() * probe.norm()
    _agree(multiply(probe), expected, "the loss couples its examples", size)
    strengths, vectors = torch.linalg.eigh(blocks.double())
    strengths, vectors = strengths.to(z.dtype).T, vectors.to(z.dtype).permute(2, 0, 1)
    # A product of rounding errors is no part of the matrix: of a gradient's square, only one vector stays.
    weak = outputs * torch.finfo(z.dtype).eps * strengths.abs().max()
    there = strengths.abs().amax(1) > weak
    return strengths[there], vectors[there].reshape(-1, count, *z.shape[1:])


def _count(z: Tensor) -> int:
    """Return the number of examples; a prediction without dimensions is one."""
    return len(z) if z.ndim else 1


def _check_gradient(
    kernel: GGNLikeKernel, names: Sequence[str], batch: Any, z: Tensor, told: Callable[[str], str]
) -> None:
    """Refuse a model that couples its examples in derivatives alone: one backward pass of the batch, one of each."""
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
            _check_finite(part, f"parameter {name!r}", told)
    sums = _squares(
        *(kernel, names, batch[0], z, torch.ones(1, _count(z), dtype=z.dtype, device=z.device)),
        probe.view(1, _count(z), *z.shape[1:]),
        power=1,
    )
    expected = [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(chosen, whole, strict=True)]
    eps = torch.finfo(z.dtype).eps
    # Gradients of nothing but rounding errors, as by a bias below a normalisation, are small for parameters of order
    # one; what else is as small has a square that is nothing.
    allowed = eps**0.5 * sum(float(part.norm()) for part in expected) + 100 * eps * float(probe.norm())
    for found, part in zip(sums, expected, strict=True):
        if not float((found - part).norm()) <= allowed:
            raise _unknown("the model couples its examples in their derivatives")


def _squares(
    kernel: GGNLikeKernel,
    names: Sequence[str],
    X: Any,
    z: Tensor,
    strengths: Tensor,
    vectors: Tensor,
    power: int = 2,
) -> Sequence[Tensor]:
    """Return the weighted sums of squares of ``J_n' u_nc``, or another power, for each parameter."""
    objective = kernel.objective
    whole = not z.ndim  # the batch is one example
    if whole:
        z = z[None]
    elif leading_size(X) != len(z):
        raise _unknown("the inputs' first dimensions are not the examples of the prediction")
    params = {name: objective.params[name].detach() for name in names}
    leaves = objective.leaves(())
    buffers = objective.buffers(leaves)

    def of_one(inputs: list[Tensor], strength: Tensor, vector: Tensor) -> tuple[Tensor, list[Tensor]]:
        rest = iter(inputs)
        one = map_leaves(lambda _: next(rest) if whole else next(rest)[None], X)
        image, pullback, *_ = vjp(lambda own: objective.traced_prediction(leaves | own, buffers, (one, None)), params)
        total = [torch.zeros_like(value) for value in params.values()]
        for weight, direction in zip(strength, vector, strict=True):
            pulled = pullback(direction.view_as(image))[0].values()
            total = [part + weight * value**power for part, value in zip(total, pulled, strict=True)]
        return image.reshape(z.shape[1:]), total

    size = max(1, _ENTRIES // sum(value.numel() for value in params.values()))
    sums = [torch.zeros_like(value) for value in params.values()]
    for start in range(0, len(z), size):
        rows = slice(start, start + size)
        try:
            with torch.no_grad():  # a function may hold other parameters, of which torch would keep the graph
                images, totals = vmap(of_one, in_dims=(0, 1, 1))(
                    [leaf[None] if whole else leaf[rows] for leaf in leaves_of(X)], strengths[:, rows], vectors[:, rows]
                )
        except Exception as error:  # the whole batch went well: what torch, or the model, cannot map over
            if out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise _unknown(f"the model cannot be mapped over its examples: {reason}") from error
        _agree(images, z[rows], "the model couples its examples, as batch normalisation in training mode does")
        for total, value in zip(sums, totals, strict=True):
            total += value.sum(0)
    return sums


def _agree(found: Tensor, expected: Tensor, otherwise: str, size: Tensor | None = None) -> None:
    found, expected = found.detach(), expected.detach()
    same = found == expected  # infinite ones, behind a mask, have no difference
    size = expected.masked_fill(expected.isinf(), 0.0).norm() if size is None else size
    difference = (found - expected).masked_fill(same, 0.0).norm()
    if not difference <= torch.finfo(expected.dtype).eps ** 0.5 * size:
        raise _unknown(otherwise)
