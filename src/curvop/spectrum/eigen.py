"""Eigenvalues from SciPy's solvers, with settings that fit curvature matrices, and a certificate."""

from __future__ import annotations

import dataclasses
import operator
import os
import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from curvop.memory import available_bytes
from curvop.results import save_arrays
from curvop.spectrum.certificate import ENDS, Certificate, certify
from curvop.spectrum.counted import CountedOperator, symmetric_operator
from curvop.spectrum.eigen_methods import METHODS, Task, outermost_first
from curvop.spectrum.lanczos import device_of

__all__ = ["EigenResult", "eigsh"]

Array = NDArray[Any]

_SHOWN = 20
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
        None where it was not asked for.
    converged : bool
        Whether the solver found all that were `wanted`. Where ARPACK did not, those are here that did converge, and
        there may be others between them; LOBPCG's are all here, as far as they came.
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

    @property
    def ok(self) -> bool:
        """Whether the solver converged, and the certificate says that nothing is wrong; never without one."""
        return self.converged and self.certificate is not None and self.certificate.ok

    @property
    def verdict(self) -> str:
        """The certificate's, preceded by what the solver says of itself where it did not converge."""
        text = "not certified: no certificate was asked for" if self.certificate is None else self.certificate.verdict
        if self.converged:
            return text
        remedy = "raise maxiter or ncv, or ask for fewer"
        if self.method != "arpack":
            return f"not converged, {remedy}: {text}"
        text = f"; of these, {text}" if len(self.values) else ""
        return f"not converged: {len(self.values)} of {self.wanted} eigenvalues were found, {remedy}{text}"

    def __str__(self) -> str:
        size, found = len(self.vectors), len(self.values)
        head = f"{found} of {self.wanted} eigenvalues ({self.which}) of a {size:,} x {size:,} matrix"
        lines = [f"{head} by {self.method}, {self.products:,} products" + (f" ({self.note})" if self.note else "")]
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
        with np.load(path, allow_pickle=False) as file:
            if not {"values", "vectors", "wanted"} <= set(file):
                raise ValueError(f"{os.fspath(path)} was not written by EigenResult.save")
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
        Restarts of ARPACK, or iterations of LOBPCG: 1000 by default, 10 N for small matrices.
    ncv : int, optional
        ARPACK's basis, more than k: ``max(2 k + 1, 30)`` by default, or what fits into `memory`.
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
    A = symmetric_operator(A)
    k, start = _checked(A, k, which, method, tol, maxiter, ncv, v0)
    generator = np.random.default_rng(rng)
    available = available_bytes(device_of(A) if method == "device" else None) if memory is None else memory
    with tqdm(desc="eigsh", unit=" products", disable=not progress, mininterval=0.5, delay=0.5) as bar:
        counted = CountedOperator(A, bar, None if method == "arpack" else np.float64)
        start = None if start is None else start.astype(counted.dtype)
        task = Task(counted, k, which, float(tol), maxiter, ncv, start, generator, available)
        found = METHODS[method](task)
    order = outermost_first(found.values, which)
    values, vectors = found.values[order].astype(np.float64), found.vectors[:, order]
    products, certified = counted.products, None
    if certificate:
        # ARPACK's partial results do not say how many are from which end.
        claimed = None if which == "BE" and len(values) < k else which
        certified = certify(
            A,
            values,
            vectors,
            which=claimed,
            tol=max(1e-4, 2 * tol),
            search=max(60, products // 4),
            rng=generator,  # goes on from where the solver's starting vector came from
            progress=progress,
        )
        products += certified.products
    result = EigenResult(values, vectors, certified, found.converged, products, found.method, which, k, found.note)
    if not result.ok and (certificate or not result.converged):
        warnings.warn(result.verdict, RuntimeWarning, stacklevel=2)
    return result


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
    if not 0 <= tol < 1:
        raise ValueError(f"tol is {tol}, but must be at least 0, and below 1")
    if maxiter is not None and maxiter < 1:
        raise ValueError(f"maxiter is {maxiter}, but must be at least 1")
    if ncv is not None and not (k < ncv <= size or k == ncv == size):
        raise ValueError(f"ncv is {ncv}, but must be more than k = {k}, and at most {size}")
    if v0 is None:
        return k, None
    start = np.asarray(v0)
    if start.shape != (size,) or not np.can_cast(start.dtype, np.float64, "same_kind"):
        raise ValueError(f"v0 has shape {start.shape} and dtype {start.dtype}, but must be real of shape ({size},)")
    if not (np.isfinite(start).all() and start.any()):
        raise ValueError("v0 must be finite and not zero")
    return k, start
