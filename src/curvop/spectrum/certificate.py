"""What can be said of approximate eigenpairs of a symmetric operator, by products with it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from curvop.operators.progress import step_bar
from curvop.operators.validation import random_generator, real_number, whole_number
from curvop.spectrum.counting import CountedOperator, symmetric_operator
from curvop.spectrum.norms import column_norms, norm, unit_of

__all__ = [
    "NUM_PRODUCTS",
    "Certificate",
    "Noise",
    "Search",
    "asymmetric",
    "certify",
    "limits",
    "matched_bounds",
    "measure",
    "quadratic_estimates",
    "search_missed",
]

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
        included; `curvop.spectrum.certificate.matched_bounds` says how. Infinite for vectors that are dependent.
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


# How far approximate eigenvalues of a symmetric matrix are from true ones, by the residuals of their vectors.


def matched_bounds(values: Array, gram: Array, residual_gram: Array, noise: float) -> tuple[Array, Array]:
    r"""Bound the errors of eigenvalues so that each of them stands for an eigenvalue of its own.

    There are k eigenvalues of A, counted with their multiplicities, that can be assigned to the k values one to one,
    none of them further away than its bound. Where intervals of the size of the single residuals do not overlap, each
    holds an eigenvalue (Parlett, 1998, theorem 4.5.1). Values whose intervals do are taken together: with their vectors
    V and residuals :math:`R = A V - V \Lambda`, as many eigenvalues as there are values lie within
    :math:`\|R\|_2 / \sigma_{\min}(V)` of them. Two copies of one vector have no bound.

    Parameters
    ----------
    values : ndarray, shape (k,)
    gram, residual_gram : ndarray, shape (k, k)
        ``V' V`` of the vectors, of norm 1, and ``R' R`` of their residuals.
    noise : float
        The norm, at most, of the error of a product with a vector of norm 1.

    Returns
    -------
    bounds : ndarray, shape (k,)
        In the units of the eigenvalues.
    groups : ndarray of int, shape (k,)
        The number of the group that a value was bounded in.

    References
    ----------
    Parlett (1998), "The Symmetric Eigenvalue Problem". Kahan (1967), "Inclusion theorems for clusters of eigenvalues of
    Hermitian matrices"; Cao, Xie, Li (1996), "A sharp version of Kahan's theorem on clustered eigenvalues", Linear
    Algebra Appl. 245, for vectors that are not orthonormal.
    """
    order = np.argsort(values, kind="stable")
    bounds, groups = np.zeros(len(values)), np.zeros(len(values), dtype=np.int64)
    parts = [order[index : index + 1] for index in range(len(order))]
    while True:
        reach = [_bound(gram, residual_gram, part, noise) for part in parts]
        joined: list[Array] = []
        last = -np.inf
        for part, bound in zip(parts, reach, strict=True):
            if bound == np.inf:  # it is known where the copies are, and the others need not suffer from them
                bound = max(_bound(gram, residual_gram, part[[index]], noise) for index in range(len(part)))
            if joined and values[part[0]] - bound <= last:
                joined[-1] = np.concatenate([joined[-1], part])
            else:
                joined.append(part)
            last = max(last, values[part[-1]] + bound)
        if len(joined) == len(parts):
            break
        parts = joined
    for number, (part, bound) in enumerate(zip(parts, reach, strict=True)):
        bounds[part], groups[part] = bound, number
    return bounds, groups


def _bound(gram: Array, residual_gram: Array, part: Array, noise: float) -> float:
    count = len(part)
    if count == 1:
        return float(np.sqrt(residual_gram[part[0], part[0]])) + noise
    block = np.ix_(part, part)
    least = float(np.linalg.eigvalsh(gram[block])[0])
    if least <= 100 * count * np.finfo(float).eps:  # to rounding, the vectors are dependent
        return np.inf
    residual = np.sqrt(max(0.0, float(np.linalg.eigvalsh(residual_gram[block])[-1])))
    return float((residual + np.sqrt(count) * noise) / np.sqrt(least))


def quadratic_estimates(
    values: Array,
    quotients: Array,
    residuals: Array,
    bounds: Array,
    groups: Array,
    others: tuple[float, float],
    noise: float,
) -> Array:
    r"""Estimate the errors of eigenvalues by the squares of their residuals, where there is a gap around them.

    A Rayleigh quotient :math:`\rho` of residual r is no further than :math:`\|r\|^2 / \delta` from an eigenvalue, where
    :math:`\delta` is the distance from :math:`\rho` to all others (Kato, Temple; Parlett, 1998, theorem 11.7.1). It is
    an estimate here and no bound: the eigenvalues that were not found are only known to lie about the range `others`.

    Parameters
    ----------
    values, quotients, residuals, bounds : ndarray, shape (k,)
        The residuals are those of the values.
    groups : ndarray of int, shape (k,)
        Of a group of several, the bound is returned.
    others : (float, float)
        The range of what was not found; infinite where it is not known.
    noise : float
        As in `matched_bounds`.
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


# The search for eigenvalues that a solver overlooked: Lanczos, begun afresh, on what is orthogonal to the found ones.
#
# With an orthonormal basis Q of the vectors that were found and :math:`P = I - Q Q^\top`, the extreme eigenvalues of
# :math:`P A P` on the range of P are estimated. Its starting vector has a share of every eigenvector, those included
# that the solver's own start happened to lack; the eigenvalues that were found are not in the way, whatever their
# signs; and a value that shows up beyond them is taken by a vector that is orthogonal to theirs.

Multiply = Callable[[Array], Array]

FAILURE = 1e-3
"""The probability, at most, with which an eigenvalue lies outside of the range that `Search` tells."""

_LOOK = 5  # steps from one look at the Ritz values to the next
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Search:
    """The range of the eigenvalues that were not found.

    Attributes
    ----------
    low, high : float
        The least and the largest Ritz value.
    slack : float
        With a probability of 0.999 at least, all of them lie in ``[low - slack, high + slack]``; infinite after too few
        steps.
    beyond : float or None
        A value beyond the limits, as the Rayleigh quotient of a vector that was formed and multiplied.
    """

    low: float
    high: float
    slack: float
    beyond: float | None


def limits(values: Array, which: str | None) -> tuple[float, float] | None:
    """Return the range that all other eigenvalues are in if `values` are those that ``eigsh`` calls `which`.

    It is infinite where an end is not claimed, and None for the smallest in magnitude, whose others lie around them.
    """
    if which == "LA":
        return -np.inf, float(values.min())
    if which == "SA":
        return float(values.max()), np.inf
    if which == "LM":
        return -float(np.abs(values).min()), float(np.abs(values).min())
    if which == "BE":
        ascending, low = np.sort(values), len(values) // 2
        return (float(ascending[low - 1]) if low else -np.inf), float(ascending[low])
    return None


def search_missed(
    multiply: Multiply,
    vectors: Array,
    limits: tuple[float, float],
    tolerance: float,
    steps: int,
    rng: np.random.Generator,
) -> Search:
    """Look for eigenvalues outside of `limits` among those that were not found.

    Parameters
    ----------
    multiply : callable
        Returns the product with a vector ``(N,)`` or a block ``(N, K)``, as a fresh float64 array.
    vectors : ndarray, shape (N, k)
        What was found, of norm 1; k is less than N.
    limits : (float, float)
        Infinite where an end is not looked at.
    tolerance : float
        By how much a value has to lie outside.
    steps : int
        The largest number of Lanczos steps, one product each. Where a value outside is met, as many products again form
        its vector. With at most so many eigenvalues left over, all of them are computed.
    rng : numpy.random.Generator
        Of the starting vector.

    References
    ----------
    Kuczynski, Wozniakowski (1992), "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
    start", SIAM J. Matrix Anal. Appl. 13(4), for the slack. Paige (1980), "Accuracy and effectiveness of the Lanczos
    algorithm for the symmetric eigenproblem": extreme Ritz values do not suffer from the loss of orthogonality, so that
    no basis is kept.
    """
    limits = (limits[0] - tolerance, limits[1] + tolerance)
    Q, R = np.linalg.qr(vectors)
    Q = Q[:, np.abs(np.diag(R)) > 1e-8]  # without the copies
    left, looks = Q.shape[0] - Q.shape[1], math.ceil(steps / _LOOK)
    if left <= steps:
        return _all_of_the_rest(multiply, Q, limits)
    start = _project(Q, rng.standard_normal(len(Q)))
    run = _Lanczos(multiply, Q, start / np.linalg.norm(start))
    for step in range(1, steps + 1):
        run.step()
        if run.exhausted or step == steps or step % _LOOK == 0:
            values, errors = run.ritz()
            low, high = float(values[0]), float(values[-1])
            slack = 0.0 if run.exhausted else _slack(high - low, left, step, FAILURE / looks)
            end, excess = _worst(low, high, limits)
            settled = errors[end] <= max(tolerance, 1e-6 * max(abs(low), abs(high)))
            inside = limits[0] <= low - slack and high + slack <= limits[1]
            if run.exhausted or inside or (excess > 0 and settled):
                break
    beyond = None
    if excess > 0:
        value = run.rayleigh_quotient(end)
        if value < limits[0] or value > limits[1]:
            beyond = value
        else:  # noise in the products
            slack = max(slack, excess)
    return Search(low, high, slack, beyond)


def _all_of_the_rest(multiply: Multiply, Q: Array, limits: tuple[float, float]) -> Search:
    """Compute the whole compression on the orthogonal complement."""
    count = Q.shape[1]
    rest = np.linalg.qr(Q, mode="complete")[0][:, count:]
    compression = rest.T @ multiply(rest)
    values = np.linalg.eigvalsh((compression + compression.T) / 2)
    low, high = float(values[0]), float(values[-1])
    end, excess = _worst(low, high, limits)
    return Search(low, high, 0.0, (low, high)[end] if excess > 0 else None)


def _worst(low: float, high: float, limits: tuple[float, float]) -> tuple[int, float]:
    """Return the end, 0 or -1, that lies further outside of the limits, and by how much."""
    return (0, limits[0] - low) if limits[0] - low > high - limits[1] else (-1, high - limits[1])


def _slack(spread: float, size: int, steps: int, failure: float) -> float:
    r"""Return by how much the extreme Ritz values fall short at most.

    The probability that one does by more than :math:`\epsilon` times the spread of the eigenvalues is at most
    :math:`1.648 \sqrt{n} \exp(-\sqrt{\epsilon} (2 m - 1))`; here that of either end is to be at most `failure`.
    """
    share = (math.log(1.648 * math.sqrt(size) * 2 / failure) / (2 * steps - 1)) ** 2
    return share / (1 - 2 * share) * spread if share < 0.5 else math.inf


def _project(Q: Array, x: Array) -> Array:
    """Take the span of Q out, twice, as once leaves rounding errors of the size of what was taken out."""
    for _ in range(2):
        x = x - Q @ (Q.T @ x)
    return x


class _Lanczos:
    """The three-term recurrence on the complement of Q."""

    def __init__(self, multiply: Multiply, Q: Array, start: Array) -> None:
        self._multiply, self._Q, self._start = multiply, Q, start
        self._before, self._q = np.zeros_like(start), start
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._norm = 0.0
        self.exhausted = False

    def step(self) -> None:
        """Take one step."""
        product = self._multiply(self._q)
        self._norm = max(self._norm, float(np.linalg.norm(product)))
        alpha = float(self._q @ product)
        rest = self._next(product, alpha, self._betas[-1] if self._betas else 0.0)
        beta = float(np.linalg.norm(rest))
        self._alphas.append(alpha)
        self._betas.append(beta)
        # What is left is rounding: the vectors so far span an invariant subspace, with a share of every eigenspace.
        self.exhausted = beta <= 10 * _EPS * math.sqrt(len(rest)) * self._norm
        if not self.exhausted:
            self._before, self._q = self._q, rest / beta

    def ritz(self) -> tuple[Array, Array]:
        """Return the Ritz values, in ascending order, and the norms of their residuals."""
        values, vectors = self._eigh()
        return values, self._betas[-1] * np.abs(vectors[-1])

    def rayleigh_quotient(self, end: int) -> float:
        """Run through the recurrence again, form the Ritz vector of that end, and multiply it."""
        weights = self._eigh()[1][:, end]
        self._before, self._q = np.zeros_like(self._start), self._start
        total = weights[0] * self._start
        betas = [0.0, *self._betas]
        for weight, alpha, beta in zip(weights[1:], self._alphas, betas, strict=False):
            rest = self._next(self._multiply(self._q), alpha, beta)
            self._before, self._q = self._q, rest / np.linalg.norm(rest)
            total += weight * self._q
        total = _project(self._Q, total)
        total /= np.linalg.norm(total)
        return float(total @ self._multiply(total))

    def _next(self, product: Array, alpha: float, beta: float) -> Array:
        return _project(self._Q, product - alpha * self._q - beta * self._before)

    def _eigh(self) -> tuple[Array, Array]:
        values, vectors = eigh_tridiagonal(np.array(self._alphas), np.array(self._betas[:-1]))
        return values, vectors


# How exact and how symmetric an operator's products are, measured by a few of them.

_PROBES, _SINGLE = 4, 4
NUM_PRODUCTS = _PROBES + _SINGLE
"""The products that `measure` takes, at most."""

# Symmetry is lost to rounding as linearity is, if to a few times more of it; below the second number it does no harm.
_SYMMETRY_OF_NOISE, _SYMMETRY = 10.0, 1e-10


@dataclasses.dataclass(frozen=True)
class Noise:
    """The errors of an operator's products.

    Attributes
    ----------
    relative : float
        The largest that was met, relative to the product.
    error : float
        What the error's norm may be for a found vector of norm 1: twice the largest that was met.
    symmetry : float
        An estimate of ``||A - A'|| / ||A||``.
    skew : float
        An estimate of ``||(A - A') x||`` for a vector of norm 1.
    norm : float
        The largest norm of a product with a vector of norm 1.
    """

    relative: float
    error: float
    symmetry: float
    skew: float
    norm: float


def asymmetric(symmetry: float, relative: float) -> bool:
    """Whether a lack of symmetry is more than the `relative` noise of the products explains, and does harm."""
    return symmetry > max(_SYMMETRY_OF_NOISE * relative, _SYMMETRY)


def measure(A: CountedOperator, V: Array, AV: Array, rng: np.random.Generator) -> Noise:
    """Measure the errors of products with random vectors, and with combinations of found ones.

    Random vectors see all of the operator, but little of its largest eigenvalues; the found ones are those that matter.

    Parameters
    ----------
    A : CountedOperator, shape (N, N)
        Its products are in float64.
    V, AV : ndarray, shape (N, k)
        The found vectors, of norm 1, and their products.
    rng : numpy.random.Generator
    """
    size = len(V)
    X = rng.standard_normal((size, min(_PROBES, size)))
    X /= np.linalg.norm(X, axis=0)
    AX = A.matmat(X)
    norms = column_norms(AX)
    typical, largest = _rms(norms), float(max(norms.max(), column_norms(AV).max()))

    repeated = norm(A.matvec(X[:, 0]) - AX[:, 0])
    combined = max(repeated, _combined(A, X, AX, rng))
    found = max(_combined(A, V, AV, rng) for _ in range(2))

    # For x of norm 1 in a random direction, sqrt(N) |g' x| is |g| on the average of squares.
    of_found = math.sqrt(size) * _rms(AV.T @ X - V.T @ AX)
    mixed = X.T @ AX
    of_random = math.sqrt(size) * _rms((mixed - mixed.T)[np.triu_indices(len(mixed), 1)])
    return Noise(
        relative=max(_ratio(combined, typical), _ratio(found, largest)),
        error=2 * max(combined, found) + _EPS * largest,
        symmetry=max(_ratio(of_random, typical), _ratio(of_found, largest)),
        skew=max(of_random, of_found),
        norm=largest,
    )


def _combined(A: CountedOperator, X: Array, AX: Array, rng: np.random.Generator) -> float:
    """Return the norm of ``A (X c) - (A X) c`` for a random c of norm 1."""
    weights = rng.standard_normal((X.shape[1], 1))
    weights /= np.linalg.norm(weights)
    return norm(A.matvec((X @ weights)[:, 0]) - (AX @ weights)[:, 0])


def _rms(array: Array) -> float:
    return norm(array) / math.sqrt(array.size) if array.size else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
