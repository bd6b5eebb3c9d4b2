r"""Matrices that act through the prediction: :math:`\sum_b J_b^\top M_b J_b`, with the model's Jacobian `J`.

The Jacobian's transpose is one backward pass, :math:`u \mapsto J^\top u`. It is linear in `u`, so that its own
derivative by `u`, along the retained graph, is the Jacobian itself: ``J v`` needs no forward-mode derivative and runs
nothing twice. A product costs two thirds of a gradient for each of the two.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.batches import leaves as leaves_of
from curvop.kernels.batches import map_leaves
from curvop.kernels.graph import LinearMap
from curvop.kernels.kernel import Kernel, Linearization
from curvop.kernels.model_objective import ModelObjective

__all__ = ["Middle", "Pull", "Push", "SandwichKernel"]

Parts = Sequence[Tensor | None]


class Pull:
    """``w -> J' w``: from the parts of a prediction to parameters."""

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        self._map = LinearMap(outputs, params)
        self.roots = self._map.roots

    def __call__(self, vectors: Parts, batched: bool = False) -> Parts:
        """Multiply."""
        return self._map(vectors, batched)


class Push:
    """``v -> J v``: from parameters to the parts of a prediction."""

    def __init__(self, outputs: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        seeds = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled: Parts = [None] * len(params)
        if any(output.requires_grad for output in outputs):
            used = [index for index, output in enumerate(outputs) if output.requires_grad]
            pulled = torch.autograd.grad(
                [outputs[index] for index in used],
                params,
                [seeds[index] for index in used],
                create_graph=True,
                allow_unused=True,
            )
        self._map = LinearMap(pulled, seeds).check_differentiable()
        self.roots = self._map.roots

    def __call__(self, vectors: Sequence[Tensor], batched: bool = False) -> Parts:
        """Multiply."""
        return self._map(vectors, batched)


class Middle(abc.ABC):
    """``w -> M w`` on the parts of a batch's prediction; symmetric.

    Attributes
    ----------
    roots : list of Node
        What it keeps of autograd's graph.
    tensors : list of Tensor
        What it keeps besides.
    """

    roots: Sequence[Any] = ()
    tensors: Sequence[Tensor] = ()

    @abc.abstractmethod
    def __call__(self, vectors: Parts, batched: bool = False) -> Parts:
        """Multiply: parts of the prediction's shapes, with a leading dimension more where `batched`."""


class SandwichKernel(Kernel):
    """Linearizes batches for products with a block of such a matrix; subclasses say what `M` is."""

    symmetric = True
    objective: ModelObjective

    @abc.abstractmethod
    def middle(
        self, outputs: list[Tensor], batch: Any, given: Mapping[str, Tensor], derivative: Callable[[bool], Parts]
    ) -> Middle:
        """Return `M` for one batch.

        Parameters
        ----------
        outputs : list of Tensor
            The parts of the prediction, leaves that require grad.
        batch : pair
            Input and target.
        given : dict of str to Tensor
            What `given` returns for this batch and, for a program, the loss's own tensors.
        derivative : callable
            ``create_graph -> parts``, the loss's derivative by `outputs`.
        """

    def given(self, index: int, outputs: list[Tensor]) -> dict[str, Tensor]:
        """Return what `M` depends on besides the loss, for batch number `index`."""
        return {}

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of one batch."""
        prediction = self.objective.predict(leaves, batch)
        outputs, (cut, parts) = outputs_of(prediction), cut_off(prediction)
        loss = self.objective.criterion(cut, index, batch)
        given = self.given(index, parts)
        middle = self.middle(parts, batch, given, lambda create_graph: loss.gradient(parts, create_graph))
        push, pull = Push(outputs, self.cols.of(leaves)), Pull(outputs, self.rows.of(leaves))
        return _Sandwich(loss.value, loss.weight, push, middle, pull)

    def product(
        self, leaves: Mapping[str, Tensor], held: dict[str, dict[str, Tensor]], batch: Any, tangents: Sequence[Tensor]
    ) -> tuple[Tensor, Any, Parts]:
        """Return a batch's loss, its prediction and one product."""
        prediction = self.objective.traced_prediction(leaves, held, batch)
        outputs, (cut, parts) = outputs_of(prediction), cut_off(prediction)
        loss = self.objective.traced_loss(cut, held, batch)

        def derivative(create_graph: bool) -> Parts:
            return torch.autograd.grad(loss, parts, create_graph=create_graph, allow_unused=True)

        middle = self.middle(parts, batch, held["loss"] | held.get("given", {}), derivative)
        push, pull = Push(outputs, self.cols.of(leaves)), Pull(outputs, self.rows.of(leaves))
        return loss, prediction, pull(middle(push(tangents)))


def outputs_of(prediction: Any) -> list[Tensor]:
    """Return the parts of a prediction that can be differentiated."""
    return [part for part in leaves_of(prediction) if part.is_floating_point()]


def cut_off(prediction: Any) -> tuple[Any, list[Tensor]]:
    """Return the prediction with parts that are leaves, and these."""
    parts: list[Tensor] = []

    def leaf(part: Tensor) -> Tensor:
        if not part.is_floating_point():
            return part
        parts.append(part.detach().requires_grad_())
        return parts[-1]

    return map_leaves(leaf, prediction), parts


class _Sandwich(Linearization):
    def __init__(self, loss: Tensor, weight: float, push: Push, middle: Middle, pull: Pull) -> None:
        super().__init__(loss, weight, [*push.roots, *middle.roots, *pull.roots], middle.tensors)
        self._push, self._middle, self._pull = push, middle, pull

    def apply(self, tangents: Sequence[Tensor]) -> Parts:
        return self._apply(tangents, batched=False)

    def apply_many(self, tangents: Sequence[Tensor]) -> Parts:
        return self._apply(tangents, batched=True)

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Parts:
        return self._pull(self._middle(self._push(tangents, batched), batched), batched)
