"""What a GPU asks for: streams, and CUDA graphs.

Where a model is small, a GPU waits for the host to launch the next kernel; what is recorded as a graph is one launch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["begin_on", "on_own_stream", "recorded", "waits"]


@functools.cache
def begin_on(device: torch.device) -> None:
    """Let autograd's own thread for a GPU make its first step with what no library is for: cuBLAS would warn there."""
    if device.type == "cuda":
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.zeros(1, device=device, requires_grad=True)
            torch.autograd.grad(leaf.exp().sum(), leaf)


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
