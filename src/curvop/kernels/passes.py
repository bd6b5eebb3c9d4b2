"""What a pass over the data leaves behind: linearizations that are kept, and what tells whether they still hold."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvop.kernels.batches import leaves

if TYPE_CHECKING:
    from curvop.kernels.kernel import Linearization

__all__ = ["REORDERED", "DataReorderedError", "Pass", "Totals", "precision", "same"]

REORDERED = (
    "data yields other batches, or in another order, in every pass, so that some cannot be kept and the others made "
    "anew: every product now linearizes them all. Pass shuffle=False to the DataLoader, or a larger cache=, in which "
    "all of them fit."
)


class DataReorderedError(Exception):
    """The batches come in another order than in the first pass, so those kept cannot be told from the others."""


@dataclasses.dataclass(eq=False)
class Totals:
    """The losses of a pass over the data, under the objective's `state`.

    Attributes
    ----------
    weights, losses : list of float
        One of each batch; the losses are times the weights.
    eps : float
        The precision that the losses are computed in.
    watched : list
        Tensors of the batches, as weak references, with their versions.
    """

    state: tuple[object, ...]
    weights: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    eps: float = 0.0
    watched: list[tuple[weakref.ref[Tensor], int]] = dataclasses.field(default_factory=list)

    def alone(self) -> Totals:
        """Return the losses alone, without linearizations."""
        return Totals(self.state, self.weights, self.losses, self.eps, self.watched)

    def add(self, loss: Tensor, weight: float, *params: Tensor) -> None:
        """Note a batch's share of the objective; a batch of weight 0 has none, though its own mean is 0/0."""
        self.weights.append(weight)
        self.losses.append(weight * float(loss) if weight else 0.0)
        self.eps = max(self.eps, precision(loss, *params))

    def differs(self, later: Totals, ordered: bool) -> tuple[str, float, float] | None:
        """Return what is another in a later pass than in this one, then and now; batch by batch if `ordered`."""
        eps = max(self.eps, later.eps)
        if not same(later.losses, self.losses, eps) or not same(later.weights, self.weights, eps):
            return "the loss summed over the data", sum(self.losses), sum(later.losses)
        usual = sum(map(abs, self.losses)) / max(len(self.losses), 1)
        for index, (then, now) in enumerate(zip(self.losses, later.losses, strict=False) if ordered else ()):
            if abs(now - then) > usual * eps**0.5:
                return f"the loss of batch {index}, times its weight,", then, now
        return None

    def stale(self, state: tuple[object, ...]) -> bool:
        """Whether the objective is in another state now, or a batch was written to."""
        if self.state != state:
            return True
        return any((tensor := ref()) is not None and tensor._version != version for ref, version in self.watched)


@dataclasses.dataclass(eq=False)
class Pass(Totals):
    """A pass over the data, at the parameters `leaves`, with the linearizations that are kept.

    Attributes
    ----------
    kept : dict of int to Linearization
        By the batch's number.
    bytes : int
        What these retain.
    fingerprints : list
        One of each batch, by which a later pass is compared with this one.
    """

    leaves: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    kept: dict[int, Linearization] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    fingerprints: list[list[float | None]] = dataclasses.field(default_factory=list)

    def record(self, linearization: Linearization) -> None:
        """Note a batch's share of the objective."""
        self.add(linearization.loss, linearization.weight, *self.leaves.values())

    def keep(self, index: int, linearization: Linearization, batch: Any, count: int) -> None:
        """Keep a batch's linearization, which retains `count` bytes, for as long as nobody writes to the batch."""
        self.kept[index] = linearization
        self.bytes += count
        # Weakly: tensors that the loader made for this batch alone need not be held to see that nobody changes them.
        self.watched += [(weakref.ref(leaf), leaf._version) for leaf in leaves(batch)]

    def let_go(self) -> None:
        """Keep nothing any more."""
        self.kept, self.bytes = {}, 0


def precision(*tensors: Tensor) -> float:
    """Return the epsilon of the coarsest of the tensors' dtypes; a loss may be less precise than the parameters."""
    return max(torch.finfo(dtype).eps for dtype in {tensor.dtype for tensor in tensors})


def same(these: Sequence[float], those: Sequence[float], eps: float) -> bool:
    """Whether two passes sum to the same up to rounding; a mere reordering of the batches does."""
    scale = sum(map(abs, those))
    difference = abs(sum(these) - sum(those))
    # A loss that is not finite is not random: the product that it spoils says so.
    return not difference > scale * eps**0.5
