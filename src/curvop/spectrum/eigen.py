"""Eigenvalues from SciPy's solvers, with settings that fit curvature matrices, and a certificate."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from curvop.operators.available_memory import available_bytes
from curvop.operators.progress import step_bar
from curvop.operators.validation import random_generator, real_number, whole_number
from curvop.spectrum.certificate import ENDS, Certificate, certify
from curvop.spectrum.counting import CountedOperator, symmetric_operator
from curvop.spectrum.eigen_methods import METHODS, Task, outermost_first
from curvop.spectrum.eigen_result import NO_TIME, EigenResult
from curvop.spectrum.lanczos import device_of
from curvop.spectrum.noise import NUM_PRODUCTS
from curvop.spectrum.timed import TimedOperator, TimeUpError, end_of

__all__ = ["EigenResult", "eigsh"]

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
    method : {'arpack', 'lobpcg', 'device', 'dense'}
        Implicitly restarted Lanczos, SciPy's `eigsh`, takes the fewest products, one vector at a time: the one to begin
        with. SciPy's `lobpcg`, for 'LA' and 'SA' only, multiplies blocks of ``k + 2`` vectors, and takes more products
        in all: of use where one with a block costs much less than with its columns, as where data are slow to read, or
        the matrix is small for the device. Its `tol` is relative to the operator's norm, and 0 stands for the 2/3 power
        of the precision, or the noise of the products. 'device' is Lanczos with thick restarts (Wu, Simon, 2000), not
        for 'SM', whose basis stays where the operator computes: on a GPU no vector crosses to the host before the end.
        'dense' forms the matrix by N products, as the others do where
        these are the fewer.
    tol : float
        The relative accuracy of eigenvalues at which ARPACK stops; 0 is machine precision. Over a float32 model 1e-6
        is as good, and may take a third of the products.
    maxiter : int, optional
        Restarts of 'arpack' or 'device', or iterations of LOBPCG: 1000 by default, 10 N for small matrices.
    ncv : int, optional
        Vectors of the basis of 'arpack' or 'device', more than k: ``max(2 k + 1, 30)`` by default, for 'device'
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
        End after so long, or one product later, or one of 16 vectors where a method multiplies blocks. 'device' returns
        the eigenpairs so far, not converged, and 'lobpcg' those of its last look at them, every 40 iterations; time for
        their certificate, without a search, is set aside where it is not more than half. Of the work of 'arpack' and
        'dense' nothing can be had before its end. A result for whose certificate there is no time comes without it.
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
    A = symmetric_operator(A)
    k, start = _checked(A, k, which, method, tol, maxiter, ncv, v0)
    generator = random_generator(rng)
    available = available_bytes(device_of(A) if method == "device" else None, memory)
    timed = None if seconds is None else TimedOperator(A, until)
    if timed is not None:
        A = timed
        partial = method in ("device", "lobpcg")  # can be had, and certified: twice the time that this will take
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
                f"matrix, cannot be had: give it more seconds, or pass method='device' with an ncv below {A.shape[0]}"
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
    if method == "device" and which == "SM":
        raise ValueError("which is 'SM', which method='device' does not find: use method='arpack'")
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
