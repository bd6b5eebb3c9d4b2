"""The result of stochastic Lanczos quadrature: a spectral density with its error bounds.

`curvop.spectrum.density` returns a `SpectralDensity`, which holds one Gauss quadrature for each probe. The module
`curvop.spectrum.gauss_quadrature` computes the bounds for fractions of eigenvalues and for means of functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtr

from curvop.operators.summaries import Summary, with_error
from curvop.operators.validation import (
    real_scalar,
)
from curvop.spectrum.estimators import BoundedEstimate, bounded_mean
from curvop.spectrum.gauss_quadrature import (
    Recurrence,
    ShareBounds,
    all_rules,
    beyond_ends,
    known_shares,
    number_of_rules,
    recurrences,
)
from curvop.storage.result_files import load_arrays, save_arrays

__all__ = ["SpectralDensity"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
_MISS_PROBABILITY = 0.05  # probability that an eigenvalue lies beyond `SpectralDensity.range_errors`


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Summary):
    r"""The spectral density of a matrix, estimated by stochastic Lanczos quadrature.

    The function `density` returns this class. The methods of this class estimate the fraction of eigenvalues in an
    interval, quantiles and moments of the spectrum, and the trace of a function of the matrix. The methods need no
    further products with the matrix. Each method returns a `BoundedEstimate`. The error bar of the estimate has two
    sources. The first is the standard error of the mean over the probes, which decreases with more probes. The second
    is the distance between the bounds ``low`` and ``high`` of the quadrature, which decreases with more steps.

    Attributes
    ----------
    size : int
        Number N of eigenvalues.
    nodes, weights : ndarray, shape (K, m)
        Nodes and weights of the Gauss quadrature of each probe. The nodes have the units of the eigenvalues. The
        weights of a probe sum to 1, or to about ``1 - k / N`` if there are k atoms. If the Lanczos run of a probe stops
        early, its other weights are 0. In a complete density, a run stops early only at an invariant subspace.
    atoms : ndarray, shape (k,)
        Eigenvalues that are known exactly, in ascending order. The quadratures describe the other eigenvalues. If all N
        eigenvalues are known, there are no probes.
    num_products : int
        Number of products used to compute the density.
    complete : bool
        True if all steps were taken, False if the time limit ended the run.
    recurrences : ndarray, shape (K, 2, m)
        Diagonals and off-diagonals of the tridiagonal matrices from which the nodes and weights were computed. If the
        array is empty, the matrices are recovered from the nodes and weights. The recovered matrices are less accurate
        if a weight is below the square of machine precision.
    resolution : float
        Eigenvalues closer together than this distance cannot be distinguished, because of rounding in the products.

    See Also
    --------
    density : Estimate the density of an operator.

    Notes
    -----
    Each of the K probes defines a measure on the spectrum. The integral of a function f over this measure has the
    expected value :math:`\frac{1}{N} \operatorname{tr} f(A)`. After m Lanczos steps, a Gauss quadrature :math:`\sum_j
    w_j \delta(\theta_j)` has the same moments as the measure up to degree 2 m - 1. Nodes and weights are stored without
    smoothing. The nodes are broadened only by `pdf`, by `plot`, and by `cdf` with a positive ``sigma``.

    Many measures have the same moments as the measure of a probe. The bounds ``low`` and ``high`` enclose the integrals
    of f over such measures. The value is the midpoint of the bounds. The error is ``sqrt(s**2 + ((high - low) /
    4)**2)`` with the standard error s, so that the distance from the value to each bound is at most twice the error.
    The standard error requires at least two probes. If ``low`` equals ``high``, the true value is within two standard
    errors in 95% of runs with many probes, and in 91% of runs with 8 probes (Student's t). These percentages are lower
    if a few eigenvalues dominate.

    For `cdf` and `quantile`, the bounds are proven: they hold for every measure with the same moments (Chebyshev,
    Markov, Stieltjes). For `mean` and `apply`, the bounds are estimates, which combine two criteria. First, the bounds
    contain the integrals of f over a family of measures with the same moments. This criterion covers a step or a kink
    of f between the nodes. Second, let d be the difference between the results of the Gauss quadratures with m and with
    m / 2 steps. Each bound is at least 2 d away from the result with m steps. This criterion measures the error for a
    smooth f (Golub, Strakos, 1994, for the inverse). The bounds are too narrow if more steps hardly improve the
    quadrature, as for the logarithm of eigenvalues that decay to zero over many orders of magnitude.

    For polynomials up to degree m - 1, and for probes that found an invariant subspace, ``low`` equals ``high`` up to
    rounding. After a single step, all errors are NaN, except the error of the trace.

    References
    ----------
    Golub, Meurant (2010), "Matrices, Moments and Quadrature with Applications", Princeton University Press, chapter 6.
    Golub, Strakos (1994), "Estimates in quadratic formulas", Numer. Algorithms 8. Gautschi (2004), "Orthogonal
    Polynomials: Computation and Approximation", Oxford University Press.

    Examples
    --------
    Log-determinant and median eigenvalue of a positive definite matrix with evenly spaced eigenvalues:

    >>> import numpy as np
    >>> from curvop.spectrum import density
    >>> A = np.diag(np.linspace(1, 2, 500))
    >>> found = density(A, num_probes=8, num_steps=20, progress=False)
    >>> logdet = found.apply(np.log)
    >>> bool(abs(logdet.value - np.log(np.diag(A)).sum()) < 4 * logdet.error)
    True
    >>> median = found.quantile(0.5)
    >>> bool(median.low < 1.5 < median.high)
    True
    """

    size: int
    nodes: Array
    weights: Array
    atoms: Array
    num_products: int
    complete: bool = True
    recurrences: Array = dataclasses.field(default_factory=lambda: np.zeros((0, 2, 0)))
    resolution: float = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, atoms=np.sort(state["atoms"]))  # earlier versions pickled another order

    @property
    def exact(self) -> bool:
        """True if all eigenvalues are known exactly. All estimates are then exact up to rounding."""
        return len(self.atoms) == self.size

    @property
    def num_steps(self) -> int:
        """Number of Lanczos steps of the longest run."""
        return int(self._num_nodes.max(initial=0))

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value among the atoms and the nodes with a positive weight.

        The extreme eigenvalues may lie outside of this range. For each end, the distance from the range to the extreme
        eigenvalue is at most the entry of `range_errors`, with a probability of 95%.
        """
        nodes = np.concatenate([self.nodes[self.weights > 0], self.atoms])
        return float(nodes.min()), float(nodes.max())

    @property
    def range_errors(self) -> tuple[float, float]:
        """Bounds for the distances from `range` to the smallest and to the largest eigenvalue.

        Each bound holds with a probability of 95%.

        Notes
        -----
        In the measure of a probe, each eigenvalue t has a weight. This weight is at most the Christoffel number of t,
        which can be computed from the moments of the measure. At the same time, the weight is a random variable: a
        chi-squared variable with one degree of freedom, divided by N. With a probability of only 5%, the weights in all
        probes are below a certain threshold. Beyond the returned distances, all Christoffel numbers are below it.

        For probes of random signs, the chi-squared distribution is an approximation that requires eigenvectors with
        many nonzero entries. For example, an eigenvector with two equal entries and zeros elsewhere is orthogonal to
        half of all probes.
        """
        if self.exact:
            return self.resolution, self.resolution
        mass = 2 * float(gammaincinv(0.5, _MISS_PROBABILITY ** (1 / len(self.nodes)))) / self.size
        low, high = beyond_ends(self._recurrences, self.nodes[self.weights > 0], self.range, mass)
        return low + self.resolution, high + self.resolution

    def mean(self, f: Callable[[Array], Any]) -> BoundedEstimate:
        r"""Estimate the mean of a function over all eigenvalues, :math:`\frac{1}{N} \operatorname{tr} f(A)`.

        To estimate the fraction of eigenvalues in an interval, use `cdf` instead of an indicator function, because the
        bounds of `cdf` are proven.

        Parameters
        ----------
        f : callable
            Function that is applied elementwise to an array of eigenvalues. The result may have additional trailing
            axes. The function is only evaluated within `range`.

        Returns
        -------
        BoundedEstimate
            Estimate of the mean. Its fields are floats, or arrays with the shape of the additional axes.
        """
        integrals, from_atoms, rounding = self._integrals(f, slice(None))
        gauss, change = integrals[:, 0], 2 * np.abs(integrals[:, 0] - integrals[:, 1])
        others = np.delete(integrals, 1, axis=1)
        low, high = np.minimum(others.min(1), gauss - change), np.maximum(others.max(1), gauss + change)
        middle = np.where(np.isfinite(high - low), (low + high) / 2, gauss)
        return bounded_mean(middle, low, high, from_atoms, rounding)

    def apply(self, f: Callable[[Array], Any]) -> BoundedEstimate:
        """Estimate the trace of f(A), the sum of a function over all eigenvalues.

        Parameters
        ----------
        f : callable
            Function that is applied elementwise to an array of eigenvalues. The result may have additional trailing
            axes. The function is only evaluated within `range`.

        Returns
        -------
        BoundedEstimate
            Estimate of the trace. Its fields are floats, or arrays with the shape of the additional axes.

        Examples
        --------
        The effective dimension of a ridge regression:

        >>> import numpy as np
        >>> from curvop.spectrum import density
        >>> A = np.diag(np.logspace(-6, 0, 200))
        >>> found = density(A, progress=False)
        >>> dimension = found.apply(lambda values: values / (values + 1e-3))
        >>> bool(abs(dimension.value - (np.diag(A) / (np.diag(A) + 1e-3)).sum()) < 2 * dimension.error)
        True
        """
        return self._times_size(self.mean(f))

    def moment(self, p: int) -> BoundedEstimate:
        """Estimate the mean of the p-th powers of all eigenvalues.

        Parameters
        ----------
        p : int
            Degree of the moment. If p is less than twice the number of steps, the quadrature is exact, and the error
            comes only from the spread between the probes.

        Returns
        -------
        BoundedEstimate
            Estimate of the moment. Its fields are floats.
        """
        exact = p in range(2 * int(self._num_nodes.min(initial=self.size)))

        def power(values: Array) -> Array:
            return values**p

        return self._gauss_mean(power, exact) if exact else self.mean(power)

    def trace(self) -> BoundedEstimate:
        """Estimate the trace, the sum of all eigenvalues.

        Returns
        -------
        BoundedEstimate
            Estimate of the trace. The quadrature is exact, so the error comes only from the spread of the probes.
        """
        return self._times_size(self.moment(1))

    def logdet(self, damping: float) -> BoundedEstimate:
        """Estimate the logarithm of the determinant of ``A + damping * I``.

        Parameters
        ----------
        damping : float
            Multiple of the identity that is added to the matrix.

        Returns
        -------
        BoundedEstimate
            Estimate of the logarithm. Its fields are floats.

        Raises
        ------
        ValueError
            If the smallest node shows that the damped matrix is not positive definite.
        """
        smallest = self.range[0]
        if not smallest + damping > 0:
            raise ValueError(
                f"damping is {damping:g}, but A has an eigenvalue of {smallest:.3g} or less: pass a larger "
                "damping, for which A + damping * I is positive definite"
            )
        return self.apply(lambda values: np.log(values + damping))

    @property
    def sigma(self) -> float:
        """Default standard deviation of the normal distributions that replace the nodes in `pdf`.

        The default is the width of `range` times 10^(-2.5) / 2. For a spectrum between -1 and 1, this default equals
        the standard deviation in Ghorbani, Krishnan, Xiao (2019), arXiv:1901.10159.
        """
        low, high = self.range
        return float(0.5 * (high - low) * 1e-5**0.5) or max(abs(high), 1.0) * 1e-3

    def grid(self, num_points: int = 1024, sigma: float | None = None) -> Array:
        """Return evenly spaced points that cover the broadened spectrum.

        Parameters
        ----------
        num_points : int
            Number of points.
        sigma : float, optional
            Standard deviation that will be passed to `pdf`, in the units of the eigenvalues; `SpectralDensity.sigma` by
            default.

        Returns
        -------
        ndarray, shape (num_points,)
            Points in increasing order.
        """
        low, high = self.range
        margin = max(5 * (self.sigma if sigma is None else sigma), 0.02 * (high - low))
        return np.linspace(low - margin, high + margin, num_points)

    def pdf(self, grid: Any, sigma: float | None = None) -> BoundedEstimate:
        """Estimate the probability density of the eigenvalues, with every node broadened to a normal distribution.

        Use `pdf` for plots. To estimate the number of eigenvalues in an interval, use `cdf`.

        Parameters
        ----------
        grid : array_like, shape (n,)
            Points, in the units of the eigenvalues.
        sigma : float, optional
            Standard deviation of the normal distributions, in the units of the eigenvalues; `SpectralDensity.sigma` by
            default.

        Returns
        -------
        BoundedEstimate
            Arrays with the shape of ``grid``. The value is the broadened Gauss quadrature, which integrates to about 1
            over the real line. The bounds are estimated from the difference between the quadratures of m and m / 2
            steps, averaged over the probes.

        Raises
        ------
        TypeError, ValueError
            If ``sigma`` is not a positive number.

        Notes
        -----
        If ``sigma`` is smaller than the distance between nodes, each peak shows a single node and need not be a feature
        of the spectrum.
        """
        grid, sigma = np.asarray(grid, dtype=np.float64), self._checked_sigma(sigma)
        scale = sigma * (2 * np.pi) ** 0.5
        return self._pointwise(grid, lambda distances: np.exp(-0.5 * (distances / sigma) ** 2) / scale)

    def cdf(self, grid: Any, sigma: float | None = None) -> BoundedEstimate:
        """Estimate the fraction of eigenvalues that are less than or equal to each point.

        Parameters
        ----------
        grid : array_like
            Points, in the units of the eigenvalues.
        sigma : float, optional
            Standard deviation of the normal distributions that replace the nodes, as in `pdf`. If it is None (default)
            or 0, the nodes are not broadened.

        Returns
        -------
        BoundedEstimate
            Estimate of the fractions. Its fields are floats, or arrays with the shape of ``grid``.

        Raises
        ------
        TypeError, ValueError
            If ``sigma`` is not a nonnegative number.

        Notes
        -----
        The bounds are proven for each probe: for any measure with the same moments, the fraction lies between ``low``
        and ``high``. An eigenvalue within ``resolution`` of a point counts in ``high`` but not in ``low``. At a
        multiple eigenvalue or an unresolved cluster, the bounds therefore differ by its fraction of all eigenvalues.
        The value is the midpoint of the bounds.

        If ``sigma`` is positive, the value is computed from the broadened Gauss quadrature. The bounds are then
        estimated from the difference between the quadratures of m and m / 2 steps, averaged over the probes.

        Examples
        --------
        The fraction of negative eigenvalues:

        >>> import numpy as np
        >>> from curvop.spectrum import density
        >>> A = np.diag(np.r_[np.linspace(-2, -1, 100), np.linspace(1, 5, 300)])
        >>> found = density(A, progress=False)
        >>> print(f"{found.cdf(0.0).value:.3f}")
        0.250
        """
        grid = np.asarray(grid, dtype=np.float64)
        if sigma is None or sigma == 0:
            return self._shares.up_to(grid)
        width = self._checked_sigma(sigma)
        return self._pointwise(grid, lambda distances: ndtr(distances / width))

    def quantile(self, shares: Any) -> BoundedEstimate:
        """Estimate quantiles of the eigenvalues, for example the median.

        Parameters
        ----------
        shares : array_like
            Fractions of all eigenvalues, between 0 and 1. A fraction of 0.5 gives the median.

        Returns
        -------
        BoundedEstimate
            Estimate of the quantiles. Its fields are floats, or arrays with the shape of ``shares``, in the units of
            the eigenvalues. ``value``, ``low`` and ``high`` are the points at which `cdf`, its upper bound and its
            lower bound reach the fraction. If a point does not exist, it is infinite. The error is half of the distance
            between the quantiles for the fractions ``shares - e`` and ``shares + e``, where e is the error of `cdf`
            next to the value (Woodruff, 1952).

        Raises
        ------
        ValueError
            If a fraction is not between 0 and 1.

        References
        ----------
        Woodruff (1952), "Confidence intervals for medians and other position measures", J. Amer. Statist. Assoc. 47.
        """
        shares = np.asarray(shares, dtype=np.float64)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"shares is {shares}, but must be between 0 and 1")
        return self._shares.quantile(shares, self.range)

    def plot(
        self,
        ax: Any = None,
        log: bool = True,
        *,
        label: str | None = None,
        color: Any = None,
        sigma: float | None = None,
        **properties: Any,
    ) -> Any:
        """Plot the density with its error band, and the atoms as ticks at the upper edge. Requires matplotlib.

        To compare densities, plot them on the same axes with different labels.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Axes to draw into. By default, a new figure is created.
        log : bool
            If True, use a logarithmic axis for the density, so that single eigenvalues are visible next to thousands of
            others.
        label : str, optional
            Name of the density in the legend, the number of its eigenvalues by default.
        color : color, optional
            Color of the curve, its band and the ticks. By default, the next color of a palette for color-blind readers.
        sigma : float, optional
            Standard deviation of the normal distributions that replace the nodes, as in `pdf`, in the units of the
            eigenvalues.
        **properties
            Properties of the curve, a ``matplotlib.lines.Line2D``, for example ``linestyle="--"``.

        Returns
        -------
        matplotlib.axes.Axes
            The axes that contain the plot.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        TypeError, ValueError
            If ``sigma`` is not a positive number, if `ax` is not a Matplotlib Axes, or if a property is invalid.

        Notes
        -----
        The band is the error of `pdf`. If the error band is as wide as the peaks are high, the peaks show single nodes.
        To see the shape of the spectrum, compute the density with more steps, or pass a larger ``sigma``.
        """
        from curvop.spectrum.plots import plot_density

        return plot_density(self, ax, log, label=label, color=color, sigma=sigma, **properties)

    def save(self, path: str | Path) -> None:
        """Save the density to an ``.npz`` file.

        The file appears under its name only after all data are written.

        Parameters
        ----------
        path : str or path
            Name of the file.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist. Saving creates no folders.
        """
        save_arrays(Path(path), **self.arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a density from a file written by `save`.

        Loading a file never executes code from it.

        Parameters
        ----------
        path : str or path
            Name of the file.

        Returns
        -------
        SpectralDensity
            The density that was saved.

        Raises
        ------
        ValueError
            If the file is damaged or was not written by `save`.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls.of_arrays(load_arrays(path, names, "SpectralDensity.save"))

    @property
    def arrays(self) -> dict[str, Array]:
        """Dictionary of all attributes, converted to arrays."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Create a density from the arrays of its attributes.

        Parameters
        ----------
        arrays : mapping of str to ndarray
            Arrays of all attributes by name, as returned by the property `arrays`.

        Returns
        -------
        SpectralDensity
            The density.
        """
        kinds: dict[str, Any] = {"size": int, "num_products": int, "complete": bool, "resolution": float}
        kinds["atoms"] = np.sort  # earlier versions saved another order
        return cls(**{name: kinds.get(name, np.asarray)(arrays[name]) for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        low, high = self.range
        if self.exact:
            return (
                f"{self.size:,} eigenvalues between {low:.3g} and {high:.3g}, trace {self.trace().value:.6g}: "
                f"all known, {self.num_products:,} products"
            )
        return (
            f"{self.size:,} eigenvalues between about {low:.3g} and {high:.3g}, trace {self.trace()}: "
            f"{len(self.nodes)} probes of {self.num_steps} steps, {self.num_products:,} products"
        )

    def _summary_table(self) -> list[tuple[str, str]]:
        ends = zip(("smallest eigenvalue", "largest eigenvalue"), self.range, self.range_errors, strict=True)
        rows = [(name, with_error(value, error)) for name, value, error in ends]
        return [("", "estimate"), *rows, ("trace", str(self.trace()))]

    def _times_size(self, mean: BoundedEstimate) -> BoundedEstimate:
        """Convert an estimate of the mean over all eigenvalues into an estimate of the sum."""
        return BoundedEstimate(*(self.size * number for number in (*mean, mean.low, mean.high)))

    def _gauss_mean(self, f: Callable[[Array], Any], exact: bool = False) -> BoundedEstimate:
        """Estimate the mean of f over all eigenvalues by the Gauss rules.

        The bounds are estimated from the difference between the rules of m and m / 2 steps, averaged over the probes.

        Parameters
        ----------
        f : callable
            Function that is applied elementwise to an array of eigenvalues.
        exact : bool
            True if f is known to be a polynomial that the Gauss rules integrate exactly.
        """
        integrals, from_atoms, rounding = self._integrals(f, slice(1) if exact else slice(2))
        gauss = integrals[:, 0]
        change = 2 * np.abs((gauss - integrals[:, -1]).mean(0)) if len(gauss) else 0.0
        return bounded_mean(gauss, gauss - change, gauss + change, from_atoms, rounding)

    def _integrals(self, f: Callable[[Array], Any], rules: slice) -> tuple[Array, Any, Any]:
        """Integrate f with several quadrature rules of each probe, and sum f over the known eigenvalues (atoms).

        The slice `rules` selects R of the rules that `all_rules` returns. Return ``(integrals, from_atoms, rounding)``:
        the integrals of shape ``(K, R, ...)``, the sum of f over the atoms divided by N, and an estimate of the
        rounding errors.
        """
        nodes, weights = (part[:, rules] for part in self._rules)
        values = np.asarray(f(nodes), dtype=np.float64)
        weights = weights.reshape(*weights.shape, *[1] * (values.ndim - 3))
        at_atoms = np.asarray(f(self.atoms), dtype=np.float64)
        magnitudes = np.abs(values[:, 0] * weights[:, 0]).sum(1).sum(0) / max(len(nodes), 1)
        rounding = _EPS * (magnitudes + np.abs(at_atoms).sum(0) / self.size)
        return (values * weights).sum(2), at_atoms.sum(0) / self.size, rounding

    def _pointwise(self, grid: Array, function: Callable[[Array], Any]) -> BoundedEstimate:
        """Estimate the mean of ``function(point - eigenvalue)`` over all eigenvalues, for each point of the grid.

        The points are processed one at a time, because all n points together would need memory for K m n numbers.
        """

        def at_point(point: float) -> tuple[Any, ...]:
            mean = self._gauss_mean(lambda values: function(point - values))
            return *mean, mean.low, mean.high

        columns = np.array([at_point(point) for point in grid.reshape(-1)]).reshape(-1, 4).T
        return BoundedEstimate(*(numbers.reshape(grid.shape)[()] for numbers in columns))

    def _checked_sigma(self, sigma: float | None) -> float:
        sigma = self.sigma if sigma is None else sigma
        if not real_scalar("sigma", sigma) > 0:
            raise ValueError(f"sigma is {sigma}, but must be positive")
        return float(sigma)

    @property
    def _num_nodes(self) -> Array:
        """Number of nodes of each probe, shape ``(K,)``. A probe without positive weights has the number 1."""
        lengths: Array = np.maximum((self.weights > 0).sum(1), 1)
        return lengths

    @functools.cached_property
    def _recurrences(self) -> list[Recurrence | None]:
        """List with the recurrence of each probe's measure, or None if the measure equals its Gauss rule."""
        lengths = self._num_nodes
        # A run that stopped by itself has found all eigenvectors that contribute to its probe. A probe without positive
        # weights lies in the deflated space.
        stopped = (lengths < self.nodes.shape[1]) & self.complete
        exact = stopped | (lengths >= self.size - len(self.atoms)) | ~self.weights.any(1)
        return recurrences(self.nodes, self.weights, self.recurrences, exact)

    @functools.cached_property
    def _rules(self) -> tuple[Array, Array]:
        """Nodes and weights ``(K, R, m)`` of all quadrature rules."""
        return all_rules(self.nodes, self.weights, self._recurrences)

    @functools.cached_property
    def _shares(self) -> ShareBounds:
        """Bounds for the fraction of eigenvalues that are less than or equal to any given point."""
        probes = []
        for nodes, weights, recurrence in zip(self.nodes, self.weights, self._recurrences, strict=True):
            if recurrence is None:
                probes.append(known_shares(nodes[weights > 0], weights[weights > 0]))
            else:
                probes.append(recurrence.shares(number_of_rules(len(recurrence.alphas))))
        atoms = known_shares(self.atoms, np.full(len(self.atoms), 1 / self.size))
        return ShareBounds(probes, atoms, self.resolution)
