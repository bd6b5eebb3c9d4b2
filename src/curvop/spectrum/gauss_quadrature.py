"""Bound fractions and integrals of a measure that is known only through its Gauss quadrature.

A Gauss quadrature determines the first moments of its measure, and these moments determine a tridiagonal matrix
(`Recurrence`). If the last entries of this matrix are changed, the eigenvalues and eigenvectors of the changed matrix
give another quadrature rule. The rule and the measure have the same moments, except for the highest one or two. If many
such rules are applied to a function, the spread of the results shows how accurately the moments determine the integral
of the function. For the fraction of a measure up to a point, `Recurrence.shares` computes proven bounds, and
`ShareBounds` averages these bounds over the measures of several random vectors (probes).

References
----------
Golub, Welsch (1969), "Calculation of Gauss quadrature rules", Math. Comp. 23. Golub, Meurant (2010), "Matrices, Moments
and Quadrature with Applications", Princeton University Press, chapter 6. Gautschi (2004), "Orthogonal Polynomials:
Computation and Approximation", Oxford University Press. Krein, Nudelman (1977), "The Markov Moment Problem and Extremal
Problems", American Mathematical Society, chapter III.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.special import logsumexp

from curvop.spectrum.estimators import BoundedEstimate, bounded_mean
from curvop.spectrum.norms import norm

__all__ = ["Recurrence", "ShareBounds", "all_rules", "beyond_ends", "known_shares", "number_of_rules", "recurrences"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
# All rules of a probe together have about _NODES nodes. The number of rules is at least _FEWEST and at most _MOST.
# Between the nodes of neighboring rules, the bounds are wider than sharp bounds by about 2 / (number of rules), which
# is 6% for 32 rules.
_NODES, _FEWEST, _MOST = 2048, 8, 32


def number_of_rules(steps: int) -> int:
    """Return the number of quadrature rules for a probe with `steps` nodes per rule. The number is even."""
    return int(np.clip(_NODES // max(steps, 1), _FEWEST, _MOST)) // 2 * 2


def recurrences(nodes: Array, weights: Array, entries: Array, exact: Array) -> list[Recurrence | None]:
    """Return a list with the recurrence of each probe's measure, or None if the measure equals its Gauss rule.

    Parameters
    ----------
    nodes, weights : ndarray, shape (K, m)
        Gauss rule of each probe.
    entries : ndarray, shape (K, 2, m)
        Diagonals and off-diagonals of the tridiagonal matrices. If the array is empty, the matrices are recovered from
        the rules.
    exact : ndarray of bool, shape (K,)
        True for a probe whose measure equals its Gauss rule.
    """
    result: list[Recurrence | None] = [None] * len(nodes)
    for probe in np.flatnonzero(~exact):
        positive = weights[probe] > 0
        if len(entries):
            alphas, betas = entries[probe, :, positive].T
            ends = float(nodes[probe, positive].min()), float(nodes[probe, positive].max())
            result[probe] = Recurrence(alphas, betas[:-1], float(weights[probe].sum()), ends)
        else:
            result[probe] = Recurrence.of(nodes[probe, positive], weights[probe, positive])
    return result


def all_rules(nodes: Array, weights: Array, recurrences: list[Recurrence | None]) -> tuple[Array, Array]:
    """Return the nodes and weights ``(K, R, m)`` of all rules of each probe.

    The first rule is the Gauss rule. The second rule is the Gauss rule of the first half of the Lanczos steps. If there
    is only one step, the weights of the second rule are NaN. The other rules are those of `Recurrence.within`. If the
    recurrence of a probe is None, all rules equal the Gauss rule.
    """
    count, steps = nodes.shape
    heaviest = np.take_along_axis(nodes, weights.argmax(1)[:, None], 1) if count else nodes
    # Pad with the node of largest weight instead of 0, because a function may be undefined at 0.
    own = np.where(weights > 0, nodes, heaviest)
    family = number_of_rules(steps)
    nodes, weights = (np.repeat(part[:, None], 2 + family, axis=1) for part in (own, weights))
    for probe, recurrence in enumerate(recurrences):
        if recurrence is None:
            continue
        length = len(recurrence.alphas)
        half, half_weights = recurrence.half()
        nodes[probe, 1], weights[probe, 1] = heaviest[probe], 0.0
        nodes[probe, 1, : len(half)], weights[probe, 1, : len(half)] = half, half_weights
        if length == 1:
            weights[probe, 1] = np.nan
        else:
            nodes[probe, 2:, :length], weights[probe, 2:, :length] = recurrence.within(family)
    return nodes, weights


def beyond_ends(
    recurrences: list[Recurrence | None], nodes: Array, ends: tuple[float, float], mass: float
) -> tuple[float, float]:
    """Bound the distances from an interval to the eigenvalues outside of it.

    Return (below, above), the distances from the lower end downwards and from the upper end upwards. Each is the
    largest distance at which the moments of at least one probe allow its spectral measure to have a point mass.

    Parameters
    ----------
    recurrences : list of Recurrence or None
        The recurrence of each probe.
    nodes : ndarray, shape (n,)
        Nodes of all probes, which lie within the ends.
    ends : tuple of float
        Lower and upper end of the range.
    mass : float
        The point mass.
    """
    distances = []
    for sign, outermost, end in (
        (-1, nodes.min(initial=np.inf), ends[0]),
        (1, nodes.max(initial=-np.inf), ends[1]),
    ):
        reaches = (recurrence.reach(sign, outermost, mass) for recurrence in recurrences if recurrence is not None)
        distances.append(max(max(reaches, default=0.0) - sign * (end - outermost), 0.0))
    return distances[0], distances[1]


class Recurrence(NamedTuple):
    """Three-term recurrence of the orthonormal polynomials of a measure, determined by the Gauss rule of the measure.

    The tridiagonal matrix of `alphas` and `betas` defines the Gauss rule of m nodes: the nodes are the eigenvalues of
    the matrix, and the weights are the squares of the first entries of its eigenvectors (Golub, Welsch, 1969). If the
    last entries of the matrix are changed, the same construction gives other rules with positive weights, which are
    exact for polynomials of a lower degree only.

    Attributes
    ----------
    alphas, betas : ndarray, shape (m,), (m - 1,)
        Diagonal and off-diagonal of the tridiagonal matrix.
    mass : float
        Total mass of the measure.
    ends : tuple of float
        Smallest and largest node of the Gauss rule.
    """

    alphas: Array
    betas: Array
    mass: float
    ends: tuple[float, float]

    @classmethod
    def of(cls, nodes: Array, weights: Array) -> Self:
        """Recover a recurrence from the nodes and weights ``(m,)`` of a Gauss rule.

        The method is the Lanczos process with the diagonal matrix of the nodes. The starting vector consists of the
        square roots of the weights (Gautschi, 2004, section 2.2.3).
        """
        count = len(nodes)
        basis, alphas, betas = np.zeros((count, count)), np.zeros(count), np.zeros(count)
        q = np.sqrt(weights / weights.sum())
        for step in range(count):
            basis[step] = q
            w = nodes * q
            alphas[step] = q @ w
            for _ in range(2):
                w -= basis[: step + 1].T @ (basis[: step + 1] @ w)
            betas[step] = norm(w)
            if not betas[step] > 0:
                count = step + 1
                break
            q = w / betas[step]
        return cls(alphas[:count], betas[: count - 1], float(weights.sum()), (float(nodes.min()), float(nodes.max())))

    def half(self) -> tuple[Array, Array]:
        """Return nodes and weights of the Gauss rule with m / 2 nodes, rounded up."""
        count = (len(self.alphas) + 1) // 2
        nodes, weights = self._rule(self.alphas[:count], self.betas[: count - 1])
        return np.clip(nodes, *self.ends), weights

    def shares(self, count: int) -> tuple[Array, Array, Array]:
        r"""Return bounds for the mass of the measure up to any position, as step functions of the position.

        If the last alpha is changed, the rule is exact up to degree 2 m - 2 and satisfies the inequalities of
        Chebyshev, Markov and Stieltjes: the mass to the left of a node is at least the sum of the weights of all
        smaller nodes, and the mass up to and including the node is at most this sum plus the weight of the node. These
        bounds are sharp at the node, and every point is a node of one rule of this kind. This method computes about
        `count` rules with evenly spaced nodes. Because the mass up to a point increases with the point, the bounds at
        these nodes also give bounds at all other points.

        Returns
        -------
        points : ndarray, shape (n,)
            Points in increasing order.
        low, high : ndarray, shape (n + 1,)
            Bounds for the mass up to any position in each of the n + 1 intervals that the points delimit.
        """
        if not len(self.betas):
            return np.zeros(0), np.zeros(1), np.full(1, self.mass)
        levels = self.betas[-1] * np.tan(np.pi * (np.arange(1, count) / count - 0.5))
        # In a gap that is wide relative to the last beta, a node moves by as much as the last alpha. Therefore, also
        # use large changes of the last alpha.
        doublings = max(0.0, np.log2(2 * (self.ends[1] - self.ends[0])) - np.log2(levels[-1]))
        far = levels[-1] * 2.0 ** np.arange(1, doublings + 1)
        levels = np.concatenate([-far, levels, far])
        nodes, weights = self._changed_rules(self.alphas[-1] + levels, np.ones(len(levels)))
        cumulative = weights.cumsum(1)
        order = nodes.reshape(-1).argsort(kind="stable")
        low = np.maximum.accumulate((cumulative - weights).reshape(-1)[order])
        high = np.minimum.accumulate(cumulative.reshape(-1)[order][::-1])[::-1]
        return nodes.reshape(-1)[order], np.r_[0.0, np.maximum(low, 0.0)], np.r_[high, self.mass]

    def within(self, count: int) -> tuple[Array, Array]:
        """Return nodes and weights ``(count, m)`` of rules whose nodes all lie in the range of the `ends`.

        The rules are exact up to degree 2 m - 3. Each rule has one end of the range as a node. For each end, these
        rules form a continuous family, which connects the Gauss rules of m - 1 and of m nodes. Both ends are nodes of
        the Gauss rule of m nodes. Every point of the range is a node of one rule of these two families. These rules are
        the canonical representations of the moments on the interval (Krein, Nudelman, 1977, chapter III).

        If a rule with a node at 0 exists, it is one of the returned rules. Most kinks and steps of functions of
        eigenvalues are at 0, and may lie between the nodes of the other rules.
        """
        half = count // 2
        levels = self.betas[-1] * np.tan(np.pi / 2 * np.arange(1, half + 1) / (half + 1))
        alphas, factors = [], []
        for end in self.ends:
            distance = self.alphas[-1] - end
            squares = np.abs(distance) / (np.abs(distance) + levels)
            squares[-1] = self._square_of_zero(end, squares[-1])
            alphas.append(end + squares * distance)  # with this alpha, `end` is a node for any value of the square
            factors.append(np.sqrt(squares))
        nodes, weights = self._changed_rules(np.concatenate(alphas), np.concatenate(factors))
        for row in nodes[[half - 1, count - 1]]:
            nearest = np.abs(row).argmin()
            row[nearest] = 0.0 if abs(row[nearest]) <= _EPS * len(row) * np.abs(row).max() else row[nearest]
        return np.clip(nodes, *self.ends), weights

    def _square_of_zero(self, end: float, default: float) -> float:
        """Return the square of the factor for which a rule has nodes at `end` and 0, or `default` if there is none."""
        pivot = 1.0
        for alpha, previous_beta in zip(self.alphas[:-1], np.r_[0.0, self.betas[:-1]], strict=True):
            pivot = alpha - previous_beta * (previous_beta / (pivot or _EPS))
        beta, distance = self.betas[-1], self.alphas[-1] - end
        divisor = beta - (pivot / beta) * distance
        square = (pivot / beta) * end / divisor if divisor else 0.0
        return square if 0 < square <= 1 else default

    def mass_at(self, points: Array) -> Array:
        """Return the Christoffel numbers ``(n,)`` of points outside of the range.

        The Christoffel number of a point is the largest mass that the measure can have at this point.
        """
        pivots, logarithms = np.ones(len(points)), [np.zeros(len(points))]
        for alpha, beta, previous_beta in zip(self.alphas, self.betas, np.r_[0.0, self.betas], strict=False):
            pivots = alpha - points - previous_beta * (previous_beta / pivots)
            pivots = np.where(pivots == 0, np.finfo(np.float64).tiny, pivots)
            # Sum logarithms, because the squares of the orthonormal polynomials overflow.
            logarithms.append(logarithms[-1] + 2 * (np.log(np.abs(pivots)) - np.log(beta)))
        masses: Array = self.mass * np.exp(-logsumexp(logarithms, axis=0))
        return masses

    def reach(self, sign: int, end: float, mass: float) -> float:
        """Return the largest outward distance from `end` at which the moments allow a point mass.

        The distance is overestimated by at most about 10%. It is infinite if the moments allow the mass at any
        distance.

        Parameters
        ----------
        sign : {-1, 1}
            Direction from the end: -1 for smaller values, 1 for larger values.
        end : float
            An end of the range.
        mass : float
            The point mass.
        """
        distances = np.r_[0.0, (self.ends[1] - self.ends[0]) * np.geomspace(1e-16, 1e4, 500)]
        allowed = self.mass_at(end + sign * distances) >= mass
        return float(np.r_[distances, np.inf][allowed.sum()]) if allowed[0] else 0.0

    def _rule(self, alphas: Array, betas: Array) -> tuple[Array, Array]:
        """Return the nodes and weights ``(m,)`` of the quadrature rule that a tridiagonal matrix defines."""
        values, vectors = eigh_tridiagonal(alphas, betas)
        return values, vectors[0] ** 2 * self.mass

    def _changed_rules(self, last_alphas: Array, factors: Array) -> tuple[Array, Array]:
        """Return nodes and weights ``(R, m)`` of R rules, each with a changed last alpha and a scaled last beta."""
        rules = []
        for last, factor in zip(last_alphas, factors, strict=True):
            rules.append(self._rule(np.r_[self.alphas[:-1], last], np.r_[self.betas[:-1], factor * self.betas[-1]]))
        nodes, weights = zip(*rules, strict=True)
        return np.array(nodes), np.array(weights)


# Points (n,), lower bounds (n + 1,) and upper bounds (n + 1,), as returned by `Recurrence.shares`. The bounds of an
# interval between neighboring points hold for the mass up to any position in the interval.
Curves = tuple[Array, Array, Array]


def known_shares(nodes: Array, weights: Array) -> Curves:
    """Return points and bounds as `Recurrence.shares` does, for a measure that is known exactly."""
    order = nodes.argsort(kind="stable")
    cumulative = np.r_[0.0, weights[order].cumsum()]
    return nodes[order], cumulative, cumulative


class ShareBounds:
    """Bounds for fractions of eigenvalues up to given points, and for quantiles.

    Parameters
    ----------
    probes : list of tuple
        For each probe, a tuple of points ``(n,)`` in increasing order, lower bounds ``(n + 1,)`` and upper bounds ``(n
        + 1,)``. The bounds of an interval between neighboring points hold for the mass of the probe's measure up to any
        position in the interval.
    atoms : tuple
        Points and bounds for the eigenvalues that are known exactly, in the same format as for a probe.
    resolution : float
        Distance below which points are considered equal.
    """

    def __init__(self, probes: list[Curves], atoms: Curves, resolution: float) -> None:
        self._curves, self._resolution = [*probes, atoms], resolution

    def up_to(self, points: Array) -> BoundedEstimate:
        """Estimate the fraction of eigenvalues up to each point.

        An eigenvalue that is equal to a point counts only in the upper bound.
        """
        low, high = (
            np.array([curves[bound][np.searchsorted(curves[0], shifted, "right")] for curves in self._curves])
            for bound, shifted in ((1, points - self._resolution), (2, points + self._resolution))
        )
        middle = (low + high) / 2
        return bounded_mean(middle[:-1], low[:-1], high[:-1], middle[-1], _EPS, high[-1] - middle[-1])

    def quantile(self, shares: Array, ends: tuple[float, float]) -> BoundedEstimate:
        """Estimate the quantiles of the eigenvalues for the fractions `shares`.

        The estimates are clipped to `ends`. Their bounds are not clipped.
        """
        points, low, high = self._means
        lower, middle, upper = (_Inverse(points, curve) for curve in (high, (low + high) / 2, low))
        value = np.clip(middle.at(shares), *ends)
        # Use the larger of the errors on both sides of the value, because the error at an eigenvalue itself includes
        # the fraction of this eigenvalue.
        error = np.maximum(*(self.up_to(value + side * 2 * self._resolution).error for side in (-1, 1)))
        left, right = (np.clip(middle.at(shares + side * error), *ends) for side in (-1, 1))
        error = np.where(np.isnan(error), np.nan, np.maximum((right - left) / 2, self._resolution))
        bounds = lower.at(shares) - self._resolution, upper.at(shares) + self._resolution
        return BoundedEstimate(value[()], error[()], *bounds)

    @property
    def _means(self) -> Curves:
        """Points and bounds of the measure of all eigenvalues, whose mass is 1.

        The measure is the mean of the measures of the probes, to which the known eigenvalues are added.
        """
        probes = len(self._curves) - 1
        numbers = [*[probes] * probes, 1]  # the bounds of the probes are averaged, but those of the atoms are not
        points = np.concatenate([curves[0] for curves in self._curves])
        order = points.argsort(kind="stable")
        bounds = []
        for bound in (1, 2):
            parts = [curves[bound] / number for curves, number in zip(self._curves, numbers, strict=True)]
            jumps = np.concatenate([np.diff(part) for part in parts])
            bounds.append(np.r_[0.0, jumps[order].cumsum()] + sum(part[0] for part in parts))
        low, high = (bound / bounds[1][-1] for bound in bounds)
        return points[order], low, high


class _Inverse:
    """Inverse of a step function of fractions. If the function does not reach a fraction, `at` returns infinity."""

    def __init__(self, points: Array, curve: Array) -> None:
        self._points, self._curve = np.r_[-np.inf, points, np.inf], curve

    def at(self, shares: Array) -> Any:
        return self._points[np.searchsorted(self._curve, shares - _EPS * len(self._curve))]
