"""Interface of the kernels to the engine: linearize a batch once, then apply the linearization to many vectors."""

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
from curvop.kernels.recorded import RecordedProducts

__all__ = ["GraphLinearization", "Kernel", "Linearization"]


class Linearization(abc.ABC):
    """The curvature matrix of one batch at fixed parameters, prepared for products with vectors.

    Attributes
    ----------
    loss : Tensor
        The loss of the batch, detached.
    weight : float
        The weight ``w_b`` of the batch. The engine multiplies products by ``Kernel.scale(weight)``; `apply` does not.
    roots : sequence of Node
        Root nodes of the retained autograd graphs. To measure the memory of the graphs, their nodes are visited,
        starting from the roots.
    tensors : sequence of Tensor
        Retained tensors that do not belong to the graphs below `roots`. The memory of these tensors is measured, too.
    whole : bool
        If False, `apply` takes and returns a list with one tensor per parameter. If True, it takes and returns a list
        with a single flat vector.
    """

    whole = False

    def __init__(self, loss: Tensor, weight: float, roots: Sequence[Node] = (), tensors: Sequence[Tensor] = ()) -> None:
        self.loss = loss
        self.weight = weight
        self.roots = roots
        self.tensors = tensors

    @property
    def seconds(self) -> float:
        """Time spent on preparing products, in seconds."""
        return 0.0

    @property
    def is_settled(self) -> bool:
        """Whether later products with several vectors take no less time than the last one."""
        return True

    def keep(self) -> None:  # noqa: B027  # optional
        """Prepare more products as soon as this is likely to save time, because the batch is cached."""

    @abc.abstractmethod
    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to one vector.

        Parameters
        ----------
        tangents : sequence of Tensor
            One tangent for each parameter that corresponds to columns.

        Returns
        -------
        sequence of Tensor or None
            One cotangent for each parameter that corresponds to rows. None stands for a tensor of zeros.
        """

    @abc.abstractmethod
    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to K vectors at once. Tangents and cotangents have an additional first dimension K."""


class GraphLinearization(Linearization):
    """A linearization that runs the same autograd graphs for one vector or for several vectors at once."""

    def __init__(self, loss: Tensor, weight: float, roots: Sequence[Node] = (), tensors: Sequence[Tensor] = ()) -> None:
        super().__init__(loss, weight, roots, tensors)
        self._recorded: RecordedProducts | None = None

    @property
    def seconds(self) -> float:
        """Time spent on recording products, in seconds."""
        return 0.0 if self._recorded is None else self._recorded.seconds

    @property
    def is_settled(self) -> bool:
        """Whether the last products were computed by a recorded program, or nothing will be recorded."""
        return self._recorded is None or self._recorded.is_settled

    def keep(self) -> None:
        """Record the operations of a product as soon as this is likely to save time."""
        self._recorded = RecordedProducts()

    @abc.abstractmethod
    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        """Apply the matrix. If `batched` is True, tangents and cotangents have an additional first dimension."""

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to one vector."""
        if self._recorded is None:
            return self._apply(tangents, batched=False)
        return self._recorded.one(self._apply, self.roots, tangents)

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to several vectors at once."""
        if self._recorded is None:
            return self._apply(tangents, batched=True)
        return self._recorded(self._apply, self.roots, tangents)


class Kernel(abc.ABC):
    """Abstract base class of kernels. A kernel linearizes batches for products with a block of a curvature matrix.

    Each subclass implements one kind of matrix.

    Parameters
    ----------
    objective : Objective
    rows, cols : sequence of str
        Names of the parameters that correspond to the rows and to the columns of the block.
    """

    #: Whether the whole matrix, with rows and columns for all parameters, is symmetric.
    symmetric: bool
    #: Whether the rows or the columns of the matrix correspond to the entries of the predictions, ordered by batch.
    by_batch = False
    #: Whether compiled programs compute the products. If True, a warning is issued if the products cannot be recorded
    #: as CUDA graphs.
    compiled = False
    #: The engine tries to multiply several columns at once only if a column takes at most this time, in seconds.
    worth_batching: float = math.inf
    #: Whether an earlier pass over the same batches, in the same state of the objective, has checked that all gradients
    #: can be differentiated. The engine sets this attribute.
    is_checked = False
    #: Whether linearizations are cached for later products. The engine sets this attribute.
    is_kept = True

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

        The adjoint is a copy in which `rows` and `cols` are swapped. Swapping is sufficient if the whole matrix is
        symmetric. Swapping is also sufficient for a Jacobian, because its kernel multiplies by the transpose if the
        columns correspond to predictions.
        """
        mirrored = copy.copy(self)
        mirrored.rows, mirrored.cols = self.cols, self.rows
        return mirrored

    def scale(self, weight: float) -> float:
        """Return the factor by which the engine multiplies the product of a batch. By default, return `weight`."""
        return weight

    def divisor(self, weights: Sequence[float]) -> float:
        """Return the number by which the sum over all batches is divided, given the weight of each batch."""
        return self.objective.divisor(weights)

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return the tensors other than `leaves` and `batch` on which a product for batch number `index` depends."""
        return self.objective.buffers(leaves)

    @abc.abstractmethod
    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return ``(loss, prediction, product)`` for a batch; ``product`` is the batch's matrix times `tangents`.

        A compiler can trace this method, because the results depend only on the arguments. In ``product``, None stands
        for a tensor of zeros.
        """

    def check_count(self, count: int) -> None:  # noqa: B027  # most kernels accept any number
        """Raise a ValueError if the shape of the matrix requires another number of batches than `count`."""

    def move(self) -> bool:
        """Change the point at which a kernel differentiates linear maps. Call this method if a product is not finite.

        Return False if the kernel has no other point to try. If the method returns True, linearize all batches again.
        """
        return False

    def prepare(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> None:  # noqa: B027  # optional
        """Do work that `linearize` needs only once for all batches of equal shapes, such as compilation."""

    @abc.abstractmethod
    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Linearize batch number `index`: do all computations of a product that do not depend on the vector."""
