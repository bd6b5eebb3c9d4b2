"""Record the products of cached linearizations as CUDA graphs.

If a model is small, the GPU waits for the host, which launches one kernel after another. A CUDA graph launches all
kernels of a product at once.
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

__all__ = ["Recorder", "Replayed", "capture_stream"]

Product = Callable[[Tensor], Tensor]
Multiply = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


class Recorder:
    """Record products as CUDA graphs.

    All graphs share the same memory, because only one graph runs at a time.

    Parameters
    ----------
    warns : bool
        Whether to warn if products cannot be recorded.
    """

    def __init__(self, warns: bool) -> None:
        self._warns = warns
        self._gave_up = False
        self._memory: _Memory | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_memory": None}

    def recordable(self, linearization: Linearization, kernel: Kernel, count: int) -> Linearization:
        """Return a linearization that records its products, or `linearization` itself if recording is not possible.

        The argument `count` is the number of bytes that the linearization retains. A product with K columns is assumed
        to need ``K * count`` bytes of temporary memory.
        """
        objective = kernel.objective  # autocast frees its cached copies, so a replay could not read them
        if self._gave_up or objective.device.type != "cuda" or objective.autocast() is not None:
            return linearization
        return Replayed(linearization, kernel, self, count)

    def record(self, run: Product, vectors: Tensor, products: Tensor, needed: int = 0) -> Product | None:
        """Record `run` and return a function that replays the recording, or None if nothing was recorded.

        Parameters
        ----------
        run : callable
            A function ``vectors -> products`` on a GPU. The function must have run before, because one-time
            initialization cannot be recorded.
        vectors, products : Tensor
            An argument of `run`, and the result ``run(vectors)``. The recording must reproduce this result.
        needed : int
            Number of bytes of temporary memory that a product needs. A graph keeps this memory, so nothing is recorded
            if less than an eighth of the GPU memory would remain free.
        """
        if self._gave_up:
            return None
        size = torch.linalg.vector_norm(products)
        free, total = torch.cuda.mem_get_info(vectors.device)
        if free - needed < total // 8 or not 0 < size < torch.inf:
            return None
        try:
            replay = self._capture_product(run, vectors, products)
            if torch.linalg.vector_norm(replay(vectors) - products) <= torch.finfo(products.dtype).eps ** 0.5 * size:
                return replay
            reason = "the recorded product differs"
        except Exception as error:  # from torch or from user code that runs on the host
            reason = " ".join(str(error).split())[:300]
        self._gave_up = True
        if self._warns:
            warnings.warn(f"products are not recorded as CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)
        return None

    def _capture_product(self, run: Product, vectors: Tensor, products: Tensor) -> Product:
        with capture_stream(vectors.device):
            if self._memory is None:
                if _synchronizes(lambda: run(vectors)):
                    raise RuntimeError("the host waits for the device")
                self._memory = _Memory(vectors)
            static, result = self._memory.buffers(vectors, products)
            launch = _capture(lambda: result.copy_(run(static)), self._memory.pool)

        def replay(vectors: Tensor) -> Tensor:
            static.copy_(vectors)
            return launch().clone()  # a copy: the next product of any batch overwrites the buffer

        return replay


class _Memory:
    """Memory that all recorded products use: buffers for vectors and products, and a pool for temporary tensors."""

    def __init__(self, like: Tensor) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        nothing = like.new_zeros(1)
        self._anchor = _capture(nothing.zero_, self.pool)  # the pool exists as long as one of its graphs exists
        self._buffers: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def buffers(self, vectors: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """Return two buffers: one with the shape, dtype and device of `vectors`, and one with those of `products`."""
        key = tuple(part for like in (vectors, products) for part in (like.shape, like.dtype, like.device))
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(vectors), torch.empty_like(products)
        return self._buffers[key]


class Replayed(Linearization):
    """A cached linearization whose products are recorded and replayed.

    The first product with a given number of columns is not recorded, because it may include one-time initialization.
    The second product is computed and recorded. All later products are replayed.
    """

    whole = True

    def __init__(self, linearization: Linearization, kernel: Kernel, recorder: Recorder, count: int) -> None:
        super().__init__(linearization.loss, linearization.weight, linearization.roots, linearization.tensors)
        self._linearization, self._cols, self._rows = linearization, kernel.cols, kernel.rows
        self._recorder, self._bytes_per_column = recorder, count
        self._calls: dict[torch.Size, int] = defaultdict(int)
        self._replays: dict[torch.Size, Product] = {}

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to one flat vector."""
        return [self._multiply(self._linearization.apply, tangents[0], count=1)]

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Apply the matrix to several flat vectors at once."""
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
        self._calls[vectors.shape] += 1
        if self._calls[vectors.shape] == 2:
            needed = count * self._bytes_per_column + vectors.nbytes + products.nbytes
            replay = self._recorder.record(run, vectors, products, needed)
            if replay is not None:
                self._replays[vectors.shape] = replay
        return products


@contextlib.contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """Use a side stream of a GPU while the context is active, because the default stream cannot be captured.

    Only one thread at a time can enter the context. Autograd runs the backward pass on the stream of the forward pass,
    so both linearizations and products must be computed within the context. On the CPU, the context does nothing.
    """
    if device.type != "cuda":
        yield
        return
    side, lock = _stream(device)
    with lock:  # operations of another thread on this stream would be captured as well
        outer = torch.cuda.current_stream(device)
        side.wait_stream(outer)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            outer.wait_stream(side)


@functools.cache
def _stream(device: torch.device) -> tuple[torch.cuda.Stream, threading.RLock]:
    return torch.cuda.Stream(device), threading.RLock()


def _synchronizes(compute: Callable[[], object]) -> bool:
    """Return True if the host waits for the GPU during a computation. Such a computation cannot be captured."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            compute()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _capture(compute: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """Capture a computation as a CUDA graph, and return a function that replays the graph.

    Every replay overwrites and returns the same tensor. Call this function within `capture_stream`. Temporary
    tensors are allocated in `pool`, a memory pool that exists as long as one of its graphs exists.
    """
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # a warning if an error ends the capture early
        # Clear the cuBLAS workspace, so that cuBLAS allocates a new one in the pool. A workspace that another graph of
        # this stream allocated would be freed together with that graph.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # thread_local: other threads, such as a data loader that pins memory, may call CUDA during the capture.
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
    """End a failed capture, and reset PyTorch's allocator and generators, which a failure leaves in capture mode."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    nothing = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):
        nothing.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        nothing.capture_end()
