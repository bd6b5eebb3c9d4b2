r"""Factors of matrices of the form :math:`S^\top S`, whose rows are scaled per-example gradients.

GGN-like matrices are sums :math:`\frac{1}{W} \sum_b w_b J_b^\top M_b J_b`. If :math:`M_b = R_b R_b^\top`, the matrix is
:math:`S^\top S`, and the rows of batch b are :math:`S_b = \sqrt{w_b / W} \, R_b^\top J_b`. For the empirical Fisher
matrix, :math:`R_b` has one column per example: the derivative :math:`r_n` of the loss with respect to the prediction.
Without the factor :math:`1 / \sqrt W`, the rows are then the gradients of the undivided terms of the loss.

A product with `S` is a Jacobian-vector product, followed by one inner product per row. A product with the transpose is
one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from curvop.kernels.batches import batch_size
from curvop.kernels.fisher_kernel import EmpiricalFisherKernel, OuterProducts, used_terms
from curvop.kernels.ggn_kernel import GGNLikeKernel, Parts, cut_off
from curvop.kernels.jacobian_kernel import JacobianKernel, RowMap
from curvop.kernels.losses import Examples
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import Buffers

__all__ = ["UNKNOWN_ITEMS", "FactorKernel", "PerExampleKernel", "example_counts", "item_count"]

UNKNOWN_ITEMS = (
    "the data items of a batch are not known, because the number of terms of its loss is not a multiple of the size of "
    "its first axis: pass examples='terms', or make the model return the terms of an item one after the other"
)


class FactorKernel(JacobianKernel):
    """Linearize batches for products with the factor `S` of a matrix ``S' S``, or with its transpose.

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

    def extra(self, index: int, prediction: Any, batch: Any) -> dict[str, Tensor]:
        """Return the additional tensors of the kernel of the matrix."""
        return self._matrix.extra(index, prediction, batch)

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return the buffers of the kernel of the matrix. Raise a ValueError if the number of batches has grown."""
        self.check_index(index)
        return self._matrix.buffers(leaves, index, batch)

    def row_map(
        self, outputs: list[Tensor], batch: Any, extra: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> RowMap:
        """Return the map ``w -> R' w`` for one batch."""
        output_hessian = self._matrix.output_hessian(outputs, batch, extra, derivative)
        assert isinstance(output_hessian, OuterProducts)
        return output_hessian


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
        If True, a row is the gradient of the sum of all terms that belong to one index of the first axis of the batch.
        If False, a row is the gradient of a single term.
    """

    row_name = "example"

    def __init__(self, objective: ModelObjective, cols: Sequence[str], sizes: Sequence[int], by_item: bool) -> None:
        super().__init__(EmpiricalFisherKernel(objective, cols, cols), sizes)
        self.by_item = by_item

    def divisor(self, weights: Sequence[float]) -> float:
        """Return 1, because the terms of the loss are not divided."""
        return 1.0

    def row_map(
        self, outputs: list[Tensor], batch: Any, extra: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> RowMap:
        """Return the map from the tangent of the prediction to the directional derivatives of the examples."""
        row_map = super().row_map(outputs, batch, extra, derivative)
        count = item_count(outputs, batch, row_map.count) if self.by_item else row_map.count
        if count is None:
            raise ValueError(UNKNOWN_ITEMS)
        return row_map if count == row_map.count else _RowSums(row_map, count)


class _RowSums(RowMap):
    """The sums of groups of consecutive rows of another map."""

    def __init__(self, terms: RowMap, count: int) -> None:
        self._terms, self.count, self.tensors = terms, count, terms.tensors

    def rows(self, tangents: Parts) -> Tensor | None:
        rows = self._terms.rows(tangents)
        return None if rows is None else rows.reshape(*rows.shape[:-1], self.count, -1).sum(-1)

    def cotangents(self, rows: Tensor) -> Parts:
        return self._terms.cotangents(rows.repeat_interleave(self._terms.count // self.count, -1))


def example_counts(objective: ModelObjective) -> list[tuple[int, int | None]]:
    """Return the number of terms and the number of data items (see `item_count`) of each batch, in one pass.

    The model is evaluated without autograd.
    """
    examples, leaves = Examples(objective.loss_function), objective.leaves(())
    counts = []
    with objective.slow_backends():
        for index, batch in objective.batches():
            _, _, outputs, loss = objective.split(leaves, index, batch, cut_off)
            terms = used_terms(examples, outputs, loss.gradient(outputs))
            counts.append((terms, item_count(outputs, batch, terms)))
    return counts


def item_count(outputs: Sequence[Tensor], batch: Any, terms: int) -> int | None:
    """Return the number of data items in a batch, which is the size of its first axis. Return None if it is unknown.

    The terms of an item must be consecutive. If X and y differ in their first axis, as for a model that flattens its
    predictions, the axis of X counts.

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
