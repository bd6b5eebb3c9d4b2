r"""Hessian products by double backward (reverse over reverse).

Let :math:`g_C(\theta) = \partial L / \partial \theta_C` be the gradient with respect to the parameters C. The product
of a vector `v` with the block of the Hessian that has rows R and columns C is

.. math:: H_{RC} v = \frac{\partial}{\partial \theta_R} \langle g_C(\theta), v \rangle.

The graph of the gradient does not depend on `v`, so the graph is built once and retained. Each product is then one
backward pass through this graph. Forward mode is not needed. For a method that uses forward mode, see Pearlmutter,
"Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994, DOI 10.1162/neco.1994.6.1.147.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.graph import LinearMap
from curvop.kernels.kernel import GraphLinearization, Kernel, Linearization
from curvop.kernels.objective import BatchLoss, Buffers

__all__ = ["HessianKernel"]


class HessianKernel(Kernel):
    """Linearize batches for products with a block of the Hessian."""

    symmetric = True

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return ``(loss, prediction, product)`` for a batch; ``product`` is the batch's matrix times `tangents`."""
        loss, prediction = self.objective.traced(leaves, buffers, batch)
        gradient: Sequence[Tensor | None] = [None] * len(tangents)
        if loss.requires_grad:
            gradient = torch.autograd.grad(loss, self.cols.of(leaves), create_graph=True, allow_unused=True)
        return loss, prediction, LinearMap(gradient, self.rows.of(leaves)).check_differentiable()(tangents)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return a linearization of batch number `index` that retains the graph of the gradient."""
        evaluate = self.objective.evaluate if self.is_kept else self.objective.evaluate_once
        loss = evaluate(leaves, index, batch)
        gradient = loss.gradient(self.cols.of(leaves), create_graph=True)
        product = LinearMap(gradient, self.rows.of(leaves))
        return _RetainedGraph(loss, product if self.is_checked else product.check_differentiable())


class _RetainedGraph(GraphLinearization):
    def __init__(self, loss: BatchLoss, product: LinearMap) -> None:
        super().__init__(loss.value, loss.weight, product.roots)
        self._product = product

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        return self._product(tangents, batched)
