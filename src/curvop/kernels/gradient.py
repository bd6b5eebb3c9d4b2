"""The gradient and the loss, weighted over the batches as the curvature is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.errors import NonFiniteProductError, not_finite
from curvop.kernels.objective import Objective
from curvop.kernels.parameters import ParameterLayout

__all__ = ["gradient_and_loss", "plain_gradient_seconds"]


def gradient_and_loss(objective: Objective, names: Sequence[str], out: Tensor) -> float:
    """Write the gradient with respect to the parameters `names` into `out` ``(N,)`` and return the loss; one pass.

    Raises
    ------
    NonFiniteProductError
        Where the gradient or the loss holds NaN or infinity.
    """
    leaves = objective.leaves(names)
    layout = ParameterLayout(objective.params, names)
    parts = layout.split(out.zero_())
    totals, sums = objective.totals(), []
    with objective.slow_backends():
        for index, batch in objective.batches():
            loss = objective.evaluate(leaves, index, batch)
            totals.add(loss.value, loss.weight, *leaves.values())
            for part, value in zip(parts, loss.gradient([leaves[name] for name in names]), strict=True):
                if value is not None:
                    part.add_(value.to(part.device), alpha=loss.weight)
            # NaN and infinity survive a sum. It is read at the end only, as a GPU would be waited for here.
            sums.append(out.sum())
        _check(out, layout, sums, totals.losses, totals.weights)
        objective.conclude(totals)
    divisor = objective.divisor(totals.weights)
    out.div_(divisor)
    return math.fsum(totals.losses) / divisor


def plain_gradient_seconds(objective: Objective, names: Sequence[str]) -> float:
    """Return the seconds that the gradients of all batches take, as the user's own ``torch.autograd.grad`` does.

    Reading the data, putting the parameters in place and what is done for second derivatives do not count.
    """
    leaves = objective.leaves(names)
    params = [leaves[name] for name in names]
    gpus = [device for device in objective.devices if device.type == "cuda"]

    def now() -> float:
        for device in gpus:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(batch: Any) -> float:
        start = now()
        value = objective.plain_loss(leaves, batch)
        if value.requires_grad:
            torch.autograd.grad(value, params, allow_unused=True)
        return now() - start

    with torch.enable_grad():
        return sum(
            objective.guard.run(timed, batch, objective.replacements(leaves)) for _, batch in objective.batches()
        )


def _check(
    out: Tensor, layout: ParameterLayout, sums: Sequence[Tensor], losses: Sequence[float], weights: Sequence[float]
) -> None:
    """Name the first batch at which the gradient, or its loss, is not finite, given the sums of `out` after each."""
    where = [layout.label(index) for index, part in enumerate(layout.split(out)) if not part.isfinite().all()]
    spoilt = ~torch.stack(list(sums)).isfinite() if where else [False] * len(losses)
    for index, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        if spoilt[index] or not math.isfinite(loss):
            what, there = ("gradient", where[0]) if spoilt[index] else ("loss", "its value")
            raise NonFiniteProductError(not_finite(what, index, loss / (weight or 1.0), there))
