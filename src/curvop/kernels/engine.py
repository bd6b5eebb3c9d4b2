"""The engine: every batch is linearized once, kept while the budget lasts, and applied to many vectors.

``Kernel.linearize(batch) -> Linearization`` does all that does not depend on the vector;
``Linearization.apply(tangents) -> cotangents`` is the linear rest. `Engine` sums the batches.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from curvop.kernels.batches import at_batch, leaves, signature
from curvop.kernels.changes import Fingerprint, random_state
from curvop.kernels.cuda_graphs import Recorder, on_own_stream
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError, not_finite
from curvop.kernels.kernel import Kernel, Linearization
from curvop.kernels.memory import (
    SHORT_OF_MEMORY,
    Budget,
    free_unused,
    graph_bytes,
    keep_freed_memory,
    measured,
    out_of_memory,
    tensor_bytes,
)
from curvop.kernels.passes import REORDERED, DataReorderedError, Pass, precision, same

__all__ = ["Columns", "Engine", "add_sums", "set_sums"]


class Engine:
    """Sums a kernel's batches into products, in bounded memory.

    Parameters
    ----------
    kernel : Kernel
    budget : Budget
        Of the bytes that kept linearizations may retain. What does not fit is linearized anew in each sweep.
    columns : int or 'auto'
        How many columns are multiplied at once; see `Columns`.

    Attributes
    ----------
    first_passes : int
        How often the data was linearized at a new point, or for the first time.
    """

    def __init__(self, kernel: Kernel, budget: Budget, columns: int | str = "auto") -> None:
        self.kernel = kernel
        self._objective = kernel.objective
        self._budget = budget
        self._columns = Columns(columns, kernel.worth_batching)
        self._keeps = True
        self._spread = False
        self._first: Pass | None = None
        self.first_passes = 0
        self._recorder = Recorder(kernel.compiled)
        self._short = False  # of memory
        self._bytes: dict[object, int] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_first": None}  # graphs cannot be pickled; the first product makes them anew

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
        with self._objective.slow_backends(), on_own_stream(self._objective.device):
            while True:
                try:
                    return self._checked_sum(vectors, out, tick)
                except DataReorderedError:
                    self._keeps = False
                    self._forget()
                    told = REORDERED
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    told = self.release_memory(error)
                if told:
                    warnings.warn(told, RuntimeWarning, stacklevel=2)

    def release_memory(self, error: Exception) -> str:
        """Keep less, and multiply fewer columns at once; return what to tell the user, nothing after that."""
        if not (self._budget.shrink() | self._columns.shrink()):  # both, as neither's part is known
            error.add_note("one column and one batch at a time do not fit: let data yield smaller batches")
            raise error
        self._forget()
        self._recorder = Recorder(self.kernel.compiled)
        for device in self._objective.devices:
            free_unused(device)
        told, self._short = "" if self._short else SHORT_OF_MEMORY, True
        return told

    def kept(self) -> tuple[int, float]:
        """Return the bytes that are kept, and the share of the batches they are for, as of the last product."""
        if self._first is None:
            return 0, 0.0
        return self._first.bytes, len(self._first.kept) / len(self._first.losses)

    def _checked_sum(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> None:
        self._sum(vectors, out, tick)
        # NaN and infinity survive a sum, so one reduction clears the whole product; only a suspect is looked through.
        if not math.isfinite(out.sum().item()) and not torch.isfinite(out).all():
            finite = bool(torch.isfinite(vectors).all())
            if finite and self.kernel.move():
                self._forget()
                self._checked_sum(vectors, out, tick)
                return
            blame = self._blame(vectors)
            if finite:
                self._forget()  # a batch that was read wrong once is not to spoil every later product
            raise NonFiniteProductError(blame)

    def _sum(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> None:
        steps, done = len(self._objective) * len(vectors), 0
        chunks: dict[tuple[int, int, bool], tuple[list[Tensor], list[Tensor]]] = {}
        weights: list[float] = []
        unit = 0.0
        for linearization in self._linearizations():  # not enumerated, which holds on to what it has yielded
            index = len(weights)
            weights.append(linearization.weight)
            first = self.kernel.by_batch and not self.kernel.rows.names  # then each batch has rows of its own
            add = set_sums if first or not unit else add_sums
            unit = unit or linearization.weight  # one batch, or equal ones, are not scaled at all
            share = linearization.weight / unit if unit else 0.0
            if self.kernel.by_batch:
                chunks.clear()
            for start, stop in self._columns.chunks(len(vectors), self._room, self._clock):
                chunk = start, stop, linearization.whole
                if chunk not in chunks:
                    which = start if stop == start + 1 else slice(start, stop)
                    chunks[chunk] = self._parts(index, vectors[which], out[which], linearization.whole)
                tangents, totals = chunks[chunk]
                if share:
                    add(totals, self._beside(totals, self._multiply(linearization, tangents, stop - start)), share)
                done += stop - start
                if tick is not None and steps:
                    tick(done / steps)
            del linearization  # one batch's graph at a time: this one is freed before the next is made
        self.kernel.check_count(len(weights))
        if not unit:  # no batch counts, as may be in a part of a data set
            out.zero_()
        rest = self._objective.divisor(weights) / (unit or 1.0)
        if rest != 1:
            out.div_(rest)

    def _parts(self, index: int, vector: Tensor, total: Tensor, whole: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return what batch number `index` is applied to, and where its product belongs."""
        cols, rows = self.kernel.cols, self.kernel.rows
        vector, total = cols.at(vector, index), rows.at(total, index)
        tangents = [vector] if whole else self._beside(cols.of(self._objective.params), cols.split(vector))
        return tangents, [total] if whole else rows.split(total)

    def _beside(self, others: Sequence[Tensor], parts: Any) -> Any:
        """Return the parts, of which some are None, each on the device of its counterpart where it has any."""
        pairs = zip(parts, others, strict=True)
        moved = self._spread and others
        return [part if part is None else part.to(other.device) for part, other in pairs] if moved else parts

    def _multiply(self, linearization: Linearization, tangents: list[Tensor], count: int) -> Sequence[Tensor | None]:
        if count == 1:
            return linearization.apply(tangents)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # measured, so nothing to tell
                return linearization.apply_many(tangents)
        except RuntimeError as error:  # not implemented, or an operation that cannot be batched
            if out_of_memory(error):
                raise
            self._columns.one_by_one()
        products = zip(*(linearization.apply(one) for one in zip(*tangents, strict=True)), strict=True)
        return [None if parts[0] is None else torch.stack(cast("tuple[Tensor, ...]", parts)) for parts in products]

    def _room(self) -> int:
        """Return for how many columns at once there is memory; each needs about what its batch retains."""
        largest = max(self._bytes.values(), default=0)
        return int(min(self._budget.left / largest, 2**31)) if largest else 1

    def _clock(self) -> float:
        """Return the seconds until the device has done what it was asked to, those of compiling left out."""
        if self._objective.device.type == "cuda":
            torch.cuda.synchronize(self._objective.device)
        return time.perf_counter() - self.kernel.seconds

    def _linearizations(self) -> Iterator[Linearization]:
        """Begin a pass over the batches: the first one where there was none since anything changed."""
        state = self._objective.state()
        if self._first is not None and self._first.stale(state):
            self._forget()
        if self._first is None:
            self._spread = len(self._objective.devices) > 1
            return self._first_pass(state)
        if len(self._first.kept) == len(self._first.losses):
            return iter(self._first.kept.values())
        return self._next_pass(self._first)

    def _forget(self) -> None:
        """Free what is kept, before anything new is made."""
        self._first = None

    def _first_pass(self, state: tuple[object, ...]) -> Iterator[Linearization]:
        keep_freed_memory()
        first = Pass(state, leaves=self._objective.leaves({*self.kernel.rows.names, *self.kernel.cols.names}))
        keeps = self._keeps and self._budget.open(self._objective.device)
        for index, batch in self._objective.batches():
            count, loss = self._measure(first.leaves, index, batch) if keeps else (None, None)
            before = random_state(self._objective.devices)
            linearization = self._linearize(first.leaves, index, batch)
            if loss is None and not torch.equal(random_state(self._objective.devices), before):
                loss = float(linearization.loss)
                del linearization
                linearization = self._linearize(first.leaves, index, batch)
            eps = precision(linearization.loss, *first.leaves.values())
            if loss is not None and not same([float(linearization.loss)], [loss], eps):
                self._bytes.clear()  # so that the next product looks again
                what = f"the loss of batch {index}"
                raise NonDeterministicObjectiveError(self._objective.changed(what, loss, linearization.loss))
            if keeps:
                if count is None:
                    count = graph_bytes(linearization.roots, self._objective.tensors())
                if self._budget.take(count, first):
                    kept = linearization if self._spread else self._recorder.watching(linearization, self.kernel, count)
                    first.keep(index, kept, batch, count)
                first.fingerprints.append(Fingerprint.of_data(leaves(batch)))
            first.record(linearization)
            yield linearization
            del linearization
        self._objective.conclude(first, kept=bool(first.kept))
        self._first = first
        self.first_passes += 1
        if keeps and self.first_passes == 1 and self._objective.device.type == "cuda":
            self._columns.forget()  # what was timed before anything was recorded

    def _next_pass(self, first: Pass) -> Iterator[Linearization]:
        this = Pass(first.state, leaves=first.leaves)
        for index, batch in self._objective.batches():
            if first.kept and Fingerprint.of_data(leaves(batch)) not in first.fingerprints[index : index + 1]:
                raise DataReorderedError
            linearization = first.kept.get(index)
            if linearization is None:
                linearization = self._linearize(first.leaves, index, batch)
            this.record(linearization)
            yield linearization
            del linearization
        if (found := first.differs(this, self._objective.ordered or bool(first.kept))) is not None:
            raise NonDeterministicObjectiveError(self._objective.changed(*found))

    def _linearize(self, point: Mapping[str, Tensor], index: int, batch: Any) -> Linearization:
        with at_batch(index):
            return self.kernel.linearize(point, index, batch)

    def _measure(self, point: Mapping[str, Tensor], index: int, batch: Any) -> tuple[int | None, float | None]:
        """Return the bytes that a linearization of `batch` retains, and its loss where it was made to see that.

        It is made once for batches of equal shapes. The bytes are None where it cannot be measured beforehand.
        """
        like = (self._objective.dtype, signature(batch))
        if like in self._bytes:
            return self._bytes[like], None
        self.kernel.prepare(point, index, batch)
        try:
            linearization, count = measured(lambda: self._linearize(point, index, batch), self._objective.tensors())
        except RuntimeError:
            return None, None
        self._bytes[like] = count = count + tensor_bytes(linearization.tensors, self._objective.tensors())
        return count, float(linearization.loss)

    def _blame(self, vectors: Tensor) -> str:
        """Say where a product that is not finite went wrong, by making it once more, batch by batch."""
        if not torch.isfinite(vectors).all():
            return f"x, the vector handed in, is not finite as {self._objective.dtype}: pass finite numbers"
        for index, linearization in enumerate(self._linearizations()):
            for vector in vectors if linearization.weight else ():
                product = vector.new_empty(self.kernel.rows.size)
                tangents, parts = self._parts(index, vector, product, linearization.whole)
                set_sums(parts, linearization.apply(tangents), 1.0)
                for number, part in enumerate(self.kernel.rows.split(self.kernel.rows.at(product, index))):
                    if not torch.isfinite(part).all():
                        return not_finite("product", index, float(linearization.loss), self.kernel.rows.label(number))
        return "the product is not finite: the batches are, but their sum overflows"


# How many columns of a block are multiplied at once.

_SIZES = (1, 8, 64)
# Chunks of a size that are timed: the least of them counts, as a busy machine only ever adds to it.
_MEASURED = 3


class Columns:
    """Cuts blocks into chunks of the size that costs least for each column.

    Batching columns makes one operation of several: a gain where operations are small, a loss where they are large
    enough already. Which it is, is measured on the first chunks, upwards: a larger size is tried where the one before
    it paid.

    Parameters
    ----------
    setting : int or 'auto'
        The size of chunks, 1 for columns one by one, or ``'auto'`` to measure.
    worth : float
        Seconds that a column takes above which no larger size is tried.
    """

    def __init__(self, setting: int | str, worth: float = math.inf) -> None:
        self._worth = worth
        self._sizes: tuple[int, ...] = _SIZES if setting == "auto" else (int(setting),)
        self._taken: dict[int, list[float]] = defaultdict(list)

    def chunks(self, count: int, room: Callable[[], int], clock: Callable[[], float]) -> Iterator[tuple[int, int]]:
        """Yield the bounds of chunks of `count` columns; what is done between one and the next is timed.

        Parameters
        ----------
        room : callable
            Returns for how many columns' temporaries there is memory.
        clock : callable
            Returns the seconds at which the device has done what it was asked to.
        """
        if count == 1:
            yield 0, 1
            return
        start, most = 0, room()
        while start < count:
            left = count - start
            size = min(self._size(left, most), left)
            measuring = left > 1 and size in self._sizes and not self._known(size)
            began = clock() if measuring else 0.0
            yield start, start + size
            if measuring:
                self._taken[size].append((clock() - began) / size)
            start += size

    def forget(self) -> None:
        """Measure anew."""
        self._taken.clear()

    def shrink(self) -> bool:
        """Make chunks smaller from now on; return whether they can be."""
        largest = self._sizes[-1]
        self._sizes = self._sizes[:-1] or (max(1, largest // 2),)
        return largest > 1

    def one_by_one(self) -> None:
        """Batch no columns any more: some operation cannot."""
        self._sizes = (1,)

    def _size(self, left: int, room: int) -> int:
        if len(self._sizes) == 1:
            return max(1, min(self._sizes[0], room))
        best = 1
        for size in self._sizes:
            if size > min(left, room):
                break
            if not self._known(size):
                return size if size == 1 or self._seconds(best) <= self._worth else best
            if self._seconds(size) > self._seconds(best):
                break
            best = size
        return best

    def _known(self, size: int) -> bool:
        return len(self._taken[size]) == _MEASURED

    def _seconds(self, size: int) -> float:
        """Return what a column takes in chunks of `size`; the first chunk paid for what is prepared once."""
        return min(self._taken[size][1:])


# Adding a batch's products to the sums over all.


def set_sums(totals: Sequence[Tensor], cotangents: Sequence[Tensor | None], share: float) -> None:
    """Begin sums; their share is 1. Cheaper than to add to zero, where the sums are in another precision."""
    for total, cotangent in zip(totals, cotangents, strict=True):
        if cotangent is None:
            total.zero_()
        else:
            total.copy_(cotangent)


def add_sums(totals: Sequence[Tensor], cotangents: Sequence[Tensor | None], share: float) -> None:
    """Add a batch's cotangents, times its share, to sums that are begun."""
    for total, cotangent in zip(totals, cotangents, strict=True):
        if cotangent is not None:
            total.add_(cotangent, alpha=share)
