"""Products of kept linearizations, recorded as CUDA graphs.

If a model is small, a GPU waits for the host to launch the next kernel. A recorded graph is one launch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from curvop.kernels.kernel import Kernel, Linearization

__all__ = ["Recorder", "Replayed", "on_own_stream"]

Product = Callable[[Tensor], Tensor]
Multiply = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


class Recorder:
    """Records products, which take turns in the same memory.

    Parameters
    ----------
    warns : bool
        Whether to say so where they cannot be recorded.
    """

    def __init__(self, warns: bool) -> None:
        self._warns = warns
        self._gave_up = False
        self._memory: _Memory | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_memory": None}

    def watching(self, linearization: Linearization, kernel: Kernel, count: int) -> Linearization:
        """Return a linearization that is kept as one whose products are recorded, where that can be.

        It retains `count` bytes, and a product of so many columns is taken to need as many times that.
        """
        objective = kernel.objective  # autocast has casts of its own, which it forgets
        if self._gave_up or objective.device.type != "cuda" or objective.autocast() is not None:
            return linearization
        return Replayed(linearization, kernel, self, count)

    def record(self, run: Product, vectors: Tensor, products: Tensor, needed: int = 0) -> Product | None:
        """Return what does as `run` does, None where it cannot be recorded.

        Parameters
        ----------
        run : callable
            ``vectors -> products`` on a GPU, which ran before: what it does once is not recorded.
        vectors, products : Tensor
            An example, by which the recorded product is judged.
        needed : int
            Bytes that it takes meanwhile. They stay taken, so that nothing is recorded where memory is scarce.
        """
        if self._gave_up:
            return None
        size = torch.linalg.vector_norm(products)
        free, total = torch.cuda.mem_get_info(vectors.device)
        if free - needed < total // 8 or not 0 < size < torch.inf:
            return None
        try:
            replay = self._recorded(run, vectors, products)
            if torch.linalg.vector_norm(replay(vectors) - products) <= torch.finfo(products.dtype).eps ** 0.5 * size:
                return replay
            reason = "the recorded product differs"
        except Exception as error:  # whatever the host's part in it says
            reason = " ".join(str(error).split())[:300]
        self._gave_up = True
        if self._warns:
            warnings.warn(f"products are not recorded as CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)
        return None

    def _recorded(self, run: Product, vectors: Tensor, products: Tensor) -> Product:
        with on_own_stream(vectors.device):
            if self._memory is None:
                if waits(lambda: run(vectors)):
                    raise RuntimeError("the host waits for the device")
                self._memory = _Memory(vectors)
            static, result = self._memory.of(vectors, products)
            again = recorded(lambda: result.copy_(run(static)), self._memory.pool)

        def replay(vectors: Tensor) -> Tensor:
            static.copy_(vectors)
            return again().clone()  # the next product of any batch is written to the same place

        return replay


class _Memory:
    """What recorded products have in common: the places of vectors and products, and a pool for the temporaries."""

    def __init__(self, like: Tensor) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        nothing = like.new_zeros(1)
        self._anchor = recorded(nothing.zero_, self.pool)  # a pool dies with the last of its graphs
        self._places: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def of(self, vectors: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places for a vector and a product, or several, like these."""
        key = tuple(part for one in (vectors, products) for part in (one.shape, one.dtype, one.device))
        if key not in self._places:
            self._places[key] = torch.empty_like(vectors), torch.empty_like(products)
        return self._places[key]


class Replayed(Linearization):
    """A linearization that is kept, and whose products are recorded.

    Those with as many columns are computed as they are at first, to do what is done once; the second is recorded.
    """

    whole = True

    def __init__(self, linearization: Linearization, kernel: Kernel, recorder: Recorder, count: int) -> None:
        super().__init__(linearization.loss, linearization.weight, linearization.roots, linearization.tensors)
        self._linearization, self._cols, self._rows = linearization, kernel.cols, kernel.rows
        self._recorder, self._count = recorder, count
        self._times: dict[torch.Size, int] = defaultdict(int)
        self._replays: dict[torch.Size, Product] = {}

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply one vector, which comes whole."""
        return [self._multiply(self._linearization.apply, tangents[0], count=1)]

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply several vectors at once."""
        return [self._multiply(self._linearization.apply_many, tangents[0], count=len(tangents[0]))]

    def _multiply(self, multiply: Multiply, vectors: Tensor, count: int) -> Tensor:
        replay = self._replays.get(vectors.shape)
        if replay is not None:
            return replay(vectors)

        def run(vectors: Tensor) -> Tensor:
            if not self._linearization.whole:
                return self._rows.join(multiply(self._cols.split(vectors)), vectors)
            [products] = multiply([vectors])
            return cast("Tensor", products)

        products = run(vectors)
        self._times[vectors.shape] += 1
        if self._times[vectors.shape] == 2:
            needed = count * self._count + vectors.nbytes + products.nbytes
            if (made := self._recorder.record(run, vectors, products, needed)) is not None:
                self._replays[vectors.shape] = made
        return products


@contextlib.contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """Let a GPU compute on a stream that can be recorded, which the default one cannot; one thread at a time.

    Autograd computes a product on the stream that the forward pass was on: all of it has to be within.
    """
    if device.type != "cuda":
        yield
        return
    own, lock = _stream(device)
    with lock:  # what another thread computes there would be recorded as well
        outer = torch.cuda.current_stream(device)
        own.wait_stream(outer)
        try:
            with torch.cuda.stream(own):
                yield
        finally:
            outer.wait_stream(own)


@functools.cache
def _stream(device: torch.device) -> tuple[torch.cuda.Stream, threading.RLock]:
    return torch.cuda.Stream(device), threading.RLock()


def waits(compute: Callable[[], object]) -> bool:
    """Whether the host waits for the GPU in a computation, which cannot be recorded then."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("called a synchronizing CUDA operation" in str(one.message) for one in told)


def recorded(compute: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """Return what computes the same tensor again, in the same place; within `on_own_stream`.

    Its temporaries are in the memory `pool` of graphs, which lives as long as any of them.
    """
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # where an error ends it early
        # The workspace of cuBLAS goes to the pool: elsewhere, it is freed with any other graph of this stream.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads, such as a loader's that pins memory, may ask the device for something meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            result = compute()
            graph.capture_end()
        except BaseException:
            _abandon(graph, pool)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a recording that failed: torch itself leaves its allocator and its random numbers as while recording."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    nothing = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):
        nothing.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        nothing.capture_end()
