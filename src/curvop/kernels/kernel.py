"""What an engine asks of a kernel: linearize a batch once, apply the linearization to many vectors."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from curvop.kernels.objective import Buffers, Objective
from curvop.kernels.parameters import Layout, ParameterLayout

__all__ = ["GraphLinearization", "Kernel", "Linearization"]


class Linearization(abc.ABC):
    """One batch's curvature at one point, ready for products.

    Attributes
    ----------
    loss : Tensor
        The batch's loss, detached.
    weight : float
        The batch's weight ``w_b``; the engine applies it.
    roots : sequence of Node
        What it keeps of autograd's graph, to be measured.
    tensors : sequence of Tensor
        What it keeps besides, to be measured.
    whole : bool
        Whether it takes and gives vectors as a whole, a list of one, and not a tensor for each parameter.
    """

    whole = False

    def __init__(self, loss: Tensor, weight: float, roots: Sequence[Node] = (), tensors: Sequence[Tensor] = ()) -> None:
        self.loss = loss
        self.weight = weight
        self.roots = roots
        self.tensors = tensors

    @abc.abstractmethod
    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply: one tangent a column parameter in, one cotangent a row parameter out, None for zero."""

    @abc.abstractmethod
    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply several vectors at once: tangents and cotangents have one more dimension, the first."""


class GraphLinearization(Linearization):
    """A linearization that multiplies one vector, or several at once, by the same graphs."""

    @abc.abstractmethod
    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        """Multiply; where `batched`, tangents and cotangents have one more dimension, the first."""

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply one vector."""
        return self._apply(tangents, batched=False)

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply several vectors at once."""
        return self._apply(tangents, batched=True)


class Kernel(abc.ABC):
    """How one kind of curvature matrix is linearized, for the block of the parameters `rows` and `cols`."""

    symmetric: bool
    #: Whether rows or columns are what the batches yield, one batch after another.
    by_batch = False
    #: Whether products are made by compiled programs, so that one is told where a GPU cannot record them.
    compiled = False
    #: Seconds that a column takes above which no batching of columns is tried.
    worth_batching: float = math.inf

    def __init__(self, objective: Objective, rows: Sequence[str], cols: Sequence[str]) -> None:
        self.objective = objective
        self.rows: Layout = ParameterLayout(objective.params, rows)
        self.cols: Layout = ParameterLayout(objective.params, cols)

    @property
    def seconds(self) -> float:
        """What compiling took so far."""
        return 0.0

    def adjoint(self) -> Kernel:
        """Return the kernel of the adjoint of the block: as the whole is symmetric, of its mirror image."""
        mirrored = copy.copy(self)
        mirrored.rows, mirrored.cols = self.cols, self.rows
        return mirrored

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return what a product of batch number `index` depends on besides `leaves` and the batch."""
        return self.objective.buffers(leaves)

    @abc.abstractmethod
    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return a batch's loss, its prediction, and one product, for programs to be made of it; None for zero."""

    def check_count(self, count: int) -> None:  # noqa: B027  # most take any
        """Refuse data of `count` batches where rows or columns were made for another number."""

    def move(self) -> bool:
        """Linearize by derivatives at another point, after a product that is not finite; False if there is none."""
        return False

    def prepare(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> None:  # noqa: B027  # most need not
        """Do what `linearize` does once for batches of a shape."""

    @abc.abstractmethod
    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Compute everything about batch number `index` that does not depend on the vector."""
