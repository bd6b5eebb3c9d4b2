r"""Products with a matrix :math:`R^\top J` and with its transpose, where :math:`J` is the Jacobian of the predictions.

The rows of the matrix are ordered by batch. A `RowMap` multiplies by :math:`R^\top` and by :math:`R`, batch by batch.
`JacobianKernel` computes the Jacobian itself, for which :math:`R` is the identity. `curvop.kernels.factor_kernel` has
subclasses whose rows are per-example gradients.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from curvop.kernels.ggn_kernel import JVP, Parts, cut_off, outputs_of
from curvop.kernels.graph import LinearMap
from curvop.kernels.kernel import GraphLinearization, Kernel, Linearization
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import BatchLoss, Buffers
from curvop.kernels.parameters import BatchLayout, ParameterLayout

__all__ = ["JacobianKernel", "RowMap", "over_predictions", "prediction_size", "prediction_sum"]

T = TypeVar("T")

_CHANGED = "this has changed since the operator was made; make a new one"


def prediction_sum(prediction: Any, y: Any) -> Tensor:
    """Return a checksum of the entries of a prediction. The objective of a Jacobian uses it in place of a loss.

    The checksum depends on the order of the entries.
    """
    flat = _flat(outputs_of(prediction))
    masked = ~flat.isfinite() | (flat.abs() > torch.finfo(flat.dtype).max ** 0.5)  # a mask may add infinity
    return flat.masked_fill(masked, 0.0) @ torch.arange(1, len(flat) + 1, device=flat.device).to(flat.dtype).cos()


prediction_sum.reduction = "sum"  # type: ignore[attr-defined]  # PyTorch's losses have this attribute
prediction_sum.stands_in = True  # type: ignore[attr-defined]  # not a loss: skip the check of the batch weights


def over_predictions(objective: ModelObjective, function: Callable[[int, Any, Any], T]) -> list[T]:
    """Return a list with ``function(index, prediction, batch)`` for each batch.

    The model is called once for each batch, without autograd.
    """
    leaves = objective.leaves(())
    with torch.no_grad():
        return [function(index, objective.predict(leaves, batch), batch) for index, batch in objective.batches()]


def prediction_size(index: int, prediction: Any, batch: Any) -> int:
    """Return the number of entries in a prediction. Pass this function to `over_predictions`."""
    return sum(output.numel() for output in outputs_of(prediction))


class RowMap(abc.ABC):
    """The linear map ``w -> R' w`` from the tangent of a prediction to the rows of one batch, and its transpose.

    Attributes
    ----------
    count : int
        The number of rows.
    tensors : sequence of Tensor
        Tensors that the map retains.
    """

    count: int
    tensors: Sequence[Tensor] = ()

    @abc.abstractmethod
    def rows(self, tangents: Parts) -> Tensor | None:
        """Return ``R' w``, a tensor of shape (..., count), or None if all entries are zero.

        `tangents` has one entry for each floating-point tensor in the prediction. None stands for a tensor of zeros.
        """

    @abc.abstractmethod
    def cotangents(self, rows: Tensor) -> Parts:
        """Return ``R u`` for `rows`, a tensor `u` of shape (..., count).

        The result has one entry for each output. None stands for a tensor of zeros.
        """


class _FlatOutputs(RowMap):
    """The identity: the rows are the entries of the prediction."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self._shapes = [output.shape for output in outputs]
        self.count = sum(shape.numel() for shape in self._shapes)

    def rows(self, tangents: Parts) -> Tensor | None:
        given = next((index for index, part in enumerate(tangents) if part is not None), None)
        if given is None:
            return None
        some = cast("Tensor", tangents[given])
        leading = some.shape[: some.ndim - len(self._shapes[given])]
        pairs = zip(tangents, self._shapes, strict=True)
        flat = [
            some.new_zeros(*leading, shape.numel()) if part is None else part.reshape(*leading, -1)
            for part, shape in pairs
        ]
        return torch.cat(flat, -1)

    def cotangents(self, rows: Tensor) -> Parts:
        parts = rows.split([shape.numel() for shape in self._shapes], -1)
        return [part.reshape(rows.shape[:-1] + shape) for part, shape in zip(parts, self._shapes, strict=True)]


class JacobianKernel(Kernel):
    """Linearize batches for products with the Jacobian of the predictions, or with its transpose.

    The Jacobian may be restricted to the columns of some of the parameters.

    Parameters
    ----------
    objective : ModelObjective
    cols : sequence of str
        Names of the parameters that the columns belong to.
    sizes : sequence of int
        Number of rows of each batch. For the Jacobian, this is the number of entries in the prediction.
    """

    symmetric = False
    by_batch = True
    #: The word for a row in error messages.
    row_name = "prediction"
    objective: ModelObjective

    def __init__(self, objective: ModelObjective, cols: Sequence[str], sizes: Sequence[int]) -> None:
        self.objective = objective
        self.rows, self.cols = BatchLayout(sizes), ParameterLayout(objective.params, cols)
        self._sizes = list(sizes)
        self._at_zero = True

    def move(self) -> bool:
        """Change the point `u` at which the linear map ``u -> J' u`` is differentiated to compute ``J v``.

        A new kernel uses ``u = 0``. If `u` is zero, replace `u` by a vector without zero entries, and return True.
        Otherwise, set `u` to zero again, and return False. A kernel for the transpose always returns False, because the
        product ``J' u`` needs no such derivative.
        """
        self._at_zero = not self._at_zero or not isinstance(self.rows, BatchLayout)
        return not self._at_zero

    def check_count(self, count: int) -> None:
        """Raise a ValueError if the number of batches has changed since the operator was created."""
        if count != len(self._sizes):
            raise ValueError(f"data yields {count} batches: {_CHANGED}")

    def restricted(self, cols: Sequence[str]) -> Self:
        """Return a copy of the kernel whose columns belong to the parameters `cols`."""
        restricted = copy.copy(self)
        restricted.cols = ParameterLayout(self.objective.params, cols)
        return restricted

    def row_map(
        self, outputs: list[Tensor], pair: tuple[Any, Any], extra: Mapping[str, Tensor], loss: BatchLoss
    ) -> RowMap:
        """Return the map from the tangent of the prediction to the rows of one batch.

        `pair` contains the inputs and the targets. For the other parameters, see
        `curvop.kernels.ggn_kernel.GGNLikeKernel.output_hessian`.
        """
        return _FlatOutputs(outputs)

    def extra(self, index: int, prediction: Any, batch: Any, y: Any) -> dict[str, Tensor]:
        """Return a dict of additional tensors that are needed to compute the rows of batch number `index`."""
        return {}

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return the buffers of the objective. Raise a ValueError if the number of batches has grown."""
        self.check_index(index)
        return super().buffers(leaves, index, batch)

    def check_index(self, index: int) -> None:
        """Raise a ValueError if the data yield more batches than when the operator was created."""
        if index >= len(self._sizes):
            raise ValueError(f"data yields more than {index} batches: {_CHANGED}")

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return ``(loss, prediction, product)`` for a batch.

        ``product`` is the matrix of the batch, or its transpose, multiplied by `tangents`.
        """
        prediction, parts, loss, y = self.objective.traced_split(leaves, buffers, batch, cut_off)
        extra, batch_loss = buffers["loss"] | buffers.get("extra", {}), BatchLoss(loss, 1.0, loss, y=y)
        row_map = self.row_map(parts, (self.objective.inputs(batch), y), extra, batch_loss)
        return loss, prediction, self._linearization(row_map, outputs_of(prediction), leaves, loss, 1.0).apply(tangents)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of batch number `index`."""
        prediction, row_map, loss = self.evaluate(leaves, index, batch)
        return self._linearization(row_map, outputs_of(prediction), leaves, loss.value, loss.weight)

    def evaluate(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> tuple[Any, RowMap, BatchLoss]:
        """Return ``(prediction, row_map, loss)`` for batch number `index`."""
        prediction, cut, parts, loss = self.objective.split(leaves, index, batch, cut_off)
        extra, pair = self.extra(index, cut, batch, loss.y), (self.objective.inputs(batch), loss.y)
        row_map = self.row_map(parts, pair, extra, loss)
        if index >= len(self._sizes) or self._sizes[index] != row_map.count:
            raise ValueError(f"batch {index} has {row_map.count} {self.row_name}s: {_CHANGED}")
        return prediction, row_map, loss

    def _linearization(
        self, row_map: RowMap, outputs: list[Tensor], leaves: Mapping[str, Tensor], loss: Tensor, weight: float
    ) -> GraphLinearization:
        if isinstance(self.rows, BatchLayout):
            jvp = JVP(outputs, self.cols.of(leaves), self._at_zero)
            return _JacobianLinearization(loss, weight, jvp, row_map)
        return _TransposedLinearization(loss, weight, row_map, LinearMap(outputs, self.rows.of(leaves)))


class _JacobianLinearization(GraphLinearization):
    def __init__(self, loss: Tensor, weight: float, jvp: JVP, row_map: RowMap) -> None:
        super().__init__(loss, weight, jvp.roots, row_map.tensors)
        self._jvp, self._row_map = jvp, row_map

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        return [self._row_map.rows(self._jvp(tangents, batched))]


class _TransposedLinearization(GraphLinearization):
    def __init__(self, loss: Tensor, weight: float, row_map: RowMap, vjp: LinearMap) -> None:
        super().__init__(loss, weight, vjp.roots, row_map.tensors)
        self._row_map, self._vjp = row_map, vjp

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        [rows] = tangents
        return self._vjp(self._row_map.cotangents(rows), batched)


def _flat(outputs: list[Tensor]) -> Tensor:
    return torch.cat([output.reshape(-1) for output in outputs])
