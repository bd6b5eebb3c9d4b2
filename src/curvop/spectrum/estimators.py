"""Estimates of what a matrix would have to be formed for, from a few block products, with error bars."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, solve_triangular
from scipy.sparse.linalg import LinearOperator

from curvop.operators.validation import random_generator, real_operator, whole_number
from curvop.spectrum.norms import column_norms, norm, unit_of

__all__ = ["BoundedEstimate", "Estimate", "bounded_mean", "diagonal", "frobenius_norm", "mean_of", "trace"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)


class Estimate(NamedTuple):
    """A random estimate.

    Attributes
    ----------
    value : float or ndarray
    error : float or ndarray
        Its standard error, of the same shape, as the spread between probes tells it; NaN where there was one. In about
        95 % of runs the truth is within ``scipy.stats.t.ppf(0.975, num_probes - 1)`` of them where no few eigenvalues
        dominate; where they do, spreads of a few probes are too small in one run of ten. What does not differ between
        probes is not in it, but for the error of a quadrature, as `SpectralDensity` estimates it.
    """

    value: Any
    error: Any

    def __str__(self) -> str:
        return f"{self.value:.6g} +- {self.error:.2g}" if np.ndim(self.value) == 0 else repr(self)


def mean_of(values: Any) -> Estimate:
    """Return the mean of independent estimates along the first axis, and its standard error."""
    values = np.asarray(values, dtype=np.float64)
    count, value = len(values), values.mean(0)
    if count == 1:
        return Estimate(value[()], np.full(value.shape, np.nan)[()])
    spread = column_norms((values - value).reshape(count, -1)).reshape(value.shape)
    return Estimate(value[()], (spread / (count * (count - 1)) ** 0.5)[()])


class _Sketch:
    r"""What the estimators know of `A` after two block products, `A` times tests, and its adjoint times their range.

    With :math:`Q R = A \Omega`, the projector on the range of all columns of :math:`A \Omega` but the i-th is
    :math:`Q (I - s_i s_i^\top) Q^\top`, where :math:`s_i` is the i-th column of :math:`R^{-\top}`, normalised (Epperly,
    Tropp, Webber, 2024, section 3.1 and supplement): so each test can be set against the range of the others.

    Attributes
    ----------
    unit : int
        The power of two in whose units all products are, so that their squares neither underflow nor overflow.
    Q, image : ndarray, shape (M, r), (N, r)
        An orthonormal basis of the range, and the adjoint's products with it.
    rounding : float
        What the norm of an error in one of the products may be by rounding.
    dropped : float
        The norm of what the products have outside of the range of Q, as little as rounding may leave.
    found : bool
        Whether the range of `A` is that of Q, as far as rounding tells; what follows is there where it is not.
    tests, products, S : ndarray, shape (N, r), (M, r), (r, r)
    """

    def __init__(self, A: LinearOperator, adjoint: LinearOperator, tests: Array) -> None:
        products = _product(A, tests)
        self.unit = unit_of(products)
        products = np.ldexp(products, -self.unit)
        # Pivoted, as columns may be equal: the signs that a few rows see are few.
        self.Q, R, order = qr(products, mode="economic", pivoting=True, check_finite=False)
        weights = np.abs(np.diag(R))
        largest = float(weights.max(initial=0.0))
        kept = weights > _EPS * max(products.shape) * largest
        self.rounding = float(np.finfo(np.float32).eps if A.dtype == np.float32 else _EPS) * largest
        self.dropped = float(weights[~kept].max(initial=0.0))
        self.found = not kept.all()
        if self.found:
            self.Q = self.Q[:, kept]
        image = _product(adjoint, self.Q) if self.Q.size else np.zeros((A.shape[1], 0))
        self.image = np.ldexp(image, -self.unit)
        if not self.found:
            self.tests, self.products, self._R = tests[:, order], products[:, order], R
            S = solve_triangular(R, np.eye(len(R)), lower=False).T
            self.S = S / np.linalg.norm(S, axis=0)

    def estimate(self, value: Any, error: Any) -> Estimate:
        """Return what was estimated in units of the power of two."""
        return Estimate(np.ldexp(value, self.unit)[()], np.ldexp(error, self.unit)[()])

    def left_over(self) -> Array:
        """Return the norms ``(r,)`` of each product without its projection on the range of the others."""
        norms: Array = np.abs(np.einsum("ij,ij->j", self.S, self._R))
        return norms

    def apart(self) -> tuple[Array, Array]:
        """Return each test without its projection on the range of the others, ``(N, r)``, and `A` times it."""
        inner = self.Q.T @ self.tests
        shares = self.S * np.einsum("ij,ij->j", self.S, inner) - inner
        return self.tests + self.Q @ shares, self.products + self.image @ shares


def _product(A: LinearOperator, X: Array) -> Array:
    product = np.asarray(A @ X, dtype=np.float64)
    if not np.isfinite(product).all():
        raise ValueError("a product with A is not finite")
    return product


def _columns(A: LinearOperator, num_products: int, square: bool = True) -> int:
    """Return the number of test vectors, half of the products."""
    if square and A.shape[0] != A.shape[1]:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    return whole_number("num_products", num_products, 2) // 2


def trace(A: LinearOperator, num_products: int, rng: int | np.random.Generator | None = None) -> Estimate:
    """Estimate the trace of a symmetric operator by XTrace, without bias.

    Half of the products find the dominant part of the range, whose trace is exact; the rest is estimated, each test
    vector leaving out itself. Where the eigenvalues decay, the error falls much faster than that of `SpectralDensity`'s
    `trace`, which is of use where they do not. From N products on it is read off the matrix.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric.
    num_products : int
        At least 2. Memory is about 4 N num_products numbers.
    rng : int or numpy.random.Generator, optional
        Of the test vectors, which are uniform on the sphere.

    Returns
    -------
    Estimate
        The single estimates have the found range in common: where the eigenvalues decay, the error is too small by up
        to a third. It is no less than the rounding of the products, and than what of the matrix may lie within that:
        beside an eigenvalue 1e16 times larger, all others do.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 2.1; arXiv:2301.07825.
    """
    A = real_operator(A)
    size, count = A.shape[1], _columns(A, num_products)
    if num_products >= size:
        entries = np.diagonal(_product(A, np.eye(size)))
        return Estimate(float(entries.sum()), _EPS * float(np.abs(entries).sum()))
    tests = random_generator(rng).standard_normal((size, count))
    sketch = _Sketch(A, A, tests * (size**0.5 / np.linalg.norm(tests, axis=0)))
    core = sketch.Q.T @ sketch.image
    if sketch.found:
        # The identity has the largest trace, sqrt(N) times it, where the norm of a product with a test is given.
        return sketch.estimate(np.trace(core), max(sketch.rounding, size**0.5 * sketch.dropped))
    apart, image = sketch.apart()
    # A test vector's direction is uniform in what its projection leaves, of dimension N - count + 1.
    scales = (size - count + 1) / (apart**2).sum(0)
    exact = np.trace(core) - np.einsum("ji,jk,ki->i", sketch.S, core, sketch.S)
    value, error = mean_of(exact + scales * (apart * image).sum(0))
    return sketch.estimate(value, np.maximum(error, sketch.rounding))


def diagonal(A: LinearOperator, num_products: int, rng: int | np.random.Generator | None = None) -> Estimate:
    """Estimate the diagonal ``(N,)`` of a symmetric operator by XDiag.

    As `trace` does; where half of the products exceed the rank of `A` by some there is no error but rounding. From N
    products on the diagonal is read off the matrix.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real, symmetric. The Gauss-Newton and Fisher matrices know theirs exactly: ``A.diagonal()``.
    num_products : int
        At least 2. Memory is about 4 N num_products numbers.
    rng : int or numpy.random.Generator, optional
        Of the test vectors, which are signs.

    Returns
    -------
    Estimate
        Arrays ``(N,)``.

    References
    ----------
    Epperly, Tropp, Webber (2024), section 3.1 and supplement.
    """
    A = real_operator(A)
    size, count = A.shape[1], _columns(A, num_products)
    if num_products >= size:
        return Estimate(np.diagonal(_product(A, np.eye(size))).copy(), np.zeros(size))
    sketch = _Sketch(A, A, random_generator(rng).choice(np.array([-1.0, 1.0]), (size, count)))
    exact = _rowwise(sketch.Q, sketch.image)
    if sketch.found:
        return sketch.estimate(exact, np.full(size, max(sketch.rounding, sketch.dropped)))
    # Of the part that the others' range leaves, from the left only: what is left to the right is exact, too.
    QS = sketch.Q @ sketch.S
    inner = np.einsum("ij,ij->j", sketch.S, sketch.image.T @ sketch.tests)
    of_tests = sketch.products - sketch.Q @ (sketch.image.T @ sketch.tests) + QS * inner
    found = mean_of((sketch.tests * of_tests - QS * (sketch.image @ sketch.S)).T)
    return sketch.estimate(exact + found.value, np.maximum(found.error, sketch.rounding))


def frobenius_norm(A: LinearOperator, num_products: int, rng: int | np.random.Generator | None = None) -> Estimate:
    r"""Estimate the Frobenius norm of an operator of any shape.

    :math:`\|A\|_F^2 = \|Q^\top A\|_F^2 + \|(I - Q Q^\top) A\|_F^2`, where the first is known for the range Q of half of
    the products, and the second is estimated by each of them against the range of the others, as XTrace does for
    :math:`A A^\top`.

    Parameters
    ----------
    A : LinearOperator, shape (M, N)
        Real, with an adjoint (``rmatvec`` or ``rmatmat``).
    num_products : int
        At least 2; half of them are the adjoint's. From 2 min(M, N) on the norm is exact.
    rng : int or numpy.random.Generator, optional

    Returns
    -------
    Estimate
        The square is estimated without bias. The error is the spread of the single estimates, not that of their mean,
        as they have the found range in common and do not average out where the eigenvalues decay.
    """
    A = real_operator(A)
    count = _columns(A, num_products, square=False)
    if count >= min(A.shape):
        small = A if A.shape[1] <= A.shape[0] else A.H
        return Estimate(norm(_product(small, np.eye(small.shape[1]))), 0.0)
    tests = random_generator(rng).standard_normal((A.shape[1], count))
    sketch = _Sketch(A, A.H, tests * (A.shape[1] ** 0.5 / np.linalg.norm(tests, axis=0)))
    exact = float(np.linalg.norm(sketch.image)) ** 2
    if sketch.found:
        return sketch.estimate(exact**0.5, max(sketch.rounding, np.hypot(exact**0.5, sketch.dropped) - exact**0.5))
    squares = exact - ((sketch.image @ sketch.S) ** 2).sum(0) + sketch.left_over() ** 2
    root = float(squares.mean()) ** 0.5
    spread = float(squares.std(ddof=1)) / (2 * root) if count > 1 else float("nan")
    return sketch.estimate(root, np.maximum(spread, sketch.rounding))


def _rowwise(left: Array, right: Array) -> Array:
    total: Array = np.einsum("ij,ij->i", left, right)
    return total


# Random estimates that carry bounds of what is not random in them.


class BoundedEstimate(Estimate):
    """A random estimate that also carries the bounds of its quadrature; it unpacks to value and error.

    Attributes
    ----------
    value : float or ndarray
    error : float or ndarray
        Of the probes and the quadrature together: the root of the sum of squares of the standard error and of a quarter
        of ``high - low``, so that two of them reach the bounds.
    low, high : float or ndarray
        What the quadrature leaves open, averaged over the probes; the probes' spread is not in them.
    """

    low: Any
    high: Any

    def __new__(cls, value: Any, error: Any, low: Any, high: Any) -> Self:
        """Make an estimate with bounds."""
        self = super().__new__(cls, value, error)
        self.low, self.high = low, high
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.value, self.error, self.low, self.high

    def __repr__(self) -> str:
        names = ("value", "error", "low", "high")
        return f"BoundedEstimate({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def bounded_mean(
    values: Array, low: Array, high: Array, known: Any, rounding: Any, reach: Any = 0.0
) -> BoundedEstimate:
    """Return the mean of the probes' values ``(K, ...)`` with its bounds.

    To it is added what is `known` without probes, to within `reach`. No error is below `rounding`.
    """
    if not len(values):
        value, spread = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
        low, high = value - reach, value + reach
    else:
        value, spread = mean_of(values)
        low, high = low.mean(0) - reach, high.mean(0) + reach
    error = np.maximum(np.hypot(spread, (high - low) / 4), rounding)
    return BoundedEstimate((value + known)[()], error[()], (low + known)[()], (high + known)[()])
