"""The eigen-solvers behind `curvop.spectrum.eigsh`, each a function from a `Task` to what it `Found`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, lobpcg
from scipy.sparse.linalg import eigsh as scipy_eigsh

from curvop.operators.available_memory import check_fits
from curvop.operators.transfer import aligned
from curvop.spectrum.counting import CountedOperator
from curvop.spectrum.missed import search
from curvop.spectrum.noise import measure
from curvop.spectrum.norms import unit_of
from curvop.spectrum.restarted import thick_restart
from curvop.spectrum.timed import TimeUpError

__all__ = ["METHODS", "Found", "Task"]

Array = NDArray[Any]

_MAX_RESTARTS = 1000  # SciPy's 10 N would let a large problem run for ever
_MIN_BASIS = 30  # at a crowded end SciPy's own 20 vectors for a few eigenvalues take twice as many products
_MIN_DEVICE_BASIS = 40  # 30 take twice as many products at the lower end of digits (1,187 to 652)
_ATTEMPTS = 3
_DENSE_SIZE = 2000  # rows up to which the whole matrix is as good as many eigenvalues
_GUARDS = 2  # vectors of LOBPCG more than are wanted: the last ones of a block converge slowly
_CHUNK = 40  # iterations of LOBPCG from one look at the wanted residuals to the next
_LOBPCG_BLOCKS = 16  # blocks of vectors that it holds at its peak, as measured


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be found, and with what; `curvop.spectrum.eigsh` says what each is. `available` is in bytes."""

    A: CountedOperator
    k: int
    which: str
    tol: float
    maxiter: int | None
    ncv: int | None
    v0: Array | None
    rng: np.random.Generator
    available: int

    @property
    def size(self) -> int:
        """N."""
        return int(self.A.shape[0])

    def start(self, columns: int | None = None) -> Array:
        """Return random vectors in the operator's dtype, ``(N,)`` or ``(N, columns)``."""
        shape = (self.size,) if columns is None else (self.size, columns)
        return self.rng.standard_normal(shape).astype(self.A.dtype, copy=False)


@dataclasses.dataclass(frozen=True)
class Found:
    """Eigenpairs, ``(n,)`` and ``(N, n)``, in any order, and how they were found; `note` says what was unusual.

    So many of them are `converged`; `timed_out` says that time was up before all were.
    """

    values: Array
    vectors: Array
    converged: int
    method: str
    note: str = ""
    timed_out: bool = False


def arpack(task: Task) -> Found:
    """Run SciPy's `eigsh`, implicitly restarted Lanczos.

    Where its basis would be the whole space, the matrix is formed instead, which takes N products.
    """
    basis = task.ncv or min(task.size, max(2 * task.k + 1, _MIN_BASIS))
    if basis >= task.size:
        return dense(task, "the basis would have been the whole space")
    basis, note = _basis_that_fits(task, basis, "ARPACK's", 2)
    start = task.start() if task.v0 is None else task.v0
    options = {"ncv": basis, "tol": task.tol, "maxiter": task.maxiter or min(_MAX_RESTARTS, 10 * task.size)}
    for attempt in range(_ATTEMPTS):
        try:
            values, vectors = scipy_eigsh(task.A, task.k, which=task.which, v0=start, rng=task.rng, **options)
        except ArpackNoConvergence as error:
            return Found(error.eigenvalues, error.eigenvectors, len(error.eigenvalues), "arpack", note)
        except ArpackError:
            # It gives up where it cannot go on from its start, in an invariant subspace for one.
            start = task.start()
            if not task.A.matvec(start).any():
                return _zero(task, "arpack")
            if attempt == _ATTEMPTS - 1:
                raise
        else:
            return Found(values, vectors, len(values), "arpack", note)
    raise AssertionError("unreachable")


def _basis_that_fits(task: Task, basis: int, whose: str, share: float) -> tuple[int, str]:
    """Return a smaller basis where the memory asks for it and the user did not ask for this one, and a note of it.

    Each vector of the basis takes `share` vectors, and ``k + 4`` come on top.
    """
    vector, note, others = task.size * task.A.dtype.itemsize, "", task.k + 4
    fitting = max(task.k + 2, int((task.available // vector - others) / share))
    if task.ncv is None and fitting < basis:
        basis, note = fitting, f"ncv is {fitting} for lack of memory"
    check_fits(
        int((share * basis + others) * vector),
        task.available,
        f"{whose} basis of {basis} vectors of {task.size:,} numbers",
        "take a smaller k or ncv, method='lobpcg', or a block of the matrix",
    )
    return basis, note


def lobpcg_blocks(task: Task) -> Found:
    """Run SciPy's `lobpcg` on the operator divided by its norm, as its limits are absolute, with guard vectors.

    It ends at residuals of ``tol`` times the norm, or where the operator's precision or its noise ends. Where time is
    up, the last chunk's are what there is.
    """
    size, k = task.size, task.k
    if size < 5 * k:  # SciPy would form the matrix, from integers
        note = f"lobpcg needs N >= 5 k, but N is {size} and k is {k}"
        return dense(task, note) if size <= _DENSE_SIZE else dataclasses.replace(arpack(task), note=note)
    width = min(k + _GUARDS, size // 5)
    check_fits(
        _LOBPCG_BLOCKS * 8 * size * width,
        task.available,
        f"LOBPCG's blocks of {width} vectors of {size:,} numbers",
        "take a smaller k, method='arpack', or a block of the matrix",
    )
    X = task.start(width)
    if task.v0 is not None:
        X[:, 0] = task.v0
    X = np.linalg.qr(X)[0]
    left, converged = task.maxiter or min(_MAX_RESTARTS, 10 * size), 0
    values, scale = np.zeros(0), 1.0
    try:
        noise = measure(task.A, X, task.A.matmat(X), task.rng)
        unit = unit_of(np.array([noise.norm]))
        first = search(lambda x: np.ldexp(task.A.dot(x), -unit), X[:, :0], (-np.inf, np.inf), 0.0, 10, task.rng)
        scale = max(noise.norm, float(np.ldexp(max(abs(first.low), abs(first.high)), unit)))
        if scale == 0:
            return _zero(task, "lobpcg")
        precision = float(np.finfo(task.A.dtype).eps) ** (2 / 3)
        goal = max(task.tol, precision, 4 * noise.relative)
        while converged < k and left > 0:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of residuals above the goal, which are looked at here
                values, X, history = lobpcg(
                    lambda block: task.A.matmat(block) / scale,
                    X,
                    tol=goal,
                    maxiter=min(left, _CHUNK),
                    largest=task.which == "LA",
                    retResidualNormsHistory=True,
                )
            left -= _CHUNK
            converged = int((np.atleast_1d(history[-1])[:k] <= goal).sum())
    except TimeUpError:
        count = min(k, len(values))
        return Found(values[:count] * scale, X[:, :count], converged, "lobpcg", timed_out=True)
    return Found(values[:k] * scale, X[:, :k], converged, "lobpcg")


def device(task: Task) -> Found:
    """Run Lanczos with thick restarts, whose basis stays on the operator's device."""
    basis = task.ncv or min(task.size, max(2 * task.k + 1, _MIN_DEVICE_BASIS))
    if basis >= task.size:
        return dense(task, "the basis would have been the whole space")
    basis, note = _basis_that_fits(task, basis, "the Lanczos", 1.5)  # half of it is made anew beside it, at a restart
    start = aligned(torch.from_numpy(np.array(task.start() if task.v0 is None else task.v0, dtype=task.A.dtype)))
    restarts = task.maxiter or min(_MAX_RESTARTS, 10 * task.size)

    def choose(values: Array, count: int) -> Array:
        return _chosen(values, task.which, count)

    values, vectors, converged, timed_out = thick_restart(
        task.A.multiply_rows, start.to(task.A.device), task.k, basis, task.tol, restarts, choose
    )
    note = note if values.any() or timed_out else "the matrix is zero"
    return Found(values, vectors.T.cpu().numpy(), converged, "device", note, timed_out)


def _chosen(values: Array, which: str, count: int) -> Array:
    """Return the indices of the wanted ones among ascending values, for BE half from each end."""
    if which != "BE":
        order: Array = outermost_first(values, which)[:count]
        return order
    low = count // 2
    ends: Array = np.r_[:low, len(values) - (count - low) : len(values)]
    return ends


def dense(task: Task, note: str = "") -> Found:
    """Form the matrix by N products, and find all eigenvalues."""
    check_fits(
        5 * 8 * task.size**2,
        task.available,
        f"the matrix of {task.size:,} rows, formed for its {task.k:,} eigenvalues,",
        "take a smaller k, or a block of the matrix",
    )
    matrix = task.A.matmat(np.eye(task.size, dtype=task.A.dtype)).astype(np.float64)
    matrix += matrix.T.copy()
    values, vectors = np.linalg.eigh(matrix / 2)
    order = _chosen(values, task.which, task.k)
    return Found(values[order], vectors[:, order], task.k, "dense", note)


def outermost_first(values: Array, which: str) -> Array:
    """Return the order of eigenvalues: the outermost first, for SM the least in magnitude; for BE, ascending."""
    key = {"LA": -values, "LM": -np.abs(values), "SM": np.abs(values)}.get(which, values)
    return np.argsort(key, kind="stable")


def _zero(task: Task, method: str) -> Found:
    """Return pairs of the zero matrix, of which any vectors will do."""
    vectors = np.linalg.qr(task.start(task.k))[0]
    return Found(np.zeros(task.k), vectors, task.k, method, "the matrix is zero")


METHODS: dict[str, Callable[[Task], Found]] = {
    "arpack": arpack,
    "lobpcg": lobpcg_blocks,
    "device": device,
    "dense": dense,
}
"""What `curvop.spectrum.eigsh` calls its methods."""
