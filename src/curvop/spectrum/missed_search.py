"""The search for eigenvalues that a solver missed.

Let the columns of Q be an orthonormal basis of the computed eigenvectors, and let P = I - Q Q'. `search_missed`
estimates the extreme eigenvalues of P A P on the range of P. It uses Lanczos with a random starting vector, which
almost surely has a component along every eigenvector. The projection P removes the computed eigenvalues, regardless of
their signs. A missed eigenvalue is reported only if the Rayleigh quotient of a vector orthogonal to Q confirms it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

__all__ = ["SearchResult", "remaining_range", "search_missed"]

Array = NDArray[Any]
Multiply = Callable[[Array], Array]

_EPS = float(np.finfo(np.float64).eps)
_FAILURE = 1e-3  # upper bound for the probability that the range of a `SearchResult` is wrong
_CHECK_INTERVAL = 5  # Lanczos steps between two checks of the Ritz values


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The result of a search for missed eigenvalues: the range of all eigenvalues that the solver did not compute.

    Attributes
    ----------
    low, high : float
        The smallest and the largest Ritz value.
    slack : float
        With a probability of at least 0.999, all eigenvalues that the solver did not compute lie in ``[low - slack,
        high + slack]``. After too few Lanczos steps, the slack is infinite.
    beyond : float or None
        The Rayleigh quotient of a Ritz vector. It lies outside the limits of the search, which proves that an
        eigenvalue was missed. None if no missed eigenvalue was found.
    """

    low: float
    high: float
    slack: float
    beyond: float | None


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
) -> SearchResult:
    """Search for missed eigenvalues outside of `limits`, on the orthogonal complement of the computed eigenvectors.

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
        The maximum number of Lanczos steps. Each step takes one product. If a Ritz value lies outside of the limits,
        the recurrence is repeated to form the Ritz vector. If the solver left at most `steps` eigenvalues uncomputed, a
        dense eigensolver computes all of them.
    rng : numpy.random.Generator
        The generator for the starting vector.

    Notes
    -----
    The slack of the result is the bound of [1]_. No Lanczos basis is stored, because a loss of orthogonality does not
    affect the extreme Ritz values [2]_.

    References
    ----------
    .. [1] J. Kuczynski, H. Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a
       random start", SIAM J. Matrix Anal. Appl. 13(4), 1992. doi:10.1137/0613066
    .. [2] C. C. Paige, "Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem", Linear
       Algebra Appl. 34, 1980. doi:10.1016/0024-3795(80)90167-6
    """
    limits = (limits[0] - tolerance, limits[1] + tolerance)
    Q, R = np.linalg.qr(vectors)
    Q = Q[:, np.abs(np.diag(R)) > 1e-8]  # drop linearly dependent vectors
    left, checks = Q.shape[0] - Q.shape[1], math.ceil(steps / _CHECK_INTERVAL)
    if left <= steps:
        return _search_densely(multiply, Q, limits)
    start = _project(Q, rng.standard_normal(len(Q)))
    lanczos = _ProjectedLanczos(multiply, Q, start / np.linalg.norm(start))
    for step in range(1, steps + 1):
        lanczos.step()
        if lanczos.exhausted or step == steps or step % _CHECK_INTERVAL == 0:
            values, errors = lanczos.ritz()
            low, high = float(values[0]), float(values[-1])
            slack = 0.0 if lanczos.exhausted else _slack(high - low, left, step, _FAILURE / checks)
            end, excess = _furthest_outside(low, high, limits)
            settled = errors[end] <= max(tolerance, 1e-6 * max(abs(low), abs(high)))
            inside = limits[0] <= low - slack and high + slack <= limits[1]
            if lanczos.exhausted or inside or (excess > 0 and settled):
                break
    beyond = None
    if excess > 0:
        value = lanczos.rayleigh_quotient(end)
        if value < limits[0] or value > limits[1]:
            beyond = value
        else:  # noise in the products caused the outlying Ritz value
            slack = max(slack, excess)
    return SearchResult(low, high, slack, beyond)


def _search_densely(multiply: Multiply, Q: Array, limits: tuple[float, float]) -> SearchResult:
    """Search by computing all eigenvalues of A restricted to the orthogonal complement of Q."""
    count = Q.shape[1]
    complement = np.linalg.qr(Q, mode="complete")[0][:, count:]
    compression = complement.T @ multiply(complement)
    values = np.linalg.eigvalsh((compression + compression.T) / 2)
    low, high = float(values[0]), float(values[-1])
    end, excess = _furthest_outside(low, high, limits)
    return SearchResult(low, high, 0.0, (low, high)[end] if excess > 0 else None)


def _furthest_outside(low: float, high: float, limits: tuple[float, float]) -> tuple[int, float]:
    """Find which of the values `low` and `high` lies further outside of the limits.

    Return ``(index, distance)``. The index is 0 for `low` and -1 for `high`. The distance is measured outwards from the
    limit to the value, and is negative if both values lie within the limits.
    """
    return (0, limits[0] - low) if limits[0] - low > high - limits[1] else (-1, high - limits[1])


def _slack(spread: float, size: int, steps: int, failure: float) -> float:
    r"""Return an upper bound for the distances from the extreme Ritz values to the extreme eigenvalues.

    The probability that the bound fails at one or both ends is at most `failure`. After m steps with a matrix of size
    n, the distance at one end exceeds :math:`\epsilon` times the spread of the eigenvalues with a probability of at
    most :math:`1.648 \sqrt{n} \exp(-\sqrt{\epsilon} (2 m - 1))`.
    """
    share = (math.log(1.648 * math.sqrt(size) * 2 / failure) / (2 * steps - 1)) ** 2
    return share / (1 - 2 * share) * spread if share < 0.5 else math.inf


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

    def rayleigh_quotient(self, end: int) -> float:
        """Return the Rayleigh quotient of the Ritz vector for the smallest (end=0) or largest (end=-1) Ritz value.

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
        return float(total @ self._multiply(total))

    def _next(self, product: Array, alpha: float, beta: float) -> Array:
        """Return the next Lanczos vector before normalization."""
        return _project(self._Q, product - alpha * self._q - beta * self._previous)

    def _eigh(self) -> tuple[Array, Array]:
        """Return the eigenvalues and eigenvectors of the tridiagonal matrix."""
        values, vectors = eigh_tridiagonal(np.array(self._alphas), np.array(self._betas[:-1]))
        return values, vectors
