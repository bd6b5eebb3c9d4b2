"""What two passes over the data tell of a model, a loss and their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvop.kernels.batches import leaves
from curvop.kernels.changes import Fingerprint
from curvop.kernels.objective import BATCHING_REMEDY, Objective
from curvop.kernels.objective_checks import batchwise_modules, random_modules

__all__ = ["Inspection", "inspect"]


class _Dtypes(TorchFunctionMode):
    """Collects the dtypes in which anything is computed that depends on the parameters."""

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
        """Call `func`, and look at what it returns."""
        found = func(*args, **(kwargs or {}))
        parts = found if isinstance(found, tuple | list) else (found,)
        self.seen |= {
            part.dtype for part in parts if isinstance(part, Tensor) and part.requires_grad and part.is_floating_point()
        }
        return found


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What is known of an objective.

    Attributes
    ----------
    dtype : str
        Of the parameters.
    coarsest : str
        The one of the least precision in which anything is computed that depends on them.
    eps : float
        Of the coarsest numbers that a product is computed in.
    random, batchwise : list of str
        Modules with active dropout, and those that normalise by the statistics of a batch.
    batches : int
    losses : tuple of float
        Of all the data, in each of the two passes.
    change : float
        The largest change of the loss, or of a batch's, between them, relative to the sizes of the batches' losses.
    reordered : bool
        Whether the batches of the second pass are others, or come in another order.
    unreached : list of str
        Parameters that no batch's loss depends on.
    looked_into : bool
        Whether the model is made of modules, so that it could be looked into.
    batching, batching_remedy : str
        How the loss of two batches as one contradicts their weights, empty if it does not; and what to do about it.
    unverified : bool
        Whether the weights are an assumption, and no two batches could be compared.
    """

    dtype: str
    coarsest: str
    eps: float
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
    """Look at an objective: a gradient by the parameters `names`, and one more pass for the loss alone."""
    values, unreached = objective.leaves(names), set(names)
    passes: list[list[tuple[float, float]]] = [[], []]
    totals = objective.totals()
    batches: list[list[list[float | None]]] = [[], []]
    eps, dtypes = 0.0, _Dtypes()
    with objective.slow_backends():
        for number in range(2):
            for index, batch in objective.batches():
                batches[number].append(Fingerprint.of_data(leaves(batch)))
                with dtypes:
                    loss = objective.evaluate(values, index, batch)
                if number == 1:  # the one after which two batches are remembered
                    totals.add(loss.value, loss.weight, *values.values())
                passes[number].append((loss.weight, float(loss.value) if loss.weight else 0.0))
                eps = max(eps, objective.epsilon(loss.value))
                if number == 0 and unreached and loss.weight:
                    reached = zip(names, loss.gradient([values[name] for name in names]), strict=True)
                    unreached -= {name for name, part in reached if part is not None}
    coarsest = max({objective.dtype, *dtypes.seen}, key=lambda dtype: torch.finfo(dtype).eps)
    with objective.slow_backends():
        objective.verify_batching(totals)
    objective.warn_once(len(batches[0]), aloud=False)  # what a product would warn of is told here
    divisors = [objective.divisor([w for w, _ in one]) for one in passes]
    losses = [sum(w * loss for w, loss in one) / divisor for one, divisor in zip(passes, divisors, strict=True)]
    reordered = batches[0] != batches[1]
    # By the sizes of the batches' losses: their sum may cancel, as that of a policy gradient does.
    size = sum(abs(w * loss) for one in passes for w, loss in one) or 1.0
    change = abs(losses[0] - losses[1]) / (size / sum(divisors))
    if not reordered:
        usual = size / sum(w for one in passes for w, _ in one)
        pairs = ((first, second) for (_, first), (_, second) in zip(*passes, strict=True))
        change = max(change, *(abs(first - second) / usual for first, second in pairs))
    return Inspection(
        dtype=str(objective.dtype).removeprefix("torch."),
        coarsest=str(coarsest).removeprefix("torch."),
        eps=max(eps, torch.finfo(coarsest).eps),
        random=random_modules(objective.modules),
        batchwise=batchwise_modules(objective.modules),
        batches=len(batches[0]),
        losses=(losses[0], losses[1]),
        change=change,
        reordered=reordered,
        unreached=[name for name in names if name in unreached],
        looked_into=any(True for module in objective.modules for _ in module.parameters()),
        batching=objective.batching or "",
        unverified=objective.unverified,
    )
