"""What is looked at before a product is trusted: modes of modules, batches that are written to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from curvop.kernels.batches import leaves, map_leaves
from curvop.kernels.stateless import replace

__all__ = ["Guard", "batchwise_modules", "cautions", "listed", "random_modules", "suspects"]

T = TypeVar("T")


class Guard:
    """Runs code of the user's that may write to the batch that it gets, or to buffers.

    What it writes is undone. Once it has written, it gets copies, so that what it reads is not what it wrote before.

    Attributes
    ----------
    writes : bool
        Whether it does, as far as it is known.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self.writes = False

    def run(self, function: Callable[[Any], T], batch: Any) -> T:
        """Return ``function(batch)``."""
        result, wrote = self._watched(function, batch)
        return self._watched(function, batch)[0] if wrote else result

    def _watched(self, function: Callable[[Any], T], batch: Any) -> tuple[T, bool]:
        """Return ``function(batch)``, and whether that wrote to what is the user's."""
        own = [(part, dict(part._buffers)) for module in self._modules for part in module.modules()]
        buffers = [buffer for _, found in own for buffer in found.values() if buffer is not None]
        # At every run, as what is written may depend on the batch.
        saved, beside = ([], []) if self.writes else (_saved(leaves(batch)), _saved(buffers))
        touched: list[_Saved] = []

        def put_back() -> None:
            touched[:] = [one for one in saved if one.changed()]
            if any(one.changed() for one in beside):
                touched.extend(beside)  # batch normalisation counts its batches, but not that it writes its statistics
            for one in touched:
                one.restore()
            for part, found in own:
                replace(part._buffers, found)

        try:
            try:
                if self.writes:
                    for part, found in own:
                        replace(part._buffers, _copies(found))
                result = function(self.own(batch))
            finally:
                put_back()
        except BaseException:  # Ctrl-C may have come while it was put back
            put_back()
            raise
        self.writes = self.writes or bool(touched)
        return result, bool(touched)

    def own(self, batch: Any) -> Any:
        """Return a batch whose mappings and lists, and tensors if need be, can be written to."""
        return map_leaves(lambda leaf: leaf.clone() if self.writes else leaf, batch)


class _Saved:
    """A tensor as it was."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version, self._copy = tensor, tensor._version, tensor.detach().clone()

    def changed(self) -> bool:
        return self._tensor._version != self._version

    def restore(self) -> None:
        self._tensor.detach().copy_(self._copy)  # not under no_grad, which Ctrl-C might leave switched on


def _saved(tensors: Iterable[Tensor]) -> list[_Saved]:
    return [_Saved(one) for one in tensors if _counts(one)]


def _copies(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Copy; a function, as Python 3.13 runs no `finally` where a comprehension within its `try` is interrupted."""
    return {name: None if buffer is None else buffer.detach().clone() for name, buffer in buffers.items()}


def _counts(tensor: Tensor) -> bool:
    """Whether a tensor counts how often it is written to."""
    return not tensor.is_inference()


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
        "data, shuffling with drop_last=True"
    )


def listed(names: Sequence[str], most: int = 3) -> str:
    """Return the first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
