"""Whether the user's code means what the kernels compute: verified once, in the first pass over the data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from curvop.kernels.batches import batch_size, joined, leaves, to_device
from curvop.kernels.graph import nodes

if TYPE_CHECKING:
    from curvop.kernels.objective import Objective
    from curvop.kernels.passes import Totals

__all__ = [
    "BatchPair",
    "batchwise_modules",
    "cautions",
    "compared_as_one",
    "disagreement",
    "listed",
    "random_modules",
    "random_subset",
    "reached",
    "suspects",
]

_ALIKE = 1e-3  # relative difference below which two losses say little about their weights
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}


def reached(outputs: Iterable[Tensor], inputs: Mapping[str, Sequence[Tensor]]) -> set[str]:
    """Return the names of those `inputs` to which the graph of `outputs` leads."""
    wanted = {
        get_gradient_edge(tensor).node: name
        for name, tensors in inputs.items()
        for tensor in tensors
        if tensor.requires_grad
    }
    roots = [get_gradient_edge(output).node for output in outputs if output.requires_grad]
    return {wanted[node] for node in nodes(roots) if node in wanted}


class BatchPair:
    """Two batches of a pass that differ most in their size, or in how many valid integer targets they may have."""

    def __init__(self) -> None:
        self._first: tuple[int, Any] | None = None
        self._last: tuple[int, Any] | None = None
        self._ends: dict[int, list[tuple[float, int, Any]]] = {}  # of each figure: the least and the largest

    def see(self, index: int, batch: Any) -> None:
        """Look at a batch."""
        self._first, self._last = self._first or (index, batch), (index, batch)
        for number, figure in enumerate(_figures(batch)):
            ends = self._ends.setdefault(number, [(figure, index, batch)] * 2)
            if figure < ends[0][0]:
                ends[0] = figure, index, batch
            if figure > ends[1][0]:
                ends[1] = figure, index, batch

    def candidates(self) -> Iterator[tuple[tuple[int, Any], tuple[int, Any]]]:
        """Yield pairs of numbers and batches, the best first; of a single batch, nothing."""
        if self._first is None or self._last is None or self._first[0] == self._last[0]:
            return
        for low, high in sorted(self._ends.values(), key=lambda ends: -(ends[1][0] + 1) / (ends[0][0] + 1)):
            if low[0] < high[0]:
                first, second = sorted((low[1:], high[1:]), key=lambda one: one[0])
                yield first, second
        yield self._first, self._last


def _figures(batch: Any) -> list[float]:
    """Return the number of examples, of integers that are not negative, as -100 for padding is, and of nonzero ones."""
    integers = [leaf for leaf in leaves(batch) if leaf.dtype in _INTEGERS and leaf.layout == torch.strided]
    parts = batch if isinstance(batch, list | tuple) else [batch]
    return [
        batch_size(*parts) or 0,
        sum(int((leaf >= 0).sum()) for leaf in integers),
        sum(int((leaf != 0).sum()) for leaf in integers),
    ]


def random_subset(data: Any) -> str:
    """Return how a loader draws another part of its data set in each pass, or nothing if it does not."""
    if not isinstance(data, DataLoader):
        return ""
    batches = data.batch_sampler if isinstance(data.batch_sampler, BatchSampler) else None
    sampler: Any = data.sampler if batches is None else getattr(batches, "sampler", None)
    if isinstance(sampler, WeightedRandomSampler):
        return "draws examples by their weights"
    if isinstance(sampler, RandomSampler) and sampler.replacement:
        return "draws examples with replacement"
    if not isinstance(sampler, RandomSampler | SubsetRandomSampler):
        return ""
    count = len(sampler)
    if isinstance(sampler, RandomSampler) and count % len(sampler.data_source):
        return f"draws {count:,} of {len(sampler.data_source):,} examples"
    # Subclasses that are not initialised lack these.
    drops, size = (getattr(batches, name, 0) for name in ("drop_last", "batch_size"))
    left = count % size if drops and size else 0
    return f"shuffles, and drops {left} of {count:,} examples with the last batch" if left else ""


def compared_as_one(objective: Objective, totals: Totals, pair: BatchPair) -> str | None:
    """Say how the loss of two batches as one contradicts their weights; nothing if it does not.

    None if no two batches can be compared: they cannot be joined, or the model cannot take batches of another size, or
    all are alike.
    """
    for (index, first), (other, second) in pair.candidates():
        with contextlib.suppress(Exception):
            parts = [to_device(batch, objective.device) for batch in (first, second)]
            found = _compared(objective, totals, (index, other), (*parts, joined(parts)))
            if found is not None:
                return f"batches {index} and {other}: {found}" if found else ""
    return None


def _compared(
    objective: Objective, totals: Totals, numbers: tuple[int, int], batches: tuple[Any, Any, Any]
) -> str | None:
    """Compare two batches with both as one, the last; None if nothing can be said."""
    weights = [totals.weights[number] for number in numbers]
    both = objective.evaluate(objective.leaves(()), numbers[0], batches[2]).value
    losses = [totals.losses[number] / weight for number, weight in zip(numbers, weights, strict=True)]
    losses.append(float(both))
    rounding, scale = objective.epsilon(both) ** (2 / 3), sum(map(abs, losses))
    if not math.isfinite(scale):
        return None
    asked = None if objective.reduction == "sum" else weights
    decisive = asked is None or abs(losses[0] - losses[1]) > _ALIKE * scale
    if decisive and not disagreement(losses, asked, rounding * scale):
        return ""
    # The matrix is that of the gradient, which decides: losses may be rounding errors, or differ by a constant.
    gradients = [_gradient(objective, batch) for batch in batches]
    direction = gradients[0] - gradients[1] if asked else gradients[2]
    size, scale = float(direction.norm()), sum(float(gradient.norm()) for gradient in gradients)
    if not size > _ALIKE * scale:  # they are alike, whatever their weights
        return None
    along = [float(gradient @ direction) / size for gradient in gradients]
    return disagreement(along, asked, rounding * scale)


def _gradient(objective: Objective, batch: Any) -> Tensor:
    leaves = objective.leaves(objective.params)
    parts = objective.evaluate(leaves, 0, batch).gradient(list(leaves.values()))
    pairs = zip(parts, leaves.values(), strict=True)
    flat = [torch.zeros_like(leaf) if part is None else part for part, leaf in pairs]
    return torch.cat([part.detach().reshape(-1).to(objective.device) for part in flat])


def disagreement(losses: Sequence[float], weights: Sequence[float] | None, limit: float) -> str:
    """Say how the loss of two batches as one differs from what their weights say, or nothing if it does not.

    Parameters
    ----------
    losses : three floats
        The losses of the first batch, the second, and both as one; or their derivatives in one direction.
    weights : two floats, or None
        The weights of the two batches in a mean; None for a sum.
    limit : float
        By how much they differ by rounding.
    """
    first, second, both = losses
    if weights is None:
        if abs(both - first - second) <= limit:
            return ""
        return f"as one batch they have {both / (first + second):.4g} times the sum of their losses"
    expected = (weights[0] * first + weights[1] * second) / (weights[0] + weights[1])
    if abs(both - expected) <= limit:
        return ""
    if abs(both - first - second) <= limit:
        return "as one batch they have the sum of their losses, not the mean"
    share = (both - second) / (first - second)
    if not 0 < share < 1:
        return "as one batch they have a loss that is no mean of the two"
    factor = (1 - share) / share * weights[0] / weights[1]
    return f"as one batch they have a loss in which the second one counts {factor:.4g} times as much as its weight says"


# Modes of modules that make a matrix another than the user may mean.


def random_modules(modules: Sequence[nn.Module]) -> list[str]:
    """Return which modules draw random numbers: dropout, and what contains it, in training mode."""
    rates = ((name, part, _drop_rate(part)) for name, part in _named(modules) if part.training)
    return [f"{name!r} ({type(part).__name__}, p = {rate:g})" for name, part, rate in rates if rate]


def _drop_rate(part: nn.Module) -> float:
    """Return the probability with which a module drops something by itself."""
    rate: Any = 0.0
    if isinstance(part, nn.MultiheadAttention) or (isinstance(part, nn.RNNBase) and part.num_layers > 1):
        rate = part.dropout
    elif isinstance(part, _DropoutNd) or "Drop" in type(part).__name__ or "StochasticDepth" in type(part).__name__:
        rate = next((vars(part)[name] for name in ("p", "drop_prob", "drop_p", "rate") if name in vars(part)), 0.0)
    return float(rate) if isinstance(rate, int | float) else 0.0


def batchwise_modules(modules: Sequence[nn.Module]) -> list[str]:
    """Return which modules normalise by the statistics of the batch that they see."""
    found = ((name, part) for name, part in _named(modules) if isinstance(part, _BatchNorm))
    return [f"{name!r} ({type(part).__name__})" for name, part in found if part.training or part.running_mean is None]


def _named(modules: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for module in modules:
        yield from module.named_modules()


def cautions(modules: Sequence[nn.Module], batches: int, autocast: torch.dtype | None) -> dict[str, str]:
    """Return what makes the matrix another than the user may mean, by kind, with a remedy each.

    Parameters
    ----------
    modules : sequence of nn.Module
    batches : int
        How many the data has.
    autocast : torch.dtype or None
        In which autocast computes, where it does.
    """
    found = {}
    if random := random_modules(modules):
        found["dropout"] = (
            f"dropout is active in {listed(random)}: a product is that of one draw of the masks, and the next pass "
            "over the data draws others; call model.eval()"
        )
    if batches > 1 and (batchwise := batchwise_modules(modules)):
        found["batch normalisation"] = (
            f"{listed(batchwise)} normalises each of the {batches} batches by its own statistics: the matrix depends "
            "on how the data is cut, and is not that of the whole data set as one batch; call model.eval(), or pass "
            "one batch"
        )
    if autocast is not None:
        found["autocast"] = (
            f"torch.autocast is enabled: a product is computed in {str(autocast).removeprefix('torch.')}, whose "
            f"epsilon is {torch.finfo(autocast).eps:.1e}, and is as coarse; take products outside of it"
        )
    return found


def suspects(modules: Sequence[nn.Module]) -> str:
    """Return what to look at where the loss changes from pass to pass."""
    random = random_modules(modules)
    if random:
        return f"dropout is active in {listed(random)}: call model.eval()"
    return (
        "look at dropout and batch normalisation in training mode (call model.eval()), random augmentation in the "
        "data, shuffling with drop_last=True; if a function reads something that has changed, make a new operator"
    )


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
