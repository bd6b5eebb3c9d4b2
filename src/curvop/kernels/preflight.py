"""Modes of modules that make a matrix another than the user may mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ["batchwise_modules", "cautions", "listed", "random_modules", "suspects"]


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
