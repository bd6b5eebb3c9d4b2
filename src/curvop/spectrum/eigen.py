"""Eigenvalues from SciPy's solvers, with settings that fit curvature matrices, and a certificate."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, lobpcg
from scipy.sparse.linalg import eigsh as scipy_eigsh
from torch import Tensor

from curvop.operators.progress import step_bar
from curvop.operators.transfer import aligned
from curvop.operators.validation import available_bytes, check_fits, random_generator, real_number, whole_number
from curvop.spectrum.certificate import ENDS, NUM_PRODUCTS, Certificate, certify, measure, search_missed
from curvop.spectrum.counting import CountedOperator, TimedOperator, TimeUpError, end_of, symmetric_operator
from curvop.spectrum.lanczos import device_of, rounding_left
from curvop.spectrum.norms import norm_of, unit_of
from curvop.storage.result_files import load_arrays, save_arrays

__all__ = ["METHODS", "NO_TIME", "EigenResult", "Found", "Task", "eigsh", "thick_restart", "without_verdicts"]

Array = NDArray[Any]

_LEAST_SEARCH = 20  # steps: fewer see nothing of a large matrix


def eigsh(
    A: Any,
    k: int = 6,
    which: str = "LA",
    *,
    method: str = "arpack",
    tol: float = 0.0,
    maxiter: int | None = None,
    ncv: int | None = None,
    v0: Any = None,
    rng: int | np.random.Generator | None = 0,
    memory: int | None = None,
    certificate: bool = True,
    seconds: float | None = None,
    progress: bool = True,
) -> EigenResult:
    """Find k eigenvalues at an end of the spectrum, with their vectors, and certify them.

    Parameters
    ----------
    A : LinearOperator or matrix, shape (N, N)
        Real, symmetric. ARPACK multiplies one of float32 by vectors of float32; float64 vectors over a float32 model,
        as this package's operators are by default, give residuals 6 to 40 times smaller.
    k : int
    which : {'LA', 'SA', 'LM', 'SM', 'BE'}
        In SciPy's words: the largest, the smallest, those of the largest magnitude, of the smallest magnitude (which
        takes long, and often does not converge), or half from each end, of which an odd one is from the upper.
    method : {'arpack', 'lobpcg', 'lanczos', 'dense'}
        Implicitly restarted Lanczos, SciPy's `eigsh`, takes the fewest products, one vector at a time: the one to begin
        with. SciPy's `lobpcg`, for 'LA' and 'SA' only, multiplies blocks of ``k + 2`` vectors, and takes more products
        in all: of use where one with a block costs much less than with its columns, as where data are slow to read, or
        the matrix is small for the device. Its `tol` is relative to the operator's norm, and 0 stands for the 2/3 power
        of the precision, or the noise of the products. 'lanczos' is Lanczos with thick restarts (Wu, Simon, 2000), not
        for 'SM', whose basis stays where the operator computes: on a GPU no vector crosses to the host before the end.
        'dense' forms the matrix by N products, as the others do where
        these are the fewer.
    tol : float
        The relative accuracy of eigenvalues at which ARPACK stops; 0 is machine precision. Over a float32 model 1e-6
        is as good, and may take a third of the products.
    maxiter : int, optional
        Restarts of 'arpack' or 'lanczos', or iterations of LOBPCG: 1000 by default, 10 N for small matrices.
    ncv : int, optional
        Vectors of the basis of 'arpack' or 'lanczos', more than k: ``max(2 k + 1, 30)`` by default, for 'lanczos'
        ``max(2 k + 1, 40)``, or what fits into `memory`.
    v0 : array_like, shape (N,), optional
        The starting vector; for LOBPCG the first of them. Random by default.
    rng : int or numpy.random.Generator, optional
        Of all random vectors: the same number gives the same result.
    memory : int, optional
        Bytes that the solver may take, half of what is free by default.
    certificate : bool
        Whether to certify the result, which takes ``k + 8`` products, and up to 60, or a quarter of the solver's, to
        search for eigenvalues that were missed; see `curvop.spectrum.certify`. Its `tol` is 1e-4, or twice this one
        where that is more.
    seconds : float, optional
        End after so long, or one product later, or one of 16 vectors where a method multiplies blocks. 'lanczos'
        returns the eigenpairs so far, not converged, and 'lobpcg' those of its last look at them, every 40 iterations;
        time for their certificate, without a search, is set aside where it is not more than half. Of the work of
        'arpack' and 'dense' nothing can be had before its end. A result for whose certificate there is no time comes
        without it.
    progress : bool
        Count products on a bar.

    Returns
    -------
    EigenResult

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot be, and where a product is not finite.
    MemoryError
        Where the solver does not fit into `memory`.
    TimeoutError
        Where time is up and the method is 'arpack' or 'dense'.

    Warns
    -----
    RuntimeWarning
        Where the solver does not converge, or the certificate says that something is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> result = eigsh(np.diag(np.arange(100.0)), 3, progress=False)
    >>> result.values.round(9)
    array([99., 98., 97.])
    >>> result.ok
    True
    """
    until = end_of(seconds)
    if method == "device":
        warnings.warn("method='device' is now method='lanczos'", DeprecationWarning, stacklevel=2)
        method = "lanczos"
    A = symmetric_operator(A)
    k, start = _checked(A, k, which, method, tol, maxiter, ncv, v0)
    generator = random_generator(rng)
    available = available_bytes(device_of(A) if method == "lanczos" else None, memory)
    timed = None if seconds is None else TimedOperator(A, until)
    if timed is not None:
        A = timed
        partial = method in ("lanczos", "lobpcg")  # can be had, and certified: twice the time that this will take
        timed.spare = 2 * (k + NUM_PRODUCTS) if certificate and partial else 0
    with step_bar("eigsh", progress) as bar:
        counted = CountedOperator(A, bar, None if method == "arpack" else np.float64)
        start = None if start is None else start.astype(counted.dtype)
        task = Task(counted, k, which, float(tol), maxiter, ncv, start, generator, available)
        try:
            found = METHODS[method](task)
        except TimeUpError:
            raise TimeoutError(
                f"{seconds} s were over after {counted.products} products, and ARPACK's basis, or a part of a "
                f"matrix, cannot be had: give it more seconds, or pass method='lanczos' with an ncv below {A.shape[0]}"
            ) from None
    order = outermost_first(found.values, which)
    values, vectors = found.values[order].astype(np.float64), found.vectors[:, order]
    products, certified, note = counted.products, None, found.note
    if certificate:
        # ARPACK's partial results do not say how many are from which end, and unfinished ones are no claim.
        claimed = None if (found.timed_out and found.converged < k) or (which == "BE" and len(values) < k) else which
        search = max(60, products // 4)
        # The generator goes on from where the solver's starting vector came from.
        certified = _certified(A, values, vectors, claimed, max(1e-4, 2 * tol), search, generator, progress)
        if certified is None:
            note = f"{note}, {NO_TIME}" if note else NO_TIME
        else:
            products += certified.products
    converged = found.converged == k
    out_of_time = found.timed_out and not converged
    result = EigenResult(
        values, vectors, certified, converged, products, found.method, which, k, note, found.converged, out_of_time
    )
    if not result.ok and (certificate or not result.converged):
        warnings.warn(result.verdict, RuntimeWarning, stacklevel=2)
    return result


def _certified(
    A: LinearOperator,
    values: Array,
    vectors: Array,
    which: str | None,
    tol: float,
    search: int,
    rng: np.random.Generator,
    progress: bool,
) -> Certificate | None:
    """Certify a result, with as long a search as there is time for; return None where there is none at all."""
    if isinstance(A, TimedOperator):
        A.spare = 0
        left = A.columns_left - len(values) - NUM_PRODUCTS
        if left < 0:
            return None
        search = int(max(1, min(search, left / 2)))  # it takes twice as many where something seems to be missed
    searched = which if search >= _LEAST_SEARCH else None
    try:
        found = certify(A, values, vectors, which=searched, tol=tol, search=search, rng=rng, progress=progress)
    except TimeUpError:
        return None
    return dataclasses.replace(found, which=which)


def _checked(
    A: Any, k: Any, which: Any, method: Any, tol: Any, maxiter: Any, ncv: Any, v0: Any
) -> tuple[int, Array | None]:
    size = A.shape[0]
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k is a {type(k).__name__}, but must be an integer") from None
    if not 1 <= k <= size:
        raise ValueError(f"k is {k}, but must be between 1 and {size}, the rows of A")
    if which not in ENDS:
        raise ValueError(f"which is {which!r}, but must be one of {', '.join(ENDS)}")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, but must be one of {', '.join(METHODS)}")
    if method == "lobpcg" and which not in ("LA", "SA"):
        raise ValueError(f"which is {which!r}, but lobpcg finds 'LA' and 'SA' only: use method='arpack'")
    if method == "lanczos" and which == "SM":
        raise ValueError("which is 'SM', which method='lanczos' does not find: use method='arpack'")
    if which == "BE" and k == 1:
        raise ValueError("k is 1, but which='BE' takes at least one from each end")
    if not 0 <= real_number("tol", tol) < 1:
        raise ValueError(f"tol is {tol}, but must be at least 0, and below 1")
    if maxiter is not None:
        whole_number("maxiter", maxiter, 1)
    if ncv is not None and not (k < whole_number("ncv", ncv, 1) <= size or k == ncv == size):
        raise ValueError(f"ncv is {ncv}, but must be more than k = {k}, and at most {size}")
    if v0 is None:
        return k, None
    start = np.asarray(v0)
    if start.shape != (size,) or not np.can_cast(start.dtype, np.float64, "same_kind"):
        raise ValueError(f"v0 has shape {start.shape} and dtype {start.dtype}, but must be real of shape ({size},)")
    if not (np.isfinite(start).all() and start.any()):
        raise ValueError("v0 must be finite and not zero")
    return k, start


# Eigenpairs with what is known of them, as `eigsh` returns them.

NO_TIME = "no certificate, as time was up"
"""What a `note` says where that is so."""

_SHOWN = 20
_TITLES = {
    "arpack": "ARPACK",
    "lobpcg": "LOBPCG",
    "lanczos": "thick-restart Lanczos",
    "device": "thick-restart Lanczos",  # its name in results of earlier versions
    "dense": "dense",
}
_PREFIX = "certificate_"


@dataclasses.dataclass(frozen=True, eq=False)
class EigenResult:
    """Eigenpairs of a symmetric operator, and what they are worth.

    Attributes
    ----------
    values : ndarray, shape (n,)
        The outermost first; for 'SM' the smallest in magnitude first, for 'BE' in ascending order.
    vectors : ndarray, shape (N, n)
        Their vectors, in this order.
    certificate : Certificate or None
        None where it was not asked for, or time was up.
    converged : bool
        Whether the solver found all that were `wanted`. Where ARPACK did not, those are here that did converge, and
        there may be others between them; those of 'lobpcg' and 'lanczos' are all here, as far as they came.
    products : int
        Columns multiplied with `A`, those of the certificate included.
    method : str
        The one that was used in the end.
    which : str
        As it was asked for.
    wanted : int
        How many were asked for.
    note : str
        What was done other than asked for, and why; empty mostly.
    num_converged : int
        How many of the values the solver takes for converged.
    timed_out : bool
        Whether time was up before the solver was done.
    """

    values: Array
    vectors: Array
    certificate: Certificate | None
    converged: bool
    products: int
    method: str
    which: str
    wanted: int
    note: str = ""
    num_converged: int = 0
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Whether the solver converged, and the certificate says that nothing is wrong; never without one."""
        return self.converged and self.certificate is not None and self.certificate.ok

    @property
    def verdict(self) -> str:
        """The certificate's, preceded by what the solver says of itself where it did not converge."""
        why = "time was up" if NO_TIME in self.note else "no certificate was asked for"
        text = f"not certified: {why}" if self.certificate is None else self.certificate.verdict
        if self.converged:
            return text
        if self.timed_out:
            return f"not converged, as time was up: {self.num_converged} of {self.wanted} eigenvalues did; {text}"
        remedy = "raise maxiter or ncv, or ask for fewer"
        if self.method != "arpack":
            return f"not converged, {remedy}: {text}"
        text = f"; of these, {text}" if len(self.values) else ""
        return f"not converged: {len(self.values)} of {self.wanted} eigenvalues were found, {remedy}{text}"

    def __str__(self) -> str:
        size, found = len(self.vectors), len(self.values)
        head = f"{found} of {self.wanted} eigenvalues ({self.which}) of a {size:,} x {size:,} matrix"
        title = _TITLES.get(self.method, self.method)
        lines = [f"{head}: {title}, {self.products:,} products" + (f" ({self.note})" if self.note else "")]
        if found:
            lines.append(
                f"{'':>6}{'eigenvalue':>16}" + (f"{'residual':>12}{'error <=':>12}" if self.certificate else "")
            )
        for index in range(min(found, _SHOWN)):
            line = f"{index + 1:>6}{self.values[index]:>16.8g}"
            if self.certificate:
                line += f"{self.certificate.residuals[index]:>12.1e}{self.certificate.bounds[index]:>12.1e}"
            lines.append(line)
        if found > _SHOWN:
            lines.append(f"{'...':>6}")
        return "\n".join([*lines, self.verdict])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to an ``.npz`` file of plain arrays, which appears only when it is complete."""
        arrays = _arrays(self, "")
        if self.certificate is not None:
            arrays |= _arrays(self.certificate, _PREFIX)
        save_arrays(Path(path), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            Where the file is another one.
        """
        file = load_arrays(path, ("values", "vectors", "wanted"), "EigenResult.save")
        own = {name: file[name] for name in file if not name.startswith(_PREFIX)}
        other = {name.removeprefix(_PREFIX): file[name] for name in file if name.startswith(_PREFIX)}
        certificate = Certificate(**_fields(Certificate, other)) if other else None
        return cls(**{**_fields(cls, own), "certificate": certificate})


def _arrays(record: Any, prefix: str) -> dict[str, Array]:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return {
        prefix + name: np.asarray(value)
        for name, value in values.items()
        if value is not None and not isinstance(value, Certificate)
    }


def _fields(record: Any, arrays: dict[str, Array]) -> dict[str, Any]:
    """Return the fields of a record: arrays as they are, numbers and words as Python's own, None what is not there."""
    names = [field.name for field in dataclasses.fields(record)]
    found = {name: arrays[name] for name in names if name in arrays}
    return dict.fromkeys(names) | {name: array if array.ndim else array.item() for name, array in found.items()}


# The eigen-solvers behind `curvop.spectrum.eigsh`, each a function from a `Task` to what it `Found`.

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
        first = search_missed(lambda x: np.ldexp(task.A.dot(x), -unit), X[:, :0], (-np.inf, np.inf), 0.0, 10, task.rng)
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


def lanczos(task: Task) -> Found:
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
    return Found(values, vectors.T.cpu().numpy(), converged, "lanczos", note, timed_out)


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
    "lanczos": lanczos,
    "dense": dense,
}
"""What `curvop.spectrum.eigsh` calls its methods."""


# Lanczos with thick restarts, whose basis stays on the device where the operator computes.


def thick_restart(
    multiply: Any, start: Tensor, k: int, basis: int, tol: float, maxiter: int, choose: Any
) -> tuple[Array, Tensor, int, bool]:
    r"""Find eigenpairs at an end of the spectrum of a symmetric operator (Wu, Simon, 2000).

    The basis :math:`V` grows to its full size; then the best Ritz vectors and the last residual begin it anew. In the
    projected matrix :math:`V^\top A V` what theory says is zero, or known, is that: products that are not exact would
    else set a floor to the residuals that it tells.

    Parameters
    ----------
    multiply : callable
        Of a ``(1, N)`` tensor. Its `TimeUpError` ends the search with what the basis holds.
    start : Tensor, shape (N,)
        In the precision and on the device of the basis.
    k : int
    basis : int
        Vectors of the basis, more than k, fewer than N.
    tol : float
        Relative accuracy of an eigenvalue; 0 for that of the basis.
    maxiter : int
        Restarts.
    choose : callable
        ``(values, count) -> indices`` of so many that are wanted, the most wanted first.

    Returns
    -------
    values : ndarray, shape (n,)
        k of them; fewer where time was up before the basis had so many vectors.
    vectors : Tensor, shape (n, N)
    converged : int
        How many of them are within `tol`.
    timed_out : bool

    References
    ----------
    Wu, Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl.
    22(2); the criterion is ARPACK's.
    """
    size, eps = len(start), float(torch.finfo(start.dtype).eps)
    V = torch.empty(basis + 1, size, dtype=start.dtype, device=start.device)
    V[0] = start / norm_of(start)
    H = np.zeros((basis + 1, basis + 1))
    generator = torch.Generator().manual_seed(0)
    kept, scale, timed_out = 0, 0.0, False
    while True:
        count = basis
        for at in range(kept, basis):
            try:
                w = multiply(V[at : at + 1])[0].to(start.dtype)
            except TimeUpError:
                count, timed_out = at, True
                break
            H[at, at] = float(_orthogonalise(V[: at + 1], w)[at])
            beta = norm_of(w)
            scale = max(scale, abs(H[at, at]) + beta)
            if beta <= rounding_left(start.dtype, size) * scale:  # an invariant subspace: go on from elsewhere
                beta = 0.0
                w = torch.randn(size, generator=generator, dtype=start.dtype).to(start.device)
                _orthogonalise(V[: at + 1], w)
            V[at + 1] = w / norm_of(w)
            H[at, at + 1] = H[at + 1, at] = beta
        values, S = np.linalg.eigh(H[:count, :count])
        wanted = choose(values, min(k, count))
        coupling = H[count, :count] @ S  # of the Ritz vectors to the next vector of the basis: their residuals
        residuals = np.abs(coupling[wanted])
        done = residuals <= max(tol, eps) * np.maximum(np.abs(values[wanted]), eps ** (2 / 3) * scale)
        maxiter -= 1
        if timed_out or done.all() or maxiter <= 0:
            return values[wanted], _combined(V[:count], S[:, wanted]), int(done.sum()), timed_out
        # Besides those that are wanted, half of the others: what was learnt of them speeds up the next round.
        kept = min(k + (basis - k) // 2, basis - 1)
        best = choose(values, kept)
        V[:kept] = _combined(V[:basis], S[:, best])
        V[kept] = V[basis]
        H[:] = 0
        H[np.diag_indices(kept)] = values[best]
        H[kept, :kept] = H[:kept, kept] = coupling[best]


def _orthogonalise(V: Tensor, w: Tensor) -> Tensor:
    """Take the rows of `V` out of `w`, in place and twice; return the shares."""
    total = torch.zeros(len(V), dtype=V.dtype, device=V.device)
    for _ in range(2):
        shares = V @ w
        w.addmv_(V.T, shares, alpha=-1.0)
        total += shares
    return total


def _combined(V: Tensor, coefficients: Array) -> Tensor:
    """Return the rows ``coefficients' V``."""
    return torch.from_numpy(np.ascontiguousarray(coefficients.T)).to(V.device, V.dtype) @ V


@contextlib.contextmanager
def without_verdicts() -> Iterator[None]:
    """Ignore the verdicts that `eigsh` and `solve` warn of, and nothing else: an operator's own warnings are news."""
    with warnings.catch_warnings():
        told = "not converged|not certified|converged: relative residual"
        warnings.filterwarnings("ignore", told, RuntimeWarning)
        yield
