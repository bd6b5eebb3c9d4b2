"""The engine: every batch is linearized once, kept while the budget lasts, and applied to many vectors.

``Kernel.linearize(batch) -> Linearization`` does all that does not depend on the vector;
``Linearization.apply(tangents) -> cotangents`` is the linear rest. `Engine` sums the batches.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from curvop.kernels.batches import leaves as tensor_leaves
from curvop.kernels.batches import signature
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.kernels.memory import free_bytes, keep_freed_memory, retained_bytes
from curvop.kernels.objective import Objective
from curvop.kernels.parameters import ParameterLayout

__all__ = ["Engine", "Kernel", "Linearization"]


class Linearization(abc.ABC):
    """One batch's curvature at one point, ready for products.

    Attributes
    ----------
    loss : Tensor
        The batch's loss, detached.
    weight : float
        The batch's weight ``w_b``; the engine applies it.
    """

    def __init__(self, loss: Tensor, weight: float) -> None:
        self.loss = loss
        self.weight = weight

    @abc.abstractmethod
    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply: one tangent a column parameter in, one cotangent a row parameter out, None for zero."""


class Kernel(abc.ABC):
    """How one kind of curvature matrix is linearized, for the block of the parameters `rows` and `cols`."""

    symmetric: ClassVar[bool]

    def __init__(self, objective: Objective, rows: Sequence[str], cols: Sequence[str]) -> None:
        self.objective = objective
        self.rows = ParameterLayout(objective.params, rows)
        self.cols = ParameterLayout(objective.params, cols)

    @abc.abstractmethod
    def adjoint(self) -> Kernel:
        """Return the kernel of the adjoint of the block."""

    @abc.abstractmethod
    def linearize(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        """Compute everything about batch number `index` that does not depend on the vector."""


@dataclasses.dataclass
class _Pass:
    """What the first pass over the data left behind."""

    state: tuple[object, ...]
    leaves: dict[str, Tensor]
    kept: dict[int, Linearization] = dataclasses.field(default_factory=dict)
    watched: list[tuple[Tensor, int]] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)

    def record(self, linearization: Linearization) -> None:
        """Note a batch's share of the objective; a batch of weight 0 has none, though its own mean is 0/0."""
        self.weights.append(linearization.weight)
        self.losses.append(linearization.weight * float(linearization.loss) if linearization.weight else 0.0)

    def keep(self, index: int, linearization: Linearization, batch: Any) -> None:
        self.kept[index] = linearization
        self.watched += [(leaf, leaf._version) for leaf in tensor_leaves(batch)]

    def stale(self, state: tuple[object, ...]) -> bool:
        return self.state != state or any(tensor._version != version for tensor, version in self.watched)


class _DataReorderedError(Exception):
    """The batches come in another order than in the first pass, so those kept cannot be told from the others."""


class Engine:
    """Sums a kernel's batches into products, in bounded memory.

    Parameters
    ----------
    kernel : Kernel
    cache : int or 'auto'
        Bytes that kept linearizations may retain; ``'auto'`` is half of what is free on the device at the first
        product. What does not fit is linearized anew in each sweep.
    """

    def __init__(self, kernel: Kernel, cache: int | str) -> None:
        self.kernel = kernel
        self._objective = kernel.objective
        self._cache = cache
        self._first: _Pass | None = None
        self._bytes: dict[object, int] = {}

    def __getstate__(self) -> dict[str, object]:
        # Graphs cannot be pickled and need not be: the first product makes them anew.
        return self.__dict__ | {"_first": None}

    def apply(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None = None) -> None:
        """Write the products with `vectors` into `out`.

        Parameters
        ----------
        vectors : Tensor, shape (K, N)
            One vector a row, in the parameters' dtype and on their device.
        out : Tensor, shape (K, M)
            Overwritten, on the same device; products are summed over the batches in its dtype.
        tick : callable, optional
            Called with the share of the work that is done, between 0 and 1.

        Raises
        ------
        NonFiniteProductError, NonDeterministicObjectiveError
        """
        try:
            self._sum(vectors, out, tick)
        except _DataReorderedError:
            self._cache, self._first = 0, None
            warnings.warn(
                "data yields its batches in another order in every pass, so that some cannot be kept and the others "
                "made anew: every product now linearizes them all. Pass shuffle=False to the DataLoader, or a larger "
                "cache=, in which all of them fit.",
                RuntimeWarning,
                stacklevel=2,
            )
            self._sum(vectors, out, tick)
        # NaN and infinity survive a sum, so one reduction clears the whole product; only a suspect is looked through.
        if not math.isfinite(out.sum().item()) and not torch.isfinite(out).all():
            raise NonFiniteProductError(self._blame(vectors))

    def _sum(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> None:
        linearizations = self._linearizations()
        # After the first pass the divisor is known, and a pass over the product saved.
        divisor = 1.0 if self._first is None else self._objective.divisor(self._first.weights)
        out.zero_()
        tangents = [self.kernel.cols.split(vector) for vector in vectors]
        totals = [self.kernel.rows.split(vector) for vector in out]
        steps = len(self._objective) * len(tangents)
        done = 0
        weights = []
        for linearization in linearizations:
            share = linearization.weight / divisor
            for tangent, total in zip(tangents, totals, strict=True):
                for part, cotangent in zip(total, linearization.apply(tangent), strict=True):
                    if cotangent is not None:
                        part.add_(cotangent, alpha=share)
                done += 1
                if tick is not None and steps:
                    tick(done / steps)
            weights.append(linearization.weight)
        rest = self._objective.divisor(weights) / divisor
        if rest != 1:
            out.div_(rest)

    def _linearizations(self) -> Iterator[Linearization]:
        """Begin a pass over the batches: the first one where there was none since anything changed."""
        state = self._objective.state()
        if self._first is not None and self._first.stale(state):
            self._first = None  # what was kept is freed before anything new is made
        if self._first is None:
            return self._first_pass(state)
        if len(self._first.kept) == len(self._first.losses):
            return iter(self._first.kept.values())
        return self._next_pass(self._first)

    def _first_pass(self, state: tuple[object, ...]) -> Iterator[Linearization]:
        first = _Pass(state, self._objective.leaves({*self.kernel.rows.names, *self.kernel.cols.names}))
        keep_freed_memory()
        budget = free_bytes(self._objective.device) // 2 if self._cache == "auto" else int(self._cache)
        for index, batch in self._objective.batches():
            kept = budget > 0 and self._retained(first.leaves, index, batch) <= budget
            linearization = self.kernel.linearize(first.leaves, index, batch)
            if kept:
                budget -= self._retained(first.leaves, index, batch)
                first.keep(index, linearization, batch)
            first.record(linearization)
            yield linearization
        self._first = first

    def _next_pass(self, first: _Pass) -> Iterator[Linearization]:
        this = _Pass(first.state, first.leaves)
        for index, batch in self._objective.batches():
            linearization = first.kept.get(index)
            if linearization is None:
                linearization = self.kernel.linearize(first.leaves, index, batch)
            this.record(linearization)
            if first.kept and not self._same(this.losses[index:], first.losses[index : index + 1]):
                raise _DataReorderedError
            yield linearization
        if not self._same(this.losses, first.losses) or not self._same(this.weights, first.weights):
            raise NonDeterministicObjectiveError(
                f"the loss summed over the data was {sum(first.losses):.9g} in the first pass and is "
                f"{sum(this.losses):.9g} now, at the same parameters: look at dropout and batch normalisation in "
                "training mode (call model.eval()), random augmentation in the data, shuffling with drop_last=True"
            )

    def _same(self, these: Sequence[float], those: Sequence[float]) -> bool:
        """Whether two passes sum to the same up to rounding; a mere reordering of the batches does."""
        scale = sum(map(abs, those))
        difference = abs(sum(these) - sum(those))
        # A loss that is not finite is not random: the product that it spoils says so.
        return not difference > scale * torch.finfo(self._objective.dtype).eps ** 0.5

    def _retained(self, leaves: Mapping[str, Tensor], index: int, batch: Any) -> int:
        """Return the bytes that a linearization of `batch` retains, measured once for batches of equal shapes."""
        like = (self._objective.dtype, signature(batch))
        if like not in self._bytes:
            self._bytes[like] = retained_bytes(
                lambda: self.kernel.linearize(leaves, index, batch), self._objective.tensors()
            )
        return self._bytes[like]

    def _blame(self, vectors: Tensor) -> str:
        """Say where a product that is not finite went wrong, by making it once more, batch by batch."""
        if not torch.isfinite(vectors).all():
            return f"the vector handed in is not finite (as {self._objective.dtype}, the parameters' dtype)"
        for index, linearization in enumerate(self._linearizations()):
            for vector in vectors:
                cotangents = linearization.apply(self.kernel.cols.split(vector))
                for name, cotangent in zip(self.kernel.rows.names, cotangents, strict=True):
                    if cotangent is not None and not torch.isfinite(cotangent).all():
                        return (
                            f"the product is not finite at batch {index} in parameter {name!r} "
                            f"(the loss of that batch is {float(linearization.loss):.6g})"
                        )
        return "the product is not finite: the batches are, but their sum overflows"
