"""CUDA graphs: the kernels of a product are recorded once and launched together.

Where a model is small, a GPU waits for the host to launch the next kernel; a recorded product is one launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Recorder"]

Product = Callable[[Tensor], Tensor]


class Recorder:
    """Records products of one size, which take turns in the same memory."""

    def __init__(self) -> None:
        self._gave_up = False
        self._static: tuple[Tensor, Tensor] | None = None

    def record(self, run: Product, vector: Tensor, product: Tensor) -> Product | None:
        """Return what does as `run` does, None where it cannot be recorded.

        Parameters
        ----------
        run : callable
            ``vector -> product`` on a GPU, which ran before: what it does once is not recorded.
        vector, product : Tensor
            An example, by which the recorded product is judged.
        """
        if self._gave_up:
            return None
        try:
            replay = self._recorded(run, vector, product)
            if torch.allclose(replay(vector), product, rtol=1e-3, atol=1e-3 * float(product.abs().max())):
                return replay
            reason = "the recorded product differs"
        except RuntimeError as error:  # what waits for the device, or computes on the host
            reason = " ".join(str(error).split())[:300]
        self._gave_up = True
        warnings.warn(f"products are not recorded as CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)
        return None

    def _recorded(self, run: Product, vector: Tensor, product: Tensor) -> Product:
        if self._static is None:
            self._static = torch.empty_like(vector), torch.empty_like(product)
            self._pool = torch.cuda.graph_pool_handle()
        static, result = self._static
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a loader's that pins memory, may ask the device for something meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result.copy_(run(static))

        def replay(vector: Tensor) -> Tensor:
            static.copy_(vector)
            graph.replay()
            return result.clone()  # the next product of any batch is written to the same place

        return replay
