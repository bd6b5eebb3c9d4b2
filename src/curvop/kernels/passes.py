"""Results of a pass over the data (losses and cached linearizations), and checks that the results are still valid."""

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
    "data yields different batches, or a different order, in every pass, so a cached linearization cannot be matched "
    "to its batch: every product now linearizes all batches. Pass shuffle=False to the DataLoader, or a larger cache= "
    "that holds all linearizations."
)


class DataReorderedError(Exception):
    """Raised if cached linearizations cannot be matched to batches, because a later pass yields other batches."""


@dataclasses.dataclass(eq=False)
class Totals:
    """The losses of a pass over the data.

    Attributes
    ----------
    state : tuple
        The state of the objective during the pass; see `curvop.kernels.objective.Objective.state`.
    weights : list of float
        The weight of each batch.
    eps : float
        The largest machine epsilon among the dtypes of the losses and the parameters.
    watched : list
        Pairs ``(reference, version)`` for tensors of batches: a weak reference to the tensor, and the value of the
        tensor's version counter during the pass.
    """

    state: tuple[object, ...]
    weights: list[float] = dataclasses.field(default_factory=list)
    eps: float = 0.0
    watched: list[tuple[weakref.ref[Tensor], int]] = dataclasses.field(default_factory=list)
    _losses: list[float] = dataclasses.field(default_factory=list)
    _on_gpu: list[Tensor] = dataclasses.field(default_factory=list)
    _dtypes: set[torch.dtype] = dataclasses.field(default_factory=set)

    @property
    def losses(self) -> list[float]:
        """For each batch, the product of its loss and its weight. Losses on a GPU are transferred at the first use."""
        if self._on_gpu:
            values = torch.stack(self._on_gpu).tolist()
            weights = self.weights[len(self._losses) :]
            self._losses += [weight * loss if weight else 0.0 for weight, loss in zip(weights, values, strict=True)]
            self._on_gpu = []
        return self._losses

    def alone(self) -> Totals:
        """Return a `Totals` object with the same losses and weights, but without references to linearizations."""
        return Totals(self.state, self.weights, self.eps, self.watched, self.losses)

    def add(self, loss: Tensor, weight: float, *params: Tensor) -> None:
        """Record the loss and the weight of a batch.

        If the weight is 0, the loss is recorded as 0, because it may be undefined (0/0 if all targets of the batch are
        ignored).
        """
        if loss.is_cuda and len({loss.device, *(other.device for other in self._on_gpu[-1:])}) == 1:
            self._on_gpu.append(loss.double())  # reading the number would make the host wait for the GPU
            self.weights.append(weight)
        else:
            losses = self.losses
            self.weights.append(weight)
            losses.append(weight * float(loss) if weight else 0.0)
        if loss.dtype not in self._dtypes:
            self._dtypes.add(loss.dtype)
            self.eps = max(self.eps, precision(loss, *params))

    def differs(self, later: Totals, ordered: bool) -> tuple[str, float, float] | None:
        """Compare the losses and the weights of this pass with those of a later pass.

        Parameters
        ----------
        later : Totals
        ordered : bool
            If True, also compare the losses of single batches. If False, compare only sums.

        Returns
        -------
        tuple or None
            A tuple ``(name, value, later_value)``: the name of the quantity that differs, its value in this pass, and
            its value in the later pass. None if all losses and weights agree.
        """
        eps = max(self.eps, later.eps)
        if not same(later.losses, self.losses, eps) or not same(later.weights, self.weights, eps):
            return "the loss summed over the data", sum(self.losses), sum(later.losses)
        usual = sum(map(abs, self.losses)) / max(len(self.losses), 1)
        for index, (then, now) in enumerate(zip(self.losses, later.losses, strict=False) if ordered else ()):
            if abs(now - then) > usual * eps**0.5:
                return f"the loss of batch {index}, times its weight,", then, now
        return None

    def stale(self, state: tuple[object, ...]) -> bool:
        """Return True if `state` differs from the recorded state, or if a watched tensor was modified in place."""
        if self.state != state:
            return True
        return any((tensor := ref()) is not None and tensor._version != version for ref, version in self.watched)


@dataclasses.dataclass(eq=False)
class Pass(Totals):
    """The losses and the cached linearizations of a pass over the data.

    Attributes
    ----------
    leaves : dict of str to Tensor
        The parameters at which the batches were linearized, by name.
    kept : dict of int to Linearization
        The cached linearizations by batch index.
    bytes : int
        Number of bytes that the cached linearizations retain.
    fingerprints : list
        The fingerprint of each batch, for comparison with later passes.
    """

    leaves: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    kept: dict[int, Linearization] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    fingerprints: list[list[float | None]] = dataclasses.field(default_factory=list)

    def record(self, linearization: Linearization) -> None:
        """Record the loss and the weight of a linearized batch."""
        self.add(linearization.loss, linearization.weight, *self.leaves.values())

    def keep(self, index: int, linearization: Linearization, batch: Any, count: int) -> None:
        """Cache a linearization of batch number `index`. The linearization retains `count` bytes.

        If a tensor of the batch is modified in place later, `stale` returns True.
        """
        self.kept[index] = linearization
        self.bytes += count
        # Weak references do not keep the tensors of a data loader in memory. A freed tensor cannot be modified.
        self.watched += [(weakref.ref(leaf), leaf._version) for leaf in leaves(batch)]

    def let_go(self) -> None:
        """Discard all cached linearizations."""
        self.kept, self.bytes = {}, 0


def precision(*tensors: Tensor) -> float:
    """Return the largest machine epsilon among the dtypes of `tensors`.

    Pass both the loss and the parameters, because their precisions may differ.
    """
    return max(torch.finfo(dtype).eps for dtype in {tensor.dtype for tensor in tensors})


def same(losses: Sequence[float], expected: Sequence[float], eps: float) -> bool:
    """Return True if the losses of two passes have the same sum, up to rounding errors."""
    scale = sum(map(abs, expected))
    difference = abs(sum(losses) - sum(expected))
    # Return True if the difference is NaN, because another check raises an error for products that are not finite.
    return not difference > scale * eps**0.5
