"""Interface between engine and kernels: linearize a batch once, then apply the linearization to many vectors."""

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
    """The curvature matrix of one batch at fixed parameters, prepared for products with vectors.

    Attributes
    ----------
    loss : Tensor
        The loss of the batch, detached.
    weight : float
        The weight ``w_b`` of the batch. The engine multiplies products by this weight; `apply` does not.
    roots : sequence of Node
        Roots of the retained autograd graphs. The memory of the graphs is measured from the roots.
    tensors : sequence of Tensor
        Other retained tensors, whose memory is measured, too.
    whole : bool
        If True, `apply` takes a list with one flat vector instead of one tensor per parameter, and returns such a list.
    """

    whole = False

    def __init__(self, loss: Tensor, weight: float, roots: Sequence[Node] = (), tensors: Sequence[Tensor] = ()) -> None:
        self.loss = loss
        self.weight = weight
        self.roots = roots
        self.tensors = tensors

    @abc.abstractmethod
    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to one vector.

        Parameters
        ----------
        tangents : sequence of Tensor
            One tangent for each column parameter.

        Returns
        -------
        sequence of Tensor or None
            One cotangent for each row parameter; None means zero.
        """

    @abc.abstractmethod
    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to K vectors at once; tangents and cotangents have an additional first dimension K."""


class GraphLinearization(Linearization):
    """A linearization that runs the same autograd graphs for one vector or for several vectors at once."""

    @abc.abstractmethod
    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        """Apply the matrix; if `batched`, tangents and cotangents have an additional first dimension."""

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to one vector."""
        return self._apply(tangents, batched=False)

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to several vectors at once."""
        return self._apply(tangents, batched=True)


class Kernel(abc.ABC):
    """Abstract base class of kernels, which linearize batches for products with a block of a curvature matrix.

    Each subclass implements one kind of matrix.

    Parameters
    ----------
    objective : Objective
    rows, cols : sequence of str
        Names of the parameters that correspond to the rows and to the columns of the block.
    """

    #: Whether the matrix of all parameters is symmetric.
    symmetric: bool
    #: Whether the rows or the columns of the matrix correspond to the entries of the predictions, ordered by batch.
    by_batch = False
    #: Whether compiled programs compute the products. If True, failure to record CUDA graphs causes a warning.
    compiled = False
    #: Batching of columns is tried only if a column takes at most this time, in seconds.
    worth_batching: float = math.inf

    def __init__(self, objective: Objective, rows: Sequence[str], cols: Sequence[str]) -> None:
        self.objective = objective
        self.rows: Layout = ParameterLayout(objective.params, rows)
        self.cols: Layout = ParameterLayout(objective.params, cols)

    @property
    def seconds(self) -> float:
        """Total time spent on compilation, in seconds."""
        return 0.0

    def adjoint(self) -> Kernel:
        """Return the kernel of the adjoint of the block.

        In the adjoint, `rows` and `cols` are swapped, because the whole matrix is symmetric.
        """
        mirrored = copy.copy(self)
        mirrored.rows, mirrored.cols = self.cols, self.rows
        return mirrored

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return the tensors on which a product of batch number `index` depends, except `leaves` and `batch`."""
        return self.objective.buffers(leaves)

    @abc.abstractmethod
    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return the loss of a batch, the prediction, and the product of the batch's matrix with `tangents`.

        The method can be traced, because the results depend only on the arguments. In the product, None stands for a
        tensor of zeros.
        """

    def check_count(self, count: int) -> None:  # noqa: B027  # most kernels accept any number
        """Raise a ValueError if `count` batches do not fit the shape of the matrix."""

    def move(self) -> bool:
        """Change the point at which linear maps are differentiated, because a product was not finite.

        Return False if no other point is left to try. If True is returned, the caller must linearize all batches again.
        """
        return False

    def prepare(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> None:  # noqa: B027  # optional
        """Do the work of `linearize` that is done only once for all batches of equal shapes, such as compilation."""

    @abc.abstractmethod
    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Linearize batch number `index`: do all computations of a product that do not depend on the vector."""
