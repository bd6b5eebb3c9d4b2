"""What a Gauss quadrature knows of its measure: other rules with the same moments, and bounds of shares."""

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
# Quadrature rules per probe: about so many nodes in all, within these numbers of rules. Bounds at a point between the
# nodes of two neighbouring rules are wider than the sharp ones by about 2 / rules, 6 % for 32.
_NODES, _FEWEST, _MOST = 2048, 8, 32


def number_of_rules(steps: int) -> int:
    """Return an even number of rules of so many nodes each."""
    return int(np.clip(_NODES // max(steps, 1), _FEWEST, _MOST)) // 2 * 2


def recurrences(nodes: Array, weights: Array, entries: Array, exact: Array) -> list[Recurrence | None]:
    """Return the recurrences of the measures of K probes, from their `entries` ``(K, 2, m)`` if there are any.

    None for a probe whose measure is its rule, as `exact` ``(K,)`` says.
    """
    found: list[Recurrence | None] = [None] * len(nodes)
    for probe in np.flatnonzero(~exact):
        there = weights[probe] > 0
        if len(entries):
            alphas, betas = entries[probe, :, there].T
            ends = float(nodes[probe, there].min()), float(nodes[probe, there].max())
            found[probe] = Recurrence(alphas, betas[:-1], float(weights[probe].sum()), ends)
        else:
            found[probe] = Recurrence.of(nodes[probe, there], weights[probe, there])
    return found


def all_rules(nodes: Array, weights: Array, recurrences: list[Recurrence | None]) -> tuple[Array, Array]:
    """Return the nodes and weights of all rules of each probe, ``(K, R, m)``.

    The Gauss rule, that of half the steps (NaN after a single step), and the family of `Recurrence.within`; all are the
    Gauss rule if that is exact.
    """
    count, steps = nodes.shape
    heaviest = np.take_along_axis(nodes, weights.argmax(1)[:, None], 1) if count else nodes
    own = np.where(weights > 0, nodes, heaviest)  # f may not be defined at nodes that are none
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
    """Return how far beyond both `ends` the moments of any probe allow a mass; the probes' `nodes` are within them."""
    found = []
    for sign, outermost, end in (
        (-1, nodes.min(initial=np.inf), ends[0]),
        (1, nodes.max(initial=-np.inf), ends[1]),
    ):
        reach = max((one.reach(sign, outermost, mass) for one in recurrences if one is not None), default=0.0)
        found.append(max(reach - sign * (end - outermost), 0.0))
    return found[0], found[1]


class Recurrence(NamedTuple):
    """The three-term recurrence of a measure's orthonormal polynomials, as far as its Gauss rule knows it.

    A rule of m nodes is the tridiagonal matrix of `alphas` ``(m,)`` and `betas` ``(m - 1,)``: its eigenvalues are the
    nodes, the squares of its eigenvectors' first entries the weights (Golub, Welsch, 1969). Changing the last entries
    gives other rules with positive weights that are exact up to a lower degree.
    """

    alphas: Array
    betas: Array
    mass: float
    ends: tuple[float, float]

    @classmethod
    def of(cls, nodes: Array, weights: Array) -> Self:
        """Recover it from nodes and weights ``(m,)``.

        The Lanczos process with the matrix of the nodes, from the roots of the weights, takes up again the recurrence
        that they are of (Gautschi, 2004, section 2.2.3).
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

    def _rule(self, alphas: Array, betas: Array) -> tuple[Array, Array]:
        values, vectors = eigh_tridiagonal(alphas, betas)
        return values, vectors[0] ** 2 * self.mass

    def half(self) -> tuple[Array, Array]:
        """Return the Gauss rule of half as many nodes, one more if they are odd."""
        count = (len(self.alphas) + 1) // 2
        nodes, weights = self._rule(self.alphas[:count], self.betas[: count - 1])
        return np.clip(nodes, *self.ends), weights

    def shares(self, count: int) -> tuple[Array, Array, Array]:
        r"""Return points, and the least and the largest share of the measure up to a point between two of them.

        The rules whose last alpha is changed are exact up to degree 2 m - 2. Of each of them the inequalities of
        Chebyshev, Markov and Stieltjes hold: the share of the measure to the left of a node is at least the sum of the
        weights before it, and the share up to it at most that sum with its own weight. These bounds are the sharp ones
        at the node, and each point is the node of one such rule; as shares increase, the bounds at all other points
        follow from some `count` of them that place their nodes evenly.
        """
        if not len(self.betas):
            return np.zeros(0), np.zeros(1), np.full(1, self.mass)
        levels = self.betas[-1] * np.tan(np.pi * (np.arange(1, count) / count - 0.5))
        # In a gap that is wide beside the last beta, a node goes as far as the last alpha does.
        doublings = max(0.0, np.log2(2 * (self.ends[1] - self.ends[0])) - np.log2(levels[-1]))
        far = levels[-1] * 2.0 ** np.arange(1, doublings + 1)
        levels = np.concatenate([-far, levels, far])
        nodes, weights = self._changed(self.alphas[-1] + levels, np.ones(len(levels)))
        upto = weights.cumsum(1)
        order = nodes.reshape(-1).argsort(kind="stable")
        low = np.maximum.accumulate((upto - weights).reshape(-1)[order])
        high = np.minimum.accumulate(upto.reshape(-1)[order][::-1])[::-1]
        return nodes.reshape(-1)[order], np.r_[0.0, np.maximum(low, 0.0)], np.r_[high, self.mass]

    def within(self, count: int) -> tuple[Array, Array]:
        """Return nodes and weights ``(count, m)`` of rules with nodes in the range, exact up to degree 2 m - 3.

        All have an end of the range as a node. They lead from the Gauss rule of m - 1 nodes to that of m, which has
        both ends; on the way each point in the range is the node of one of them: the canonical representations of the
        moments on the interval (Krein, Nudelman, 1977, chapter III). One of them has a node at 0, where functions of
        eigenvalues most often have a kink or a step that may be narrower than the distance of the others' nodes.
        """
        half = count // 2
        levels = self.betas[-1] * np.tan(np.pi / 2 * np.arange(1, half + 1) / (half + 1))
        alphas, factors = [], []
        for end in self.ends:
            distance = self.alphas[-1] - end
            squares = np.abs(distance) / (np.abs(distance) + levels)
            squares[-1] = self._square_of_zero(end, squares[-1])
            alphas.append(end + squares * distance)  # `end` stays a node, whatever the square is
            factors.append(np.sqrt(squares))
        nodes, weights = self._changed(np.concatenate(alphas), np.concatenate(factors))
        for row in nodes[[half - 1, count - 1]]:
            nearest = np.abs(row).argmin()
            row[nearest] = 0.0 if abs(row[nearest]) <= _EPS * len(row) * np.abs(row).max() else row[nearest]
        return np.clip(nodes, *self.ends), weights

    def _square_of_zero(self, end: float, default: float) -> float:
        """Return the square of the factor of the rule that has `end` and 0 as nodes, or `default` if there is none."""
        pivot = 1.0
        for alpha, before in zip(self.alphas[:-1], np.r_[0.0, self.betas[:-1]], strict=True):
            pivot = alpha - before * (before / (pivot or _EPS))
        beta, distance = self.betas[-1], self.alphas[-1] - end
        divisor = beta - (pivot / beta) * distance
        square = (pivot / beta) * end / divisor if divisor else 0.0
        return square if 0 < square <= 1 else default

    def mass_at(self, points: Array) -> Array:
        """Return the Christoffel numbers ``(n,)`` of points outside the range: the most mass that may be in each."""
        pivots, logarithms = np.ones(len(points)), [np.zeros(len(points))]
        for alpha, beta, before in zip(self.alphas, self.betas, np.r_[0.0, self.betas], strict=False):
            pivots = alpha - points - before * (before / pivots)
            pivots = np.where(pivots == 0, np.finfo(np.float64).tiny, pivots)
            # The squares of the orthonormal polynomials, which overflow.
            logarithms.append(logarithms[-1] + 2 * (np.log(np.abs(pivots)) - np.log(beta)))
        masses: Array = self.mass * np.exp(-logsumexp(logarithms, axis=0))
        return masses

    def reach(self, sign: int, end: float, mass: float) -> float:
        """Return how far beyond `end`, outside the range, the moments allow a mass, to about 10 % more."""
        distances = np.r_[0.0, (self.ends[1] - self.ends[0]) * np.geomspace(1e-16, 1e4, 500)]
        allowed = self.mass_at(end + sign * distances) >= mass
        return float(np.r_[distances, np.inf][allowed.sum()]) if allowed[0] else 0.0

    def _changed(self, last_alphas: Array, factors: Array) -> tuple[Array, Array]:
        """Return nodes and weights ``(R, m)`` of rules with another last alpha, and the last beta times a factor."""
        rules = []
        for last, factor in zip(last_alphas, factors, strict=True):
            rules.append(self._rule(np.r_[self.alphas[:-1], last], np.r_[self.betas[:-1], factor * self.betas[-1]]))
        nodes, weights = zip(*rules, strict=True)
        return np.array(nodes), np.array(weights)


# Bounds of the share of the eigenvalues up to a point, and the quantiles that follow.

Curves = tuple[Array, Array, Array]


def known_shares(nodes: Array, weights: Array) -> Curves:
    """Return the curves of a measure that is known: its nodes, and twice the mass up to each of them."""
    order = nodes.argsort(kind="stable")
    reached = np.r_[0.0, weights[order].cumsum()]
    return nodes[order], reached, reached


class ShareBounds:
    """Bounds of the share of the eigenvalues up to a point.

    Parameters
    ----------
    probes : list of tuple
        Of each probe, points ``(n,)`` in increasing order, and for each of the ``n + 1`` intervals between them the
        least and the largest share of the probe's measure up to a point in it.
    atoms : tuple
        The same of eigenvalues that are known.
    resolution : float
        Points that differ by less are the same.
    """

    def __init__(self, probes: list[Curves], atoms: Curves, resolution: float) -> None:
        self._curves, self._resolution = [*probes, atoms], resolution

    def up_to(self, points: Array) -> BoundedEstimate:
        """Return the share of the eigenvalues up to each point; those at a point are in the upper bound only."""
        low, high = (
            np.array([curves[bound][np.searchsorted(curves[0], shifted, "right")] for curves in self._curves])
            for bound, shifted in ((1, points - self._resolution), (2, points + self._resolution))
        )
        middle = (low + high) / 2
        return bounded_mean(middle[:-1], low[:-1], high[:-1], middle[-1], _EPS, high[-1] - middle[-1])

    def quantile(self, shares: Array, ends: tuple[float, float]) -> BoundedEstimate:
        """Return where the share reaches some, between `ends`; its bounds do not keep to them."""
        points, low, high = self._means
        least, middle, largest = (_Inverse(points, curve) for curve in (high, (low + high) / 2, low))
        value = np.clip(middle.at(shares), *ends)
        # On both sides of it, as an eigenvalue that is there leaves open at itself what is known beside it.
        error = np.maximum(*(self.up_to(value + side * 2 * self._resolution).error for side in (-1, 1)))
        before, behind = (np.clip(middle.at(shares + side * error), *ends) for side in (-1, 1))
        error = np.where(np.isnan(error), np.nan, np.maximum((behind - before) / 2, self._resolution))
        bounds = least.at(shares) - self._resolution, largest.at(shares) + self._resolution
        return BoundedEstimate(value[()], error[()], *bounds)

    @property
    def _means(self) -> Curves:
        """The curves of all eigenvalues, as shares of the mass."""
        probes = len(self._curves) - 1
        numbers = [*[probes] * probes, 1]  # of the measures that each is one of
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
    """Where a curve of shares, constant between points, reaches a share, to rounding; infinite if it does nowhere."""

    def __init__(self, points: Array, curve: Array) -> None:
        self._points, self._curve = np.r_[-np.inf, points, np.inf], curve

    def at(self, shares: Array) -> Any:
        return self._points[np.searchsorted(self._curve, shares - _EPS * len(self._curve))]
