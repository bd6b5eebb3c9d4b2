"""The gradient and the loss, with the same batch weights as the curvature matrices."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.engine import add_sums, set_sums
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
    parts, selected = layout.split(out), [leaves[name] for name in names]
    totals, unit = objective.totals(), 0.0
    with objective.slow_backends():
        for index, batch in objective.batches():
            loss = objective.evaluate_once(leaves, index, batch)
            totals.add(loss.value, loss.weight, *leaves.values())
            add = add_sums if unit else set_sums  # overwriting is cheaper than adding to zero
            unit = unit or loss.weight  # equal weights need no multiplication
            add(parts, _moved(loss.gradient(selected), parts), loss.weight / (unit or 1.0))
            del loss  # frees the graph of this batch before the next graph is built
        if not unit:
            out.zero_()
        # NaN and infinity propagate through sums. A sum of finite entries may overflow.
        if not math.isfinite(out.sum().item() + sum(totals.losses)) and not (
            torch.isfinite(out).all() and math.isfinite(sum(totals.losses))
        ):
            raise NonFiniteProductError(_locate_non_finite(objective, leaves, layout))
        objective.conclude(totals)
    divisor = objective.divisor(totals.weights)
    if (rest := divisor / (unit or 1.0)) != 1:
        out.div_(rest)
    return math.fsum(totals.losses) / divisor


def _moved(gradient: Sequence[Tensor | None], parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Move each tensor of a gradient to the device of the corresponding entry of `parts`."""
    pairs = zip(gradient, parts, strict=True)
    return [value if value is None or value.device == part.device else value.to(part.device) for value, part in pairs]


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


def _locate_non_finite(objective: Objective, leaves: Mapping[str, Tensor], layout: ParameterLayout) -> str:
    """Return an error message that names the first batch whose gradient or loss is not finite.

    To find the batch, the gradient and the loss of each batch are computed again.
    """
    selected = [leaves[name] for name in layout.names]
    for index, batch in objective.batches():
        loss = objective.evaluate_once(leaves, index, batch)
        value = float(loss.value) if loss.weight else 0.0
        for number, part in enumerate(loss.gradient(selected)):
            if part is not None and not part.isfinite().all():
                return not_finite("gradient", index, value, layout.label(number))
        if not math.isfinite(value):
            return not_finite("loss", index, value, "its value")
    return "the gradient is not finite: the gradient of each batch is finite, but their sum overflows"
