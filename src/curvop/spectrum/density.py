"""Spectral densities: how many eigenvalues lie where, and what follows for functions of the matrix."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from scipy.special import gammaincinv, ndtr

from curvop.operators.progress import step_bar
from curvop.operators.validation import (
    available_bytes,
    check_fits,
    random_generator,
    real_number,
    real_operator,
    whole_number,
)
from curvop.spectrum.checkpoint import Checkpoint
from curvop.spectrum.counting import end_of
from curvop.spectrum.eigen import eigsh
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
from curvop.spectrum.lanczos import Lanczos, basis_dtype, device_of, resolution, runs_at_once
from curvop.storage.fingerprint import fingerprint
from curvop.storage.result_files import load_arrays, save_arrays

__all__ = ["SpectralDensity", "density"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
_MISSED = 0.05  # probability that an eigenvalue lies beyond the bounds of the ends


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralDensity:
    r"""The distribution of a matrix's eigenvalues as stochastic Lanczos quadrature estimates it, made by `density`.

    Each of K probes sees a measure of its own, whose integrals have the mean
    :math:`\frac{1}{N} \operatorname{tr} f(A)`, and knows its moments up to 2 m - 1 as a Gauss quadrature
    :math:`\sum_j w_j \delta(\theta_j)`. Nodes and weights are kept as they were found; only drawing makes them smooth.
    Every answer is a `BoundedEstimate`: `low` and `high` are what the quadrature leaves open, the value is the middle
    of them, and the error is the root of the sum of squares of the probes' standard error and a quarter of
    ``high - low``, so that two error bars reach the bounds. The standard error needs two probes. If the quadrature
    leaves nothing open, the truth is within two of them in 95 % of runs with many probes and in 91 % with 8 (Student's
    t), and less often if a few eigenvalues dominate.

    The bounds of shares and quantiles (`cdf`, `quantile`) are proved: no measure with the same moments exceeds them
    (Chebyshev, Markov, Stieltjes). For other functions (`mean`, `apply`) they hold the integrals of a family of
    measures with the same moments, and twice the change from the rule of m / 2 steps: as wide as a step or a kink among
    the nodes needs, and for a smooth function the error of the lesser rule (Golub, Strakos, 1994, for the inverse).
    They are no proof, and too narrow if doubling the steps gains little, as for a logarithm of eigenvalues that are
    spread over many orders of magnitude down to zero. Polynomials up to degree m - 1, and probes that found an
    invariant subspace, leave nothing open but rounding. After a single step all errors but the trace's are NaN.

    Attributes
    ----------
    size : int
        N, the number of eigenvalues.
    nodes, weights : ndarray, shape (K, m)
        Of each probe; the weights of one sum to 1, or with atoms to about ``1 - k / N``. Weights of 0 fill the rows of
        probes that stopped early: in a complete density, as they had found an invariant subspace.
    atoms : ndarray, shape (k,)
        Eigenvalues that are known; a density of probes is of the others. If all are known there are no probes.
    num_products : int
        The number of products that it took.
    complete : bool
        Whether all steps were taken; False if time was up.
    recurrences : ndarray, shape (K, 2, m)
        The alphas and betas that the nodes and weights come from. If empty, they are recovered from these, which is
        less exact if a weight is below the square of the precision.
    resolution : float
        Eigenvalues that differ by less are the same, to the rounding of the products.

    References
    ----------
    Golub, Meurant (2010), "Matrices, Moments and Quadrature with Applications", chapter 6. Golub, Strakos (1994),
    "Estimates in quadratic formulas", Numer. Algorithms 8. Gautschi (2004), "Orthogonal Polynomials: Computation and
    Approximation".
    """

    size: int
    nodes: Array
    weights: Array
    atoms: Array
    num_products: int
    complete: bool = True
    recurrences: Array = dataclasses.field(default_factory=lambda: np.zeros((0, 2, 0)))
    resolution: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether all eigenvalues are known, so that no answer has an error but rounding."""
        return len(self.atoms) == self.size

    @property
    def num_steps(self) -> int:
        """The steps of the longest run."""
        return int(self._lengths.max(initial=0))

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest node that carries weight: bounds of the spectrum from inside."""
        nodes = np.concatenate([self.nodes[self.weights > 0], self.atoms])
        return float(nodes.min()), float(nodes.max())

    @property
    def range_errors(self) -> tuple[float, float]:
        """How far beyond `range` the least and the largest eigenvalue may lie, with a probability of 95 %.

        An eigenvalue at t has a share in each probe of at most the Christoffel number of t, the largest mass at t that
        the probe's moments allow. That is a chi-squared variable with one degree of freedom, divided by N; it is as
        small in all probes as beyond these ends with a probability of 5 %. For probes of signs this supposes an
        eigenvector with many entries: one with two equal entries is orthogonal to half of them.
        """
        if self.exact:
            return self.resolution, self.resolution
        mass = 2 * float(gammaincinv(0.5, _MISSED ** (1 / len(self.nodes)))) / self.size
        low, high = beyond_ends(self._recurrences, self.nodes[self.weights > 0], self.range, mass)
        return low + self.resolution, high + self.resolution

    def mean(self, f: Callable[[Array], Any]) -> BoundedEstimate:
        """Estimate the mean of f over all eigenvalues.

        Parameters
        ----------
        f : callable
            Of an array of eigenvalues, entry by entry; what it returns may have further axes behind. It is called with
            numbers within `range` only.
        """
        integrals, known, scale = self._integrals(f, slice(None))
        whole, change = integrals[:, 0], 2 * np.abs(integrals[:, 0] - integrals[:, 1])
        others = np.delete(integrals, 1, axis=1)
        low, high = np.minimum(others.min(1), whole - change), np.maximum(others.max(1), whole + change)
        middle = np.where(np.isfinite(high - low), (low + high) / 2, whole)
        return bounded_mean(middle, low, high, known, scale)

    def _gauss(self, f: Callable[[Array], Any], exact: bool = False) -> BoundedEstimate:
        """Return the mean of f by the Gauss rules, and their mean difference to those of half the steps as the error.

        `exact` if f is known to be a polynomial of a degree that leaves none.
        """
        integrals, known, scale = self._integrals(f, slice(1) if exact else slice(2))
        whole = integrals[:, 0]
        change = 2 * np.abs((whole - integrals[:, -1]).mean(0)) if len(whole) else 0.0
        return bounded_mean(whole, whole - change, whole + change, known, scale)

    def _integrals(self, f: Callable[[Array], Any], rules: slice) -> tuple[Array, Any, Any]:
        """Return f's integrals ``(K, R, ...)`` by some rules of each probe, what the atoms add, and the rounding."""
        nodes, weights = (part[:, rules] for part in self._rules)
        values = np.asarray(f(nodes), dtype=np.float64)
        weights = weights.reshape(*weights.shape, *[1] * (values.ndim - 3))
        of_atoms = np.asarray(f(self.atoms), dtype=np.float64)
        magnitudes = np.abs(values[:, 0] * weights[:, 0]).sum(1).sum(0) / max(len(nodes), 1)
        rounding = _EPS * (magnitudes + np.abs(of_atoms).sum(0) / self.size)
        return (values * weights).sum(2), of_atoms.sum(0) / self.size, rounding

    @property
    def _lengths(self) -> Array:
        """The number of nodes ``(K,)`` of each probe; 1 where it has no weight."""
        lengths: Array = np.maximum((self.weights > 0).sum(1), 1)
        return lengths

    @functools.cached_property
    def _recurrences(self) -> list[Recurrence | None]:
        """The recurrence of each probe; None for a probe whose measure is its rule."""
        lengths = self._lengths
        # A run that ended by itself has met all that its probe sees, and a probe without weight sees nothing.
        ended = (lengths < self.nodes.shape[1]) & self.complete
        exact = ended | (lengths >= self.size - len(self.atoms)) | ~self.weights.any(1)
        return recurrences(self.nodes, self.weights, self.recurrences, exact)

    @functools.cached_property
    def _rules(self) -> tuple[Array, Array]:
        return all_rules(self.nodes, self.weights, self._recurrences)

    @functools.cached_property
    def _shares(self) -> ShareBounds:
        found = []
        for nodes, weights, recurrence in zip(self.nodes, self.weights, self._recurrences, strict=True):
            if recurrence is None:
                found.append(known_shares(nodes[weights > 0], weights[weights > 0]))
            else:
                found.append(recurrence.shares(number_of_rules(len(recurrence.alphas))))
        atoms = known_shares(self.atoms, np.full(len(self.atoms), 1 / self.size))
        return ShareBounds(found, atoms, self.resolution)

    def apply(self, f: Callable[[Array], Any]) -> BoundedEstimate:
        """Estimate the trace of f(A), the sum of f over all eigenvalues; see `mean`."""
        return self._summed(self.mean(f))

    def _summed(self, mean: BoundedEstimate) -> BoundedEstimate:
        """Return the sum over all eigenvalues whose mean this is."""
        return BoundedEstimate(*(self.size * number for number in (*mean, mean.low, mean.high)))

    def moment(self, p: int) -> BoundedEstimate:
        """Estimate the mean of the eigenvalues' p-th powers; the quadrature leaves nothing open if p < 2 m."""
        exact = p in range(2 * int(self._lengths.min(initial=self.size)))

        def power(values: Array) -> Array:
            return values**p

        return self._gauss(power, exact) if exact else self.mean(power)

    def trace(self) -> BoundedEstimate:
        """Estimate the trace, the sum of the eigenvalues."""
        return self._summed(self.moment(1))

    def logdet(self, damping: float) -> BoundedEstimate:
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

    def pdf(self, grid: Any, sigma: float | None = None) -> BoundedEstimate:
        """Estimate the density at points `grid` ``(n,)``, every node broadened to a normal distribution.

        Parameters
        ----------
        grid : array_like, shape (n,)
        sigma : float, optional
            Its standard deviation, in the units of the eigenvalues; `self.sigma` by default.

        Returns
        -------
        BoundedEstimate
            Arrays ``(n,)``; the value is that of the Gauss quadrature, and integrates to about 1 over the line. What
            the quadrature leaves open is estimated by the mean difference to the rule of half the steps: a picture of
            the nodes, whose peaks need not be the spectrum's if `sigma` is less than their distance. For the number of
            eigenvalues in an interval use `cdf`.
        """
        grid, sigma = np.asarray(grid, dtype=np.float64), self._width(sigma)
        scale = sigma * (2 * np.pi) ** 0.5
        return self._at(grid, lambda distances: np.exp(-0.5 * (distances / sigma) ** 2) / scale)

    def cdf(self, grid: Any, sigma: float | None = None) -> BoundedEstimate:
        """Estimate the share of the eigenvalues up to each point of `grid`.

        Parameters
        ----------
        grid : array_like
        sigma : float, optional
            A standard deviation to broaden every eigenvalue by, as `pdf` does; by default, and for 0, there is none.

        Returns
        -------
        BoundedEstimate
            In the shape of `grid`. ``low`` and ``high`` are proved for each probe: every measure with its moments has a
            share between them. Eigenvalues that equal a point to ``resolution`` are in ``high`` and not in ``low``: at
            a multiple eigenvalue the share is that interval, and the value is its middle. So is that of a cluster that
            the quadrature does not resolve. For a positive `sigma` the value is that of the Gauss quadrature.
        """
        grid = np.asarray(grid, dtype=np.float64)
        if sigma is None or sigma == 0:
            return self._shares.up_to(grid)
        width = self._width(sigma)
        return self._at(grid, lambda distances: ndtr(distances / width))

    def quantile(self, shares: Any) -> BoundedEstimate:
        """Estimate the eigenvalues up to which ``shares`` of all lie; 0.5 for the median.

        Parameters
        ----------
        shares : array_like
            Between 0 and 1.

        Returns
        -------
        BoundedEstimate
            In the shape of ``shares``, in the units of the eigenvalues. The value is where `cdf` reaches the share.
            ``low`` and ``high`` are where its upper and its lower bound do: infinite if they do nowhere. The error is
            half of the distance between the values for one error bar of `cdf` less and more (Woodruff, 1952), as it
            is beside the value.

        References
        ----------
        Woodruff (1952), "Confidence intervals for medians and other position measures", J. Amer. Statist. Assoc. 47.
        """
        shares = np.asarray(shares, dtype=np.float64)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise ValueError(f"shares is {shares}, but must be between 0 and 1")
        return self._shares.quantile(shares, self.range)

    def _width(self, sigma: float | None) -> float:
        sigma = self.sigma if sigma is None else sigma
        if not real_number("sigma", sigma) > 0:
            raise ValueError(f"sigma is {sigma}, but must be positive")
        return float(sigma)

    def _at(self, grid: Array, function: Callable[[Array], Any]) -> BoundedEstimate:
        """Return the mean of a function of ``grid - eigenvalue``; point by point, as all at once take K m n numbers."""

        def at(point: float) -> tuple[Any, ...]:
            found = self._gauss(lambda values: function(point - values))
            return *found, found.low, found.high

        found = np.array([at(point) for point in grid.reshape(-1)]).reshape(-1, 4).T
        return BoundedEstimate(*(numbers.reshape(grid.shape)[()] for numbers in found))

    @property
    def arrays(self) -> dict[str, Array]:
        """All of it as arrays, by name."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Return the density that these `arrays` are of."""
        kinds: dict[str, Any] = {"size": int, "num_products": int, "complete": bool, "resolution": float}
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: kinds.get(name, np.asarray)(arrays[name]) for name in names})

    def save(self, path: str | Path) -> None:
        """Write it to an ``.npz`` file, which appears only when it is complete."""
        save_arrays(Path(path), **self.arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` has written; nothing in the file is executed."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls.of_arrays(load_arrays(path, names, "SpectralDensity.save"))

    def plot(self, ax: Any = None, log: bool = True) -> Any:
        """Draw the density; see `curvop.spectrum.plots.plot_density`."""
        from curvop.spectrum.plots import plot_density

        return plot_density(self, ax, log)

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


# Stochastic Lanczos quadrature.


def density(
    A: LinearOperator,
    *,
    num_probes: int = 8,
    num_steps: int = 64,
    rng: int | np.random.Generator | None = 0,
    deflate: int = 0,
    memory: int | None = None,
    checkpoint: str | Path | None = None,
    seconds: float | None = None,
    progress: bool = True,
) -> SpectralDensity:
    r"""Estimate the density of a symmetric operator's eigenvalues by stochastic Lanczos quadrature.

    Every probe is a vector of random signs; the Lanczos process from it gives a Gauss quadrature for the eigenvalues,
    exact for polynomials up to degree 2 m - 1 in what it sees. The recurrences are in float64 (where `A` is float32, in
    that: half the memory, half the time) and keep their vectors orthogonal, so that an outlier counts once; all probes
    take their steps together, with one block product. The Wasserstein distance between the density and the spectrum
    falls as 1 / m, and with the probes as :math:`1 / \sqrt{K N}` (Chen, Trogdon, Ubaru, 2021).

    Of use for the shape of a spectrum, and for the trace of any function of the matrix. For single eigenvalues with
    proof take `eigsh`; for a trace or a norm alone, with fewer products where eigenvalues decay, `trace` and
    `frobenius_norm`.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric.
    num_probes : int
        K; error bars need two.
    num_steps : int
        m, at most N. Outliers need some 10, the fine structure of the bulk as many as there is patience for.
    rng : int or numpy.random.Generator, optional
        Of the probes, which are the same on every device; None for others in every run.
    deflate : int
        So many eigenvalues of largest magnitude are found by `eigsh`, taken out, and added back as what they are
        (Papyan, 2018): sharper where a few outliers are of interest, and the probes' spread no longer stems from them.
        To find them takes its time, whatever `seconds` says; they are certified, with a warning where one may be
        missing, and recorded in a checkpoint when all of them are found.
    memory : int, optional
        Bytes for the bases, 8 N m and some for each probe, half of it where `A` is float32, and for `deflate` vectors
        of 8 N (12 N where `A` is float32); by default half of what is free. Where they do not fit, probes take turns.
    checkpoint : str or path, optional
        A directory where every step is recorded. A run that was killed takes its steps up again from there, called in
        the same way with the same seed, and ends with the same bits as one that was not (where products repeat to the
        last bit: this package's do with ``columns=1``, or any fixed number). It keeps 8 N bytes for each step of the
        probes that are under way, and nodes and weights of those that are done.
    seconds : float, optional
        End after so long with the steps that there are, a new one at least: a density of fewer of them. With a
        checkpoint it can be taken up again.
    progress : bool
        Count products on a bar.

    Returns
    -------
    SpectralDensity

    Raises
    ------
    ValueError, TypeError
        For arguments that cannot be, and where a product is not finite.
    ValueError, RecordFileError, OSError
        Where the checkpoint is of something else (naming it), in use, damaged, or cannot be written.
    MemoryError
        Where the deflated vectors and the basis of a single probe do not fit, before anything is computed.

    References
    ----------
    Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38(4), algorithm 1; Ghorbani, Krishnan, Xiao (2019),
    arXiv:1901.10159; Papyan (2018), arXiv:1811.07062; Chen, Trogdon, Ubaru (2021), arXiv:2105.06595.
    """
    until = end_of(seconds)
    A = real_operator(A)
    _check(A, num_probes, num_steps, deflate)
    size, device = A.shape[0], device_of(A)
    num_steps = min(num_steps, size - deflate)
    at_once = runs_at_once(A, num_probes, num_steps, _left_for_runs(A, deflate, memory))
    generator = random_generator(rng)
    seed = json.dumps(generator.bit_generator.state, default=str)
    signs = generator.choice(np.array([-1, 1], dtype=np.int8), (num_probes, size))

    def settings() -> dict[str, str]:
        asked = {"num_probes": num_probes, "num_steps": num_steps, "deflate": deflate}
        seeded = {"rng": hashlib.blake2b(seed.encode(), digest_size=16).hexdigest()}
        return fingerprint(A) | {name: str(value) for name, value in asked.items()} | seeded

    kept = Checkpoint(checkpoint, settings)
    at_once = kept.fixed("probes at once", at_once)  # whatever memory is free today: other blocks round otherwise
    total = num_probes * num_steps
    with (
        contextlib.closing(kept),
        step_bar("density", progress, total) as bar,
    ):
        values, vectors, taken = kept.deflated(lambda: _largest(A, deflate, memory, progress))
        known = torch.from_numpy(vectors).to(device) if deflate else None
        nodes, weights = np.zeros((num_probes, num_steps)), np.zeros((num_probes, num_steps))
        recurrences = np.zeros((num_probes, 2, num_steps))
        done, whole, idle = kept.groups(), True, True
        for first in range(0, num_probes, at_once):
            group = slice(first, min(first + at_once, num_probes))
            if first in done:
                bar.update(int(done[first][2].sum()))
            elif not idle and time.monotonic() > until:
                nodes, weights, recurrences, whole = nodes[:first], weights[:first], recurrences[:first], False
                break
            else:
                probes = torch.from_numpy(signs[group]).to(device).to(torch.float64)
                if known is not None:
                    probes -= (probes @ known.T) @ known
                # A step at least, so that whoever comes back again and again gets on.
                done[first], complete = _quadrature(A, probes, num_steps, known, kept, first, bar, until, idle)
                idle = False
                whole = whole and complete
                if complete:
                    kept.finish(first, *done[first])
            nodes[group], weights[group], lengths, recurrences[group] = done[first]
            taken += int(lengths.sum())
    longest = max(int(lengths.max()) for _, _, lengths, _ in done.values())
    if whole:  # a weight of 0 tells of each probe that it ended by itself
        longest = min(longest + 1, num_steps)
    nodes, weights, recurrences = nodes[:, :longest], weights[:, :longest], recurrences[:, :, :longest]
    scale = max(np.abs(nodes).max(), np.abs(values).max(initial=0.0))
    return SpectralDensity(size, nodes, weights, values, taken, whole, recurrences, float(resolution(A) * scale))


def _quadrature(
    A: LinearOperator,
    probes: torch.Tensor,
    num_steps: int,
    known: Any,
    kept: Checkpoint,
    first: int,
    bar: Any,
    until: float,
    idle: bool,
) -> tuple[list[Any], bool]:
    """Return nodes, weights, lengths and recurrences of a group of probes, and whether their runs are complete."""
    squares = (probes**2).sum(1).cpu().numpy()
    within = squares <= 1e-20 * probes.shape[1]  # of a probe in the deflated space rounding is left: of no weight
    squares[within] = 0
    if within.any():
        probes[torch.from_numpy(within)] = torch.linspace(
            1, 2, probes.shape[1], dtype=probes.dtype, device=probes.device
        )
    run = Lanczos(A, probes, num_steps, known)
    kept.replay(first, run)
    bar.update(int(run.lengths.sum()))
    while run.running and (time.monotonic() < until or idle or not run.lengths.any()):
        idle = False
        runs = run.step()
        bar.update(len(runs))
        kept.add(first, run, runs)
    nodes, weights = run.quadrature()
    weights *= (squares / probes.shape[1])[:, None]
    return [nodes, weights, run.lengths, np.stack([run.alphas, run.betas], axis=1)], not run.running


def _check(A: LinearOperator, num_probes: int, num_steps: int, deflate: int) -> None:
    if A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise ValueError(f"A has shape {A.shape}, but must be square and symmetric, and not empty")
    for name, value, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 1), ("deflate", deflate, 0)):
        whole_number(name, value, least)
    if deflate >= A.shape[0]:
        raise ValueError(f"deflate is {deflate}, but must be less than the {A.shape[0]} eigenvalues of A")


def _left_for_runs(A: LinearOperator, count: int, memory: int | None) -> int:
    """Return what deflated vectors, and their copy in the precision of the bases, leave of `memory` bytes."""
    available = available_bytes(device_of(A), memory)
    precise = basis_dtype(A) == torch.float64
    needed: int = count * A.shape[0] * (8 if precise else 8 + basis_dtype(A).itemsize)
    check_fits(needed, available, f"what is deflated, {count} vectors of {A.shape[0]:,} numbers,", "deflate fewer")
    return available - needed


def _largest(A: LinearOperator, count: int, memory: int | None, progress: bool) -> tuple[Any, Any, int]:
    """Return eigenvalues ``(k,)`` and vectors ``(k, N)`` that are certain, and the products they took."""
    if not count:
        return np.zeros(0), np.zeros((0, A.shape[0])), 0
    method = "arpack" if device_of(A).type == "cpu" else "lanczos"
    found = eigsh(A, count, "LM", method=method, memory=memory, progress=progress)
    if not found.converged:
        raise RuntimeError(f"deflate is {count}, but only {len(found.values)} eigenvalues converged: deflate fewer")
    return found.values.astype(np.float64), np.ascontiguousarray(found.vectors.T, dtype=np.float64), found.products
