r"""The Hessian by reverse over reverse: the graph of the gradient is kept, a product is one more backward pass.

With :math:`g_C(\theta) = \partial L / \partial \theta_C` the block with rows R and columns C acts as

.. math:: H_{RC} v = \frac{\partial}{\partial \theta_R} \langle g_C(\theta), v \rangle,

which is linear in `v` and needs no forward-mode derivative (double backward; Pearlmutter, 1994, "Fast exact
multiplication by the Hessian", has the forward-mode twin). The gradient is differentiated anew for each `v` along the
same graph, so everything that does not depend on `v` is computed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from curvop.kernels.graph import nodes
from curvop.kernels.kernel import Kernel, Linearization
from curvop.kernels.objective import BatchLoss

__all__ = ["HessianKernel"]


class HessianKernel(Kernel):
    """Linearizes batches for products with the Hessian block of the parameters `rows` and `cols`."""

    symmetric = True

    def adjoint(self) -> HessianKernel:
        """Return the kernel of the block mirrored at the diagonal."""
        return HessianKernel(self.objective, self.cols.names, self.rows.names)

    def product(
        self, leaves: Mapping[str, Tensor], loss: Tensor, tangents: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return one product from the beginning, by double backward."""
        if not loss.requires_grad:
            return [None] * len(self.rows.names)
        columns, rows = ([leaves[name] for name in layout.names] for layout in (self.cols, self.rows))
        gradient = torch.autograd.grad(loss, columns, create_graph=True, allow_unused=True)
        edges, positions = _edges(gradient)
        if not edges:
            return [None] * len(rows)
        seeds = [tangents[position] for position in positions]
        return torch.autograd.grad(edges, rows, seeds, allow_unused=True)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of one batch: the retained graph of its gradient."""
        loss = self.objective.evaluate(leaves, index, batch)
        gradient = loss.gradient([leaves[name] for name in self.cols.names], create_graph=True)
        return _RetainedGraph(loss, *_edges(gradient), [leaves[name] for name in self.rows.names])


def _edges(gradient: Sequence[Tensor | None]) -> tuple[list[GradientEdge], list[int]]:
    """Return the edges of the parts of a gradient that are not constant, and which parts these are.

    The edge is all a product needs; the gradient's own memory, as large as the parameters, is freed.
    """
    positions = [index for index, part in enumerate(gradient) if part is not None and part.requires_grad]
    edges = [get_gradient_edge(cast("Tensor", gradient[position])) for position in positions]
    _check_differentiable(edge.node for edge in edges)
    return edges, positions


def _check_differentiable(roots: Iterable[Node]) -> None:
    """Refuse a gradient that cannot be differentiated again.

    A function marked ``once_differentiable`` leaves a node of this name in the graph of its gradient, off the path to
    the parameters, where a product would pass it by and silently lack its part.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes(roots)):
        raise RuntimeError(
            "the model uses an autograd function that is once_differentiable: it has a gradient, but no Hessian. "
            "Write its backward with differentiable operations, or take a block above it"
        )


def _backward(
    edges: Sequence[GradientEdge], seeds: Sequence[Tensor], rows: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Do as ``torch.autograd.grad(edges, rows, seeds, retain_graph=True, allow_unused=True)``.

    Without its checks of the seeds, which are known to fit here, and take a seventh of a small model's product.
    """
    keep_graph, create_graph, allow_unreachable, accumulate = True, False, True, False
    run = Variable._execution_engine.run_backward
    products: Sequence[Tensor | None] = run(
        tuple(edges), tuple(seeds), keep_graph, create_graph, tuple(rows), allow_unreachable, accumulate
    )
    return products


class _RetainedGraph(Linearization):
    def __init__(self, loss: BatchLoss, edges: list[GradientEdge], positions: list[int], rows: list[Tensor]) -> None:
        super().__init__(loss.value, loss.weight, [edge.node for edge in edges])
        self._edges = edges
        self._positions = positions
        self._rows = rows

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return self._apply(tangents, batched=False)

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        return self._apply(tangents, batched=True)

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        if not self._edges:
            return [None] * len(self._rows)
        seeds = [tangents[position] for position in self._positions]
        if not batched:
            return _backward(self._edges, seeds, self._rows)
        return torch.autograd.grad(
            self._edges, self._rows, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
