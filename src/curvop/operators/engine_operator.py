"""Operators whose products an engine computes: settings, the way to the device and back, cost."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.kernels.compiled import CompiledKernel
from curvop.kernels.engine import Engine
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.kernels.gradient import gradient_and_loss, plain_gradient_seconds
from curvop.kernels.inspection import Inspection, inspect
from curvop.kernels.kernel import Kernel
from curvop.kernels.memory import Budget, out_of_memory, peak_rise
from curvop.kernels.objective_fingerprint import digest, objective_parts, objective_state
from curvop.kernels.parameters import Layout
from curvop.kernels.reference import Route, other_routes
from curvop.operators.base import Rows, TensorLinearOperator
from curvop.operators.progress import Progress
from curvop.operators.transfer import Staging, aligned
from curvop.operators.validation import available_bytes, whole_number

__all__ = [
    "TORCH_DTYPES",
    "UNTRUSTED",
    "Cost",
    "EngineLinearOperator",
    "NonFiniteProductError",
    "Settings",
    "digest",
    "medians",
    "seconds",
]

T = TypeVar("T")

#: What a product raises that cannot be trusted.
UNTRUSTED = (NonDeterministicObjectiveError, NonFiniteProductError)

TORCH_DTYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a curvature operator computes; the same for an operator and its blocks."""

    dtype: Any
    cache: float | str
    engine: str
    columns: int | str
    progress: Any

    def __post_init__(self) -> None:
        try:
            dtype = np.dtype(self.dtype)
        except TypeError:
            dtype = None
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, but must be numpy.float32 or numpy.float64")
        if self.cache != "auto" and not (isinstance(self.cache, int | float | np.number) and self.cache >= 0):
            raise ValueError(f"cache is {self.cache!r}, but must be a number of bytes, 0 for none, or 'auto'")
        if self.columns != "auto" and not (isinstance(self.columns, int) and self.columns >= 1):
            raise ValueError(f"columns is {self.columns!r}, but must be a number of columns from 1 on, or 'auto'")
        if self.engine not in ("autograd", "compiled"):
            raise ValueError(f"engine is {self.engine!r}, but must be 'autograd' or 'compiled'")
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "progress", Progress(self.progress))


_FEWER = "multiply with fewer columns at a time"


class EngineLinearOperator(TensorLinearOperator):
    """An operator whose products an engine sums over the batches of an objective."""

    def _set_up_engines(self, kernel: Kernel, settings: Settings) -> None:
        """Set the engines up; called in ``__init__``."""
        if settings.engine == "compiled":
            kernel = CompiledKernel(kernel)
        self._objective = kernel.objective
        self._settings = settings
        self._staging = Staging()
        budget = Budget(settings.cache)
        self._engine = Engine(kernel, budget, settings.columns)
        self._adjoint_engine = self._engine
        if not kernel.symmetric or kernel.rows.names != kernel.cols.names:
            self._adjoint_engine = Engine(kernel.adjoint(), budget, settings.columns)

    @property
    def device(self) -> torch.device:
        """That of the parameters: tensors that are there need no copy."""
        return self._objective.device

    @property
    def epsilon(self) -> float:
        """Of the coarsest numbers that a product is computed in, as parameters, autocast and TF32 tell without a pass.

        What the model or the loss casts to besides, `inspect` sees.
        """
        return self._objective.epsilon(next(iter(self._objective.params.values())))

    def cost(self, repeats: int = 5) -> Cost:
        """Measure the time and memory of a product, in units of a plain gradient over the same data.

        Parameters
        ----------
        repeats : int
            Number of products and of gradients that are timed, in turn; none of them is counted in `num_products`.

        Returns
        -------
        Cost
            Prints as one sentence.
        """
        whole_number("repeats", repeats, 1)
        vector = np.ones((1, self.shape[1]), dtype=self.dtype)
        self._apply(vector)  # makes what is kept
        peak = peak_rise(lambda: self._apply(vector), self._objective.device)
        self._plain_gradient_seconds()  # the first takes longer
        product, gradient = medians(
            [lambda: seconds(lambda: self._apply(vector)), self._plain_gradient_seconds], repeats
        )
        return Cost(product, product / gradient, *self._engine.kept(), peak, self._engine.kernel.seconds)

    def fingerprint(self, data: bool = True) -> dict[str, str]:
        """Return what the matrix depends on, by name, as digests: parameters, model, loss function, data, settings.

        They are the same in every process and on every device; how a product is computed (`engine`, `cache`,
        `columns`) is not among them. It computes no product, and reads the data once unless `data` is False, which
        leaves its parts out. `curvop.fingerprint` says what it sees of functions.
        """
        kernel, settings = self._engine.kernel, getattr(self, "_kernel", None)
        parts = {"operator": type(self).__name__, "shape": str(tuple(self.shape)), "dtype": str(self.dtype)}
        parts |= {"rows": digest(kernel.rows.names), "cols": digest(kernel.cols.names)}
        if isinstance(settings, functools.partial):
            parts |= {name: str(value) for name, value in settings.keywords.items()}
        with torch.inference_mode(False):
            return parts | objective_parts(self._objective, data)

    def state(self) -> tuple[object, ...]:
        """Return a token, to be compared in this process, that changes where a parameter or the model is written to.

        It costs one pass over the parameters. Products of equal tokens are of the same matrix, as far as it can be
        told without reading the data.
        """
        with torch.inference_mode(False):
            return objective_state(self._objective)

    def inspect(self) -> Inspection:
        """Look at the model, the loss and the data, by two passes over it; `curvop.check` reports what is found."""
        kernel = self._engine.kernel
        names = list(dict.fromkeys((*kernel.rows.names, *kernel.cols.names)))
        with torch.inference_mode(False):
            return inspect(self._objective, names)

    def other_routes(self, vector: NDArray[Any]) -> list[Route]:
        """Return products with `vector` ``(N,)`` by other routes, and the gradient; `curvop.check` compares with them.

        In forward mode, where torch has it, in float64; and by differences of the user's own code, called as the user
        calls it. They take three passes over the data, of fifteen or so gradients, and no more than the memory that
        may be used.
        """
        there = torch.tensor(vector, dtype=torch.float64, device=self.device)
        with torch.inference_mode(False):
            return other_routes(self._engine.kernel, there, available_bytes(self.device))

    def _gradient(self) -> tuple[Tensor, float]:
        """Return the gradient by the parameters of the rows, or else of the columns, and the loss."""
        layout = self._parameters()
        with torch.inference_mode(False):
            gradient = torch.zeros(layout.size, dtype=TORCH_DTYPES[self.dtype], device=self._objective.device)
            return gradient, self._retry_on_out_of_memory(
                lambda: gradient_and_loss(self._objective, layout.names, gradient)
            )

    def _plain_gradient_seconds(self) -> float:
        with torch.inference_mode(False):
            return self._retry_on_out_of_memory(
                lambda: plain_gradient_seconds(self._objective, self._parameters().names)
            )

    def _parameters(self) -> Layout:
        """Return the parameters of the rows, or of the columns if the rows are none."""
        kernel = self._engine.kernel
        return kernel.rows if kernel.rows.names else kernel.cols

    def _retry_on_out_of_memory(self, compute: Callable[[], T], remedy: str = "let data yield smaller batches") -> T:
        """Return ``compute()``; where memory runs out, once more without what is kept for products."""
        told = ""
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            keeping = [engine for engine in {self._engine, self._adjoint_engine} if engine.kept()[0]]
            if not keeping:
                error.add_note(f"it does not fit though nothing is kept: {remedy}")
                raise
            for engine in keeping:
                told = engine.release_memory(error) or told
        # Out of the handler, whose traceback holds what the first try has made.
        if told:
            warnings.warn(told, RuntimeWarning, stacklevel=2)
        return compute()

    def _adjoint(self) -> Self:
        if self._adjoint_engine is self._engine:
            return self
        adjoint = copy.copy(self)  # shares the counter and both engines, with what they keep
        adjoint._engine, adjoint._adjoint_engine = self._adjoint_engine, self._engine
        adjoint.shape = self.shape[::-1]
        return adjoint

    def _apply(self, rows: Rows) -> Rows:
        with torch.inference_mode(False):
            return self._apply_tensor(rows) if isinstance(rows, Tensor) else self._apply_array(rows)

    def _apply_tensor(self, rows: Tensor) -> Tensor:
        here, dtype = self._objective.device, torch.promote_types(rows.dtype, self._objective.dtype)

        def hand_over() -> tuple[Tensor, Tensor]:
            vectors = aligned(rows.to(here, self._objective.dtype).contiguous())
            return vectors, torch.empty(len(rows), self.shape[0], device=here, dtype=dtype)

        vectors, products = self._retry_on_out_of_memory(hand_over, _FEWER)
        self._run(vectors, products)
        return self._retry_on_out_of_memory(lambda: products.to(rows.device, rows.dtype), _FEWER)

    def _apply_array(self, rows: NDArray[Any]) -> NDArray[Any]:
        dtype = self._product_dtype(rows.dtype)
        here = self._objective.device

        def hand_over() -> tuple[Tensor, Tensor]:
            given = rows
            if not (rows.dtype in TORCH_DTYPES and rows.flags.c_contiguous and rows.flags.writeable):  # as torch wants
                given = np.require(rows, _stage_dtype(self._objective.dtype), ["C", "W"])
            if here.type == "cpu":  # by torch, which converts on all cores
                vectors = aligned(torch.from_numpy(given).to(self._objective.dtype))
                return vectors, torch.from_numpy(np.empty((len(rows), self.shape[0]), dtype=dtype))
            vectors = self._staging.to_device(given, here, self._objective.dtype)
            return vectors, torch.empty(len(rows), self.shape[0], device=here, dtype=TORCH_DTYPES[dtype])

        vectors, products = self._retry_on_out_of_memory(hand_over, _FEWER)
        self._run(vectors, products)
        if here.type == "cpu":
            return products.numpy()
        return self._retry_on_out_of_memory(lambda: self._staging.to_array(products), _FEWER)

    def _run(self, vectors: Tensor, products: Tensor) -> None:
        with self._settings.progress.of(len(vectors)) as tick:
            self._engine.apply(vectors, products, tick)


def _stage_dtype(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32  # NumPy has no bfloat16


# What one product costs.


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one product of an operator costs, as measured by `cost` of the operator.

    Attributes
    ----------
    seconds : float
        Median time of a product with one vector, with everything kept that the budget allows.
    gradients : float
        ``seconds`` in units of a plain gradient over the same data: the median time of ``torch.autograd.grad`` of the
        loss by the operator's parameters, with the model and the loss called as a user calls them, summed over the
        batches; the time to read the data does not count. (Of a Jacobian, the loss is the sum of the predictions.)
        Counted in floating-point operations, a product of a Hessian takes at most 2.0 with a kept linearization and 3.0
        with a fresh one, less if the first layer is large; small models take what calls of torch take.
    kept_bytes : int
        Bytes that kept linearizations retain.
    kept_share : float
        Share of the batches that are kept; the others are linearized again in every product.
    peak_bytes : int or None
        Rise of memory above what is kept during a product; None if it is not known.
    compile_seconds : float
        Time that compiling has taken so far, 0 for the autograd engine.
    """

    seconds: float
    gradients: float
    kept_bytes: int
    kept_share: float
    peak_bytes: int | None
    compile_seconds: float

    def __str__(self) -> str:
        share = f"{self.kept_share:.0%} of the" if 0 < self.kept_share < 1 else "all" if self.kept_share else "no"
        peak = "" if self.peak_bytes is None else f"; {self.peak_bytes / 1e6:.1f} MB more at the peak"
        compiled = f"; compiled in {self.compile_seconds:.1f} s" if self.compile_seconds else ""
        return (
            f"one product: {self.seconds * 1e3:.3g} ms ({self.gradients:.1f} gradients); "
            f"{share} batches cached, {self.kept_bytes / 1e6:.1f} MB{peak}{compiled}"
        )


def seconds(function: Callable[[], object]) -> float:
    """Return the time that a function takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(clocks: Sequence[Callable[[], float]], repeats: int) -> list[float]:
    """Return the median of what each function returns; they take turns, so that a busy machine is busy for all."""
    rounds = [[clock() for clock in clocks] for _ in range(repeats)]
    return [statistics.median(taken) for taken in zip(*rounds, strict=True)]
