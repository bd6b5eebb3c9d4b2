"""An objective that computes its own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from curvop.kernels.batches import batch_size
from curvop.kernels.guard import modules_of, own_batch, replaced
from curvop.kernels.losses import loss_reduction
from curvop.kernels.objective import BatchWeight, Objective
from curvop.kernels.parameters import check_callable, checked_params

__all__ = ["CallableObjective"]


class CallableObjective(Objective):
    """``objective(params, batch) -> scalar`` over batches of any kind."""

    def __init__(
        self,
        objective: Callable[[dict[str, Tensor], Any], Tensor],
        params: Mapping[str, Tensor],
        data: Iterable[Any],
        batch_weight: BatchWeight | None = None,
    ) -> None:
        check_callable("objective", objective, "a function (params, batch) -> scalar")
        modules = modules_of(objective)
        super().__init__(modules, checked_params(None, params), data, loss_reduction(objective), batch_weight)
        self._objective = objective

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, float | None, Tensor, Tensor | None]:
        loss = self._objective(dict(leaves), batch)
        return loss, self._mean_divisor(None, batch), loss, None

    def plain_loss(self, leaves: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Return the loss as the user's own call computes it."""
        return self._objective(dict(leaves), batch)

    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        return batch_size(*batch) if isinstance(batch, list | tuple) else batch_size(batch)

    def _assumes_weights(self) -> bool:
        return self._batch_weight is None

    def _reached_directly(self, name: str) -> str:
        return (
            f"params[{name!r}] is reached directly: the objective holds the tensor itself, so part of the loss would "
            "not be differentiated; compute all of the loss from the dict of parameters that the objective is given"
        )

    def held(self, leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return nothing: what the objective holds is not known."""
        return {}

    def traced(
        self, leaves: Mapping[str, Tensor], held: dict[str, dict[str, Tensor]], batch: Any
    ) -> tuple[Tensor, Any]:
        """Return a batch's loss, and no prediction."""
        with replaced(self.modules, self.replacements(leaves)):
            return self._objective(dict(leaves), own_batch(batch, self.guard.writes)), None
