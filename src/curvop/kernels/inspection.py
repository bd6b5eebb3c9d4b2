"""Inspect a model, a loss function and data for `curvop.check`, in two passes over the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvop.kernels.batches import leaves
from curvop.kernels.changes import Fingerprint
from curvop.kernels.objective import Objective
from curvop.kernels.objective_checks import BATCHING_REMEDY, batchwise_modules, random_modules
from curvop.kernels.precision import Precision

__all__ = ["Inspection", "inspect"]


class _DtypeRecorder(TorchFunctionMode):
    """Record the dtypes of all intermediate results that depend on the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call `func` and record the dtypes of its results."""
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else (result,)
        self.seen |= {
            part.dtype for part in parts if isinstance(part, Tensor) and part.requires_grad and part.is_floating_point()
        }
        return result


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The properties of an objective and of its data that `inspect` finds.

    Attributes
    ----------
    dtype : str
        Dtype of the parameters.
    coarsest : str
        The dtype with the lowest precision among the parameters and all intermediate results that depend on them.
    eps : float
        Machine epsilon of the lowest precision that a product uses.
    cause, remedy : str
        What lowers the precision below that of the dtypes, and how to change it. Empty strings if nothing does.
    random : list of str
        Descriptions of the modules in which dropout is active.
    batchwise : list of str
        Descriptions of the modules that normalize by batch statistics.
    batches : int
        Number of batches.
    losses : tuple of float
        The loss over the whole data set in the first and in the second pass.
    change : float
        The largest change of a loss between the two passes, divided by the mean absolute loss of a batch. The loss over
        the whole data set is compared. If `reordered` is False, the loss of each batch is also compared.
    reordered : bool
        Whether the two passes yield different batches, or the same batches in a different order.
    unreached : list of str
        Names of parameters that have no effect on the loss of any batch.
    looked_into : bool
        Whether the objective has modules with parameters. If False, `random` and `batchwise` may be incomplete.
    batching : str
        A description of how the loss of two batches, evaluated as one batch, contradicts the weights of the two
        batches. An empty string if there is no contradiction.
    unverified : bool
        True if the weights of the batches are only assumed, and no two batches could be used to verify them.
    batching_remedy : str
        Advice for the user if `batching` is not empty.
    """

    dtype: str
    coarsest: str
    eps: float
    cause: str
    remedy: str
    random: list[str]
    batchwise: list[str]
    batches: int
    losses: tuple[float, float]
    change: float
    reordered: bool
    unreached: list[str]
    looked_into: bool
    batching: str
    unverified: bool
    batching_remedy: str = BATCHING_REMEDY


def inspect(objective: Objective, names: Sequence[str]) -> Inspection:
    """Inspect an objective in two passes over the data.

    Both passes compute the losses. To find parameters that have no effect on the loss, the first pass also computes
    gradients with respect to the parameters in `names`.
    """
    values, unreached = objective.leaves(names), set(names)
    passes: list[list[tuple[float, float]]] = [[], []]
    totals = objective.totals()
    batches: list[list[list[float | None]]] = [[], []]
    lowest, dtypes = Precision(0.0), _DtypeRecorder()
    with objective.slow_backends():
        for number in range(2):
            for index, batch in objective.batches():
                batches[number].append(Fingerprint.of_data(leaves(batch)))
                with dtypes:
                    loss = objective.evaluate(values, index, batch)
                if number == 1:  # `verify_batching` compares two batches of the last pass
                    totals.add(loss.value, loss.weight, *values.values())
                passes[number].append((loss.weight, float(loss.value) if loss.weight else 0.0))
                lowest = max(lowest, objective.precision(loss.value), key=lambda precision: precision.epsilon)
                if number == 0 and unreached and loss.weight:
                    reached = zip(names, loss.gradient([values[name] for name in names]), strict=True)
                    unreached -= {name for name, part in reached if part is not None}
    coarsest = max({objective.dtype, *dtypes.seen}, key=lambda dtype: torch.finfo(dtype).eps)
    lowest = max(lowest, Precision(torch.finfo(coarsest).eps), key=lambda precision: precision.epsilon)
    with objective.slow_backends():
        objective.checks.verify_batching(objective, totals)
    objective.checks.warn_once(objective, len(batches[0]), aloud=False)  # `check` reports these problems itself
    divisors = [objective.divisor([w for w, _ in batch_losses]) for batch_losses in passes]
    losses = [
        sum(w * loss for w, loss in batch_losses) / divisor
        for batch_losses, divisor in zip(passes, divisors, strict=True)
    ]
    reordered = batches[0] != batches[1]
    # The change is relative to the mean absolute loss. The mean loss may be zero, because positive and negative losses
    # may cancel, as in policy gradients.
    size = sum(abs(w * loss) for batch_losses in passes for w, loss in batch_losses) or 1.0
    change = abs(losses[0] - losses[1]) / (size / sum(divisors))
    if not reordered:
        usual = size / sum(w for batch_losses in passes for w, _ in batch_losses)
        pairs = ((first, second) for (_, first), (_, second) in zip(*passes, strict=True))
        change = max(change, *(abs(first - second) / usual for first, second in pairs))
    return Inspection(
        dtype=str(objective.dtype).removeprefix("torch."),
        coarsest=str(coarsest).removeprefix("torch."),
        eps=lowest.epsilon,
        cause=lowest.cause,
        remedy=lowest.remedy,
        random=random_modules(objective.modules),
        batchwise=batchwise_modules(objective.modules),
        batches=len(batches[0]),
        losses=(losses[0], losses[1]),
        change=change,
        reordered=reordered,
        unreached=[name for name in names if name in unreached],
        looked_into=any(True for module in objective.modules for _ in module.parameters()),
        batching=objective.checks.batching or "",
        unverified=objective.checks.unverified,
    )
