"""The search for eigenvalues that a solver missed.

Let the columns of Q be an orthonormal basis of the computed eigenvectors, and let P = I - Q Q'. `search_missed`
estimates the extreme eigenvalues of P A P on the range of P. It uses Lanczos with a random starting vector, which
almost surely has a component along every eigenvector. The projection P removes the computed eigenvalues, regardless of
their signs. A missed eigenvalue is reported only if the Rayleigh quotient of a vector orthogonal to Q confirms it.

The search also bounds the eigenvalues that it did not see. If an eigenvalue lies far beyond the extreme Ritz value,
then the component of the starting vector along its eigenvector must be very small. This is unlikely for a random
vector.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from curvop.spectrum.counting import TimeUpError

__all__ = ["SearchResult", "remaining_range", "search_missed"]

Array = NDArray[Any]
Multiply = Callable[[Array], Array]

_EPS = float(np.finfo(np.float64).eps)
_FAILURE = 1e-3  # upper bound for the probability that the range of a `SearchResult` is wrong
_CHECK_INTERVAL = 5  # Lanczos steps between two checks of the Ritz values, and 10 % of the steps after the first 50
_SMALL = 60  # If at most this many eigenvalues are left, all of them are computed by a dense eigensolver at once.
_DENSE = 2000  # If more eigenvalues are left, a dense eigensolver would take too much memory.
_DISTANCES = np.logspace(-16, 1, 256)  # distances from the extreme Ritz value at which the bound is evaluated


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """The result of a search for missed eigenvalues: the range of all eigenvalues that the solver did not compute.

    Attributes
    ----------
    low, high : float
        The smallest and the largest Ritz value.
    lower, upper : float
        With a probability of at least 0.999, all eigenvalues that the solver did not compute lie in ``[lower, upper]``.
        A bound is infinite after too few Lanczos steps, or if this end of the spectrum is not searched.
    beyond : float or None
        The Rayleigh quotient of one of the `vectors`. It lies outside the limits of the search, which proves that an
        eigenvalue was missed. None if no missed eigenvalue was found.
    limits : (float, float)
        The limits of the search, including the tolerance.
    vectors : ndarray, shape (N, m), or None
        Orthonormal vectors that are orthogonal to the computed eigenvectors, and whose Rayleigh quotients lie outside
        of `limits`. They approximate eigenvectors of missed eigenvalues. A dense eigensolver finds the eigenvectors of
        all missed eigenvalues, and Lanczos finds one. None if no missed eigenvalue was found.
    products : ndarray, shape (N, m), or None
        The products of the operator with `vectors`.
    """

    low: float
    high: float
    lower: float
    upper: float
    beyond: float | None = None
    limits: tuple[float, float] = (-math.inf, math.inf)
    vectors: Array | None = None
    products: Array | None = None


def remaining_range(values: Array, which: str | None) -> tuple[float, float] | None:
    """Return the range in which all other eigenvalues lie if the solver missed none.

    Parameters
    ----------
    values : ndarray, shape (k,)
        The computed eigenvalues.
    which : str or None
        Which eigenvalues `values` are claimed to be, as in `certify`.

    Returns
    -------
    (float, float) or None
        The lower and the upper limit. A limit is infinite if `which` makes no claim about that end of the spectrum. The
        result is None if `which` is None or 'SM', because the range of the other eigenvalues is then unknown.
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
    *,
    most: float | None = None,
    tol: float = 0.0,
    norm: float = 0.0,
) -> SearchResult:
    r"""Search for missed eigenvalues outside of `limits`, on the orthogonal complement of the computed eigenvectors.

    The search stops as soon as a missed eigenvalue is found, or as soon as all other eigenvalues lie within the limits
    up to `tolerance`, with a probability of at least 0.999. After `steps` steps, it also stops as soon as they lie
    within the limits up to `tol` times the norm of the operator. If `multiply` raises a ``TimeUpError``, the search
    returns its current result.

    Parameters
    ----------
    multiply : callable
        Takes a vector ``(N,)`` or a block ``(N, K)`` and returns its product with the operator as a new float64 array.
    vectors : ndarray, shape (N, k)
        The computed eigenvectors, of norm 1. k is less than N.
    limits : (float, float)
        The range in which all other eigenvalues lie if the solver missed none (see `remaining_range`). If one end of
        the spectrum is not searched, the limit at this end is infinite.
    tolerance : float
        The distance by which an eigenvalue must exceed the limits to count as missed.
    steps : int
        The number of Lanczos steps. Each step takes one product. If a Ritz value lies outside of the limits, the
        recurrence is repeated to form the Ritz vector. If the solver left at most 60 eigenvalues uncomputed, and not
        more than `steps`, a dense eigensolver computes all of them.
    rng : numpy.random.Generator
        The generator for the starting vector.
    most : float, optional
        The maximum number of products without the repetition, at least `steps`. The default is `steps`. The search
        takes at most ``N - k`` Lanczos steps. If `most` allows ``N - k`` more products after these steps, and ``N - k``
        is at most 2,000, a dense eigensolver then computes all eigenvalues.
    tol : float, optional
    norm : float, optional
        A lower bound for the norm of the operator.

    Raises
    ------
    TimeUpError
        If `multiply` raises this error before the first step is complete.

    Notes
    -----
    Let n = N - k, and let u be the eigenvector of the largest eigenvalue :math:`\lambda` of P A P. The starting vector
    :math:`q_1` is uniformly distributed on the unit sphere. Hence, :math:`|u^\top q_1| \ge \delta` with a probability
    of at least :math:`1 - \delta \sqrt{2 (n - 1) / \pi}`. The Lanczos vectors satisfy :math:`u^\top q_{j+1} =
    p_j(\lambda) \, u^\top q_1`, where :math:`p_j` are the Lanczos polynomials. Since :math:`|u^\top q_{j+1}| \le 1`, it
    follows that :math:`|p_j(\lambda)| \le 1 / \delta` for all j [1]_. The polynomials grow monotonically beyond the
    largest Ritz value, so this condition yields an upper bound for :math:`\lambda`. The bound holds at all steps at the
    same time. If the extreme Ritz vector has the residual norm r, the bound exceeds the Ritz value by about 1600 r. A
    lower bound for the smallest eigenvalue follows in the same way. Rounding errors also change the components
    :math:`u^\top q_j`. They are not correlated with :math:`u^\top q_1`, so they do not make small components more
    likely.

    No Lanczos basis is stored, because a loss of orthogonality does not affect the extreme Ritz values [2]_.

    References
    ----------
    .. [1] J. L. M. van Dorsselaer, M. E. Hochstenbach, H. A. van der Vorst, "Computing probabilistic bounds for extreme
       eigenvalues of symmetric matrices with the Lanczos method", SIAM J. Matrix Anal. Appl. 22(3), 2001.
       doi:10.1137/S0895479800366859
    .. [2] C. C. Paige, "Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem", Linear
       Algebra Appl. 34, 1980. doi:10.1016/0024-3795(80)90167-6
    """
    most = steps if most is None else max(most, steps)
    inner = (limits[0] - tolerance, limits[1] + tolerance)
    Q, R = np.linalg.qr(vectors)
    Q = Q[:, np.abs(np.diag(R)) > 1e-8]  # drop linearly dependent vectors
    left = Q.shape[0] - Q.shape[1]
    if left <= min(steps, _SMALL):
        return _search_densely(multiply, Q, inner)
    start = _project(Q, rng.standard_normal(len(Q)))
    lanczos = _ProjectedLanczos(multiply, Q, start / np.linalg.norm(start))
    component = _FAILURE / 2 * math.sqrt(math.pi / (2 * (left - 1)))  # at each end, with half of the failures
    next_check, time_up = _CHECK_INTERVAL, False
    while True:
        try:
            lanczos.step()
        except TimeUpError:
            if not lanczos.steps:
                raise
            time_up = True
        step = lanczos.steps
        last = lanczos.exhausted or time_up or step >= min(most, left)
        if not last and step < next_check:
            continue
        next_check = step + max(_CHECK_INTERVAL, step // 10)
        values, errors = lanczos.ritz()
        low, high = float(values[0]), float(values[-1])
        lower, upper = lanczos.bounds(low, high, limits, component)
        end, excess = _furthest_outside(low, high, inner)
        scale = max(abs(low), abs(high))
        settled = errors[end] <= max(tolerance, 1e-6 * scale)
        goal = tolerance if step < steps and not lanczos.exhausted else max(tolerance, tol * max(scale, norm))
        closed = limits[0] - goal <= lower and upper <= limits[1] + goal
        if closed or (excess > 0 and settled):
            break
        if last:
            if not time_up and left <= min(_DENSE, most - step):
                return _search_densely(multiply, Q, inner)
            break
    if excess > 0:
        with contextlib.suppress(TimeUpError):
            vector, product = lanczos.ritz_vector(end)
            value = float(vector @ product)
            if not inner[0] <= value <= inner[1]:  # otherwise, noise in the products caused the outlying Ritz value
                return SearchResult(low, high, lower, upper, value, inner, vector[:, None], product[:, None])
    return SearchResult(low, high, lower, upper)


def _search_densely(multiply: Multiply, Q: Array, limits: tuple[float, float]) -> SearchResult:
    """Search by computing all eigenvalues of A restricted to the orthogonal complement of Q."""
    count = Q.shape[1]
    complement = np.linalg.qr(Q, mode="complete")[0][:, count:]
    products = multiply(complement)
    compression = complement.T @ products
    values, S = np.linalg.eigh((compression + compression.T) / 2)
    low, high = float(values[0]), float(values[-1])
    end, excess = _furthest_outside(low, high, limits)
    if excess <= 0:
        return SearchResult(low, high, low, high)
    S = S[:, (values < limits[0]) | (values > limits[1])]
    return SearchResult(low, high, low, high, (low, high)[end], limits, complement @ S, products @ S)


def _furthest_outside(low: float, high: float, limits: tuple[float, float]) -> tuple[int, float]:
    """Find which of the values `low` and `high` lies further outside of the limits.

    Return ``(index, distance)``. The index is 0 for `low` and -1 for `high`. The distance is measured outwards from the
    limit to the value, and is negative if both values lie within the limits.
    """
    return (0, limits[0] - low) if limits[0] - low > high - limits[1] else (-1, high - limits[1])


def _upper_bound(alphas: Array, betas: Array, top: float, component: float, norm: float) -> float:
    r"""Return an upper bound for the largest eigenvalue, or infinity if there is none yet.

    The bound holds if the component of the starting vector along the eigenvector is at least `component`. The Lanczos
    polynomials are evaluated at increasing distances from the largest Ritz value `top`. The largest distance is at
    least ten times `norm`, the largest norm of a product. With :math:`d_j = \beta_j p_j(t) / p_{j-1}(t)`, their
    recurrence is :math:`d_j = t - \alpha_j - \beta_{j-1}^2 / d_{j-1}`.
    """
    t = top + _DISTANCES * max(np.abs(alphas).max() + 2 * betas.max(), norm)
    log_p, largest, pivot = np.zeros_like(t), np.zeros_like(t), np.full_like(t, np.inf)
    previous = 0.0
    beyond = np.ones(len(t), dtype=bool)  # not below the largest Ritz value, up to rounding errors
    for alpha, beta in zip(alphas, betas, strict=True):
        pivot = t - alpha - previous**2 / pivot
        beyond &= pivot > 0
        pivot = np.where(beyond, pivot, 1.0)
        log_p += np.log(pivot / beta)
        largest = np.maximum(largest, log_p)
        previous = beta
    excluded = beyond & (largest > -math.log(component))
    first = 1 + int(np.flatnonzero(~excluded).max(initial=-1))
    return float(t[first]) if first < len(t) else math.inf


def _project(Q: Array, x: Array) -> Array:
    """Return x minus its projection onto the span of Q. The projection is repeated to remove rounding errors."""
    for _ in range(2):
        x = x - Q @ (Q.T @ x)
    return x


class _ProjectedLanczos:
    """Lanczos on the orthogonal complement of Q, as a three-term recurrence that does not store the basis."""

    def __init__(self, multiply: Multiply, Q: Array, start: Array) -> None:
        self._multiply, self._Q, self._start = multiply, Q, start
        self._previous, self._q = np.zeros_like(start), start
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._norm = 0.0
        self.exhausted = False

    @property
    def steps(self) -> int:
        """The number of completed steps."""
        return len(self._alphas)

    def step(self) -> None:
        """Take one Lanczos step."""
        product = self._multiply(self._q)
        self._norm = max(self._norm, float(np.linalg.norm(product)))
        alpha = float(self._q @ product)
        rest = self._next(product, alpha, self._betas[-1] if self._betas else 0.0)
        beta = float(np.linalg.norm(rest))
        self._alphas.append(alpha)
        self._betas.append(beta)
        # If `rest` contains only rounding errors, the Lanczos vectors span an invariant subspace. This subspace
        # contains all distinct eigenvalues, because the starting vector is random.
        self.exhausted = beta <= 10 * _EPS * math.sqrt(len(rest)) * self._norm
        if not self.exhausted:
            self._previous, self._q = self._q, rest / beta

    def ritz(self) -> tuple[Array, Array]:
        """Return the Ritz values in ascending order, and the residual norms of the Ritz vectors."""
        values, vectors = self._eigh()
        return values, self._betas[-1] * np.abs(vectors[-1])

    def bounds(self, low: float, high: float, limits: tuple[float, float], component: float) -> tuple[float, float]:
        """Return bounds for the eigenvalues at the ends with finite limits (see `_upper_bound`).

        `low` and `high` are the smallest and the largest Ritz value.
        """
        if not self._betas[-1]:
            return low, high
        # If the space is exhausted, the last norm consists of rounding errors. Eigenvalues that differ by less than
        # these errors have not been told apart, so the Ritz values themselves are no bounds.
        alphas, betas = np.array(self._alphas), np.maximum(self._betas, _EPS * self._norm)
        lower = -_upper_bound(-alphas, betas, -low, component, self._norm) if math.isfinite(limits[0]) else -math.inf
        upper = _upper_bound(alphas, betas, high, component, self._norm) if math.isfinite(limits[1]) else math.inf
        return lower, upper

    def ritz_vector(self, end: int) -> tuple[Array, Array]:
        """Return the Ritz vector for the smallest (end=0) or largest (end=-1) Ritz value, and its product with A.

        The recurrence is repeated to form the Ritz vector.
        """
        weights = self._eigh()[1][:, end]
        self._previous, self._q = np.zeros_like(self._start), self._start
        total = weights[0] * self._start
        betas = [0.0, *self._betas]
        for weight, alpha, beta in zip(weights[1:], self._alphas, betas, strict=False):
            rest = self._next(self._multiply(self._q), alpha, beta)
            self._previous, self._q = self._q, rest / np.linalg.norm(rest)
            total += weight * self._q
        total = _project(self._Q, total)
        total /= np.linalg.norm(total)
        return total, self._multiply(total)

    def _next(self, product: Array, alpha: float, beta: float) -> Array:
        """Return the next Lanczos vector before normalization."""
        return _project(self._Q, product - alpha * self._q - beta * self._previous)

    def _eigh(self) -> tuple[Array, Array]:
        """Return the eigenvalues and eigenvectors of the tridiagonal matrix."""
        values, vectors = eigh_tridiagonal(np.array(self._alphas), np.array(self._betas[:-1]))
        return values, vectors
