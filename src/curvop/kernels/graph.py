"""Autograd graphs: iterate over the nodes of a graph, and run the same graph backward many times."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["LinearMap", "nodes", "run_backward"]


def nodes(roots: Iterable[Node]) -> Iterator[Node]:
    """Yield all nodes of an autograd graph that are reachable from `roots`, without duplicates."""
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
    """The transposed Jacobian of `outputs` with respect to `inputs`, for products with many vectors.

    The object retains the graph, but not the outputs. If the outputs are a gradient, they would occupy as much memory
    as the parameters.

    Parameters
    ----------
    outputs : sequence of Tensor or None
        An output that is None or does not require grad is treated as a constant.
    inputs : sequence of Tensor
        Leaves of the graph.

    Attributes
    ----------
    roots : list of Node
        Roots of the graph.
    """

    def __init__(self, outputs: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> None:
        self._inputs = tuple(inputs)
        self._positions = [index for index, part in enumerate(outputs) if part is not None and part.requires_grad]
        self._edges = tuple(get_gradient_edge(cast("Tensor", outputs[index])) for index in self._positions)
        self.roots: list[Node] = [edge.node for edge in self._edges]

    def check_differentiable(self) -> LinearMap:
        """Return self, or raise a RuntimeError if the outputs are a gradient that cannot be differentiated.

        An autograd function marked ``once_differentiable`` adds a node named ``torch::autograd::Error`` to the graph of
        its gradient. No path to the parameters contains this node, so a product would not run the node and would
        silently omit a term. PyTorch operations without a second derivative also add such a node.
        """
        error = next((node for node in nodes(self.roots) if node.name() == "torch::autograd::Error"), None)
        if error is not None:
            message = _message(error)
            if "once_differentiable" in message:
                raise RuntimeError(
                    "the model uses an autograd function that is once_differentiable: it has a gradient, but no "
                    "Hessian. Write its backward with differentiable operations, or pass only the parameters of later "
                    "layers"
                )
            raise RuntimeError(f"torch cannot differentiate the gradient of an operation of the model: {message}")
        return self

    def __call__(self, vectors: Sequence[Tensor | None], batched: bool = False) -> Sequence[Tensor | None]:
        """Apply the transposed Jacobian to one vector, or to several vectors at once if `batched` is True.

        `vectors` has one entry for each output, and the returned sequence has one entry for each input. An entry is a
        tensor, or None in place of a zero tensor.
        """
        given = [vectors[index] for index in self._positions]  # lists are faster than generators
        seeds, edges = tuple([vector for vector in given if vector is not None]), self._edges
        if len(seeds) < len(edges):
            edges = tuple(edge for edge, vector in zip(edges, given, strict=True) if vector is not None)
        if not edges:
            return [None] * len(self._inputs)
        if not batched:
            return run_backward(edges, self._inputs, seeds, keep_graph=True, create_graph=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # the engine measures the speed
            return torch.autograd.grad(
                edges, self._inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
            )


def _message(error: Node) -> str:
    """Run a node named ``torch::autograd::Error``, which raises an exception, and return the exception's message."""
    try:
        cast("Callable[[Tensor], Tensor]", error)(torch.zeros(()))
    except RuntimeError as raised:
        return str(raised)
    return "torch gives no reason"


def run_backward(
    outputs: tuple[Tensor | GradientEdge, ...],
    inputs: tuple[Tensor, ...],
    seeds: tuple[Tensor, ...],
    *,
    keep_graph: bool,
    create_graph: bool,
) -> Sequence[Tensor | None]:
    """Compute ``torch.autograd.grad(outputs, inputs, seeds, keep_graph, create_graph, allow_unused=True)``.

    For small models, the checks that ``torch.autograd.grad`` makes of `seeds` take a seventh of the time of a product.
    This function makes no checks.
    """
    allow_unreachable, accumulate = True, False
    run = Variable._execution_engine.run_backward
    grads: Sequence[Tensor | None] = run(
        outputs, seeds, keep_graph, create_graph, inputs, allow_unreachable, accumulate
    )
    return grads
