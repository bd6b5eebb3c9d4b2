"""Operators whose products are sums over batches, with their settings and the cost of a product.

An ``Engine`` computes the products of an `EngineLinearOperator` as sums over the batches of an objective. The operator
converts arrays and tensors to the device and dtype of the parameters. If memory runs out, the operator releases the
cached linearizations and tries again once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.kernels.compiled import CompiledKernel
from curvop.kernels.engine import Engine, apply_in_one_pass
from curvop.kernels.errors import NonDeterministicObjectiveError, NonFiniteProductError
from curvop.kernels.gradient import gradient_and_loss, plain_gradient_seconds
from curvop.kernels.inspection import Inspection, inspect
from curvop.kernels.kernel import Kernel
from curvop.kernels.memory import Budget, out_of_memory, peak_rise
from curvop.kernels.objective_fingerprint import digest, objective_parts, objective_state
from curvop.kernels.parameters import Layout
from curvop.kernels.precision import Precision
from curvop.kernels.reference import Route, other_routes
from curvop.kernels.user_warnings import warn_user
from curvop.operators.base import Rows, TensorLinearOperator
from curvop.operators.progress import Progress
from curvop.operators.summaries import Summary
from curvop.operators.transfer import TORCH_DTYPES, Staging, aligned, packed
from curvop.operators.validation import available_bytes, integer

__all__ = [
    "TORCH_DTYPES",
    "UNTRUSTED",
    "Cost",
    "EngineLinearOperator",
    "NonFiniteProductError",
    "Settings",
    "digest",
    "medians",
    "products_in_one_pass",
    "seconds",
]

T = TypeVar("T")

#: Exceptions that are raised if the products of an operator are not finite or not reproducible.
UNTRUSTED = (NonDeterministicObjectiveError, NonFiniteProductError)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Validated settings of an operator and its blocks. The constructors of the operators document the settings."""

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
            raise ValueError(f"cache is {self.cache!r}, but must be a number of bytes, 0 to keep nothing, or 'auto'")
        if self.columns != "auto" and not (isinstance(self.columns, int) and self.columns >= 1):
            raise ValueError(f"columns is {self.columns!r}, but must be a number of columns >= 1, or 'auto'")
        if self.engine not in ("autograd", "compiled"):
            raise ValueError(f"engine is {self.engine!r}, but must be 'autograd' or 'compiled'")
        object.__setattr__(self, "dtype", dtype)
        if not isinstance(self.progress, Progress):  # `dataclasses.replace` passes the converted value
            object.__setattr__(self, "progress", Progress(self.progress))


_FEWER_COLUMNS = "multiply with fewer columns at a time"


class EngineLinearOperator(TensorLinearOperator):
    """Base class of operators whose products are sums over the batches of an objective."""

    def _set_up_engines(self, kernel: Kernel, settings: Settings) -> None:
        """Create the engines that compute products with the operator and its adjoint. Constructors call this method."""
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

    def _details(self) -> list[str]:
        details = [*super()._details(), f"{self._settings.engine} engine"]
        with contextlib.suppress(Exception):  # the user's class of data can raise any error
            if batches := len(self._objective):
                details.insert(-1, f"{batches:,} batch{'es' * (batches > 1)}")
        return details

    @property
    def device(self) -> torch.device:
        """Device of the parameters, on which products are computed. Tensors on this device are not copied."""
        return self._objective.device

    @property
    def epsilon(self) -> float:
        """Machine epsilon of the lowest precision used in a product.

        The value is derived from the dtype of the parameters, from autocast, and from PyTorch's settings that allow
        TF32 or bfloat16 in float32 matrix products and convolutions, without a pass over the data. Call `inspect` to
        also detect dtype conversions in the model and the loss function.
        """
        return self._precision().epsilon

    def _precision(self) -> Precision:
        return self._objective.precision(next(iter(self._objective.params.values())))

    def cost(self, repeats: int = 5) -> Cost:
        """Measure the time and memory of one product.

        Parameters
        ----------
        repeats : int, default 5
            Number of timed products. The same number of gradients is timed, and products and gradients alternate. The
            timed products do not increase `num_products`.

        Returns
        -------
        Cost
            Time of a product in seconds and relative to the time of a gradient, memory of the cached linearizations,
            peak memory, and compile time. ``print`` shows a summary in one line.

        Raises
        ------
        ValueError
            If ``repeats`` is not an integer >= 1.

        Notes
        -----
        The method computes ``repeats + 2`` products and ``repeats + 1`` gradients. The first product is not timed,
        because it linearizes batches and compiles programs if necessary.
        """
        integer("repeats", repeats, 1)
        vector = np.ones((1, self.shape[1]), dtype=self.dtype)
        self._apply(vector)  # linearizes and caches batches if necessary
        peak = peak_rise(lambda: self._apply(vector), self._objective.device)
        self._plain_gradient_seconds()  # the first gradient takes longer
        product, gradient = medians(
            [lambda: seconds(lambda: self._apply(vector)), self._plain_gradient_seconds], repeats
        )
        lowest = self._precision()
        reduced = f"{lowest.cause} (epsilon {lowest.epsilon:.1e}): {lowest.remedy}" if lowest.cause else ""
        return Cost(product, product / gradient, *self._engine.kept(), peak, self._engine.kernel.seconds, reduced)

    def fingerprint(self, data: bool = True) -> dict[str, str]:
        """Return a dict of digests of all inputs that determine the matrix.

        Compare two fingerprints to check that stored results belong to this matrix, or to find the inputs that differ.

        Parameters
        ----------
        data : bool, default True
            Whether to include digests of the data, which are computed in one pass over the data.

        Returns
        -------
        parts : dict of str to str
            Class, shape and dtype of the operator, and the digests. There is one digest for each parameter, one for the
            model (structure, code, other parameters and buffers), one for the loss function, and one for each batch.
            The digests do not depend on the process or on the device. The settings ``engine``, ``cache`` and
            ``columns`` are not included.

        Notes
        -----
        The method does not compute a product. The digest of a Python function covers its code, its default arguments
        and the values in its closure. It also covers those global variables used by the function that are numbers,
        tensors, neural network modules, or functions defined in the same file.
        """
        kernel, settings = self._engine.kernel, getattr(self, "_kernel", None)
        parts = {"operator": type(self).__name__, "shape": str(tuple(self.shape)), "dtype": str(self.dtype)}
        parts |= {"rows": digest(kernel.rows.names), "cols": digest(kernel.cols.names)}
        if isinstance(settings, functools.partial):
            parts |= {name: str(value) for name, value in settings.keywords.items()}
        with torch.inference_mode(False):
            return parts | objective_parts(self._objective, data)

    def state(self) -> tuple[object, ...]:
        """Return a token that changes if the parameters, the model or a list of batches is modified.

        Returns
        -------
        token : tuple
            Compare tokens with ``==``, and only within one process. If two tokens are equal, the matrix did not change
            between the two calls, as far as this can be detected without reading the data.

        Notes
        -----
        The cost is one pass over the parameters.
        """
        with torch.inference_mode(False):
            return objective_state(self._objective)

    def inspect(self) -> Inspection:
        """Examine the model, the loss and the data in two passes over the data.

        `curvop.check` presents the result as a report.

        Returns
        -------
        Inspection
            The findings about precision, randomness, batch normalization, the weights of the batches, and parameters
            that do not affect the loss. The result also describes changes of the loss and of the order of the data
            between the two passes.
        """
        kernel = self._engine.kernel
        names = list(dict.fromkeys((*kernel.rows.names, *kernel.cols.names)))
        with torch.inference_mode(False):
            return inspect(self._objective, names)

    def other_routes(self, vector: NDArray[Any]) -> list[Route]:
        """Compute a product by independent methods.

        `curvop.check` compares the products of the operator with these results.

        Parameters
        ----------
        vector : ndarray, shape (N,)
            Vector to multiply.

        Returns
        -------
        list of Route
            One entry for each method that computes the product, and one entry for the gradient. One method is forward
            mode (in float64, if torch supports it). Another method computes finite differences of the unmodified model
            and loss function.

        Notes
        -----
        The computation takes three passes over the data, costs about fifteen gradients, and uses at most half of the
        free memory.
        """
        tensor = torch.tensor(vector, dtype=torch.float64, device=self.device)
        with torch.inference_mode(False):
            return other_routes(self._engine.kernel, tensor, available_bytes(self.device))

    def release_cache(self) -> None:
        """Free the memory of the batches that are kept between products."""
        for engine in (self._engine, self._adjoint_engine):
            engine.forget()

    def _gradient(self) -> tuple[Tensor, float]:
        """Return (gradient, loss). The gradient is with respect to the parameters in ``_parameters()``."""
        layout = self._parameters()
        with torch.inference_mode(False):
            gradient = torch.empty(layout.size, dtype=TORCH_DTYPES[self.dtype], device=self._objective.device)
            return gradient, self._retry_on_out_of_memory(
                lambda: gradient_and_loss(self._objective, layout.names, gradient)
            )

    def _plain_gradient_seconds(self) -> float:
        with torch.inference_mode(False):
            return self._retry_on_out_of_memory(
                lambda: plain_gradient_seconds(self._objective, self._parameters().names)
            )

    def _parameters(self) -> Layout:
        """Return the layout of the row parameters, or that of the column parameters if the rows are not parameters."""
        kernel = self._engine.kernel
        return kernel.rows if kernel.rows.names else kernel.cols

    def _retry_on_out_of_memory(self, compute: Callable[[], T], remedy: str = "use smaller batches") -> T:
        """Return ``compute()``. If memory runs out, release the cached linearizations and try again once."""
        message = ""
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            keeping = [engine for engine in {self._engine, self._adjoint_engine} if engine.kept()[0]]
            if not keeping:
                error.add_note(f"the product does not fit into memory, although no batch is kept: {remedy}")
                raise
            for engine in keeping:
                message = engine.release_memory(error) or message
        # Try again outside the ``except`` block. Within the block, the traceback keeps the tensors of the first attempt
        # in memory.
        if message:
            warn_user(message)
        return compute()

    def _adjoint(self) -> Self:
        if self._adjoint_engine is self._engine:
            return self
        adjoint = copy.copy(self)  # shares the counter, both engines and their caches
        adjoint._engine, adjoint._adjoint_engine = self._adjoint_engine, self._engine
        adjoint.shape = self.shape[::-1]
        return adjoint

    def _identity(self) -> tuple[Any, ...]:
        return type(self).__name__, id(self._engine)

    def _apply(self, rows: Rows) -> Rows:
        with torch.inference_mode(False):
            vectors, products = self._vectors_and_products(rows)
            with self._settings.progress.counting(vectors.shape[0]) as tick:
                self._engine.apply(vectors, products, tick)
            return self._delivered(products, rows)

    def _vectors_and_products(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return (vectors, products): `rows` on the device of the parameters, and a tensor for the products."""
        move = self._moved_tensor if isinstance(rows, Tensor) else self._moved_array
        return self._retry_on_out_of_memory(lambda: move(cast("Any", rows)), _FEWER_COLUMNS)

    def _moved_tensor(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        device, dtype = self._objective.device, torch.promote_types(rows.dtype, self._objective.dtype)
        if rows.device.type == device.type == "cpu":
            vectors = packed(rows, self._objective.dtype)
        else:
            vectors = aligned(rows.to(device, self._objective.dtype).contiguous())
        return vectors, torch.empty(rows.shape[0], self.shape[0], device=device, dtype=dtype)

    def _moved_array(self, rows: NDArray[Any]) -> tuple[Tensor, Tensor]:
        device, dtype = self._objective.device, self._product_dtype(rows.dtype)
        vectors = self._staging.to_device(rows, device, self._objective.dtype)
        if device.type == "cpu":
            return vectors, torch.from_numpy(np.empty((len(rows), self.shape[0]), dtype=dtype))
        return vectors, torch.empty(len(rows), self.shape[0], device=device, dtype=TORCH_DTYPES[dtype])

    def _delivered(self, products: Tensor, rows: Rows) -> Rows:
        """Convert products to the type of `rows`: an array, or a tensor on the same device."""
        if isinstance(rows, Tensor):
            return self._retry_on_out_of_memory(lambda: products.to(rows.device, rows.dtype), _FEWER_COLUMNS)
        if products.device.type == "cpu":
            return products.numpy()
        return self._retry_on_out_of_memory(lambda: self._staging.to_array(products), _FEWER_COLUMNS)


def products_in_one_pass(operators: Sequence[EngineLinearOperator], rows: Rows) -> dict[int, Rows]:
    """Compute products of several operators in one pass over the data.

    Operators can share a pass only if they have the same data and cache no batches.

    Parameters
    ----------
    operators : sequence of EngineLinearOperator
        Different operators with the same number of columns. Operators that cannot share a pass are skipped.
    rows : array or Tensor, shape (K, N)
        Vectors to multiply.

    Returns
    -------
    dict
        Maps the ``id()`` of each operator that was not skipped to its products. The products are added to the
        operator's counter.
    """
    groups: dict[Any, list[EngineLinearOperator]] = {}
    for A in operators:
        if not A._engine.keeps_nothing or type(A)._apply is not EngineLinearOperator._apply or 0 in A.shape:
            continue
        group = groups.setdefault((id(A._objective.data), A.device), [])
        if all(A._objective is not other._objective for other in group):  # one pass at a time per objective
            group.append(A)
    found: dict[int, Rows] = {}
    for group in groups.values():
        if len(group) == 1:
            continue
        for A in group:
            A._check_entries(rows)
        with torch.inference_mode(False), contextlib.ExitStack() as stack:
            pairs = [A._vectors_and_products(rows) for A in group]
            ticks = [stack.enter_context(A._settings.progress.counting(len(rows))) for A in group]
            vectors, products = zip(*pairs, strict=True)
            if apply_in_one_pass([A._engine for A in group], vectors, products, ticks):
                for A, product in zip(group, products, strict=True):
                    A._counter.total += len(rows)
                    found[id(A)] = A._delivered(product, rows)
    return found


# Cost of a product.


@dataclasses.dataclass(frozen=True, repr=False)
class Cost(Summary):
    """Measured time and memory of one product with an operator, returned by ``A.cost()``.

    Attributes
    ----------
    seconds : float
        Median time, in seconds, of a product with one vector, after all batches that fit into the budget have been
        cached.
    gradients : float
        ``seconds`` divided by the median time of a gradient over the same data. The gradient is computed for all
        batches by ``torch.autograd.grad``, which differentiates the loss with respect to the operator's parameters. The
        model and the loss function are not modified. The time to read the data is not included. For a Jacobian, the
        loss is the sum of the predictions.
    kept_bytes : int
        Size of the cached linearizations in bytes.
    kept_share : float
        Fraction of the batches that are cached. All other batches are linearized again in every product.
    peak_bytes : int or None
        Largest amount of additional memory in bytes that a product allocates. The cached linearizations are not
        included. The value is None if the amount is unknown.
    compile_seconds : float
        Time in seconds spent on compilation so far. The time is 0 for the autograd engine.
    reduced_precision : str
        What lowers the precision of products below that of the parameters, such as TF32 on a GPU, and how to compute in
        full precision. An empty string if nothing does.

    Notes
    -----
    Counted in floating-point operations, a product with a Hessian costs at most 2.0 gradients for cached batches and
    3.0 gradients for other batches. If the first layer is large, products cost less. For small models, the time is
    dominated by the overhead of calls to torch.

    Examples
    --------
    Compare the cost of a block with that of the whole matrix:

    >>> import torch
    >>> from curvop import HessianLinearOperator
    >>> model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
    >>> data = [(torch.randn(64, 20), torch.randn(64, 1))]
    >>> H = HessianLinearOperator(model, torch.nn.MSELoss(), dict(model.named_parameters()), data)
    >>> cost = H.cost()
    >>> last = H.block(["2.weight", "2.bias"]).cost()
    >>> last.kept_bytes < cost.kept_bytes, cost.kept_share
    (True, 1.0)
    """

    seconds: float
    gradients: float
    kept_bytes: int
    kept_share: float
    peak_bytes: int | None
    compile_seconds: float
    reduced_precision: str = ""

    def __str__(self) -> str:
        if not self.kept_share:
            share = "no"
        elif self.kept_share < 1:
            share = f"{self.kept_share:.0%} of the"
        else:
            share = "all"
        peak = "" if self.peak_bytes is None else f"; {self.peak_bytes / 1e6:.1f} MB more at the peak"
        compiled = f"; compiled in {self.compile_seconds:.1f} s" if self.compile_seconds else ""
        reduced = f"; {self.reduced_precision}" if self.reduced_precision else ""
        return (
            f"one product: {self.seconds * 1e3:.3g} ms ({self.gradients:.1f} gradients); "
            f"{share} batches cached, {self.kept_bytes / 1e6:.1f} MB{peak}{compiled}{reduced}"
        )

    def _summary_table(self) -> list[tuple[str, ...]]:
        peak = "unknown" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.1f} MB"
        return [
            ("one product", "gradients", "batches cached", "cache", "memory of a product", "compilation"),
            (
                f"{self.seconds * 1e3:.3g} ms",
                f"{self.gradients:.1f}",
                f"{self.kept_share:.0%}",
                f"{self.kept_bytes / 1e6:.1f} MB",
                peak,
                f"{self.compile_seconds:.1f} s",
            ),
        ]


def seconds(function: Callable[[], object]) -> float:
    """Call a function and return its run time in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(clocks: Sequence[Callable[[], float]], repeats: int) -> list[float]:
    """Call each function ``repeats`` times, and return the median result of each function.

    The functions are called alternately, so that other programs on the machine slow down all of them equally.
    """
    rounds = [[clock() for clock in clocks] for _ in range(repeats)]
    return [statistics.median(results) for results in zip(*rounds, strict=True)]
