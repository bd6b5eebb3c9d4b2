"""The engine: every batch is linearized once, kept while the budget lasts, and applied to many vectors.

``Kernel.linearize(batch) -> Linearization`` does all that does not depend on the vector;
``Linearization.apply(tangents) -> cotangents`` is the linear rest. `Engine` sums the batches.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvop.kernels.batches import leaves, signature
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.kernels.memory import Budget, graph_bytes, keep_freed_memory, measured
from curvop.kernels.objective import Objective
from curvop.kernels.parameters import ParameterLayout
from curvop.kernels.state import Fingerprint

__all__ = ["Engine", "Kernel", "Linearization"]


class Linearization(abc.ABC):
    """One batch's curvature at one point, ready for products.

    Attributes
    ----------
    loss : Tensor
        The batch's loss, detached.
    weight : float
        The batch's weight ``w_b``; the engine applies it.
    roots : sequence of Node
        What it keeps of autograd's graph, to be measured.
    """

    def __init__(self, loss: Tensor, weight: float, roots: Sequence[Node] = ()) -> None:
        self.loss = loss
        self.weight = weight
        self.roots = roots

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
    bytes: int = 0
    watched: list[tuple[weakref.ref[Tensor], int]] = dataclasses.field(default_factory=list)
    fingerprints: list[list[float]] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)

    def record(self, linearization: Linearization) -> None:
        """Note a batch's share of the objective; a batch of weight 0 has none, though its own mean is 0/0."""
        self.weights.append(linearization.weight)
        self.losses.append(linearization.weight * float(linearization.loss) if linearization.weight else 0.0)

    def keep(self, index: int, linearization: Linearization, batch: Any, count: int) -> None:
        self.kept[index] = linearization
        self.bytes += count
        # Weakly: tensors that the loader made for this batch alone need not be held to see that nobody changes them.
        self.watched += [(weakref.ref(leaf), leaf._version) for leaf in leaves(batch)]

    def stale(self, state: tuple[object, ...]) -> bool:
        if self.state != state:
            return True
        return any((tensor := ref()) is not None and tensor._version != version for ref, version in self.watched)


class _DataReorderedError(Exception):
    """The batches come in another order than in the first pass, so those kept cannot be told from the others."""


class Engine:
    """Sums a kernel's batches into products, in bounded memory.

    Parameters
    ----------
    kernel : Kernel
    budget : Budget
        Of the bytes that kept linearizations may retain. What does not fit is linearized anew in each sweep.
    """

    def __init__(self, kernel: Kernel, budget: Budget) -> None:
        self.kernel = kernel
        self._objective = kernel.objective
        self._budget = budget
        self._keeps = True
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
        with self._objective.slow_backends():
            try:
                self._checked_sum(vectors, out, tick)
            except _DataReorderedError:
                self._keeps = False
                self._forget()
                warnings.warn(
                    "data yields other batches, or in another order, in every pass, so that some cannot be kept and "
                    "the others made anew: every product now linearizes them all. Pass shuffle=False to the "
                    "DataLoader, or a larger cache=, in which all of them fit.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._checked_sum(vectors, out, tick)

    def _checked_sum(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> None:
        self._sum(vectors, out, tick)
        # NaN and infinity survive a sum, so one reduction clears the whole product; only a suspect is looked through.
        if not math.isfinite(out.sum().item()) and not torch.isfinite(out).all():
            raise NonFiniteProductError(self._blame(vectors))

    def _sum(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> None:
        out.zero_()
        tangents = [self.kernel.cols.split(vector) for vector in vectors]
        totals = [self.kernel.rows.split(vector) for vector in out]
        steps = len(self._objective) * len(tangents)
        done = 0
        weights: list[float] = []
        unit = 0.0
        for linearization in self._linearizations():
            weights.append(linearization.weight)
            unit = unit or linearization.weight  # one batch, or equal ones, are not scaled at all
            share = linearization.weight / unit if unit else 0.0
            for tangent, total in zip(tangents, totals, strict=True):
                for part, cotangent in zip(total, linearization.apply(tangent), strict=True):
                    if cotangent is not None:
                        part.add_(cotangent, alpha=share)
                done += 1
                if tick is not None and steps:
                    tick(done / steps)
            del linearization  # one batch's graph at a time: this one is freed before the next is made
        rest = self._objective.divisor(weights) / (unit or 1.0)
        if rest != 1:
            out.div_(rest)

    def _linearizations(self) -> Iterator[Linearization]:
        """Begin a pass over the batches: the first one where there was none since anything changed."""
        state = self._objective.state()
        if self._first is not None and self._first.stale(state):
            self._forget()
        if self._first is None:
            return self._first_pass(state)
        if len(self._first.kept) == len(self._first.losses):
            return iter(self._first.kept.values())
        return self._next_pass(self._first)

    def _forget(self) -> None:
        """Free what is kept, before anything new is made."""
        if self._first is not None:
            self._budget.give_back(self._first.bytes)
            self._first = None

    def _first_pass(self, state: tuple[object, ...]) -> Iterator[Linearization]:
        keep_freed_memory()
        first = _Pass(state, self._objective.leaves({*self.kernel.rows.names, *self.kernel.cols.names}))
        keeps = self._keeps and self._budget.open(self._objective.device)
        try:
            for index, batch in self._objective.batches():
                count, loss = self._measure(first.leaves, index, batch) if keeps else (None, None)
                linearization = self.kernel.linearize(first.leaves, index, batch)
                if loss is not None and not self._same([float(linearization.loss)], [loss]):
                    raise NonDeterministicObjectiveError(
                        _random(f"the loss of batch {index}", loss, linearization.loss)
                    )
                if keeps:
                    if count is None:
                        count = graph_bytes(linearization.roots, self._objective.tensors())
                    if self._budget.take(count):
                        first.keep(index, linearization, batch, count)
                    first.fingerprints.append(Fingerprint(leaves(batch))())
                first.record(linearization)
                yield linearization
                del linearization
            self._first = first
        finally:
            if self._first is not first:
                self._budget.give_back(first.bytes)

    def _next_pass(self, first: _Pass) -> Iterator[Linearization]:
        this = _Pass(first.state, first.leaves)
        for index, batch in self._objective.batches():
            if first.kept and Fingerprint(leaves(batch))() not in first.fingerprints[index : index + 1]:
                raise _DataReorderedError
            linearization = first.kept.get(index)
            if linearization is None:
                linearization = self.kernel.linearize(first.leaves, index, batch)
            this.record(linearization)
            yield linearization
            del linearization
        if not self._same(this.losses, first.losses) or not self._same(this.weights, first.weights):
            raise NonDeterministicObjectiveError(
                _random("the loss summed over the data", sum(first.losses), sum(this.losses))
            )

    def _same(self, these: Sequence[float], those: Sequence[float]) -> bool:
        """Whether two passes sum to the same up to rounding; a mere reordering of the batches does."""
        scale = sum(map(abs, those))
        difference = abs(sum(these) - sum(those))
        # A loss that is not finite is not random: the product that it spoils says so.
        return not difference > scale * torch.finfo(self._objective.dtype).eps ** 0.5

    def _measure(self, point: Mapping[str, Tensor], index: int, batch: Any) -> tuple[int | None, float | None]:
        """Return the bytes that a linearization of `batch` retains, and its loss where it was made to see that.

        It is made once for batches of equal shapes. The bytes are None where it cannot be measured beforehand.
        """
        like = (self._objective.dtype, signature(batch))
        if like in self._bytes:
            return self._bytes[like], None
        try:
            linearization, count = measured(
                lambda: self.kernel.linearize(point, index, batch), self._objective.tensors()
            )
        except RuntimeError:
            return None, None
        self._bytes[like] = count
        return count, float(linearization.loss)

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


def _random(what: str, then: float, now: Any) -> str:
    return (
        f"{what} was {float(then):.9g} at first and is {float(now):.9g} now, at the same parameters: look at dropout "
        "and batch normalisation in training mode (call model.eval()), random augmentation in the data, shuffling "
        "with drop_last=True"
    )
