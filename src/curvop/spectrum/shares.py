"""Bounds of the share of the eigenvalues up to a point, and the quantiles that follow."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.spectrum.bounded import BoundedEstimate, bounded_mean

__all__ = ["ShareBounds", "known_shares"]

Array = NDArray[Any]
Curves = tuple[Array, Array, Array]

_EPS = float(np.finfo(np.float64).eps)


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
