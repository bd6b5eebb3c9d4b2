"""Products with the Jacobian of the predictions for all batches, and with the transpose of this Jacobian.

The rows of the Jacobian are ordered by batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.ggn_kernel import JVP, cut_off, outputs_of
from curvop.kernels.graph import LinearMap
from curvop.kernels.kernel import GraphLinearization, Kernel, Linearization
from curvop.kernels.model_objective import ModelObjective
from curvop.kernels.objective import Buffers
from curvop.kernels.parameters import BatchLayout, ParameterLayout

__all__ = ["JacobianKernel", "prediction_sizes", "prediction_sum"]


_CHANGED = "this has changed since the operator was made; make a new one"


def prediction_sum(prediction: Any, y: Any) -> Tensor:
    """Return a checksum of the entries of a prediction. A Jacobian has no loss, and uses the checksum instead.

    The checksum depends on the order of the entries.
    """
    flat = _flat(outputs_of(prediction))
    masked = ~flat.isfinite() | (flat.abs() > torch.finfo(flat.dtype).max ** 0.5)  # a mask may add infinity
    return flat.masked_fill(masked, 0.0) @ torch.arange(1, len(flat) + 1, device=flat.device).to(flat.dtype).cos()


prediction_sum.reduction = "sum"  # type: ignore[attr-defined]  # PyTorch's losses have this attribute
prediction_sum.stands_in = True  # type: ignore[attr-defined]  # not a loss: skip the check of the batch weights


def prediction_sizes(objective: ModelObjective) -> list[int]:
    """Return a list with the number of entries in the prediction of each batch.

    To obtain the predictions, the model is called once for each batch.
    """
    leaves = objective.leaves(())
    with torch.no_grad():
        predictions = (objective.predict(leaves, batch) for _, batch in objective.batches())
        return [sum(output.numel() for output in outputs_of(prediction)) for prediction in predictions]


class JacobianKernel(Kernel):
    """Linearize batches for products with the Jacobian of the predictions, or with its transpose.

    The Jacobian may be restricted to the columns of some of the parameters.

    Parameters
    ----------
    objective : ModelObjective
    cols : sequence of str
        Names of the parameters that the columns belong to.
    sizes : sequence of int
        Number of entries in the prediction of each batch.
    """

    symmetric = False
    by_batch = True
    objective: ModelObjective

    def __init__(self, objective: ModelObjective, cols: Sequence[str], sizes: Sequence[int]) -> None:
        self.objective = objective
        self.rows, self.cols = BatchLayout(sizes), ParameterLayout(objective.params, cols)
        self._sizes = list(sizes)
        self._at_zero = True

    def move(self) -> bool:
        """Change the point `u` at which the linear map ``u -> J' u`` is differentiated to compute ``J v``.

        At first, ``u = 0``. Each call switches between zero and a vector without zero entries. Return True after a
        switch to a vector without zero entries, and False after a switch back to zero. A kernel for the transpose
        always returns False, because the product ``J' u`` needs no such derivative.
        """
        self._at_zero = not self._at_zero or not isinstance(self.rows, BatchLayout)
        return not self._at_zero

    def check_count(self, count: int) -> None:
        """Raise a ValueError if the number of batches has changed since the operator was created."""
        if count != len(self._sizes):
            raise ValueError(f"data yields {count} batches: {_CHANGED}")

    def buffers(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Buffers:
        """Return the buffers of the objective. Raise a ValueError if the number of batches has grown."""
        if index >= len(self._sizes):
            raise ValueError(f"data yields more than {index} batches: {_CHANGED}")
        return super().buffers(leaves, index, batch)

    def product(
        self,
        leaves: Mapping[str, Tensor],
        buffers: Buffers,
        batch: Any,
        tangents: Sequence[Tensor],
    ) -> tuple[Tensor, Any, Sequence[Tensor | None]]:
        """Return ``(checksum, prediction, product)`` for a batch.

        ``checksum`` is the `prediction_sum` of the prediction. ``product`` is the Jacobian of the batch, or its
        transpose, multiplied by `tangents`.
        """
        loss, prediction = self.objective.traced(leaves, buffers, batch)
        return loss, prediction, self._map(outputs_of(prediction), leaves).apply(tangents)

    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Return the linearization of batch number `index`."""
        prediction, _, _, loss = self.objective.split(leaves, index, batch, cut_off)
        outputs = outputs_of(prediction)
        count = sum(output.numel() for output in outputs)
        if index >= len(self._sizes) or self._sizes[index] != count:
            raise ValueError(f"batch {index} has {count} predictions: {_CHANGED}")
        return self._map(outputs, leaves, loss.value)

    def _map(
        self, outputs: list[Tensor], leaves: Mapping[str, Tensor], loss: Tensor | None = None
    ) -> GraphLinearization:
        loss = torch.zeros(()) if loss is None else loss
        if isinstance(self.rows, BatchLayout):
            return _JacobianLinearization(loss, JVP(outputs, self.cols.of(leaves), self._at_zero), outputs)
        return _TransposedLinearization(loss, outputs, self.rows.of(leaves))


class _JacobianLinearization(GraphLinearization):
    def __init__(self, loss: Tensor, jvp: JVP, outputs: list[Tensor]) -> None:
        self._jvp = jvp
        self._shapes = [output.shape for output in outputs]
        super().__init__(loss, 1.0, jvp.roots)

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        columns = tangents[0].shape[: int(batched)]
        products = [
            tangents[0].new_zeros(*columns, *shape) if part is None else part
            for part, shape in zip(self._jvp(tangents, batched), self._shapes, strict=True)
        ]
        return [torch.cat([product.reshape(*columns, -1) for product in products], -1)]


class _TransposedLinearization(GraphLinearization):
    def __init__(self, loss: Tensor, outputs: list[Tensor], params: list[Tensor]) -> None:
        self._vjp = LinearMap(outputs, params)
        self._shapes = [output.shape for output in outputs]
        super().__init__(loss, 1.0, self._vjp.roots)

    def _apply(self, tangents: Sequence[Tensor], batched: bool) -> Sequence[Tensor | None]:
        [vector] = tangents
        columns = vector.shape[: int(batched)]
        parts = vector.split([shape.numel() for shape in self._shapes], -1)
        return self._vjp(
            [part.reshape(columns + shape) for part, shape in zip(parts, self._shapes, strict=True)], batched
        )


def _flat(outputs: list[Tensor]) -> Tensor:
    return torch.cat([output.reshape(-1) for output in outputs])
