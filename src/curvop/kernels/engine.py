"""The engine: linearize each batch once, cache the linearizations, and apply them to many vectors.

``Kernel.linearize(batch) -> Linearization`` performs all computations that do not depend on the vector.
``Linearization.apply(tangents) -> cotangents`` then multiplies the matrix of the batch by one vector. `Engine` sums
over the batches and caches linearizations within a memory budget. `Columns` chooses the number of vectors that are
processed at once.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from curvop.kernels.batches import Feed, at_batch, leaves, signature
from curvop.kernels.changes import Fingerprint, random_state
from curvop.kernels.cuda_graphs import Recorder, capture_stream
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
)
from curvop.kernels.passes import REORDERED, DataReorderedError, Pass, precision, same
from curvop.kernels.recorded import sums_agree
from curvop.kernels.user_warnings import warn_user

__all__ = ["Columns", "Engine", "add_sums", "apply_in_one_pass", "set_sums"]


#: A function ``(totals, cotangents, share)`` that adds the cotangents of one batch to `totals`; see `add_sums`.
Add = Callable[[Sequence[Tensor], Sequence[Tensor | None], float], None]


class Engine:
    """Compute products of a curvature matrix with vectors by summing over the batches, within a memory budget.

    Parameters
    ----------
    kernel : Kernel
    budget : Budget
        Limit on the number of bytes that cached linearizations retain. Batches that do not fit are re-linearized in
        every product.
    columns : int or 'auto'
        Number of columns that are processed at once; see `Columns`.

    Attributes
    ----------
    first_passes : int
        Number of passes that linearized all batches because the objective was new or had changed.
    """

    def __init__(self, kernel: Kernel, budget: Budget, columns: int | str = "auto") -> None:
        self.kernel = kernel
        self._objective = kernel.objective
        self._budget = budget
        self._columns = Columns(columns, kernel.worth_batching)
        self._cache_enabled = True
        self._multi_device = False
        self._first: Pass | None = None
        self.first_passes = 0
        self._recorder = Recorder(kernel.compiled)
        self._warned_of_memory = False
        self._bytes: dict[object, int] = {}  # size of a linearization, by dtype and shapes of the batch
        self._records = columns == "auto"  # recorded products differ from others by rounding errors
        self._untimed = 0.0  # seconds spent on work whose time says nothing about the speed of later products
        self._verified: set[tuple[int, int]] = set()  # batches and numbers of columns, see `_verify`

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_first": None}  # graphs cannot be pickled; the next product rebuilds them

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({"_verified": set()} | state)  # version 0.1.0 did not verify products

    def apply(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None = None) -> None:
        """Write the products of the matrix with `vectors` into `out`.

        Parameters
        ----------
        vectors : Tensor, shape (K, N)
            One vector per row, in the parameters' dtype and on their device.
        out : Tensor, shape (K, M)
            Overwritten with the products. `out` must be on the same device as `vectors`. The sum over the batches is
            computed in the dtype of `out`.
        tick : callable, optional
            Called with the completed fraction of the work, between 0 and 1.

        Raises
        ------
        NonFiniteProductError
            If a product contains NaN or infinity.
        NonDeterministicObjectiveError
            If the loss of the same data has changed since an earlier pass.
        """
        with self._objective.slow_backends(), capture_stream(self._objective.device):
            while True:
                try:
                    return self._checked_sum(vectors, out, tick)
                except DataReorderedError:
                    self._cache_enabled = False
                    self.forget()
                    message = REORDERED
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    message = self.release_memory(error)
                if message:
                    warn_user(message)

    def release_memory(self, error: Exception) -> str:
        """After an out-of-memory error, shrink the cache and reduce the number of columns that are processed at once.

        Return a warning message on the first call, and an empty string on later calls.

        Raises
        ------
        RuntimeError or MemoryError
            If neither the cache nor the number of columns can be reduced further. The exception is `error`, with a
            note.
        """
        if not (self._budget.shrink() | self._columns.shrink()):  # `|`, not `or`: shrink both
            error.add_note("one column and one batch at a time do not fit: make data yield smaller batches")
            raise error
        self.forget()
        self._recorder = Recorder(self.kernel.compiled)
        for device in self._objective.devices:
            free_unused(device)
        message = "" if self._warned_of_memory else SHORT_OF_MEMORY
        self._warned_of_memory = True
        return message

    @property
    def keeps_nothing(self) -> bool:
        """Whether the memory budget is zero. If True, no linearization is cached, and every product reads the data."""
        return self._budget.is_zero

    def kept(self) -> tuple[int, float]:
        """Return ``(size, fraction)``: the size of the cache in bytes, and the fraction of batches in the cache."""
        if self._first is None:
            return 0, 0.0
        return self._first.bytes, len(self._first.kept) / len(self._first.weights)

    def _checked_sum(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> None:
        self._sum(vectors, out, tick)
        # NaN and infinity propagate through a sum, so one sum checks the whole product. A sum of finite entries may
        # overflow, so the entries themselves are checked if the sum is not finite.
        if not math.isfinite(out.sum().item()) and not torch.isfinite(out).all():
            finite = bool(torch.isfinite(vectors).all())
            if finite and self.kernel.move():
                self.forget()
                self._checked_sum(vectors, out, tick)
                return
            message = self._locate_non_finite(vectors)
            if finite:
                self.forget()  # later products must not reuse linearizations if a batch was read incorrectly
            raise NonFiniteProductError(message)

    def _sum(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> None:
        for _ in self._sum_by_batch(vectors, out, tick):
            pass

    def _sum_by_batch(self, vectors: Tensor, out: Tensor, tick: Callable[[float], None] | None) -> Generator[None]:
        """Write the sum over the batches into `out`, and yield after each batch."""
        count = vectors.shape[0]  # Tensor.__len__ is slower
        steps, done = 0 if tick is None else len(self._objective) * count, 0
        chunks: dict[tuple[int, int, bool], tuple[list[Tensor], list[Tensor]]] = {}
        weights: list[float] = []
        unit = 0.0
        for linearization in self._linearizations():  # no enumerate: it would keep a reference to the last item
            index = len(weights)
            weights.append(linearization.weight)
            separate_rows = self.kernel.by_batch and not self.kernel.rows.names  # each batch has its own rows
            add = set_sums if separate_rows or not unit else add_sums
            scale = self.kernel.scale(linearization.weight)
            unit = unit or scale  # equal scales need no multiplication
            share = scale / unit if unit else 0.0
            if self.kernel.by_batch:
                chunks.clear()
            for start, stop in self._columns.chunks(count, self._columns_that_fit, self._clock):
                chunk = start, stop, linearization.whole
                if chunk not in chunks:
                    which = start if stop == start + 1 else slice(start, stop)
                    chunks[chunk] = self._parts(index, vectors[which], out[which], linearization.whole)
                tangents, totals = chunks[chunk]
                if share:
                    # Do not assign the products to a variable, which would keep them in memory during the next
                    # iteration.
                    self._add(add, totals, self._multiply(index, linearization, tangents, stop - start), share)
                elif separate_rows:
                    set_sums(totals, [None] * len(totals), share)
                done += stop - start
                if steps and tick is not None:
                    tick(done / steps)
            del linearization  # frees the graph of this batch before the next graph is built
            yield
        self.kernel.check_count(len(weights))
        if not unit:  # if the data set is divided into parts, all batches of a part may have weight 0
            out.zero_()
        rest = self.kernel.divisor(weights) / (unit or 1.0)
        if rest != 1:
            out.div_(rest)

    def _parts(self, index: int, vector: Tensor, total: Tensor, whole: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return ``(tangents, totals)`` for batch number `index`.

        `tangents` is a list that contains the vector, split into one tensor for each parameter. `totals` is a list of
        the views of `total` that receive the product of the batch, one for each parameter. If `whole` is True, each
        list contains one flat vector instead.
        """
        cols, rows = self.kernel.cols, self.kernel.rows
        vector, total = cols.at(vector, index), rows.at(total, index)
        tangents = [vector] if whole else self._colocate(cols.of(self._objective.params), cols.split(vector))
        return tangents, [total] if whole else rows.split(total)

    def _colocate(self, tensors: Sequence[Tensor], parts: Any) -> Any:
        """Move each tensor in `parts` to the device of the corresponding entry of `tensors`; skip None."""
        if not (self._multi_device and tensors):
            return parts
        pairs = zip(parts, tensors, strict=True)
        return [part if part is None else part.to(tensor.device) for part, tensor in pairs]

    def _multiply(
        self, index: int, linearization: Linearization, tangents: list[Tensor], count: int
    ) -> Sequence[Tensor | None]:
        before = linearization.seconds
        if count == 1:
            product = linearization.apply(tangents)
            self._untimed += linearization.seconds - before
            return product
        try:
            products = linearization.apply_many(tangents)
            if (index, count) in self._verified or self._verify(index, linearization, tangents, products):
                return products
        except RuntimeError as error:  # no `apply_many`, or an operation has no batching rule
            if out_of_memory(error):
                raise
        finally:
            self._untimed += linearization.seconds - before
            self._columns.disregard = not linearization.is_settled
        self._columns.one_by_one()
        singles = zip(*(linearization.apply(column) for column in zip(*tangents, strict=True)), strict=True)
        return [None if parts[0] is None else torch.stack(cast("tuple[Tensor, ...]", parts)) for parts in singles]

    def _verify(
        self, index: int, linearization: Linearization, tangents: list[Tensor], products: Sequence[Tensor | None]
    ) -> bool:
        """Return True if products with several vectors at once are right. Each batch is checked once for each number.

        PyTorch's batching rules can be wrong without an error. With ``is_grads_batched=True``, for example, the second
        derivative of ``group_norm`` has a relative error of 0.7 for some shapes (torch 2.13).
        """
        began = time.perf_counter() - linearization.seconds
        is_right = sums_agree(linearization.apply, tangents, products)
        self._untimed += time.perf_counter() - linearization.seconds - began  # `_multiply` adds `seconds`
        if is_right:
            self._verified.add((index, len(tangents[0])))
        return is_right

    def _add(self, add: Add, totals: list[Tensor], products: Sequence[Tensor | None], share: float) -> None:
        """Add the products of one batch to `totals`. The first batch writes to memory that may never have been used."""
        began = time.perf_counter()
        add(totals, self._colocate(totals, products), share)
        self._untimed += time.perf_counter() - began

    def _columns_that_fit(self) -> int:
        """Estimate how many columns can be processed at once within the rest of the memory budget.

        The estimate is the number of bytes left in the budget divided by the size of the largest linearization, or 1 if
        no linearization has been measured.
        """
        largest = max(self._bytes.values(), default=0)
        return int(min(self._budget.left / largest, 2**31)) if largest else 1

    def _clock(self) -> float:
        """Synchronize the device and return the time in seconds, without time for set-up and for adding products."""
        if self._objective.device.type == "cuda":
            torch.cuda.synchronize(self._objective.device)
        return time.perf_counter() - self.kernel.seconds - self._untimed

    def _linearizations(self) -> Iterator[Linearization]:
        """Return an iterator over the linearizations of all batches.

        All batches are linearized if the objective is new or has changed. Otherwise cached linearizations are reused.
        """
        state = self._objective.state()
        if self._first is not None and self._first.stale(state):
            self.forget()
        if self._first is None:
            self._multi_device = len(self._objective.devices) > 1
            return self._first_pass(state)
        if len(self._first.kept) == len(self._first.weights):
            return iter(self._first.kept.values())
        return self._next_pass(self._first)

    def forget(self) -> None:
        """Discard the cached linearizations, so that their memory is free before new ones are built."""
        self._first = None

    def _first_pass(self, state: tuple[object, ...]) -> Iterator[Linearization]:
        keep_freed_memory(max(self.kernel.rows.size, self.kernel.cols.size) * self._objective.dtype.itemsize)
        first = Pass(state, leaves=self._objective.leaves({*self.kernel.rows.names, *self.kernel.cols.names}))
        caching = self._cache_enabled and self._budget.open(self._objective.device)
        self.kernel.is_kept = caching
        for index, batch in self._objective.batches():
            count, loss = self._measure(first.leaves, index, batch) if caching else (None, None)
            before = random_state(self._objective.devices) if loss is None else None
            linearization = self._linearize(first.leaves, index, batch)
            if before is not None and not torch.equal(random_state(self._objective.devices), before):
                loss = float(linearization.loss)  # random numbers were drawn: does the loss depend on them?
                del linearization
                linearization = self._linearize(first.leaves, index, batch)
            eps = precision(linearization.loss, *first.leaves.values())
            if loss is not None and not same([float(linearization.loss)], [loss], eps):
                self._bytes.clear()  # so that the next product repeats the check
                what = f"the loss of batch {index}"
                raise NonDeterministicObjectiveError(self._objective.changed(what, loss, linearization.loss))
            if caching:
                if count is None:
                    count = graph_bytes(linearization.roots, self._objective.tensors())
                if self._budget.take(count, first):
                    if self._records:
                        linearization.keep()
                    cached = linearization
                    if not self._multi_device:
                        cached = self._recorder.recordable(linearization, self.kernel, count)
                    first.keep(index, cached, batch, count)
                if not self._objective.ordered:
                    first.fingerprints.append(Fingerprint.of_data(leaves(batch)))
            first.record(linearization)
            yield linearization
            del linearization
        if 0 < len(first.kept) < len(first.weights) and self._objective.ordered:
            first.fingerprints = [Fingerprint.of_data(leaves(batch)) for batch in self._objective.listed_batches()]
        self._objective.conclude(first, kept=bool(first.kept))
        self._first = first
        self.first_passes += 1
        if caching and self.first_passes == 1 and self._objective.device.type == "cuda":
            self._columns.forget()  # these times were measured without CUDA graphs

    def _next_pass(self, first: Pass) -> Iterator[Linearization]:
        this = Pass(first.state, leaves=first.leaves)
        for index, batch in self._objective.batches():
            if first.kept and Fingerprint.of_data(leaves(batch)) not in first.fingerprints[index : index + 1]:
                raise DataReorderedError
            linearization = first.kept.get(index)
            if linearization is None:
                linearization = self._linearize(first.leaves, index, batch, is_checked=True)
            this.record(linearization)
            yield linearization
            del linearization
        difference = first.differs(this, self._objective.ordered or bool(first.kept))
        if difference is not None:
            raise NonDeterministicObjectiveError(self._objective.changed(*difference))

    def _linearize(
        self, point: Mapping[str, Tensor], index: int, batch: Any, *, is_checked: bool = False
    ) -> Linearization:
        self.kernel.is_checked = is_checked
        with at_batch(index):
            return self.kernel.linearize(point, index, batch)

    def _measure(self, point: Mapping[str, Tensor], index: int, batch: Any) -> tuple[int | None, float | None]:
        """Return ``(count, loss)``: the number of bytes that a linearization of `batch` retains, and the batch's loss.

        To measure the number of bytes, the first of several batches with equal shapes and dtypes is linearized. For the
        other batches, `count` is the stored number, and `loss` is None. If the memory of a linearization cannot be
        measured, both `count` and `loss` are None.
        """
        key = (self._objective.dtype, signature(batch))
        if key in self._bytes:
            return self._bytes[key], None
        self.kernel.prepare(point, index, batch)
        try:
            linearization, count = measured(
                lambda: self._linearize(point, index, batch), self._objective.tensors(), lambda made: made.tensors
            )
        except RuntimeError:
            return None, None
        self._bytes[key] = count
        return count, float(linearization.loss)

    def _locate_non_finite(self, vectors: Tensor) -> str:
        """Return an error message that names the first batch and parameter at which a product is not finite.

        To find the batch and the parameter, the product is computed again, batch by batch.
        """
        if not torch.isfinite(vectors).all():
            return f"x, the vector to multiply, is not finite as {self._objective.dtype}: pass finite numbers"
        for index, linearization in enumerate(self._linearizations()):
            for vector in vectors if linearization.weight else ():
                product = vector.new_empty(self.kernel.rows.size)
                tangents, parts = self._parts(index, vector, product, linearization.whole)
                set_sums(parts, linearization.apply(tangents), 1.0)
                for number, part in enumerate(self.kernel.rows.split(self.kernel.rows.at(product, index))):
                    if not torch.isfinite(part).all():
                        return not_finite("product", index, float(linearization.loss), self.kernel.rows.label(number))
        return "the product is not finite: the product of each batch is finite, but their sum overflows"


def apply_in_one_pass(
    engines: Sequence[Engine],
    vectors: Sequence[Tensor],
    outs: Sequence[Tensor],
    ticks: Sequence[Callable[[float], None] | None],
) -> bool:
    """Compute products with several engines, whose objectives have the same data, in one pass over the data.

    Parameters
    ----------
    engines : sequence of Engine
        Engines that cache no linearizations. Their objectives have the same data and the same device.
    vectors, outs, ticks : sequences
        The arguments of `Engine.apply`: one vector (or matrix of vectors), one output and one callback for each engine.

    Returns
    -------
    bool
        True if all products were computed. False if memory ran out or a product is not finite. In this case, the caller
        must call `Engine.apply` for each engine. This method tries again, or raises an error that names the batch.
    """
    objectives = [engine._objective for engine in engines]
    with contextlib.ExitStack() as stack:
        for objective in dict.fromkeys(objectives):
            stack.enter_context(objective.slow_backends())
        stack.enter_context(capture_stream(objectives[0].device))
        feeds = [Feed() for _ in engines]
        sums = [
            stack.enter_context(contextlib.closing(engine._sum_by_batch(vector, out, tick)))
            for engine, vector, out, tick in zip(engines, vectors, outs, ticks, strict=True)
        ]
        try:
            for batch in objectives[0].unchecked_batches():
                for objective, feed, batch_sum in zip(objectives, feeds, sums, strict=True):
                    feed.batch = batch
                    with objective.fed_by(feed):
                        next(batch_sum)
                del batch
            for feed, batch_sum in zip(feeds, sums, strict=True):
                feed.ended = True
                for _ in batch_sum:  # outside `fed_by`: the checks at the end of a first pass may read the data
                    pass
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        except DataReorderedError:
            return False
    return all(bool(torch.isfinite(out).all()) for out in outs)


_SIZES = (1, 8, 64)
# Number of timed chunks per size. The shortest time is used, because other programs can only slow down a chunk.
_TIMED_CHUNKS = 4
# Several columns are processed at once if this takes less than this fraction of the time. Measured times vary.
_GAIN = 0.95
# Largest number of chunks per size whose times are disregarded.
_DISREGARDED_CHUNKS = 32


class Columns:
    """Divide the columns of a product into chunks of the fastest size.

    All columns of a chunk are processed by one batched operation. Batching is faster if the operations are small, and
    slower if the operations are large. To find the fastest size, the first chunks are timed, starting with single
    columns. At most 8 columns, and then at most 64 columns, are tried as long as a column takes less time than before.

    Parameters
    ----------
    setting : int or 'auto'
        Number of columns per chunk (1 disables batching), or ``'auto'`` to choose the number by timing.
    worth : float
        Larger sizes are tried only if a column takes at most this time, in seconds.

    Attributes
    ----------
    disregard : bool
        Set this attribute to True to disregard the time of the current chunk, because later chunks will be faster.
    """

    def __init__(self, setting: int | str, worth: float = math.inf) -> None:
        self._worth = worth
        self._sizes: tuple[int, ...] = _SIZES if setting == "auto" else (int(setting),)
        self._times: dict[int, list[float]] = defaultdict(list)  # seconds per column, by the size of the chunk
        self._disregarded: dict[int, int] = defaultdict(int)  # number of disregarded chunks, by size
        self.disregard = False

    def chunks(self, count: int, room: Callable[[], int], clock: Callable[[], float]) -> Iterator[tuple[int, int]]:
        """Divide `count` columns into chunks, and yield the bounds ``(start, stop)`` of each chunk.

        The time of a chunk is the time until the caller requests the next chunk.

        Parameters
        ----------
        count : int
        room : callable
            Returns the number of columns whose temporary tensors fit into memory.
        clock : callable
            Synchronizes the device and returns the current time in seconds.
        """
        if count == 1:
            yield 0, 1
            return
        start, most = 0, room()
        while start < count:
            left = count - start
            size = min(self._size(left, most), left)
            measuring = left > 1 and len(self._sizes) > 1 and not self._known(size)
            began = clock() if measuring else 0.0
            yield start, start + size
            if measuring and self.disregard and self._disregarded[size] < _DISREGARDED_CHUNKS:
                self._disregarded[size] += 1
            elif measuring:
                self._times[size].append((clock() - began) / size)
            self.disregard = False
            start += size

    def forget(self) -> None:
        """Discard the measured times."""
        self._times.clear()

    def shrink(self) -> bool:
        """Reduce the maximum number of columns per chunk. Return False if this number was already 1."""
        largest = self._sizes[-1]
        self._sizes = self._sizes[:-1] or (max(1, largest // 2),)
        return largest > 1

    def one_by_one(self) -> None:
        """Process columns one by one from now on, because an operation does not support batching."""
        self._sizes = (1,)

    def _size(self, left: int, room: int) -> int:
        if len(self._sizes) == 1:
            return max(1, min(self._sizes[0], room))
        best = 1
        for limit in self._sizes:
            size = min(limit, left, room)
            if size < best:
                break
            if not self._known(size):
                return size if self._worth_trying(size, limit, best) else best
            gain = _GAIN if size > best == 1 else 1.0
            if self._seconds(size) > gain * self._seconds(best):
                break
            best = size
        return max(1, best)

    def _worth_trying(self, size: int, limit: int, best: int) -> bool:
        """Return whether to time chunks of `size` columns, if chunks of `best` columns are the fastest so far.

        A larger chunk, of at most `limit` columns, shares its set-up among more columns. If such a chunk is hardly
        faster than single columns, the chunk of `size` columns is not tried.
        """
        if size == 1:
            return True
        larger = [other for other in self._times if size < other <= limit and self._known(other)]
        return self._seconds(best) <= self._worth and all(
            self._seconds(other) <= _GAIN * self._seconds(1) for other in larger
        )

    def _known(self, size: int) -> bool:
        return len(self._times[size]) == _TIMED_CHUNKS

    def _seconds(self, size: int) -> float:
        """Return the shortest time per column, in seconds, among the timed chunks of `size` columns.

        The first timed chunk of this size is excluded, because its time includes set-up.
        """
        return min(self._times[size][1:])


def set_sums(totals: Sequence[Tensor], cotangents: Sequence[Tensor | None], share: float) -> None:
    """Overwrite `totals` with the cotangents of one batch, multiplied by `share`.

    If the dtypes of `totals` and `cotangents` differ, overwriting `totals` is cheaper than setting it to zero and
    adding `cotangents`.
    """
    for total, cotangent in zip(totals, cotangents, strict=True):
        if cotangent is None:
            total.zero_()
    present, parts = _present(totals, cotangents)
    if parts:
        torch._foreach_copy_(present, parts)
        if share != 1:
            torch._foreach_mul_(present, share)


def add_sums(totals: Sequence[Tensor], cotangents: Sequence[Tensor | None], share: float) -> None:
    """Add the cotangents of one batch, multiplied by `share`, to `totals`."""
    present, parts = _present(totals, cotangents)
    if parts:
        torch._foreach_add_(present, parts, alpha=share)


def _present(totals: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the entries of `totals` whose cotangents are not None, and these cotangents as dense tensors."""
    pairs = [(total, part) for total, part in zip(totals, cotangents, strict=True) if part is not None]
    # Sparse tensors, such as the gradients of a sparse embedding, cannot be copied to dense tensors.
    dense = [part if part.layout == torch.strided else part.to_dense() for _, part in pairs]
    return [total for total, _ in pairs], dense
