"""What can be said of approximate eigenpairs of a symmetric operator, by products with it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.operators.progress import step_bar
from curvop.operators.validation import random_generator, real_number, whole_number
from curvop.spectrum.bounds import matched_bounds, quadratic_estimates
from curvop.spectrum.counting import CountedOperator, symmetric_operator
from curvop.spectrum.missed import limits
from curvop.spectrum.missed import search as search_missed
from curvop.spectrum.noise import NUM_PRODUCTS, asymmetric, measure
from curvop.spectrum.norms import column_norms, unit_of

__all__ = ["Certificate", "certify"]

Array = NDArray[Any]

ENDS = ("LA", "SA", "LM", "SM", "BE")
_ROUNDING = 2e-14  # of the norm: what a search may be off by itself


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate:
    """What products with the operator say of k eigenpairs.

    Attributes
    ----------
    residuals : ndarray, shape (k,)
        ``||A v - lambda v|| / ||v||``, in float64.
    bounds : ndarray, shape (k,)
        The values can be assigned to k eigenvalues of `A`, counted with their multiplicities, one to one, so that none
        is further away than this. Rigorous for a symmetric operator with no more noise than was measured, which is
        included; `curvop.spectrum.bounds.matched_bounds` says how. Infinite for vectors that are dependent.
    estimates : ndarray, shape (k,)
        What the errors are more likely, the squares of the residuals over the gaps between eigenvalues. Not rigorous:
        of the eigenvalues that were not found, only Ritz values are known.
    orthogonality : float
        ``max |V' V - I|``, of the vectors as they were given.
    noise : float
        The products' relative error, as it shows between block and single products, in the repetition of a product, and
        in ``A (a x + b y)`` against ``a A x + b A y``, for random vectors and for those that were found.
    symmetry : float
        An estimate of ``||A - A'|| / ||A||`` by ``x' A y - y' A x`` for random x and y, and for found x and random y.
        Beside `noise` it is of no concern.
    norm : float
        The largest ``|x' A y|`` that was met for vectors of norm 1: a lower bound of the operator's norm.
    error : float
        What the error of a product with a found vector of norm 1 is taken for, the lack of symmetry included; a part of
        each bound.
    zeros : int
        How many values are within their bounds of zero, so that their signs are not known.
    missed : float or None
        A value, beyond the last one found at the end that was asked for, that `A` takes on a unit vector orthogonal to
        all that was found: there is an eigenvalue there or further out, and it is not among these.
    resolution : float or None
        Had an eigenvalue been missed that is further from the last one found than this, the search would have told with
        a probability of 0.999 at least. None where nothing was searched: for 'SM', for lack of time, or as the operator
        is not symmetric.
    products : int
        Columns multiplied with `A`.
    which, tol : str or None, float
        As they were asked for.
    """

    residuals: Array
    bounds: Array
    estimates: Array
    orthogonality: float
    noise: float
    symmetry: float
    norm: float
    error: float
    zeros: int
    missed: float | None
    resolution: float | None
    products: int
    which: str | None
    tol: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong.

        The bounds are within `tol` times `norm`, the vectors orthonormal up to `tol`, the operator is symmetric, and no
        eigenvalue was found to be missing.
        """
        return not self._problems()

    @property
    def verdict(self) -> str:
        """All of it in a sentence; where something is wrong, what that is, and the remedy."""
        problems = self._problems()
        if problems:
            return f"not certified: {'; '.join(problems)}"
        count = len(self.bounds)
        text = f"{count} eigenvalue{'s' * (count > 1)} within {self.bounds.max():.1e} of true ones"
        if self.zeros:
            text += f" ({self.zeros} of them zero to that accuracy)"
        text += f", vectors orthonormal to {self.orthogonality:.1e}, {self._of_the_search()}; "
        return text + f"products are exact to {self.noise:.1e}"

    def __str__(self) -> str:
        return self.verdict

    def _problems(self) -> list[str]:
        if not len(self.bounds):
            return ["there are no pairs"]
        if np.isnan(self.residuals).any():
            index, last = int(np.isnan(self.residuals).argmax()), len(self.residuals) - 1
            return [f"pair {index} of 0 to {last} is not finite, or its vector is zero"]
        problems, largest = [], float(self.bounds.max())
        skewed = asymmetric(self.symmetry, self.noise)
        if skewed:
            problems.append(
                f"A is not symmetric (defect {self.symmetry:.1e}, while products are exact to {self.noise:.1e}), and "
                "neither the solvers nor these bounds are made for that"
            )
        if largest == np.inf:
            problems.append("vectors are linearly dependent: the same eigenvalue is counted twice")
        elif largest > self.tol * self.norm and not skewed:
            cause = "iterate longer, or with a smaller tol"
            if np.sqrt(len(self.bounds)) * self.error > self.tol * self.norm:
                told = f"the products are exact to {self.noise:.1e} only"
                cause = (
                    f"{told}: take out what is random in them (dropout, shuffled data), or compute in double precision"
                )
            problems.append(
                f"the values are within {largest:.1e} of eigenvalues only, where the matrix has norm {self.norm:.1e}: "
                f"{cause}"
            )
        if not self.orthogonality <= self.tol:
            problems.append(f"vectors are not orthonormal (max |V'V - I| is {self.orthogonality:.1e})")
        if self.resolution == np.inf:
            problems.append("the search was too short to see anything: raise search")
        if self.missed is not None:
            problems.append(
                f"an eigenvalue was missed, at {self.missed:.6g} or beyond: look again with a smaller tol, a larger "
                "ncv or k, or another rng"
            )
        return problems

    def _of_the_search(self) -> str:
        if self.resolution is None:
            why = {None: "it is not said which these are", "SM": "which is SM"}.get(self.which, "there was no time")
            return f"not searched for missed ones, as {why}"
        if self.resolution <= 2 * self.bounds.max() + _ROUNDING * self.norm:
            return "none missed" if self.resolution == 0 else "none missed (with probability 0.999 at least)"
        return f"none seen to be missed (one further than {self.resolution:.1e} from the last would have been)"


def certify(
    A: Any,
    values: Any,
    vectors: Any,
    *,
    which: str | None = None,
    tol: float = 1e-4,
    search: int = 60,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> Certificate:
    """Say what eigenpairs from any solver are worth.

    It takes ``k + 8`` products and those of the search, and the memory of three copies of `vectors` and some more.

    Parameters
    ----------
    A : LinearOperator or matrix, shape (N, N)
        Real, symmetric.
    values : array_like, shape (k,)
    vectors : array_like, shape (N, k)
        In the order of the values.
    which : {'LA', 'SA', 'LM', 'BE', 'SM'}, optional
        What the values are claimed to be, in SciPy's words: the largest, the smallest, those of the largest magnitude,
        or half from each end, an odd one from the upper. Others are then searched for that were missed: solvers do miss
        members of clusters, and report convergence (scipy#26112). Nothing is searched without it, and for those of the
        smallest magnitude, as Lanczos sees only the ends of a spectrum.
    tol : float
        What the bounds may be, relative to the operator's norm, and how far the vectors may be from orthonormal.
    search : int
        The largest number of Lanczos steps in the search, of one product each. It ends before where nothing can have
        been missed any more; where something seems to be, as many products again make sure of it.
    rng : int or numpy.random.Generator, optional
        Of the random vectors. Not the one that a solver's starting vector was drawn from afresh.
    progress : bool
        Count products on a bar.

    Returns
    -------
    Certificate
        Not `ok` where values or vectors are not finite.

    Raises
    ------
    TypeError, ValueError
        For arguments that cannot be, and where a product is not finite.

    Examples
    --------
    >>> import numpy as np
    >>> A = np.diag([3.0, 3.0, 2.0, 1.0])
    >>> I = np.eye(4)
    >>> certify(A, [3.0, 3.0], I[:, :2], which="LA").ok
    True
    >>> certify(A, [3.0, 2.0], I[:, [0, 2]], which="LA").missed
    3.0
    """
    A = symmetric_operator(A)
    w, V = _checked(A.shape[0], values, vectors, which, tol, search)
    unusable = ~(np.isfinite(w) & np.isfinite(V).all(axis=0) & V.any(axis=0))
    if unusable.any() or len(w) == 0:
        return _nothing(unusable, which, tol)
    most = len(w) + NUM_PRODUCTS + (0 if limits(w, which) is None else min(search, A.shape[0] - len(w)))
    with step_bar("certify", progress, most) as bar:
        found = _certificate(CountedOperator(A, bar, np.float64), w, V, which, tol, search, random_generator(rng))
        bar.total = found.products  # the search ends where it has seen enough
        return found


def _checked(size: int, values: Any, vectors: Any, which: str | None, tol: float, search: int) -> tuple[Array, Array]:
    w, V = np.asarray(values), np.asarray(vectors)
    if w.ndim != 1 or V.shape != (size, len(w)) or len(w) > size:
        raise ValueError(
            f"values has shape {w.shape} and vectors {V.shape}: for A of shape {(size, size)} they must be (k,) and "
            f"({size}, k), with k at most {size}"
        )
    for name, array in (("values", w), ("vectors", V)):
        if not np.can_cast(array.dtype, np.float64, "same_kind"):
            raise TypeError(f"{name} has dtype {array.dtype}, but must be real")
    if which is not None and which not in ENDS:
        raise ValueError(f"which is {which!r}, but must be one of {', '.join(ENDS)}, or None")
    if not (real_number("tol", tol) > 0 and whole_number("search", search, 1)):
        raise ValueError(f"tol is {tol}, but must be positive")
    return w.astype(np.float64), V.astype(np.float64)  # V is a copy, to be normalised


def _nothing(unusable: Array, which: str | None, tol: float) -> Certificate:
    """Return the certificate of pairs that need no product to be told wrong."""
    residuals, bounds, nan = np.where(unusable, np.nan, np.inf), np.full(len(unusable), np.inf), float("nan")
    return Certificate(residuals, bounds, bounds.copy(), nan, nan, nan, 0.0, nan, 0, None, None, 0, which, tol)


def _certificate(
    A: CountedOperator, w: Array, V: Array, which: str | None, tol: float, steps: int, rng: np.random.Generator
) -> Certificate:
    lengths = column_norms(V)
    V /= lengths
    gram = V.T @ V
    AV = A.matmat(V)
    noise = measure(A, V, AV, rng)
    # From here on in units of a power of two, so that squares neither underflow nor overflow; it costs no rounding.
    unit = unit_of(np.append(w, noise.norm))
    w, AV, norm = np.ldexp(w, -unit), np.ldexp(AV, -unit, out=AV), np.ldexp(noise.norm, -unit)
    error = np.ldexp(noise.error + noise.skew / 2, -unit)  # the eigenvalues are those of the symmetric part
    quotients = np.einsum("ij,ij->j", V, AV)

    AV -= V * w  # these are the residuals from here on
    residual_gram = AV.T @ AV
    residuals = np.sqrt(np.diag(residual_gram))
    bounds, groups = matched_bounds(w, gram, residual_gram, error)

    # Vectors that are a little wrong leave something of the found eigenvalues to be found again, and so does rounding.
    tolerance = 2 * float(bounds.max()) + _ROUNDING * norm
    ends = limits(w, which)
    found, resolution, others = None, None, (-np.inf, np.inf)  # where the eigenvalues are that were not found
    if len(w) == len(V):
        others, resolution = (np.inf, -np.inf), 0.0
    elif ends is not None and np.isfinite(tolerance) and not asymmetric(noise.symmetry, noise.relative):
        found = search_missed(lambda x: np.ldexp(A.dot(x), -unit), V, ends, tolerance, steps, rng)
        norm, others = max(norm, abs(found.low), abs(found.high)), (found.low, found.high)
        beyond = max(found.high - ends[1], ends[0] - found.low) + found.slack
        resolution = max(tolerance, beyond)
    estimates = quadratic_estimates(w, quotients, residuals, bounds, groups, others, error)

    def back(number: Any) -> Any:
        return None if number is None else float(np.ldexp(number, unit))

    return Certificate(
        residuals=np.ldexp(residuals, unit),
        bounds=np.ldexp(bounds, unit),
        estimates=np.ldexp(estimates, unit),
        orthogonality=float(np.abs(gram * np.outer(lengths, lengths) - np.eye(len(w))).max()),
        noise=noise.relative,
        symmetry=noise.symmetry,
        norm=back(norm),
        error=back(error),
        zeros=int((np.abs(w) <= bounds).sum()),
        missed=None if found is None else back(found.beyond),
        resolution=back(resolution),
        products=A.products,
        which=which,
        tol=tol,
    )
