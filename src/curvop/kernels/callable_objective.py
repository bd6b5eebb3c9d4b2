"""An objective that computes its own loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from curvop.kernels.batches import batch_size
from curvop.kernels.objective import BatchWeight, Objective
from curvop.kernels.parameters import check_callable, checked_params
from curvop.kernels.weights import loss_reduction

__all__ = ["CallableObjective"]

T = TypeVar("T")


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
        modules = [objective] if isinstance(objective, nn.Module) else []
        super().__init__(modules, checked_params(None, params), data, loss_reduction(objective), batch_weight)
        self._objective = objective

    def _loss(self, leaves: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, float | None, Tensor, Tensor | None]:
        loss = self._objective(dict(leaves), batch)
        return loss, self._mean_divisor(None, batch), loss, None

    def plainly(self, leaves: Mapping[str, Tensor], batch: Any, use: Callable[[Callable[[], Tensor]], T]) -> T:
        """Return ``use(loss)``, `loss` being a function that calls the objective."""
        return use(lambda: self._objective(dict(leaves), batch))

    def _mean_divisor(self, prediction: Any, batch: Any) -> float | None:
        return batch_size(batch)

    def held(self, leaves: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return nothing: what the objective holds is not known."""
        return {}

    def traced(
        self, leaves: Mapping[str, Tensor], held: dict[str, dict[str, Tensor]], batch: Any
    ) -> tuple[Tensor, Any]:
        """Return a batch's loss, and no prediction."""
        return self._objective(dict(leaves), self.guard.own(batch)), None
