"""CUDA graphs: what launches many kernels is recorded once, and launches them together.

Where a model is small, a GPU waits for the host to launch the next kernel; what is recorded is one launch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["on_own_stream", "recorded"]


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
