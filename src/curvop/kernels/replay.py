"""Products of kept linearizations, recorded as CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvop.kernels.cuda_graphs import on_own_stream, recorded
from curvop.kernels.kernel import Kernel, Linearization

__all__ = ["Recorder"]

Product = Callable[[Tensor], Tensor]


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
        self._static: dict[tuple[torch.Size, torch.Size], tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_static": {}}

    def watching(self, linearization: Linearization, kernel: Kernel) -> Linearization:
        """Return a linearization that is kept as one whose products are recorded, where it is on a GPU."""
        return Replayed(linearization, kernel, self) if linearization.loss.is_cuda else linearization

    def record(self, run: Product, vector: Tensor, product: Tensor) -> Product | None:
        """Return what does as `run` does, None where it cannot be recorded.

        Parameters
        ----------
        run : callable
            ``vector -> product`` on a GPU, which ran before: what it does once is not recorded.
        vector, product : Tensor
            An example, by which the recorded product is judged.
        """
        if self._gave_up or not torch.isfinite(product).all():
            return None
        try:
            replay = self._recorded(run, vector, product)
            difference = torch.linalg.vector_norm(replay(vector) - product)
            if difference <= torch.finfo(product.dtype).eps ** 0.5 * torch.linalg.vector_norm(product):
                return replay
            reason = "the recorded product differs"
        except RuntimeError as error:  # what waits for the device, or computes on the host
            reason = " ".join(str(error).split())[:300]
        self._gave_up = True
        if self._warns:
            warnings.warn(f"products are not recorded as CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)
        return None

    def _recorded(self, run: Product, vector: Tensor, product: Tensor) -> Product:
        if not self._static:
            self._pool = torch.cuda.graph_pool_handle()
        sizes = vector.shape, product.shape
        if sizes not in self._static:
            self._static[sizes] = torch.empty_like(vector), torch.empty_like(product)
        static, result = self._static[sizes]
        with on_own_stream(vector.device):
            again = recorded(lambda: result.copy_(run(static)), self._pool)

        def replay(vector: Tensor) -> Tensor:
            static.copy_(vector)
            return again().clone()  # the next product of any batch is written to the same place

        return replay


class Replayed(Linearization):
    """A linearization that is kept, and whose products are recorded.

    Its first is computed as it is, and recorded then: what is done once was done for the product before.
    """

    whole = True

    def __init__(self, linearization: Linearization, kernel: Kernel, recorder: Recorder) -> None:
        super().__init__(linearization.loss, linearization.weight, linearization.roots, linearization.tensors)
        self._linearization, self._cols, self._rows = linearization, kernel.cols, kernel.rows
        self._recorder = recorder
        self._replay: Product | None = None
        self._tried = False

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply one vector, which comes whole."""
        [vector] = tangents
        if self._replay is not None:
            return [self._replay(vector)]
        product = self._run(vector)
        if not self._tried:
            self._tried = True
            self._replay = self._recorder.record(self._run, vector, product)
        return [product]

    def apply_many(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Multiply several vectors at once, which are not recorded."""
        return [self._multiplied(self._linearization.apply_many, *tangents)]

    def _run(self, vector: Tensor) -> Tensor:
        return self._multiplied(self._linearization.apply, vector)

    def _multiplied(self, multiply: Callable[[Sequence[Tensor]], Sequence[Tensor | None]], vectors: Tensor) -> Tensor:
        if self._linearization.whole:
            [product] = multiply([vectors])
            assert product is not None
            return product
        return self._rows.join(multiply(self._cols.split(vectors)), vectors)
