"""The gradient and the loss, with the same batch weights as the curvature matrices."""

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
    """Write the gradient with respect to the parameters `names` into `out`, of shape (N,), and return the loss.

    The computation takes one pass over the data.

    Raises
    ------
    NonFiniteProductError
        If the gradient or the loss is not finite.
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
            # NaN and infinity propagate through a sum. The sums are read later, because reading a sum makes the host
            # wait for the GPU.
            sums.append(out.sum())
        _check(out, layout, sums, totals.losses, totals.weights)
        objective.conclude(totals)
    divisor = objective.divisor(totals.weights)
    out.div_(divisor)
    return math.fsum(totals.losses) / divisor


def plain_gradient_seconds(objective: Objective, names: Sequence[str]) -> float:
    """Return the time in seconds that plain ``torch.autograd.grad`` takes to compute the gradients of all batches.

    The time excludes reading the data, inserting the parameters into the model, and preparing second derivatives.
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
    """Raise a NonFiniteProductError if the gradient or the loss of a batch is not finite; name the first such batch.

    Parameters
    ----------
    out : Tensor, shape (N,)
    layout : ParameterLayout
    sums : sequence of Tensor
        The sum of the entries of `out` after each batch.
    losses, weights : sequence of float
        The weighted loss and the weight of each batch.
    """
    labels = [layout.label(index) for index, part in enumerate(layout.split(out)) if not part.isfinite().all()]
    gradient_spoilt = ~torch.stack(list(sums)).isfinite() if labels else [False] * len(losses)
    for index, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        if gradient_spoilt[index]:
            raise NonFiniteProductError(not_finite("gradient", index, loss / (weight or 1.0), labels[0]))
        if not math.isfinite(loss):
            raise NonFiniteProductError(not_finite("loss", index, loss / (weight or 1.0), "its value"))
