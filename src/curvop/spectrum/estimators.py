"""Estimate traces, diagonals and Frobenius norms from products with random vectors, with error bars.

`trace` and `diagonal` implement XTrace and XDiag (Epperly, Tropp, Webber, 2024). `frobenius_norm` applies the same idea
to the Frobenius norm. The results are of class `Estimate` or `BoundedEstimate`.

References
----------
Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J. Matrix
Anal. Appl. 45(1); arXiv:2301.07825.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import qr, solve_triangular
from scipy.sparse.linalg import LinearOperator

from curvop.operators.validation import integer, random_generator, real_operator
from curvop.spectrum.norms import binary_exponent, column_norms, norm

__all__ = ["BoundedEstimate", "Estimate", "bounded_mean", "diagonal", "frobenius_norm", "sample_mean", "trace"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)


def trace(A: LinearOperator, num_products: int, rng: int | np.random.Generator | None = None) -> Estimate:
    """Estimate the trace of a symmetric operator by XTrace.

    Use `trace` if the eigenvalues decay. In this case, the error of `trace` decreases much faster with the number of
    products than the error of `SpectralDensity.trace`. If the spectrum is flat, or if you need other functions of the
    matrix as well, use `density`.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator.
    num_products : int
        Number of products, at least 2. The estimate needs memory for about 4 N num_products numbers. With N or more
        products, the whole matrix is formed and its trace is exact.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the test vectors, which are uniform on the sphere.

    Returns
    -------
    Estimate
        Unbiased estimate with its standard error. If the eigenvalues decay, the error is too small by up to a third,
        because the estimates from different test vectors use nearly the same range and are correlated. The error
        includes rounding errors of the products, which hide eigenvalues that are about 1e16 times smaller than the
        largest.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or if a product is not finite.

    See Also
    --------
    diagonal : Estimate the diagonal.
    frobenius_norm : Estimate the Frobenius norm.
    density : Estimate the trace of any function of the operator.

    Notes
    -----
    Half of the products apply `A` to random test vectors, and find the dominant part of the range of `A`. The other
    half apply `A` to a basis of this range. The trace of `A` on the range is computed exactly. The trace on the
    complement of the range is estimated with the same test vectors. To avoid a bias, each test vector is projected onto
    the complement of the range that the other test vectors found. The cost is ``num_products`` products in two blocks,
    and a QR decomposition.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 2.1; arXiv:2301.07825.

    Examples
    --------
    Estimate the trace of a matrix with 500 rows, whose eigenvalues decay as 1 / k^2, from 60 products:

    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from curvop import spectrum
    >>> Q = np.linalg.qr(np.random.default_rng(0).normal(size=(500, 500)))[0]
    >>> values = 1 / np.arange(1, 501) ** 2
    >>> estimate = spectrum.trace(aslinearoperator((Q * values) @ Q.T), 60, rng=0)
    >>> bool(abs(estimate.value - values.sum()) < 4 * estimate.error)
    True
    >>> bool(estimate.error < 0.01 * values.sum())
    True
    """
    A = real_operator(A)
    size, count = A.shape[1], _num_tests(A, num_products)
    if num_products >= size:
        entries = np.diagonal(_finite_product(A, np.eye(size)))
        return Estimate(float(entries.sum()), _EPS * float(np.abs(entries).sum()))
    tests = random_generator(rng).standard_normal((size, count))
    sketch = _Sketch(A, A, tests * (size**0.5 / np.linalg.norm(tests, axis=0)))
    core = sketch.Q.T @ sketch.image
    if sketch.covers_range:
        # `dropped` bounds the norm of the neglected part of a product with a test vector. Among all matrices with this
        # bound, a multiple of the identity has the largest trace, which is sqrt(N) times the bound.
        return sketch.estimate(np.trace(core), max(sketch.rounding, size**0.5 * sketch.dropped))
    projected, image = sketch.projected_tests()
    # A projected test vector has a uniform direction in a space of dimension N - count + 1, the complement of the range
    # of the other vectors.
    scales = (size - count + 1) / (projected**2).sum(0)
    exact = np.trace(core) - np.einsum("ji,jk,ki->i", sketch.S, core, sketch.S)
    value, error = sample_mean(exact + scales * (projected * image).sum(0))
    return sketch.estimate(value, np.maximum(error, sketch.rounding))


def diagonal(A: LinearOperator, num_products: int, rng: int | np.random.Generator | None = None) -> Estimate:
    """Estimate the diagonal of a symmetric operator by XDiag.

    Use `diagonal` if the eigenvalues decay. For the Gauss-Newton and Fisher operators of this package, use the method
    ``diagonal`` of the operator instead, which is exact.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator.
    num_products : int
        Number of products, at least 2. The estimate needs memory for about 4 N num_products numbers. If ``num_products
        / 2`` is greater than the rank of `A` by at least a few, the estimate is exact up to rounding. With N or more
        products, the whole matrix is formed and its diagonal is exact.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the test vectors, which are random signs.

    Returns
    -------
    Estimate
        Estimate of the diagonal. ``value`` and ``error`` are arrays ``(N,)``: the estimated entries and their standard
        errors. The error includes rounding errors of the products.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or if a product is not finite.

    See Also
    --------
    trace : Estimate the trace.
    frobenius_norm : Estimate the Frobenius norm.

    Notes
    -----
    Half of the products apply `A` to random test vectors, and find the dominant part of the range of `A`. The other
    half apply `A` to an orthonormal basis Q of this range. The diagonal of ``Q Q' A`` is computed exactly. The diagonal
    of ``(I - Q Q') A`` is estimated with the same test vectors. To avoid a bias, the estimate from each test vector
    uses a basis of the range that the other test vectors found, in place of Q. The cost is ``num_products`` products in
    two blocks, and a QR decomposition.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 3.1 and supplement; arXiv:2301.07825.

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from curvop import spectrum
    >>> Q = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 300)))[0]
    >>> A = (Q / np.arange(1, 301) ** 2) @ Q.T
    >>> estimate = spectrum.diagonal(aslinearoperator(A), 100, rng=0)
    >>> bool(np.linalg.norm(estimate.value - np.diag(A)) < 0.05 * np.linalg.norm(np.diag(A)))
    True
    """
    A = real_operator(A)
    size, count = A.shape[1], _num_tests(A, num_products)
    if num_products >= size:
        return Estimate(np.diagonal(_finite_product(A, np.eye(size))).copy(), np.zeros(size))
    sketch = _Sketch(A, A, random_generator(rng).choice(np.array([-1.0, 1.0]), (size, count)))
    exact = _row_dots(sketch.Q, sketch.image)
    if sketch.covers_range:
        return sketch.estimate(exact, np.full(size, max(sketch.rounding, sketch.dropped)))
    # Let P be the projection onto the range that the other test vectors found. Each test vector estimates the diagonal
    # of (I - P) A. The part (I - P) A P is estimated as well, although it could be computed exactly.
    QS = sketch.Q @ sketch.S
    inner = np.einsum("ij,ij->j", sketch.S, sketch.image.T @ sketch.tests)
    residuals = sketch.products - sketch.Q @ (sketch.image.T @ sketch.tests) + QS * inner
    rest = sample_mean((sketch.tests * residuals - QS * (sketch.image @ sketch.S)).T)
    return sketch.estimate(exact + rest.value, np.maximum(rest.error, sketch.rounding))


def frobenius_norm(A: LinearOperator, num_products: int, rng: int | np.random.Generator | None = None) -> Estimate:
    r"""Estimate the Frobenius norm of an operator of any shape.

    Use `frobenius_norm` if the singular values decay. For a symmetric operator with a flat spectrum, use the method
    ``moment`` of a `density` instead: ``moment(2)`` estimates the squared norm divided by N.

    Parameters
    ----------
    A : LinearOperator, shape (M, N)
        Real operator with an adjoint (``rmatvec`` or ``rmatmat``).
    num_products : int
        Number of products, at least 2. Half of these are products with the adjoint. With 2 min(M, N) or more products,
        the norm is exact.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the test vectors, which are uniform on the sphere.

    Returns
    -------
    Estimate
        Estimate of the norm; its square is an unbiased estimate of the squared norm. The error is the standard
        deviation of the estimates from single test vectors. The standard error of the mean would be too small if the
        singular values decay, because the estimates use nearly the same range and are correlated.

    Raises
    ------
    TypeError, ValueError
        If an argument is invalid, or if a product is not finite.

    See Also
    --------
    trace : Estimate the trace.
    density : Estimate the density of the eigenvalues.

    Notes
    -----
    Half of the products give an orthonormal basis Q of the dominant part of the range. The estimate uses the identity
    :math:`\|A\|_F^2 = \|Q^\top A\|_F^2 + \|(I - Q Q^\top) A\|_F^2`. The first term is computed exactly. The second term
    is estimated as in XTrace for :math:`A A^\top`. To avoid a bias, the estimate from each test vector uses a basis of
    the range that the other test vectors found, in place of Q.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 2.1; arXiv:2301.07825.

    Examples
    --------
    A rectangular matrix whose singular values decay:

    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from curvop import spectrum
    >>> rng = np.random.default_rng(0)
    >>> A = rng.normal(size=(300, 200)) / np.arange(1, 201)
    >>> estimate = spectrum.frobenius_norm(aslinearoperator(A), 40, rng=0)
    >>> bool(abs(estimate.value - np.linalg.norm(A)) < 4 * estimate.error)
    True
    """
    A = real_operator(A)
    count = _num_tests(A, num_products, square=False)
    if count >= min(A.shape):
        narrow = A if A.shape[1] <= A.shape[0] else A.H
        return Estimate(norm(_finite_product(narrow, np.eye(narrow.shape[1]))), 0.0)
    tests = random_generator(rng).standard_normal((A.shape[1], count))
    sketch = _Sketch(A, A.H, tests * (A.shape[1] ** 0.5 / np.linalg.norm(tests, axis=0)))
    exact = float(np.linalg.norm(sketch.image)) ** 2
    if sketch.covers_range:
        return sketch.estimate(exact**0.5, max(sketch.rounding, np.hypot(exact**0.5, sketch.dropped) - exact**0.5))
    squares = exact - ((sketch.image @ sketch.S) ** 2).sum(0) + sketch.residual_norms() ** 2
    root = float(squares.mean()) ** 0.5
    spread = float(squares.std(ddof=1)) / (2 * root) if count > 1 else float("nan")
    return sketch.estimate(root, np.maximum(spread, sketch.rounding))


class Estimate(NamedTuple):
    """Randomized estimate with its standard error: a named tuple ``(value, error)``.

    Attributes
    ----------
    value : float or ndarray
        The estimate.
    error : float or ndarray
        Standard error, with the same shape as ``value``. It is computed from the spread between the probes, and is NaN
        if there is only one probe.

    Notes
    -----
    In about 95% of runs, the distance between the true value and ``value`` is at most ``scipy.stats.t.ppf(0.975,
    num_probes - 1)`` times ``error``. If a few eigenvalues dominate and there are few probes, the error is too small in
    about one of ten runs. An error that is the same for all probes is not included. The only exception is the
    quadrature error, which `SpectralDensity` estimates.

    Examples
    --------
    >>> from curvop.spectrum import Estimate
    >>> estimate = Estimate(1234.5678, 0.0123)
    >>> print(estimate)
    1234.57 +- 0.012
    >>> value, error = estimate
    """

    value: Any
    error: Any

    def __str__(self) -> str:
        return f"{self.value:.6g} +- {self.error:.2g}" if np.ndim(self.value) == 0 else repr(self)


class BoundedEstimate(Estimate):
    """Randomized estimate with bounds for its quadrature error. As a tuple, it holds only ``value`` and ``error``.

    Attributes
    ----------
    value : float or ndarray
        The estimate.
    error : float or ndarray
        Combined error of the probes and the quadrature, ``sqrt(s**2 + ((high - low) / 4)**2)`` with the standard error
        s. The distance from ``value`` to each bound is therefore at most twice ``error``.
    low, high : float or ndarray
        Bounds of the quadrature, averaged over the probes. The bounds do not account for the spread between the probes.

    Examples
    --------
    >>> import numpy as np
    >>> from curvop.spectrum import density
    >>> share = density(np.diag(np.linspace(0, 1, 300)), num_steps=10, progress=False).cdf(0.5)
    >>> value, error = share
    >>> bool(share.low < value < share.high)
    True
    """

    low: Any
    high: Any

    def __new__(cls, value: Any, error: Any, low: Any, high: Any) -> Self:
        """Create an estimate with bounds."""
        self = super().__new__(cls, value, error)
        self.low, self.high = low, high
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self.value, self.error, self.low, self.high

    def __repr__(self) -> str:
        names = ("value", "error", "low", "high")
        return f"BoundedEstimate({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class _Sketch:
    r"""The two block products that an estimator needs, and the quantities derived from them.

    The first product is :math:`A \Omega`, where the columns of :math:`\Omega` are test vectors. The second product is
    the adjoint of `A` times an orthonormal basis of the range of the first product.

    If :math:`Q R = A \Omega` is a QR decomposition, the projector onto the range of all columns of :math:`A \Omega`
    except the i-th is :math:`Q (I - s_i s_i^\top) Q^\top`, where :math:`s_i` is the i-th column of :math:`R^{-\top}`,
    normalized (Epperly, Tropp, Webber, 2024, section 3.1 and supplement). With this projector, an estimator can combine
    each test vector with the range found by the other test vectors.

    Attributes
    ----------
    unit : int
        Exponent of a power of two. All products are divided by this power, so that their squares neither underflow nor
        overflow.
    Q, image : ndarray, shape (M, r), (N, r)
        ``Q`` is an orthonormal basis of the range of the first product. ``image`` is the second product.
    rounding : float
        Estimated norm of the rounding error in a product.
    dropped : float
        Norm of the part of the first product outside of the range of Q. This norm is of the order of rounding errors.
    covers_range : bool
        True if the range of `A` equals that of Q, up to rounding. The following attributes only exist if
        ``covers_range`` is False.
    tests, products, S : ndarray, shape (N, r), (M, r), (r, r)
        Test vectors, their products with `A`, and the matrix of the columns :math:`s_i`.
    """

    def __init__(self, A: LinearOperator, adjoint: LinearOperator, tests: Array) -> None:
        products = _finite_product(A, tests)
        self.unit = binary_exponent(products)
        products = np.ldexp(products, -self.unit)
        # Pivoting handles equal columns: if A has only a few nonzero rows, many vectors of signs have equal products.
        self.Q, R, order = qr(products, mode="economic", pivoting=True, check_finite=False)
        weights = np.abs(np.diag(R))
        largest = float(weights.max(initial=0.0))
        kept = weights > _EPS * max(products.shape) * largest
        self.rounding = float(np.finfo(np.float32).eps if A.dtype == np.float32 else _EPS) * largest
        self.dropped = float(weights[~kept].max(initial=0.0))
        self.covers_range = not kept.all()
        if self.covers_range:
            self.Q = self.Q[:, kept]
        image = _finite_product(adjoint, self.Q) if self.Q.size else np.zeros((A.shape[1], 0))
        self.image = np.ldexp(image, -self.unit)
        if not self.covers_range:
            self.tests, self.products, self._R = tests[:, order], products[:, order], R
            S = solve_triangular(R, np.eye(len(R)), lower=False).T
            self.S = S / np.linalg.norm(S, axis=0)

    def estimate(self, value: Any, error: Any) -> Estimate:
        """Create an estimate from a scaled value and a scaled error, by undoing the scaling by the power of two."""
        return Estimate(np.ldexp(value, self.unit)[()], np.ldexp(error, self.unit)[()])

    def residual_norms(self) -> Array:
        """Project the range of the other products out of each product. Return the norms ``(r,)`` of the results."""
        norms: Array = np.abs(np.einsum("ij,ij->j", self.S, self._R))
        return norms

    def projected_tests(self) -> tuple[Array, Array]:
        """Project the range of the other products out of each test vector.

        Return the projected vectors, shape (N, r), and the products of `A` with them, shape (M, r).
        """
        inner = self.Q.T @ self.tests
        coefficients = self.S * np.einsum("ij,ij->j", self.S, inner) - inner
        return self.tests + self.Q @ coefficients, self.products + self.image @ coefficients


def _num_tests(A: LinearOperator, num_products: int, square: bool = True) -> int:
    """Check `num_products`, and return the number of test vectors, which is half of `num_products`."""
    if square and A.shape[0] != A.shape[1]:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    return integer("num_products", num_products, 2) // 2


def _finite_product(A: LinearOperator, X: Array) -> Array:
    product = np.asarray(A @ X, dtype=np.float64)
    if not np.isfinite(product).all():
        raise ValueError("a product with A is not finite")
    return product


def _row_dots(left: Array, right: Array) -> Array:
    dots: Array = np.einsum("ij,ij->i", left, right)
    return dots


def sample_mean(values: Any) -> Estimate:
    """Return the mean of independent estimates along the first axis, with the standard error of the mean."""
    values = np.asarray(values, dtype=np.float64)
    count, value = len(values), values.mean(0)
    if count == 1:
        return Estimate(value[()], np.full(value.shape, np.nan)[()])
    spread = column_norms((values - value).reshape(count, -1)).reshape(value.shape)
    return Estimate(value[()], (spread / (count * (count - 1)) ** 0.5)[()])


def bounded_mean(
    values: Array, low: Array, high: Array, known: Any, rounding: Any, half_width: Any = 0.0
) -> BoundedEstimate:
    """Average values and bounds over the probes, and add a contribution that does not depend on the probes.

    Parameters
    ----------
    values, low, high : ndarray, shape (K, ...)
        Value of each probe, and bounds for this value.
    known : ndarray, shape (...)
        Contribution that does not depend on the probes.
    rounding : ndarray, shape (...)
        Lower limit for the reported error.
    half_width : ndarray, shape (...)
        Distance from `known` to the bounds for `known`.
    """
    if not len(values):
        value, spread = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
        low, high = value - half_width, value + half_width
    else:
        value, spread = sample_mean(values)
        low, high = low.mean(0) - half_width, high.mean(0) + half_width
    error = np.maximum(np.hypot(spread, (high - low) / 4), rounding)
    return BoundedEstimate((value + known)[()], error[()], (low + known)[()], (high + known)[()])
