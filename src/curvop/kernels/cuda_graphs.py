"""Products of kept linearizations, recorded as CUDA graphs."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from curvop.kernels.cuda import on_own_stream, recorded, waits
from curvop.kernels.kernel import Kernel, Linearization

__all__ = ["Recorder"]

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
