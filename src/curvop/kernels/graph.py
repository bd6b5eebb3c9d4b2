"""Autograd's graphs: node by node, and run more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["LinearMap", "nodes"]


def nodes(roots: Iterable[Node]) -> Iterator[Node]:
    """Yield every node that can be reached from `roots`, once."""
    seen = set(roots)
    stack = list(seen)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


class LinearMap:
    """The transposed Jacobian of `outputs` by `inputs`, ready for many vectors.

    The edges of the graph are all it keeps: the outputs' own memory, for a gradient as large as the parameters, is
    freed.

    Parameters
    ----------
    outputs : sequence of Tensor or None
        Those that are None, or do not require grad, depend on nothing.
    inputs : sequence of Tensor
        Leaves.

    Attributes
    ----------
    roots : list of Node
        Of the graph.
    """

    def __init__(self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> None:
        self._inputs = tuple(inputs)
        self._positions = [index for index, part in enumerate(outputs) if part is not None and part.requires_grad]
        self._edges = tuple(get_gradient_edge(cast("Tensor", outputs[index])) for index in self._positions)
        self.roots: list[Node] = [edge.node for edge in self._edges]

    def check_differentiable(self) -> LinearMap:
        """Refuse outputs that are a gradient which cannot be differentiated again.

        A function marked ``once_differentiable`` leaves a node of this name in the graph of its gradient, off the path
        to the parameters, where a product would pass it by and silently lack its part. So do torch's own operations
        that have no further derivative.
        """
        error = next((node for node in nodes(self.roots) if node.name() == "torch::autograd::Error"), None)
        if error is not None:
            words = _words(error)
            if "once_differentiable" in words:
                raise RuntimeError(
                    "the model uses an autograd function that is once_differentiable: it has a gradient, but no "
                    "Hessian. Write its backward with differentiable operations, or take a block above it"
                )
            raise RuntimeError(f"torch cannot differentiate an operation of the model once more: {words}")
        return self

    def __call__(self, vectors: Sequence[Tensor | None], batched: bool = False) -> Sequence[Tensor | None]:
        """Multiply: one vector an output in, one an input out, None for zero; several at once where `batched`."""
        positions, edges = self._positions, self._edges
        if any(vectors[index] is None for index in positions):
            positions = [index for index in positions if vectors[index] is not None]
            edges = tuple(edge for index, edge in zip(self._positions, edges, strict=True) if index in positions)
        if not edges:
            return [None] * len(self._inputs)
        seeds = tuple(cast("Tensor", vectors[index]) for index in positions)
        if not batched:
            return _run(edges, self._inputs, seeds)
        return torch.autograd.grad(
            edges, self._inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )


def _words(error: Node) -> str:
    """Return what a node of autograd's raises when it is reached."""
    try:
        cast("Callable[[Tensor], Tensor]", error)(torch.zeros(()))
    except RuntimeError as raised:
        return str(raised)
    return "it does not say why"


def _run(
    edges: tuple[GradientEdge, ...], inputs: tuple[Tensor, ...], seeds: tuple[Tensor, ...]
) -> Sequence[Tensor | None]:
    """Do as ``torch.autograd.grad(edges, inputs, seeds, retain_graph=True, allow_unused=True)``.

    Without its checks of the seeds, which are known to fit here, and take a seventh of a small model's product.
    """
    keep_graph, create_graph, allow_unreachable, accumulate = True, False, True, False
    run = Variable._execution_engine.run_backward
    found: Sequence[Tensor | None] = run(edges, seeds, keep_graph, create_graph, inputs, allow_unreachable, accumulate)
    return found
