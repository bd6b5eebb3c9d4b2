"""Spectral densities: how many eigenvalues lie where, with what that tells of every function of the matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from curvop.results import save_arrays
from curvop.spectrum.estimators import Estimate, mean_of

__all__ = ["SpectralDensity"]

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""What stochastic Lanczos quadrature knows of the eigenvalues of a matrix, made by `density`.

    For each of K probes it is a measure :math:`\sum_j w_j \delta(\theta_j)`, whose integrals estimate
    :math:`\frac{1}{N} \operatorname{tr} f(A)`. It is kept as it was found; only drawing makes it smooth. Each figure is
    the mean over the probes with its standard error, so that two probes are the least. The errors are those of the
    probes alone: that of the quadrature, which m steps leave of a function that is no polynomial of degree 2 m - 1, is
    the same for all, and shows where m is doubled (a logarithm near zero is the worst case).

    Attributes
    ----------
    size : int
        N, the number of eigenvalues.
    nodes, weights : ndarray, shape (K, m)
        Of each probe; the weights of one sum to 1, or with atoms to about ``1 - k / N``. Weights of 0 fill the rows of
        probes that stopped early.
    atoms : ndarray, shape (k,)
        Eigenvalues that are known, and were taken out of the matrix before.
    num_products : int
        What it took.
    complete : bool
        Whether all steps were taken; not where time was up.
    """

    size: int
    nodes: Array
    weights: Array
    atoms: Array
    num_products: int
    complete: bool = True

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
        heaviest = np.take_along_axis(self.nodes, self.weights.argmax(1)[:, None], 1)
        nodes = np.where(self.weights > 0, self.nodes, heaviest)  # f may not be defined at nodes that are none
        values = np.asarray(f(nodes), dtype=np.float64)
        found = mean_of((values * self.weights.reshape(*self.weights.shape, *[1] * (values.ndim - 2))).sum(1))
        exact = np.asarray(f(self.atoms), dtype=np.float64).sum(0) / self.size
        return Estimate(found.value + exact, found.error)

    def apply(self, f: Callable[[Array], Any]) -> Estimate:
        """Estimate the trace of f(A), the sum of f over all eigenvalues; see `mean`."""
        value, error = self.mean(f)
        return Estimate(self.size * value, self.size * error)

    def moment(self, p: int) -> Estimate:
        """Estimate the mean of the eigenvalues' p-th powers."""
        return self.mean(lambda values: values**p)

    def trace(self) -> Estimate:
        """Estimate the trace, the sum of the eigenvalues."""
        return self.apply(lambda values: values)

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

    def _width(self, sigma: float | None) -> float:
        sigma = self.sigma if sigma is None else sigma
        if not sigma > 0:
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
        save_arrays(Path(path), **{name: np.asarray(value) for name, value in vars(self).items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; nothing in the file is executed."""
        with np.load(path, allow_pickle=False) as file:
            names = [field.name for field in dataclasses.fields(cls)]
            missing = [name for name in names if name not in file]
            if missing:
                raise ValueError(f"{path} holds no spectral density: it lacks {', '.join(missing)}")
            found = {name: file[name] for name in names}
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
            f"{len(self.nodes)} probes of {self.nodes.shape[1]} steps, {self.num_products:,} products"
        )
