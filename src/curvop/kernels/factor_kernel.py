r"""The factor :math:`S` of a matrix :math:`S^\top S`, such as the scaled per-example gradients of a Fisher matrix.

GGN-like matrices are sums :math:`\frac{1}{W} \sum_b w_b J_b^\top M_b J_b`. Here :math:`J_b` is the Jacobian of the
prediction for batch b, :math:`w_b` is the weight of the batch, and :math:`W` is the divisor of the matrix. If
:math:`M_b = R_b R_b^\top`, the matrix is equal to :math:`S^\top S`, and batch b contributes the rows
:math:`\sqrt{w_b / W} \, R_b^\top J_b` to :math:`S`. For the empirical Fisher matrix, :math:`R_b` has one column for
each example n of the batch. The column contains the derivative :math:`r_n` of the loss with respect to the prediction.
Each row of :math:`S` is then the gradient of the unreduced loss of one example, multiplied by :math:`1 / \sqrt W`.

A product with `S` takes one Jacobian-vector product, and then one inner product for each row. A product with the
transpose of `S` takes one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.batches import batch_size
from curvop.kernels.errors import NonFiniteProductError, NotFactorableError
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel, OuterProducts, used_terms
from curvop.kernels.ggn_kernel import GGNLikeKernel, OutputHessian, Parts, couples_examples, cut_off
from curvop.kernels.jacobian_kernel import JacobianKernel, RowMap
from curvop.kernels.losses import Examples
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchLoss, Buffers

__all__ = [
    "UNKNOWN_ITEMS",
    "UNKNOWN_ROWS",
    "UNKNOWN_UNITS",
    "FactorKernel",
    "PerExampleKernel",
    "example_counts",
    "item_count",
    "row_counts",
    "square_root",
]

UNKNOWN_ITEMS = (
    "the data items of a batch are not known, because the number of terms of its loss is not a multiple of the size of "
    "its first axis: make the model return the terms of an item one after the other"
)

#: Error message of an operator with one row per data item, which could have one row per term instead.
UNKNOWN_ROWS = f"{UNKNOWN_ITEMS}, or pass examples='terms'"

#: Error message of Kronecker factors that need the gradient of each data item.
UNKNOWN_UNITS = f"{UNKNOWN_ITEMS}, or use KFAC (in preconditioner.kfac, ekfac=False) with sharing='expand'"

#: Largest supported number of outputs per example. With c outputs, the Hessian of an example's loss has c * c entries.
_MAX_ENTRIES = 256


class FactorKernel(JacobianKernel):
    """Linearize batches for products with the factor `S` of a matrix ``S' S``, or with the transpose of `S`.

    Parameters
    ----------
    matrix : GGNLikeKernel
        The kernel of the matrix.
    sizes : sequence of int
        Number of rows of each batch.
    """

    row_name = "row"

    def __init__(self, matrix: GGNLikeKernel, sizes: Sequence[int]) -> None:
        super().__init__(matrix.objective, matrix.cols.names, sizes)
        self._matrix = matrix

    def scale(self, weight: float) -> float:
        """Return the square root of the weight of a batch."""
        return math.sqrt(weight)

    def divisor(self, weights: Sequence[float]) -> float:
        """Return the square root of the divisor of the matrix."""
        return math.sqrt(super().divisor(weights))

    def extra(self, index: int, prediction: Any, batch: Any, y: Any) -> dict[str, Tensor]:
        """Return the additional tensors that the kernel of the matrix needs for batch number `index`."""
        return self._matrix.extra(index, prediction, batch, y)

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return the buffers that the kernel of the matrix needs for batch number `index`.

        Raise a ValueError if the data yield more batches than when the operator was created.
        """
        self.check_index(index)
        return self._matrix.buffers(leaves, index, batch)

    def row_map(
        self, outputs: list[Tensor], pair: tuple[Any, Any], extra: Mapping[str, Tensor], loss: BatchLoss
    ) -> RowMap:
        """Return the map ``w -> R' w`` from the tangent of the prediction to the rows of one batch."""
        output_hessian = self._matrix.output_hessian(outputs, extra, loss)
        if isinstance(output_hessian, OuterProducts):
            return output_hessian
        return square_root(output_hessian, Examples(self.objective.loss_function), outputs)


class PerExampleKernel(FactorKernel):
    """Linearize batches for products with the matrix of per-example gradients, or with its transpose.

    Parameters
    ----------
    objective : ModelObjective
    cols : sequence of str
        Names of the parameters that the columns belong to.
    sizes : sequence of int
        Number of rows of each batch.
    by_item : bool
        If True, each row is the gradient of the loss of one data item, which is the sum of the terms of this item (see
        `item_count`). If False, each row is the gradient of a single term of the loss.
    """

    row_name = "example"

    def __init__(self, objective: ModelObjective, cols: Sequence[str], sizes: Sequence[int], by_item: bool) -> None:
        super().__init__(EmpiricalFisherKernel(objective, cols, cols), sizes)
        self.by_item = by_item

    def divisor(self, weights: Sequence[float]) -> float:
        """Return 1, because per-example gradients are not divided by the divisor of the loss."""
        return 1.0

    def row_map(
        self, outputs: list[Tensor], pair: tuple[Any, Any], extra: Mapping[str, Tensor], loss: BatchLoss
    ) -> RowMap:
        """Return the map from the tangent of the prediction to the directional derivative of each example's loss."""
        row_map = super().row_map(outputs, pair, extra, loss)
        count = item_count(outputs, pair, row_map.count) if self.by_item else row_map.count
        if count is None:
            raise ValueError(UNKNOWN_ROWS)
        return row_map if count == row_map.count else _RowSums(row_map, count)


def _check_entries(entries: int, remedy: str = "") -> None:
    """Raise a `NotFactorableError` if the Hessian of the loss of one example is too large for a square root."""
    if entries > _MAX_ENTRIES:
        remedy = remedy or "use EFLinearOperator, or FisherLinearOperator(..., mc_samples=1)"
        raise NotFactorableError(
            f"an example has {entries:,} outputs, more than {_MAX_ENTRIES}, so that the square root of the loss's "
            f"Hessian is too large: {remedy}"
        )


def square_root(
    output_hessian: OutputHessian, examples: Examples, outputs: list[Tensor], remedy: str = ""
) -> OuterProducts:
    """Write the block of `M` for each example as ``R R'``, where `R` is the symmetric square root of the block.

    Unlike other square roots, the symmetric square root depends continuously on `M`. An operator and its transpose
    evaluate the model separately, so their maps `M` may differ by rounding errors. Because of the continuity, their
    square roots `R` also differ only by rounding errors. If the root does not exist, the error message ends with the
    `remedy`. By default, the remedy is another operator.
    """
    used = output_hessian.used
    shapes = [outputs[index].shape for index in used]
    if not used or not outputs[used[0]].numel():
        empty = [output.detach() if index in used else None for index, output in enumerate(outputs)]
        return OuterProducts(examples, outputs, [empty] * used_terms(examples, outputs, empty)[1])
    count, entries = examples.terms(shapes)
    _check_entries(entries, remedy)
    some = outputs[used[0]]

    def multiply(flat: Tensor) -> Tensor:
        parts: list[Tensor | None] = [None] * len(outputs)
        for index, part in zip(used, examples.restore(flat, shapes), strict=True):
            parts[index] = part.to(outputs[index].dtype)
        product = examples.flatten([output_hessian(parts)[index] for index in used], shapes)
        return torch.zeros_like(flat) if product is None else product.detach().to(flat.dtype)

    units = torch.eye(entries, dtype=some.dtype, device=some.device)
    blocks = torch.stack([multiply(unit.expand(count, entries).contiguous()) for unit in units], -1)
    if not blocks.isfinite().all():
        raise NonFiniteProductError(
            "the Hessian of the loss with respect to the prediction is not finite: look for NaN"
        )
    eps = torch.finfo(some.dtype).eps
    if couples_examples(multiply, blocks):
        raise NotFactorableError(
            "the loss couples its examples, so its Hessian has no square root per example: "
            + (remedy or "use the matrix itself (for eigsh, side='parameters')")
        )
    values, vectors = torch.linalg.eigh(blocks.double())
    rounding = 10 * eps + entries * torch.finfo(torch.float64).eps
    sizes = values.abs().amax(-1, keepdim=True)
    if bool((values < -rounding * sizes.amax()).any()):
        raise NotFactorableError(
            f"the Hessian of the loss with respect to the prediction is indefinite (it has the eigenvalue "
            f"{float(values.min()):.3g}), so the matrix is not of the form S.T @ S: "
            + (remedy or "use the matrix itself (for eigsh, side='parameters'), or EFLinearOperator")
        )
    roots = torch.where(values > rounding * sizes, values, 0.0).sqrt()
    root = torch.einsum("nij,nj,nkj->nik", vectors, roots, vectors).to(some.dtype)
    factors = []
    for column in root.unbind(-1):
        parts: list[Tensor | None] = [None] * len(outputs)
        for index, part in zip(used, examples.restore(column, shapes), strict=True):
            parts[index] = part.to(outputs[index].dtype)
        factors.append(parts)
    return OuterProducts(examples, outputs, factors)


class _RowSums(RowMap):
    """A map to `count` rows. Each row is the sum of a group of consecutive rows of the map `terms`."""

    def __init__(self, terms: RowMap, count: int) -> None:
        self._terms, self.count, self.tensors = terms, count, terms.tensors

    def rows(self, tangents: Parts) -> Tensor | None:
        rows = self._terms.rows(tangents)
        return None if rows is None else rows.reshape(*rows.shape[:-1], self.count, -1).sum(-1)

    def cotangents(self, rows: Tensor) -> Parts:
        return self._terms.cotangents(rows.repeat_interleave(self._terms.count // self.count, -1))


def example_counts(objective: ModelObjective) -> list[tuple[int, int | None]]:
    """Return a tuple ``(terms, items)`` for each batch. The function takes one pass over the data.

    ``terms`` is the number of terms of the loss of the batch, and ``items`` is the result of `item_count`.
    """
    return [(terms, item_count(outputs, batch, terms)) for outputs, batch, (terms, _) in _terms(objective)]


def row_counts(matrix: GGNLikeKernel) -> list[int]:
    """Return the number of rows of the factor `S` for each batch. The function takes one pass over the data."""
    counts = []
    for _, _, (terms, entries) in _terms(matrix.objective):
        count = matrix.num_factors(entries)
        if count != matrix.num_factors(entries + 1):  # each output adds a row: a square root of the Hessian is needed
            _check_entries(entries)
        counts.append(terms * count)
    return counts


def _terms(objective: ModelObjective) -> Iterator[tuple[list[Tensor], Any, tuple[int, int]]]:
    """Yield a tuple ``(outputs, (X, y), counts)`` for each batch, where ``counts`` is the result of `used_terms`.

    The model is evaluated without autograd.
    """
    examples, leaves = Examples(objective.loss_function), objective.leaves(())
    with objective.slow_backends():
        for index, batch in objective.batches():
            _, _, outputs, loss = objective.split(leaves, index, batch, cut_off)
            yield outputs, (objective.inputs(batch), loss.y), used_terms(examples, outputs, loss.gradient(outputs))


def item_count(outputs: Sequence[Tensor], batch: Any, terms: int) -> int | None:
    """Return the number of data items in a batch, which is the size of its first axis.

    If the first axes of X and y have different sizes (for example, because the model flattens its predictions), the
    number of items is the size of the first axis of X. The terms of an item must be consecutive in the prediction.
    Return None if the number of terms is not a multiple of the number of items. If there is at most one term, return
    the number of terms.

    Parameters
    ----------
    outputs : sequence of Tensor
        The floating-point tensors of the prediction.
    batch : pair
        Input and target.
    terms : int
        Number of terms of the loss of the batch.
    """
    if terms <= 1:
        return terms
    sizes = batch_size(*batch), batch_size(batch[0]), len(outputs[0])
    count = next(size for size in sizes if size is not None)
    return count if count and terms % count == 0 else None
