"""The gradient and the loss, weighted over the batches as the curvature is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from curvop.kernels.layout import ParameterLayout
from curvop.kernels.objective import Objective

__all__ = ["gradient_and_loss"]


def gradient_and_loss(objective: Objective, names: Sequence[str], out: Tensor) -> float:
    """Write the gradient with respect to the parameters `names` into `out` ``(N,)`` and return the loss; one pass."""
    leaves = objective.leaves(names)
    parts = ParameterLayout(objective.params, names).split(out.zero_())
    losses, weights = [], []
    with objective.slow_backends():
        for index, batch in objective.batches():
            loss = objective.evaluate(leaves, index, batch)
            weights.append(loss.weight)
            if loss.weight:
                losses.append(loss.weight * loss.value.item())
            for part, value in zip(parts, loss.gradient([leaves[name] for name in names]), strict=True):
                if value is not None:
                    part.add_(value.to(part.device), alpha=loss.weight)
    divisor = objective.divisor(weights)
    out.div_(divisor)
    return math.fsum(losses) / divisor
