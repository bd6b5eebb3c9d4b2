r"""The Hessian by reverse over reverse: the graph of the gradient is kept, a product is one more backward pass.

With :math:`g_C(\theta) = \partial L / \partial \theta_C` the block with rows R and columns C acts as

.. math:: H_{RC} v = \frac{\partial}{\partial \theta_R} \langle g_C(\theta), v \rangle,

which is linear in `v` and needs no forward-mode derivative (double backward; Pearlmutter, 1994, "Fast exact
multiplication by the Hessian", has the forward-mode twin). The gradient is differentiated anew for each `v` along the
same graph, so everything that does not depend on `v` is computed once.
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
    """Linearizes batches for products with the Hessian block of the parameters `rows` and `cols`."""

    symmetric = True

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return a batch's loss and prediction, and one product by double backward."""
        loss, prediction = self.objective.traced(leaves, buffers, batch)
        gradient: Sequence[Tensor | None] = [None] * len(tangents)
        if loss.requires_grad:
            gradient = torch.autograd.grad(loss, self.cols.of(leaves), create_graph=True, allow_unused=True)
        return loss, prediction, LinearMap(gradient, self.rows.of(leaves)).check_differentiable()(tangents)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of one batch: the retained graph of its gradient."""
        loss = self.objective.evaluate(leaves, index, batch)
        gradient = loss.gradient(self.cols.of(leaves), create_graph=True)
        return _RetainedGraph(loss, LinearMap(gradient, self.rows.of(leaves)).check_differentiable())


class _RetainedGraph(GraphLinearization):
    def __init__(self, loss: BatchLoss, product: LinearMap) -> None:
        super().__init__(loss.value, loss.weight, product.roots)
        self._product = product

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        return self._product(tangents, batched)
