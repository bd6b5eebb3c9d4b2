"""What a GPU asks for: streams, and CUDA graphs.

Where a model is small, a GPU waits for the host to launch the next kernel; what is recorded as a graph is one launch.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["begin_on", "on_own_stream", "recorded"]


@functools.cache
def begin_on(device: torch.device) -> None:
    """Let autograd's own thread for a GPU make its first step with what no library is for: cuBLAS would warn there."""
    if device.type == "cuda":
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.zeros(1, device=device, requires_grad=True)
            torch.autograd.grad(leaf.exp().sum(), leaf)


@contextlib.contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """Let a GPU compute on a stream that can be recorded, which the default one cannot.

    Autograd computes a product on the stream that the forward pass was on: all of it has to be within.
    """
    if device.type != "cuda":
        yield
        return
    outer, own = torch.cuda.current_stream(device), _stream(device)
    own.wait_stream(outer)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        outer.wait_stream(own)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def recorded(compute: Callable[[], Tensor], pool: Any = None) -> Callable[[], Tensor]:
    """Return what computes the same tensor again, in the same place; within `on_own_stream`.

    Raises
    ------
    RuntimeError
        Where the host takes part in it.
    """
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # where an error ends it early
        # Other threads, such as a loader's that pins memory, may ask the device for something meanwhile.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            result = compute()
        finally:
            graph.capture_end()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
