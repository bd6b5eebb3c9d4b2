"""Certificates for approximate eigenpairs of a symmetric operator, computed from matrix-vector products.

`certify` takes three steps:

- `matched_bounds` and `quadratic_estimates` compute error bounds and error estimates for the eigenvalues from the
  residuals of the eigenvectors.
- `curvop.spectrum.missed_search` looks for eigenvalues that a solver missed.
- `curvop.spectrum.noise.measure_noise` measures the accuracy and the symmetry of the products.
"""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.operators.keywords import named_keywords
from curvop.operators.progress import step_bar
from curvop.operators.summaries import Summary, abridged
from curvop.operators.validation import integer, random_generator, real_scalar
from curvop.spectrum.counting import CountedOperator, TimeUpError, symmetric_operator
from curvop.spectrum.missed_search import SearchResult, remaining_range, search_missed
from curvop.spectrum.noise import NUM_PRODUCTS, Noise, is_asymmetric, measure_noise
from curvop.spectrum.norms import binary_exponent, column_norms

__all__ = [
    "WHICH",
    "Certificate",
    "Evidence",
    "Repair",
    "certificate_from",
    "certify",
    "certify_within",
    "matched_bounds",
    "quadratic_estimates",
    "with_ranges",
]

Array = NDArray[Any]

WHICH = ("LA", "SA", "LM", "SM", "BE")
"""SciPy's values of the argument `which`."""

_SEARCH_ROUNDING = 2e-14  # rounding error of the Ritz values of a search, relative to the norm of A
_REMEDY = "call certify(..., thorough=True)"  # for a search that was too short


@named_keywords
def certify(
    A: Any,
    values: Any,
    vectors: Any,
    *,
    which: str | None = None,
    tol: float = 1e-4,
    search: int = 60,
    thorough: bool = False,
    rng: int | np.random.Generator | None = 0,
    progress: bool = True,
) -> Certificate:
    """Bound the errors of eigenpairs from any solver, and search for eigenvalues that the solver missed.

    Use this function for eigenpairs from SciPy or from a file. The results of `eigsh` in this package are certified
    already.

    Parameters
    ----------
    A : LinearOperator or matrix, shape (N, N)
        The real symmetric operator.
    values : array_like, shape (k,)
        The approximate eigenvalues, in any order.
    vectors : array_like, shape (N, k)
        The approximate eigenvectors, one column per value.
    which : {'LA', 'SA', 'LM', 'SM', 'BE'}, optional
        Which eigenvalues `values` are claimed to be, as in SciPy: the algebraically largest ('LA') or smallest ('SA'),
        the largest ('LM') or smallest ('SM') in magnitude, or half from each end ('BE', with one more from the upper
        end if k is odd). The search looks for eigenvalues that contradict this claim. By default, there is no claim and
        no search. There is no search for 'SM' either, because Lanczos finds only eigenvalues at the ends of a spectrum.
    tol : float, optional
        The largest acceptable error bound relative to the norm of the operator. Also the largest acceptable deviation
        of the vectors from orthonormality, ``max |V'V - I|``.
    search : int, optional
        The maximum number of Lanczos steps in the search. Each step takes one product. The search stops early if it can
        rule out missed eigenvalues. If an eigenvalue seems to be missed, the search repeats its steps to confirm this.
    thorough : bool, optional
        Whether to continue the search after `search` steps until it confirms a missed eigenvalue, or rules out missed
        eigenvalues beyond the given ones, up to the distance that the attribute ``ok`` of the certificate allows. The
        number of products depends on the spectrum. It is at most ``2 * (N - k)``, and usually less than the number of
        products that the solver takes.
    rng : int, numpy.random.Generator or None, optional
        The seed or generator for the random vectors. If the solver drew its starting vector from a seeded generator,
        pass a different seed here, so that the search starts from a different vector.
    progress : bool, optional
        Whether to show a progress bar that counts the products.

    Returns
    -------
    Certificate
        The error bounds and the result of the search. The attribute ``ok`` is False if a check fails, if the search
        was too short to show that no eigenvalue is missing, or if a value or a vector is not finite.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid or a product is not finite.

    See Also
    --------
    eigsh : Compute eigenpairs and certify them.

    Notes
    -----
    The error bounds take ``k + 8`` products and as much memory as three copies of `vectors`. The bounds are computed by
    `curvop.spectrum.certificate.matched_bounds` [1]_ and include the noise of the products. The search runs Lanczos on
    the orthogonal complement of `vectors`. The search returns a range. With a probability of at least 0.999 for a
    random starting vector, this range contains all eigenvalues other than the given ones [2]_. The search is useful
    because eigensolvers can miss members of a cluster of eigenvalues and still report convergence (SciPy issue 26112).

    After few steps, the range extends beyond the given values, and the verdict says for which part of the spectrum the
    search is conclusive. The range shrinks as the Lanczos iteration converges. The search takes few products if the
    given values are well separated from all others, and more products if they are part of a dense cluster.

    References
    ----------
    .. [1] W. Kahan, "Inclusion theorems for clusters of eigenvalues of Hermitian matrices", University of Toronto,
       1967.
    .. [2] J. L. M. van Dorsselaer, M. E. Hochstenbach, H. A. van der Vorst, "Computing probabilistic bounds for extreme
       eigenvalues of symmetric matrices with the Lanczos method", SIAM J. Matrix Anal. Appl. 22(3), 2001.
       doi:10.1137/S0895479800366859

    Examples
    --------
    Certify eigenpairs from SciPy:

    >>> import numpy as np
    >>> from scipy.sparse import diags_array
    >>> from scipy.sparse.linalg import eigsh
    >>> from curvop.spectrum import certify
    >>> A = diags_array(np.r_[np.linspace(0, 1, 298), 2.0, 3.0])
    >>> values, vectors = eigsh(A, 2, which="LA", rng=0)
    >>> certify(A, values, vectors, which="LA", progress=False).ok
    True

    The search finds the eigenvalue 2 if the given eigenpairs do not include it:

    >>> certificate = certify(A, [1.0, 3.0], np.eye(300)[:, [297, 299]], which="LA", progress=False)
    >>> certificate.ok, round(certificate.missed, 4)
    (False, 2.0)

    A short search sees only gross misses. The verdict says what the search shows, and ``thorough=True`` continues it:

    >>> short = certify(A, values, vectors, which="LA", search=5, progress=False)
    >>> print(short)  # doctest: +ELLIPSIS, +NORMALIZE_WHITESPACE
    not certified: no eigenvalue above 2... is missing (with probability >= 0.999), but between 2 and 2... this search
    cannot tell: call certify(..., thorough=True)
    >>> certify(A, values, vectors, which="LA", search=5, thorough=True, progress=False).ok
    True
    """
    if not isinstance(thorough, bool | np.bool_):
        raise TypeError(
            f"thorough is {thorough!r}, but must be True or False: pass search= for the number of steps of the search"
        )
    steps = search, math.inf if thorough else search
    return certify_within(A, values, vectors, which, tol, steps, rng, progress)[0]


def certify_within(
    A: Any,
    values: Any,
    vectors: Any,
    which: str | None,
    tol: float,
    steps: tuple[int, float],
    rng: int | np.random.Generator | None,
    progress: bool,
    repair: Repair | None = None,
) -> tuple[Certificate, Evidence | None]:
    """Certify eigenpairs like `certify`, but limit a thorough search, and repair the eigenpairs if one is missing.

    Parameters
    ----------
    A, values, vectors, which, tol, rng, progress
        See `certify`.
    steps : (int, float)
        The argument `search` of `certify`, and the maximum number of products in the search. If this number is
        infinite, the search is thorough.
    repair : callable, optional
        ``repair(A, evidence, found)`` takes the counted operator, the measurements of the eigenpairs, and the result of
        a search that found a missed eigenvalue. It returns the measurements of better eigenpairs, for which the search
        is repeated, or None to keep the eigenpairs. By default, the eigenpairs are not repaired.

    Returns
    -------
    certificate : Certificate
    repaired : Evidence or None
        The certified eigenpairs if they were repaired. None if the given eigenpairs were certified.
    """
    A = symmetric_operator(A)
    w, V = _validate(A.shape[0], values, vectors, which, tol, steps[0])
    unusable = ~(np.isfinite(w) & np.isfinite(V).all(axis=0) & V.any(axis=0))
    if unusable.any() or len(w) == 0:
        return _rejected(unusable, which, tol), None
    total = len(w) + NUM_PRODUCTS + (0 if remaining_range(w, which) is None else min(steps[0], A.shape[0] - len(w)))
    with step_bar("certify", progress, total) as bar:
        counted, generator = CountedOperator(A, bar, np.float64), random_generator(rng)
        evidence, repaired = _measured(counted, w, V, generator), None
        while True:
            certificate, found = _certificate(counted, evidence, which, tol, steps, generator)
            if repair is None or found is None or found.beyond is None:
                break
            better = repair(counted, evidence, found)
            if better is None:
                break
            evidence = repaired = better
        bar.total = counted.products  # the search may have taken fewer or more products
        return dataclasses.replace(certificate, products=counted.products), repaired


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Certificate(Summary):
    """Error bounds for k eigenpairs of a symmetric operator A, as returned by `certify` and `eigsh`.

    ``print(certificate)`` shows the `verdict`.

    Attributes
    ----------
    residuals : ndarray, shape (k,)
        The norms of the residuals, ``||A v - lambda v|| / ||v||``, computed in float64.
    bounds : ndarray, shape (k,)
        The error bounds. The k values can be matched one to one with k eigenvalues of A, counted with multiplicity,
        such that the error of each value is at most its bound. The bounds include the noise of the products, and are
        rigorous if A is symmetric and the noise is not larger than `error`. If the vectors are linearly dependent,
        some bounds are infinite. See `curvop.spectrum.certificate.matched_bounds`.
    estimates : ndarray, shape (k,)
        Estimates of the actual errors: the squared residuals, divided by the gaps between eigenvalues. The estimates
        are not rigorous, because the gaps to eigenvalues that were not computed are estimated from Ritz values.
    orthogonality : float
        The deviation of the vectors from orthonormality, ``max |V'V - I|``, before `certify` normalizes them.
    noise : float
        The relative error of the products, measured with random vectors and with the eigenvectors. The noise is the
        largest difference between a single product and the same column of a block product, or between ``A (a x + b y)``
        and ``a A x + b A y``.
    symmetry : float
        An estimate of ``||A - A'|| / ||A||`` from the differences ``x' A y - y' A x``, where y is random and x is
        random or an eigenvector. A value of the order of ``noise`` is harmless.
    norm : float
        A lower bound for the norm of A: the largest absolute Ritz value, or the largest computed ``||A x||`` with
        ``||x|| = 1`` if this norm is larger.
    error : float
        The assumed error (in the Euclidean norm) of a product with an eigenvector of norm 1. It includes the error due
        to an asymmetry of A. Each bound includes this error.
    zeros : int
        The number of values that are not larger in magnitude than their bounds. The signs of these eigenvalues are
        unknown.
    missed : float or None
        The Rayleigh quotient of a vector that is orthogonal to all `vectors`. At least one eigenvalue at or beyond this
        Rayleigh quotient was missed. The attribute is None if no missed eigenvalue was found.
    resolution : float or None
        The resolution of the search. With a probability of at least 0.999, the search would have found any missed
        eigenvalue that lies more than `resolution` beyond the innermost of the given eigenvalues. The attribute is None
        if there was no search. There is no search if `which` is None or 'SM', if time ran out, if the operator is not
        symmetric, or if the given vectors are unusable.
    products : int
        The number of products with A. A block product with K columns counts as K products.
    which : str or None
        The argument `which` of `certify`.
    tol : float
        The argument `tol` of `certify`.
    remaining : ndarray, shape (2,), or None
        The range ``(low, high)`` that contains all eigenvalues other than the given ones, with a probability of at
        least 0.999. For 'LA', no eigenvalue above ``high`` is missing, and ``low`` is ``-inf``. For 'SA', no eigenvalue
        below ``low`` is missing, and ``high`` is ``inf``. None if there was no search, or if all eigenvalues are given.
    innermost : ndarray, shape (2,), or None
        The range ``(low, high)`` that would contain all other eigenvalues if none was missed: for 'LA' up to the
        smallest given value, for 'SA' from the largest given value on, for 'LM' between plus and minus the smallest
        magnitude, and for 'BE' between the two innermost values. The search is inconclusive between ``innermost`` and
        ``remaining``. None if ``remaining`` is None.

    See Also
    --------
    certify : Certify eigenpairs from any solver.
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
    remaining: Array | None = None
    innermost: Array | None = None

    @property
    def ok(self) -> bool:
        """Whether the eigenpairs pass all checks.

        The checks require finite eigenpairs, bounds of at most ``tol * norm``, vectors that are orthonormal up to
        `tol`, and a symmetric operator. If `which` makes a claim that can be searched, the search must not have found a
        missed eigenvalue, and must rule out missed eigenvalues beyond the given ones at a distance of more than ``tol *
        norm`` or twice the largest bound, whichever is larger. The given eigenvalues are then the requested ones, up to
        errors of at most ``2 * tol * norm``.
        """
        return not self._problems()

    @property
    def verdict(self) -> str:
        """A summary in one sentence. The sentence lists any problems and their remedies."""
        problems = self._problems()
        if problems:
            return f"not certified: {'; '.join(problems)}"
        count = len(self.bounds)
        text = f"{count} eigenvalue{'s' * (count > 1)} within {self.bounds.max():.1e} of exact ones"
        if self.zeros:
            text += f" ({self.zeros} zero to this accuracy)"
        text += f", vectors orthonormal to {self.orthogonality:.1e}, {self._search_summary()}"
        return f"{text}; products accurate to {self.noise:.1e}"

    def __str__(self) -> str:
        return self.verdict

    def _summary_table(self) -> list[Sequence[str]]:
        rows = [
            (str(index + 1), f"{residual:.1e}", f"{bound:.1e}", f"{estimate:.1e}")
            for index, (residual, bound, estimate) in enumerate(
                zip(self.residuals, self.bounds, self.estimates, strict=True)
            )
        ]
        return abridged([("", "residual", "error <=", "estimated error"), *rows])

    def _problems(self) -> list[str]:
        """Return a description of each problem. The list is empty if the eigenpairs pass all checks."""
        if not len(self.bounds):
            return ["there are no eigenpairs"]
        if np.isnan(self.residuals).any():
            index, last = int(np.isnan(self.residuals).argmax()), len(self.residuals) - 1
            return [f"eigenpair {index} of 0 to {last} is not finite, or its vector is zero"]
        problems, largest = [], float(self.bounds.max())
        skewed = is_asymmetric(self.symmetry, self.noise)
        if skewed:
            problems.append(
                f"A is not symmetric (||A - A'|| / ||A|| is about {self.symmetry:.1e}, but products are accurate to "
                f"{self.noise:.1e}): eigensolvers and error bounds require a symmetric operator"
            )
        if largest == np.inf:
            problems.append("the vectors are linearly dependent: an eigenvalue is counted twice")
        elif largest > self.tol * self.norm and not skewed:
            cause = "iterate longer or with a smaller tol"
            if np.sqrt(len(self.bounds)) * self.error > self.tol * self.norm:
                cause = (
                    f"products are accurate only to {self.noise:.1e}, so remove randomness (dropout, shuffled data) or "
                    "compute in double precision"
                )
            problems.append(
                f"the error bound {largest:.1e} is larger than tol = {self.tol:.1e} times the norm of A, "
                f"{self.norm:.1e}: {cause}"
            )
        if not self.orthogonality <= self.tol:
            problems.append(f"the vectors are not orthonormal (max |V'V - I| is {self.orthogonality:.1e})")
        if self.missed is not None:
            problems.append(
                f"an eigenvalue at {self.missed:.6g} or beyond was missed: try again with a smaller tol, a larger ncv "
                "or k, or another rng"
            )
        elif self.resolution == np.inf:
            problems.append(f"the search for missed eigenvalues was too short to show anything: {_REMEDY}")
        elif self.resolution is not None and self.resolution > self._allowed:
            unclear = [end.between for end in self._ends() if end.width > self._allowed]
            problems.append(f"{self._search_summary()}, but {' and '.join(unclear)} this search cannot tell: {_REMEDY}")
        elif self.resolution is None and self.which not in (None, "SM") and not problems:
            problems.append(f"there was no time to search for missed eigenvalues: {_REMEDY}")
        return problems

    @property
    def _unresolved(self) -> float:
        """The distance that no search resolves, because of the errors of the eigenpairs and of the products."""
        return 2 * float(self.bounds.max()) + _SEARCH_ROUNDING * self.norm

    @property
    def _allowed(self) -> float:
        """The largest distance beyond the given eigenvalues at which an eigenvalue may be missing if `ok` is True."""
        return max(self._unresolved, self.tol * self.norm)

    def _search_summary(self) -> str:
        """Describe the result of the search as a phrase for `verdict`."""
        if self.resolution is None:
            reason = "it is unknown which ones these are" if self.which is None else "which is 'SM'"
            return f"no search for missed ones ({reason})"
        if self.resolution == 0:
            return "none missed"
        if self.resolution <= self._unresolved:
            return "none missed (with probability >= 0.999)"
        return f"no eigenvalue {' or '.join(end.beyond for end in self._ends())} is missing (with probability >= 0.999)"

    def _ends(self) -> list[_End]:
        """Describe each end of the spectrum that was searched."""
        if self.remaining is None or self.innermost is None:
            return []
        pairs = list(zip(self.innermost, self.remaining, strict=True))
        if self.which == "LM":
            return [_end("larger in magnitude than", "the magnitudes ", pairs[1][0], max(-pairs[0][1], pairs[1][1]))]
        words = ("below", "above")
        return [_end(word, "", *pair) for word, pair in zip(words, pairs, strict=True) if np.isfinite(pair[0])]


@dataclasses.dataclass(frozen=True)
class _End:
    """The result of the search at one end of the spectrum, as text.

    Attributes
    ----------
    beyond : str
        Where no eigenvalue is missing.
    between : str
        Where the search is inconclusive.
    width : float
        The width of the range in which the search is inconclusive.
    """

    beyond: str
    between: str
    width: float


def _end(where: str, what: str, inner: float, outer: float) -> _End:
    """Describe one end. The search is inconclusive between the innermost given value and the limit `outer`.

    The numbers have enough digits to tell them apart, and `outer` is rounded away from `inner`.
    """
    width, size = abs(outer - inner), max(abs(inner), abs(outer))
    if not np.isfinite(width):
        return _End(f"{where} {outer}", f"between {what}{inner:.3g} and {outer}", width)
    digits = 3 + sum(bool(width < size * 10.0**-count) for count in range(1, 5))
    context = decimal.Context(digits, decimal.ROUND_CEILING if outer > inner else decimal.ROUND_FLOOR)
    limit = f"{float(context.create_decimal_from_float(float(outer))):.{digits}g}"
    low, high = sorted([f"{inner:.{digits}g}", limit], key=float)
    return _End(f"{where} {limit}", f"between {what}{low} and {high}", width)


def _validate(size: int, values: Any, vectors: Any, which: str | None, tol: float, search: int) -> tuple[Array, Array]:
    """Validate the arguments of `certify`. Return the values and the vectors as float64 arrays."""
    w, V = np.asarray(values), np.asarray(vectors)
    if w.ndim != 1 or V.shape != (size, len(w)) or len(w) > size:
        raise ValueError(
            f"values has shape {w.shape} and vectors {V.shape}: for A of shape {(size, size)} they must be (k,) and "
            f"({size}, k), with k at most {size}"
        )
    for name, array in (("values", w), ("vectors", V)):
        if not np.can_cast(array.dtype, np.float64, "same_kind"):
            raise TypeError(f"{name} has dtype {array.dtype}, but must be real")
    if which is not None and which not in WHICH:
        raise ValueError(f"which is {which!r}, but must be one of {', '.join(WHICH)}, or None")
    if not (real_scalar("tol", tol) > 0 and integer("search", search, 1)):
        raise ValueError(f"tol is {tol}, but must be positive")
    return w.astype(np.float64), V.astype(np.float64)  # copies: V is normalized in place later


def with_ranges(certificate: Certificate, values: Array) -> Certificate:
    """Add the attributes `innermost` and `remaining` to the certificate of `values` from a file that lacks them."""
    ends = remaining_range(values, certificate.which)
    if certificate.remaining is not None or not certificate.resolution or ends is None:
        return certificate
    innermost = np.array(ends)
    remaining = innermost + certificate.resolution * np.array([-1.0, 1.0])
    return dataclasses.replace(certificate, innermost=innermost, remaining=remaining)


def _rejected(unusable: Array, which: str | None, tol: float) -> Certificate:
    """Return a failed certificate for k eigenpairs that cannot be checked.

    The boolean array `unusable` of shape (k,) marks eigenpairs that are not finite or whose vector is zero. If there
    are no eigenpairs, the array is empty.
    """
    residuals, bounds, nan = np.where(unusable, np.nan, np.inf), np.full(len(unusable), np.inf), float("nan")
    return Certificate(residuals, bounds, bounds.copy(), nan, nan, nan, 0.0, nan, 0, None, None, 0, which, tol)


def _measured(A: CountedOperator, w: Array, V: Array, rng: np.random.Generator) -> Evidence:
    """Multiply A with the vectors, which are normalized in place, and measure the noise of the products."""
    lengths = column_norms(V)
    V /= lengths
    AV = A.matmat(V)
    noise = measure_noise(A, V, AV, rng)
    # Divide by a power of two, which is exact, so that squares neither underflow nor overflow.
    exponent = binary_exponent(np.append(w, noise.norm))
    w, AV = np.ldexp(w, -exponent), np.ldexp(AV, -exponent, out=AV)
    quotients = np.einsum("ij,ij->j", V, AV)
    R = AV  # the residuals overwrite the products
    R -= V * w
    return Evidence(w, V, lengths, R, quotients, noise, exponent)


def _certificate(
    A: CountedOperator,
    evidence: Evidence,
    which: str | None,
    tol: float,
    steps: tuple[int, float],
    rng: np.random.Generator,
) -> tuple[Certificate, SearchResult | None]:
    """Compute a certificate from measurements and a search. Also return the result of the search, if there was one.

    For `steps`, see `certify_within`.
    """
    V, R, exponent, found = evidence.vectors, evidence.residuals, evidence.exponent, None

    def search(ends: tuple[float, float], tolerance: float) -> SearchResult | None:
        nonlocal found
        limits = {"most": steps[1], "tol": tol, "norm": float(np.ldexp(evidence.noise.norm, -exponent))}
        with contextlib.suppress(TimeUpError):
            found = search_missed(lambda x: np.ldexp(A.dot(x), -exponent), V, ends, tolerance, steps[0], rng, **limits)
        return found

    gram, lengths = V.T @ V, evidence.lengths
    orthogonality = float(np.abs(gram * np.outer(lengths, lengths) - np.eye(len(gram))).max())
    certificate = certificate_from(
        evidence.values,
        gram,
        R.T @ R,
        evidence.quotients,
        evidence.noise,
        search,
        exponent=exponent,
        size=len(V),
        which=which,
        tol=tol,
    )
    return dataclasses.replace(certificate, orthogonality=orthogonality), found


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """The measurements of k eigenpairs. Values, residuals and quotients are divided by ``2 ** exponent``.

    Attributes
    ----------
    values : ndarray, shape (k,)
    vectors : ndarray, shape (N, k)
        The approximate eigenvectors, divided by their norms.
    lengths : ndarray, shape (k,)
        The norms of the given vectors.
    residuals : ndarray, shape (N, k)
        ``A @ vectors - vectors * values``.
    quotients : ndarray, shape (k,)
        The Rayleigh quotients of the vectors.
    noise : Noise
        The errors of the products, not divided by ``2 ** exponent``.
    exponent : int
    """

    values: Array
    vectors: Array
    lengths: Array
    residuals: Array
    quotients: Array
    noise: Noise
    exponent: int


Repair = Callable[[CountedOperator, Evidence, SearchResult], Evidence | None]


def certificate_from(
    w: Array,
    gram: Array,
    residual_gram: Array,
    quotients: Array,
    noise: Noise,
    search: Callable[[tuple[float, float], float], SearchResult | None],
    *,
    exponent: int,
    size: int,
    which: str | None,
    tol: float,
) -> Certificate:
    """Compute a certificate from measurements. Values, residuals and quotients are divided by ``2 ** exponent``.

    Parameters
    ----------
    w, gram, residual_gram : ndarray
        See `matched_bounds`. ``gram`` also determines the attribute ``orthogonality``.
    quotients : ndarray, shape (k,)
        The Rayleigh quotients of the vectors.
    noise : Noise
        The errors of the products, not divided by ``2 ** exponent``.
    search : callable
        ``search(limits, tolerance)`` returns the range of all eigenvalues other than the given ones; see
        `search_missed`. The result is None if there was no time. The function is called only if `which` makes a claim
        about other eigenvalues.
    exponent : int
    size : int
        The number of rows of A.
    which, tol
        See `certify`.
    """
    norm = float(np.ldexp(noise.norm, -exponent))
    error = float(np.ldexp(noise.error + noise.skew / 2, -exponent))  # the bounds are for the symmetric part of A
    residuals = np.sqrt(np.diag(residual_gram))
    bounds, groups = matched_bounds(w, gram, residual_gram, error)

    # Because of inexact vectors and rounding errors, the search can find computed eigenvalues again. Therefore, ignore
    # Ritz values that exceed the limits by at most this tolerance.
    tolerance = 2 * float(bounds.max()) + _SEARCH_ROUNDING * norm
    ends = remaining_range(w, which)
    missed, resolution, innermost, remaining = None, None, None, None
    others = (-np.inf, np.inf)  # the range of the eigenvalues that were not computed
    if len(w) == size:
        others, resolution = (np.inf, -np.inf), 0.0
    elif ends is not None and np.isfinite(tolerance) and not is_asymmetric(noise.symmetry, noise.relative):
        found = search(ends, tolerance)
        if found is not None:
            norm, others, missed = max(norm, abs(found.low), abs(found.high)), (found.low, found.high), found.beyond
            innermost = np.array(ends)
            claimed = np.isfinite(innermost)
            outwards = np.array([-1.0, 1.0])[claimed]
            limits = np.array([found.lower, found.upper])[claimed]
            beyond = np.maximum(tolerance, outwards * (limits - innermost[claimed]))
            remaining = innermost.copy()
            remaining[claimed] += outwards * beyond
            resolution = float(beyond.max())
    estimates = quadratic_estimates(w, quotients, residuals, bounds, groups, others, error)

    def unscale(number: Any) -> Any:
        return None if number is None else float(np.ldexp(number, exponent))

    def unscale_range(pair: Array | None) -> Array | None:
        return None if pair is None else np.ldexp(pair, exponent)

    return Certificate(
        residuals=np.ldexp(residuals, exponent),
        bounds=np.ldexp(bounds, exponent),
        estimates=np.ldexp(estimates, exponent),
        orthogonality=float(np.abs(gram - np.eye(len(w))).max()),
        noise=noise.relative,
        symmetry=noise.symmetry,
        norm=unscale(norm),
        error=unscale(error),
        zeros=int((np.abs(w) <= bounds).sum()),
        missed=unscale(missed),
        resolution=unscale(resolution),
        products=0,
        which=which,
        tol=tol,
        remaining=unscale_range(remaining),
        innermost=unscale_range(innermost),
    )


# Error bounds and estimates of eigenvalues.


def matched_bounds(values: Array, gram: Array, residual_gram: Array, noise: float) -> tuple[Array, Array]:
    r"""Compute error bounds for k approximate eigenvalues of a symmetric operator A.

    The k values can be matched one to one with k eigenvalues of A, counted with multiplicity, such that the error of
    each value is at most its bound. `curvop.spectrum.certify` calls this function with measured residuals and a
    measured noise.

    Parameters
    ----------
    values : ndarray, shape (k,)
        The approximate eigenvalues.
    gram : ndarray, shape (k, k)
        ``V.T @ V``, where the columns of V are the approximate eigenvectors, normalized to norm 1.
    residual_gram : ndarray, shape (k, k)
        ``R.T @ R``, where ``R = A @ V - V * values`` are the residuals.
    noise : float
        An upper bound for the norm of the error of a product with a vector of norm 1.

    Returns
    -------
    bounds : ndarray, shape (k,)
        The absolute error bounds.
    groups : ndarray of int, shape (k,)
        The group index of each value. All values of a group share one bound.

    Notes
    -----
    Each value is the center of an interval whose radius is the norm of its residual. Each interval contains an
    eigenvalue [1]_ (theorem 4.5.1), but overlapping intervals may contain the same eigenvalue. Values with overlapping
    intervals form a group with a joint bound. If a group of m values :math:`\Lambda` has vectors V and residuals
    :math:`R = A V - V \Lambda`, then the m values can be matched one to one with m eigenvalues such that each error is
    at most :math:`\|R\|_2 / \sigma_{\min}(V)` [2]_, [3]_. The bound is infinite if V contains two copies of a vector.

    References
    ----------
    .. [1] B. N. Parlett, "The Symmetric Eigenvalue Problem", SIAM, 1998. doi:10.1137/1.9781611971163
    .. [2] W. Kahan, "Inclusion theorems for clusters of eigenvalues of Hermitian matrices", University of Toronto,
       1967.
    .. [3] Z. H. Cao, J. J. Xie, R. C. Li, "A sharp version of Kahan's theorem on clustered eigenvalues", Linear Algebra
       Appl. 245, 1996. This theorem covers vectors that are not orthonormal.

    Examples
    --------
    Both values are 1.0, so they form a group with a joint bound. The second vector is not an exact eigenvector:

    >>> import numpy as np
    >>> from curvop.spectrum.certificate import matched_bounds
    >>> A = np.diag([1.0, 1.1, 5.0])
    >>> V = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0]]).T
    >>> values = np.array([1.0, 1.0])
    >>> R = A @ V - V * values
    >>> bounds, groups = matched_bounds(values, V.T @ V, R.T @ R, 0.0)
    >>> bounds.round(4), groups
    (array([0.1342, 0.1342]), array([0, 0]))
    """
    order = np.argsort(values, kind="stable")
    bounds, groups = np.zeros(len(values)), np.zeros(len(values), dtype=np.int64)
    parts = [order[index : index + 1] for index in range(len(order))]
    while True:
        part_bounds = [_bound(gram, residual_gram, part, noise) for part in parts]
        joined: list[Array] = []
        last = -np.inf
        for part, bound in zip(parts, part_bounds, strict=True):
            if bound == np.inf:  # linearly dependent vectors: use single bounds, so that other groups stay apart
                bound = max(_bound(gram, residual_gram, part[[index]], noise) for index in range(len(part)))
            if joined and values[part[0]] - bound <= last:
                joined[-1] = np.concatenate([joined[-1], part])
            else:
                joined.append(part)
            last = max(last, values[part[-1]] + bound)
        if len(joined) == len(parts):
            break
        parts = joined
    for number, (part, bound) in enumerate(zip(parts, part_bounds, strict=True)):
        bounds[part], groups[part] = bound, number
    return bounds, groups


def _bound(gram: Array, residual_gram: Array, part: Array, noise: float) -> float:
    """Return the joint error bound of the values whose indices are `part`."""
    count = len(part)
    if count == 1:
        return float(np.sqrt(residual_gram[part[0], part[0]])) + noise
    block = np.ix_(part, part)
    smallest = float(np.linalg.eigvalsh(gram[block])[0])
    if smallest <= 100 * count * np.finfo(float).eps:  # the vectors are linearly dependent up to rounding
        return np.inf
    residual = np.sqrt(max(0.0, float(np.linalg.eigvalsh(residual_gram[block])[-1])))
    return float((residual + np.sqrt(count) * noise) / np.sqrt(smallest))


def quadratic_estimates(
    values: Array,
    quotients: Array,
    residuals: Array,
    bounds: Array,
    groups: Array,
    others: tuple[float, float],
    noise: float,
) -> Array:
    r"""Estimate the errors of well-separated eigenvalues from their squared residuals.

    The error of a Rayleigh quotient :math:`\rho` with residual r is at most :math:`\|r\|^2 / \delta` if :math:`\delta`
    is the distance from :math:`\rho` to the other eigenvalues (Kato, Temple; Parlett, 1998, theorem 11.7.1). This
    function computes an estimate and not a bound, because `others`, the range of the eigenvalues that were not
    computed, is only approximate.

    Parameters
    ----------
    values, quotients, residuals, bounds : ndarray, shape (k,)
        In this order: the approximate eigenvalues, the Rayleigh quotients of the vectors, the norms of the residuals,
        and the error bounds of the eigenvalues.
    groups : ndarray of int, shape (k,)
        The group index of each value, as returned by `matched_bounds`. If a group has several values, their estimates
        equal their bounds.
    others : (float, float)
        The range of the eigenvalues that were not computed, or ``(-inf, inf)`` if this range is unknown.
    noise : float
        An upper bound for the norm of the error of a product with a vector of norm 1.

    Returns
    -------
    ndarray, shape (k,)
        The estimated absolute errors.
    """
    estimates = bounds.copy()
    for index in range(len(values)):
        apart = groups != groups[index]
        if apart.sum() < len(values) - 1 or not np.isfinite(bounds[index]):
            continue
        quotient, shift = quotients[index], abs(values[index] - quotients[index])
        gaps = np.abs(quotient - values[apart]) - bounds[apart]
        beyond = max(others[0] - quotient, quotient - others[1])
        gap = min(float(gaps.min(initial=np.inf)), beyond)
        square = max(0.0, residuals[index] ** 2 - shift**2)
        if gap > 0:
            estimates[index] = min(bounds[index], shift + square / gap + noise)
    return estimates
