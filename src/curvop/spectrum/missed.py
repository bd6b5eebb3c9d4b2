r"""The search for eigenvalues that a solver overlooked: Lanczos, begun afresh, on what is orthogonal to the found ones.

With an orthonormal basis Q of the vectors that were found and :math:`P = I - Q Q^\top`, the extreme eigenvalues of
:math:`P A P` on the range of P are estimated. Its starting vector has a share of every eigenvector, those included that
the solver's own start happened to lack; the eigenvalues that were found are not in the way, whatever their signs; and
a value that shows up beyond them is taken by a vector that is orthogonal to theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

__all__ = ["Search", "limits", "search"]

Array = NDArray[Any]
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


def search(
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
