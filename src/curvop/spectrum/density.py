"""Spectral densities: how many eigenvalues lie where, with what that tells of every function of the matrix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.special import ndtr

from curvop.checked import real_number
from curvop.norms import norm
from curvop.results import load_arrays, save_arrays
from curvop.spectrum.estimators import Estimate, mean_of

__all__ = ["SpectralDensity"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""What stochastic Lanczos quadrature knows of the eigenvalues of a matrix, made by `density`.

    For each of K probes it is a measure :math:`\sum_j w_j \delta(\theta_j)`, whose integrals estimate
    :math:`\frac{1}{N} \operatorname{tr} f(A)`. It is kept as it was found; only drawing makes it smooth. Each figure is
    the mean over the probes. Its error is their standard error, so that two probes are the least, and what the
    quadrature may leave of a function that is no polynomial, as the square root of the sum of squares: the difference
    between the rules of m and of m / 2 steps, averaged over the probes. This is the error of the lesser rule, as
    far as the greater one is better (Golub, Strakos, 1994, for the inverse); polynomials up to degree m - 1, and
    probes that found an invariant subspace, have none but rounding, below which no error is told. It is no bound,
    and too small where doubling the steps gains little, as for a logarithm of eigenvalues that are spread over many
    orders of magnitude down to zero; and NaN after a single step, but for the trace.

    Attributes
    ----------
    size : int
        N, the number of eigenvalues.
    nodes, weights : ndarray, shape (K, m)
        Of each probe; the weights of one sum to 1, or with atoms to about ``1 - k / N``. Weights of 0 fill the rows of
        probes that stopped early: in a complete density, as they had found an invariant subspace.
    atoms : ndarray, shape (k,)
        Eigenvalues that are known, and were taken out of the matrix before.
    num_products : int
        What it took.
    complete : bool
        Whether all steps were taken; not where time was up.

    References
    ----------
    Golub, Strakos (1994), "Estimates in quadratic formulas", Numer. Algorithms 8. Gautschi (2004), "Orthogonal
    Polynomials: Computation and Approximation".
    """

    size: int
    nodes: Array
    weights: Array
    atoms: Array
    num_products: int
    complete: bool = True

    @property
    def num_steps(self) -> int:
        """The steps of the longest run."""
        return int(self._lengths.max())

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest node that carries weight: bounds of the spectrum from inside."""
        nodes = np.concatenate([self.nodes[self.weights > 0], self.atoms])
        return float(nodes.min()), float(nodes.max())

    def mean(self, f: Callable[[Array], Any]) -> Estimate:
        """Estimate the mean of f over all eigenvalues.

        Parameters
        ----------
        f : callable
            Of an array of eigenvalues, entry by entry; what it returns may have further axes behind.
        """
        return self._mean(f)

    def _mean(self, f: Callable[[Array], Any], exact: bool = False) -> Estimate:
        """Return the mean of f; `exact` where it is known to be a polynomial of a degree that leaves no error."""
        nodes, differences = self._rules
        values = np.asarray(f(nodes), dtype=np.float64)
        behind = [1] * (values.ndim - 2)
        steps = self.nodes.shape[1]
        weighted = values[:, :steps] * self.weights.reshape(*self.weights.shape, *behind)
        value, error = mean_of(weighted.sum(1))
        if not exact:
            error = np.hypot(error, (values * differences.reshape(*differences.shape, *behind)).sum(1).mean(0))
        known = np.asarray(f(self.atoms), dtype=np.float64).sum(0) / self.size
        return Estimate(value + known, np.maximum(error, _EPS * (np.abs(weighted).sum(1).mean(0) + np.abs(known))))

    @property
    def _lengths(self) -> Array:
        """The number of nodes ``(K,)`` of each probe; 1 where it has no weight."""
        lengths: Array = np.maximum((self.weights > 0).sum(1), 1)
        return lengths

    @functools.cached_property
    def _rules(self) -> tuple[Array, Array]:
        """The nodes of all rules, and behind them those of half the steps, ``(K, m + h)``; and their difference.

        The differences are weights, positive for the whole rules and negative for the halves, 0 where the whole one is
        exact, and NaN where there is no half of it.
        """
        steps, lengths = self.nodes.shape[1], self._lengths
        heaviest = np.take_along_axis(self.nodes, self.weights.argmax(1)[:, None], 1)
        nodes = np.repeat(heaviest, steps + (steps + 1) // 2, axis=1)  # f may not be defined at nodes that are none
        nodes[:, :steps] = np.where(self.weights > 0, self.nodes, heaviest)
        differences = np.zeros(nodes.shape)
        # A run that ended by itself has met all that its probe sees, and a probe without weight sees nothing.
        exact = (lengths < steps) & self.complete | (lengths >= self.size - len(self.atoms)) | ~self.weights.any(1)
        for probe in np.flatnonzero(~exact):
            there = self.weights[probe] > 0
            half = _half_rule(self.nodes[probe, there], self.weights[probe, there])
            where = slice(steps, steps + len(half[0]))
            nodes[probe, where], differences[probe, where] = half[0], -half[1]
            differences[probe, :steps] = self.weights[probe] if lengths[probe] > 1 else np.nan
        return nodes, differences

    def apply(self, f: Callable[[Array], Any]) -> Estimate:
        """Estimate the trace of f(A), the sum of f over all eigenvalues; see `mean`."""
        value, error = self.mean(f)
        return Estimate(self.size * value, self.size * error)

    def moment(self, p: int) -> Estimate:
        """Estimate the mean of the eigenvalues' p-th powers."""
        return self._mean(lambda values: values**p, exact=p in range(2 * int(self._lengths.min())))

    def trace(self) -> Estimate:
        """Estimate the trace, the sum of the eigenvalues."""
        value, error = self.moment(1)
        return Estimate(self.size * value, self.size * error)

    def logdet(self, damping: float) -> Estimate:
        """Estimate the logarithm of the determinant of ``A + damping * I``.

        Raises
        ------
        ValueError
            Where the damped matrix is found not to be positive definite.
        """
        least = self.range[0]
        if not least + damping > 0:
            raise ValueError(
                f"damping is {damping:g}, but there is an eigenvalue of {least:.3g} or less: take more for a logarithm"
            )
        return self.apply(lambda values: np.log(values + damping))

    @property
    def sigma(self) -> float:
        """The standard deviation that drawing broadens nodes by: the width of the spectrum times 10^(-2.5) / 2.

        It is that of Ghorbani, Krishnan, Xiao (2019), arXiv:1901.10159, for a spectrum between -1 and 1.
        """
        low, high = self.range
        return float(0.5 * (high - low) * 1e-5**0.5) or max(abs(high), 1.0) * 1e-3

    def grid(self, num_points: int = 1024, sigma: float | None = None) -> Array:
        """Return points ``(num_points,)`` that reach over the whole spectrum and its broadening."""
        low, high = self.range
        margin = max(5 * (self.sigma if sigma is None else sigma), 0.02 * (high - low))
        return np.linspace(low - margin, high + margin, num_points)

    def pdf(self, grid: Any, sigma: float | None = None) -> Estimate:
        """Estimate the density at points `grid` ``(n,)``, every node broadened to a normal distribution.

        Parameters
        ----------
        grid : array_like, shape (n,)
        sigma : float, optional
            Its standard deviation, in the units of the eigenvalues; `self.sigma` by default.

        Returns
        -------
        Estimate
            Arrays ``(n,)``; the integral over all of the line is about 1.
        """
        grid, sigma = np.asarray(grid, dtype=np.float64), self._width(sigma)
        scale = sigma * (2 * np.pi) ** 0.5
        return self._at(grid, lambda distances: np.exp(-0.5 * (distances / sigma) ** 2) / scale)

    def cdf(self, grid: Any, sigma: float | None = None) -> Estimate:
        """Estimate the share of the eigenvalues up to each point of `grid`, broadened as by `pdf`; 0 for steps."""
        grid = np.asarray(grid, dtype=np.float64)
        if sigma == 0:
            return self._at(grid, lambda distances: distances >= 0)
        width = self._width(sigma)
        return self._at(grid, lambda distances: ndtr(distances / width))

    def quantile(self, shares: Any) -> Array:
        """Return the eigenvalues up to which `shares` of all lie, by the steps of the `cdf`; 0.5 for the median.

        Parameters
        ----------
        shares : array_like
            Between 0 and 1.
        """
        shares = np.asarray(shares, dtype=np.float64)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"shares is {shares}, but must be between 0 and 1")
        there = self.weights > 0
        nodes = np.concatenate([self.nodes[there], self.atoms])
        weights = np.concatenate([self.weights[there] / len(self.weights), np.full(len(self.atoms), 1 / self.size)])
        order = nodes.argsort()
        reached = weights[order].cumsum()
        found: Array = nodes[order][np.searchsorted(reached / reached[-1], shares)]
        return found

    def _width(self, sigma: float | None) -> float:
        sigma = self.sigma if sigma is None else sigma
        if not real_number("sigma", sigma) > 0:
            raise ValueError(f"sigma is {sigma}, but must be positive")
        return float(sigma)

    def _at(self, grid: Array, function: Callable[[Array], Any]) -> Estimate:
        """Return the mean of a function of ``grid - eigenvalue``; point by point, as all at once take K m n numbers."""

        def at(point: float) -> Estimate:
            return self.mean(lambda values: function(point - values))

        found = [at(point) for point in grid.reshape(-1)]
        value, error = np.array(found).T if found else np.zeros((2, 0))
        return Estimate(value.reshape(grid.shape), error.reshape(grid.shape))

    def save(self, path: str | Path) -> None:
        """Write it to an ``.npz`` file, which appears only when it is complete."""
        save_arrays(
            Path(path), **{field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)}
        )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; nothing in the file is executed."""
        names = [field.name for field in dataclasses.fields(cls)]
        file = load_arrays(path, names, "SpectralDensity.save")
        found: dict[str, Any] = {name: file[name] for name in names}
        numbers = {name: int(found[name]) for name in ("size", "num_products")}
        return cls(**found | numbers | {"complete": bool(found["complete"])})

    def plot(self, ax: Any = None, log: bool = True) -> Any:
        """Draw the density; see `curvop.spectrum.plots.plot_density`."""
        from curvop.spectrum.plots import plot_density

        return plot_density(self, ax, log)

    def __str__(self) -> str:
        low, high = self.range
        return (
            f"{self.size:,} eigenvalues between about {low:.3g} and {high:.3g}, trace {self.trace()}: "
            f"{len(self.nodes)} probes of {self.num_steps} steps, {self.num_products:,} products"
        )


def _half_rule(nodes: Array, weights: Array) -> tuple[Array, Array]:
    """Return the Gauss rule of half as many nodes ``(m,)``, one more where they are odd, for the same measure.

    The Lanczos process with the matrix of the nodes, from the roots of the weights, takes up again the recurrence that
    they are of (Gautschi, 2004, section 2.2.3), whose leading half has the rule.
    """
    count, total = (len(nodes) + 1) // 2, weights.sum()
    basis, alphas, betas = np.zeros((count, len(nodes))), np.zeros(count), np.zeros(count)
    q = np.sqrt(weights / total)
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
    values, vectors = eigh_tridiagonal(alphas[:count], betas[: count - 1])
    return np.clip(values, nodes.min(), nodes.max()), vectors[0] ** 2 * total
