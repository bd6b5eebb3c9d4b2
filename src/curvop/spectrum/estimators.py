"""Estimate traces, diagonals and Frobenius norms from products with random vectors, with error bars.

`trace` and `diagonal` implement XTrace and XDiag (Epperly, Tropp, Webber, 2024). `frobenius_norm` applies the same idea
to the Frobenius norm. With fewer than 6 products, all three functions average independent samples (Hutchinson, 1990).
Their results are of class `Estimate`. The methods of `SpectralDensity` return the subclass `BoundedEstimate`.

All vectors are float64 tensors on the device of the operator. Only the test vectors are drawn on the host, so that a
seed gives the same vectors on every device.

References
----------
Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J. Matrix
Anal. Appl. 45(1); arXiv:2301.07825. Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for
Laplacian smoothing splines", Commun. Stat. Simul. Comput. 19(2). Bekas, Kokiopoulou, Saad (2007), "An estimator for the
diagonal of a matrix", Appl. Numer. Math. 57(11).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from torch import Tensor
from tqdm import tqdm

from curvop.operators.keywords import named_keywords
from curvop.operators.progress import step_bar
from curvop.operators.summaries import with_error
from curvop.operators.validation import integer, random_generator, real_operator
from curvop.spectrum.lanczos import device_of, multiply, product_precision
from curvop.spectrum.norms import column_norms, row_norms, tensor_norm

__all__ = [
    "BoundedEstimate",
    "Estimate",
    "bounded_mean",
    "diagonal",
    "estimate_diagonal",
    "frobenius_norm",
    "sample_mean",
    "trace",
]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)
_NUM_PRODUCTS = 60  # default of the argument num_products

# Smallest number of products for which XTrace, XDiag, and their variant for norms are used. The table shows the ratio
# of the root mean square errors of XTrace and Hutchinson for 2 to 10 products and 300 eigenvalues (400 runs):
#
#     eigenvalues                    2     3     4     5     6     7     8    10
#     between 0 and 1, even       1.43  1.81  1.50  1.69  1.46  1.57  1.43  1.54
#     1/sqrt(k)                   1.40  1.62  1.40  1.74  1.41  1.54  1.42  1.42
#     0.9^k                       1.39  1.78  1.38  1.56  1.45  1.60  1.35  1.35
#     10 outliers, even bulk      1.45  1.69  1.34  1.48  1.29  1.38  1.21  1.12
#     1/k                         1.28  1.57  1.12  1.27  0.94  1.10  0.89  0.82
#     2^-k                        1.33  1.60  1.06  1.16  0.58  0.67  0.39  0.20
#     1/k^2                       1.28  1.56  0.72  0.82  0.33  0.35  0.20  0.14
#
# The geometric mean of the ratios in a column falls below 1 at 6 products. With 6 or more products, XTrace loses a
# factor of at most 1.6, but gains a factor of 3 or more if the eigenvalues decay quickly. The ratios for `diagonal` and
# `frobenius_norm` are similar.
_FEWEST = 6

# Factor by which XTrace and XDiag multiply the standard error of the mean over the test vectors. The estimates from
# different test vectors use nearly the same range. They are therefore correlated, and their spread is too small. For
# example, the contribution of a pair of vectors occurs in two estimates, which gives a factor of sqrt(2). For the
# spectra above and 6 to 40 products, the true factor is between 0.96 and 1.6 (300 runs). A jackknife allows for the
# correlations, but its errors are 2 to 7 times too large if the eigenvalues decay.
_CORRELATION = 1.5


@named_keywords
def trace(
    A: LinearOperator,
    num_products: int = _NUM_PRODUCTS,
    rng: int | np.random.Generator | None = None,
    *,
    num_probes: int | None = None,
    progress: bool = True,
) -> Estimate:
    r"""Estimate the trace of a symmetric operator by XTrace.

    Use `trace` if the eigenvalues decay. In this case, the error of `trace` decreases much faster with the number of
    products than the error of `SpectralDensity.trace`. If the spectrum is flat, or if you need other functions of the
    matrix as well, use `density`.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator.
    num_products : int, optional
        Number of products, at least 2. With 6 or more products, an odd number is rounded down to an even number. The
        estimate needs memory for about 4 N num_products numbers on the device of the operator. With N or more products,
        the whole matrix is formed and its trace is exact up to rounding.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the test vectors, which are uniform on the sphere. The same seed gives the same vectors on
        every device.
    num_probes : int, optional
        Number of test vectors, in place of `num_products`. Each test vector takes two products, so that this is the
        same as ``num_products = 2 * num_probes``.
    progress : bool, optional
        Whether to show a progress bar that counts the products.

    Returns
    -------
    Estimate
        Unbiased estimate with its standard error. Its attribute ``method`` is 'hutchinson' with fewer than 6 products,
        'dense' with N or more products, and 'xtrace' otherwise. The error includes rounding errors of the products,
        which hide eigenvalues that are about 1e16 times smaller than the largest.

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
    and a QR decomposition. All computations are in float64 on the device of the operator.

    The estimates from different test vectors use nearly the same range. They are therefore correlated, and the standard
    error of their mean is too small by up to a third if the eigenvalues decay. ``error`` is 1.5 times this standard
    error. In tests with 7 spectra and 6 to 48 products, the distance to the true trace was at most
    ``scipy.stats.t.ppf(0.975, num_products // 2 - 1)`` times ``error`` in 88% to 100% of 200 runs.

    With fewer than 6 products, too few vectors are left to find the range. In this case, the estimate is the mean of
    :math:`x^\top A x` over ``num_products`` test vectors x (Hutchinson, 1990). Its error is the standard error of the
    mean.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 2.1; arXiv:2301.07825. Hutchinson (1990), "A stochastic estimator of the trace of
    the influence matrix for Laplacian smoothing splines", Commun. Stat. Simul. Comput. 19(2).

    Examples
    --------
    Estimate the trace of a matrix with 500 rows, whose eigenvalues decay as 1 / k^2, from 100 products:

    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from curvop import spectrum
    >>> Q = np.linalg.qr(np.random.default_rng(0).normal(size=(500, 500)))[0]
    >>> values = 1 / np.arange(1, 501) ** 2
    >>> estimate = spectrum.trace(aslinearoperator((Q * values) @ Q.T), 100, rng=0, progress=False)
    >>> bool(abs(float(estimate) - values.sum()) < 4 * estimate.error)
    True
    >>> bool(estimate.error < 0.01 * values.sum()), estimate.method
    (True, 'xtrace')
    """
    A = real_operator(A)
    num_products = _budget(num_products, num_probes)
    size = _checked_size(A, num_products)
    with step_bar("trace", progress, min(num_products, size)) as bar:
        return _finished(_trace(A, size, num_products, rng, bar), bar)


def _trace(
    A: LinearOperator, size: int, num_products: int, rng: int | np.random.Generator | None, bar: tqdm[Any]
) -> Estimate:
    if num_products >= size:
        entries = _dense(A, bar).diagonal()
        return Estimate(entries.sum(), product_precision(A) * entries.abs().sum(), "dense")
    if num_products < _FEWEST:
        probes = _Probes(A, _on_sphere(rng, size, num_products), bar)
        return probes.mean((probes.tests * probes.products).sum(0))
    sketch = _Sketch(A, A, _on_sphere(rng, size, num_products // 2), "xtrace", bar)
    core = sketch.Q.T @ sketch.image
    if sketch.covers_range:
        # `dropped` bounds the norm of the neglected part of a product with a test vector. Among all matrices with this
        # bound, a multiple of the identity has the largest trace, which is sqrt(N) times the bound.
        return sketch.estimate(core.trace(), core.new_tensor(size**0.5 * sketch.dropped))
    projected, image = sketch.projected_tests()
    # A projected test vector has a uniform direction in a space of dimension N - count + 1, the complement of the range
    # of the other vectors.
    scales = (size - num_products // 2 + 1) / (projected**2).sum(0)
    exact = core.trace() - (sketch.S * (core @ sketch.S)).sum(0)
    return sketch.mean(exact + scales * (projected * image).sum(0))


@named_keywords
def diagonal(
    A: LinearOperator,
    num_products: int = _NUM_PRODUCTS,
    rng: int | np.random.Generator | None = None,
    *,
    num_probes: int | None = None,
    progress: bool = True,
) -> Estimate:
    """Estimate the diagonal of a symmetric operator by XDiag.

    Use `diagonal` if the eigenvalues decay. For the Gauss-Newton and Fisher operators of this package, use the method
    ``diagonal`` of the operator instead, which is exact.

    Parameters
    ----------
    A : LinearOperator, shape (N, N)
        Real symmetric operator.
    num_products : int, optional
        Number of products, at least 2. With 6 or more products, an odd number is rounded down to an even number. The
        estimate needs memory for about 4 N num_products numbers on the device of the operator. With 6 or more products,
        the estimate is exact up to rounding if ``num_products / 2`` exceeds the rank of `A` by a few. With N or more
        products, the whole matrix is formed and its diagonal is exact up to rounding.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the test vectors, which are random signs. The same seed gives the same vectors on every
        device.
    num_probes : int, optional
        Number of test vectors, in place of `num_products`. Each test vector takes two products, so that this is the
        same as ``num_products = 2 * num_probes``.
    progress : bool, optional
        Whether to show a progress bar that counts the products.

    Returns
    -------
    Estimate
        Estimate of the diagonal. ``value`` and ``error`` are arrays ``(N,)``: the estimated entries and their standard
        errors. The attribute ``method`` is 'hutchinson' with fewer than 6 products, 'dense' with N or more products,
        and 'xdiag' otherwise. The error includes rounding errors of the products.

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
    two blocks, and a QR decomposition. All computations are in float64 on the device of the operator. As in `trace`,
    the error is 1.5 times the standard error of the mean, because the estimates are correlated.

    With fewer than 6 products, the estimate is the mean of the entrywise products of x and ``A x`` over
    ``num_products`` test vectors x (Bekas, Kokiopoulou, Saad, 2007). Its error is the standard error of the mean.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 3.1 and supplement; arXiv:2301.07825. Bekas, Kokiopoulou, Saad (2007), "An
    estimator for the diagonal of a matrix", Appl. Numer. Math. 57(11).

    Examples
    --------
    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from curvop import spectrum
    >>> Q = np.linalg.qr(np.random.default_rng(0).normal(size=(300, 300)))[0]
    >>> A = (Q / np.arange(1, 301) ** 2) @ Q.T
    >>> estimate = spectrum.diagonal(aslinearoperator(A), 100, rng=0, progress=False)
    >>> bool(np.linalg.norm(estimate.value - np.diag(A)) < 0.05 * np.linalg.norm(np.diag(A)))
    True
    """
    A = real_operator(A)
    num_products = _budget(num_products, num_probes)
    size = _checked_size(A, num_products)
    with step_bar("diagonal", progress, min(num_products, size)) as bar:
        return _finished(estimate_diagonal(A, num_products, rng, bar), bar)


def estimate_diagonal(
    A: LinearOperator, num_products: int, rng: int | np.random.Generator | None, bar: tqdm[Any] | None = None
) -> Estimate:
    """Estimate the diagonal as `diagonal` does, without a check of the arguments.

    ``value`` and ``error`` are float64 tensors on the device of `A`.
    """
    size = A.shape[0]
    if num_products >= size:
        matrix = _dense(A, bar)
        errors = torch.from_numpy(product_precision(A) * row_norms(matrix.T.contiguous())).to(matrix)
        return Estimate(matrix.diagonal().clone(), errors, "dense")
    generator, few = random_generator(rng), num_products < _FEWEST
    signs = generator.choice(np.array([-1.0, 1.0]), (size, num_products if few else num_products // 2))
    if few:
        probes = _Probes(A, signs, bar)
        return probes.mean(probes.tests * probes.products)
    sketch = _Sketch(A, A, signs, "xdiag", bar)
    exact = (sketch.Q * sketch.image).sum(1)
    if sketch.covers_range:
        return sketch.estimate(exact, torch.full_like(exact, sketch.dropped))
    # Let P be the projection onto the range that the other test vectors found. Each test vector estimates the diagonal
    # of (I - P) A. The part (I - P) A P is estimated as well, although it could be computed exactly.
    QS, coefficients = sketch.Q @ sketch.S, sketch.image.T @ sketch.tests
    residuals = sketch.products - sketch.Q @ coefficients + QS * (sketch.S * coefficients).sum(0)
    return sketch.mean(exact[:, None] + sketch.tests * residuals - QS * (sketch.image @ sketch.S))


@named_keywords
def frobenius_norm(
    A: LinearOperator,
    num_products: int = _NUM_PRODUCTS,
    rng: int | np.random.Generator | None = None,
    *,
    num_probes: int | None = None,
    progress: bool = True,
) -> Estimate:
    r"""Estimate the Frobenius norm of an operator of any shape.

    Use `frobenius_norm` if the singular values decay. For a symmetric operator with a flat spectrum, use the method
    ``moment`` of a `density` instead: ``moment(2)`` estimates the squared norm divided by N.

    Parameters
    ----------
    A : LinearOperator, shape (M, N)
        Real operator with an adjoint (``rmatvec`` or ``rmatmat``).
    num_products : int, optional
        Number of products, at least 2. With 6 or more products, half of them are products with the adjoint, and an odd
        number is rounded down to an even number. With 2 min(M, N) or more products, the norm is exact up to
        rounding.
    rng : int or numpy.random.Generator, optional
        Seed or generator of the test vectors, which are uniform on the sphere. The same seed gives the same vectors on
        every device.
    num_probes : int, optional
        Number of test vectors, in place of `num_products`. Each test vector takes two products, so that this is the
        same as ``num_products = 2 * num_probes``.
    progress : bool, optional
        Whether to show a progress bar that counts the products.

    Returns
    -------
    Estimate
        Estimate of the norm; its square is an unbiased estimate of the squared norm. The attribute ``method`` is
        'hutchinson' with fewer than 6 products, 'dense' with 2 min(M, N) or more products, and 'xtrace' otherwise. For
        'xtrace', the error is the standard deviation of the estimates from single test vectors. The standard error of
        the mean would be too small if the singular values decay, because the estimates use nearly the same range and
        are correlated.

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
    the range that the other test vectors found, in place of Q. All computations are in float64 on the device of the
    operator.

    With fewer than 6 products, the squared norm is the mean of :math:`\|A x\|^2` over ``num_products`` test vectors x
    (Hutchinson, 1990). No product with the adjoint is needed. The error is the standard error of the mean.

    References
    ----------
    Epperly, Tropp, Webber (2024), "XTrace: making the most of every sample in stochastic trace estimation", SIAM J.
    Matrix Anal. Appl. 45(1), section 2.1; arXiv:2301.07825.

    Examples
    --------
    Estimate the norm of a rectangular matrix whose singular values decay:

    >>> import numpy as np
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> from curvop import spectrum
    >>> rng = np.random.default_rng(0)
    >>> A = rng.normal(size=(300, 200)) / np.arange(1, 201)
    >>> estimate = spectrum.frobenius_norm(aslinearoperator(A), 40, rng=0, progress=False)
    >>> bool(abs(estimate.value - np.linalg.norm(A)) < 4 * estimate.error)
    True
    """
    A = real_operator(A)
    num_products = _budget(num_products, num_probes)
    _checked_size(A, num_products, square=False)
    total = min(A.shape) if num_products // 2 >= min(A.shape) else num_products
    with step_bar("Frobenius norm", progress, total) as bar:
        return _finished(_frobenius_norm(A, num_products, rng, bar), bar)


def _frobenius_norm(
    A: LinearOperator, num_products: int, rng: int | np.random.Generator | None, bar: tqdm[Any]
) -> Estimate:
    if num_products // 2 >= min(A.shape):
        narrow = A if A.shape[1] <= A.shape[0] else A.H
        norm = torch.tensor(tensor_norm(_dense(narrow, bar).reshape(-1)), dtype=torch.float64)
        return Estimate(norm, product_precision(A) * norm, "dense")
    if num_products < _FEWEST:
        probes = _Probes(A, _on_sphere(rng, A.shape[1], num_products), bar)
        return probes.root((probes.products**2).sum(0), independent=True)
    sketch = _Sketch(A, A.H, _on_sphere(rng, A.shape[1], num_products // 2), "xtrace", bar)
    exact = (sketch.image**2).sum()
    if sketch.covers_range:
        root = exact.sqrt()
        return sketch.estimate(root, torch.hypot(root, root.new_tensor(sketch.dropped)) - root)
    squares = exact - ((sketch.image @ sketch.S) ** 2).sum(0) + sketch.residual_norms() ** 2
    return sketch.root(squares, independent=False)


class _Pair(NamedTuple):
    value: Any
    error: Any


class Estimate(_Pair):
    """Randomized estimate with its standard error: a named tuple ``(value, error)``.

    ``float(estimate)`` is the value.

    Parameters
    ----------
    value, error : float or ndarray
        Attributes of the same names.
    method : str, optional
        Attribute of the same name.

    Attributes
    ----------
    value : float or ndarray
        The estimate.
    error : float or ndarray
        Standard error, with the same shape as ``value``. It is computed from the spread between the probes, and is NaN
        if there is only one probe.
    method : str or None
        Method that `trace`, `diagonal` or `frobenius_norm` used: 'hutchinson', 'xtrace', 'xdiag', or 'dense' if the
        whole matrix was formed. It is None for all other estimates. It is not a field of the tuple.

    Notes
    -----
    In about 95% of runs, the distance between the true value and ``value`` is at most ``scipy.stats.t.ppf(0.975,
    num_probes - 1)`` times ``error``. If a few eigenvalues dominate and there are few probes, the error is too small in
    about one of ten runs. An error that is the same for all probes is not included in ``error``. The only exception is
    the quadrature error, which `SpectralDensity` estimates.

    Examples
    --------
    >>> from curvop.spectrum import Estimate
    >>> estimate = Estimate(1234.5678, 0.0123)
    >>> print(estimate)
    1234.568 +- 0.012
    >>> value, error = estimate
    >>> float(estimate)
    1234.5678
    """

    method: str | None = None

    def __new__(cls, value: Any, error: Any, method: str | None = None) -> Self:
        """Create an estimate."""
        self = super().__new__(cls, value, error)
        if method is not None:
            self.method = method
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __float__(self) -> float:
        """Return the value. Raise a ``TypeError`` if it is an array with several entries."""
        if np.size(self.value) != 1:
            raise TypeError(f"the estimate is an array of shape {np.shape(self.value)}: use its attribute value")
        return float(np.asarray(self.value).item())

    def __repr__(self) -> str:
        return self._with_fields("value", "error")

    def _with_fields(self, *names: str) -> str:
        values = {name: getattr(self, name) for name in names}
        values |= {name: value.item() for name, value in values.items() if isinstance(value, np.generic)}
        with np.printoptions(threshold=20, edgeitems=3):  # the arrays may have one entry for each parameter
            return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def __str__(self) -> str:
        if np.ndim(self.value):
            return repr(self)
        return with_error(self.value, self.error, 10) if self.error else f"{self.value:.6g} +- 0"


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
        return self._with_fields("value", "error", "low", "high")


class _Probes:
    """Test vectors and their products with `A`, as float64 tensors on the device of `A`.

    Attributes
    ----------
    method : str
        Value of the attribute ``method`` of the estimates.
    unit : int
        Exponent of a power of two. All products are divided by this power, so that their squares neither underflow nor
        overflow.
    rounding : float
        Estimated norm of the rounding error in a product.
    tests, products : Tensor, shape (N, r), (M, r)
        Test vectors and their products.
    """

    method = "hutchinson"
    correlation = 1.0  # factor by which the standard errors are multiplied

    def __init__(self, A: LinearOperator, tests: Array, bar: tqdm[Any] | None) -> None:
        self.tests = torch.from_numpy(tests).to(device_of(A))
        products = _finite_product(A, self.tests, bar)
        self.unit = math.frexp(float(products.abs().max()))[1] if products.numel() else 0
        self.products = _times_power_of_two(products, -self.unit)
        largest = float(torch.linalg.vector_norm(self.products, dim=0).max())
        self.rounding = product_precision(A) * largest

    def mean(self, samples: Tensor) -> Estimate:
        """Return the mean of scaled samples ``(..., r)``, one sample for each test vector, with its error."""
        errors = samples.std(-1) / samples.shape[-1] ** 0.5
        return self.estimate(samples.mean(-1), self.correlation * errors)

    def root(self, squares: Tensor, independent: bool) -> Estimate:
        """Return the square root of the mean of scaled samples ``(r,)``.

        The error of the root is computed from the standard error of the mean if the samples are independent, and from
        their standard deviation otherwise.
        """
        root = squares.mean().sqrt()
        spread = squares.std() / len(squares) ** 0.5 if independent else squares.std()
        return self.estimate(root, torch.where(root > 0, spread / (2 * root), 0.0))

    def estimate(self, value: Tensor, error: Tensor) -> Estimate:
        """Create an estimate of tensors from a scaled value and a scaled error, multiplied by the power of two."""
        value, error = (_times_power_of_two(part, self.unit) for part in (value, error.clamp(min=self.rounding)))
        return Estimate(value, error, self.method)


class _Sketch(_Probes):
    r"""The two block products that an estimator needs, and the matrices derived from these products.

    The first product is :math:`A \Omega`, where the columns of :math:`\Omega` are test vectors. The second product is
    the adjoint of `A` times an orthonormal basis of the range of the first product.

    If :math:`Q R = A \Omega` is a QR decomposition, the projector onto the range of all columns of :math:`A \Omega`
    except the i-th is :math:`Q (I - s_i s_i^\top) Q^\top`, where :math:`s_i` is the i-th column of :math:`R^{-\top}`,
    normalized (Epperly, Tropp, Webber, 2024, section 3.1 and supplement). With this projector, an estimator can combine
    each test vector with the range found by the other test vectors.

    Attributes
    ----------
    Q, image : Tensor, shape (M, r), (N, r)
        ``Q`` is an orthonormal basis of the range of the first product. ``image`` is the second product.
    dropped : float
        Largest distance of a column of the first product from the range of Q. It is of the order of rounding errors.
    covers_range : bool
        True if the range of `A` equals that of Q, up to rounding. In this case, Q has fewer columns than there are test
        vectors.
    S : Tensor, shape (r, r)
        Matrix of the columns :math:`s_i`. It only exists if ``covers_range`` is False.
    """

    correlation = _CORRELATION

    def __init__(
        self, A: LinearOperator, adjoint: LinearOperator, tests: Array, method: str, bar: tqdm[Any] | None
    ) -> None:
        super().__init__(A, tests, bar)
        self.method = method
        self.Q, self._R = torch.linalg.qr(self.products)
        # The singular values of R show the rank: if A has only a few nonzero rows, many vectors of signs have equal
        # products.
        U, sizes, Vh = torch.linalg.svd(self._R)
        kept = sizes > _EPS * max(self.products.shape) * sizes[0]
        self.covers_range = not bool(kept.all())
        self.dropped = 0.0
        if self.covers_range:
            self.Q = self.Q @ U[:, kept]
            self.dropped = float(torch.linalg.vector_norm(sizes[~kept, None] * Vh[~kept], dim=0).max())
        image = _finite_product(adjoint, self.Q, bar) if self.Q.numel() else self.tests.new_zeros(A.shape[1], 0)
        self.image = _times_power_of_two(image, -self.unit)
        if not self.covers_range:
            S = torch.linalg.solve_triangular(self._R, torch.eye(len(sizes)).to(self._R), upper=True).T
            self.S = S / torch.linalg.vector_norm(S, dim=0)

    def residual_norms(self) -> Tensor:
        """Return the distance of each product from the span of the other products, as a tensor ``(r,)``."""
        norms: Tensor = (self.S * self._R).sum(0).abs()
        return norms

    def projected_tests(self) -> tuple[Tensor, Tensor]:
        """Project each test vector onto the orthogonal complement of the range that the other test vectors found.

        Return the projected vectors, shape (N, r), and the products of `A` with them, shape (M, r).
        """
        inner = self.Q.T @ self.tests
        coefficients = self.S * (self.S * inner).sum(0) - inner
        return self.tests + self.Q @ coefficients, self.products + self.image @ coefficients


def _budget(num_products: int, num_probes: int | None) -> int:
    """Return the number of products, given the arguments for the number of products and of test vectors."""
    if num_probes is None:
        return num_products
    if num_products != _NUM_PRODUCTS:
        raise TypeError(f"num_products is {num_products} and num_probes is {num_probes}: pass only one")
    return 2 * integer("num_probes", num_probes, 1)


def _checked_size(A: LinearOperator, num_products: int, square: bool = True) -> int:
    """Check the arguments, and return the number of columns of `A`."""
    if square and A.shape[0] != A.shape[1]:
        raise ValueError(f"A has shape {A.shape}, but must be square")
    integer("num_products", num_products, 2)
    return int(A.shape[1])


def _on_sphere(rng: int | np.random.Generator | None, size: int, count: int) -> Array:
    """Draw vectors as the columns ``(size, count)`` of an array, uniformly from the sphere of radius sqrt(size)."""
    tests = random_generator(rng).standard_normal((size, count))
    return np.asarray(tests * (size**0.5 / np.linalg.norm(tests, axis=0)))


def _dense(A: LinearOperator, bar: tqdm[Any] | None) -> Tensor:
    """Form the matrix as a float64 tensor on the device of `A`."""
    return _finite_product(A, torch.eye(A.shape[1], dtype=torch.float64).to(device_of(A)), bar)


def _finite_product(A: LinearOperator, X: Tensor, bar: tqdm[Any] | None) -> Tensor:
    product: Tensor = multiply(A, X.T).T.double()
    if bar is not None:
        bar.update(X.shape[1])
    if not product.isfinite().all():
        raise ValueError("a product with A is not finite")
    return product


def _finished(estimate: Estimate, bar: tqdm[Any]) -> Estimate:
    """Convert an estimate of tensors to floats or arrays, and complete the progress bar."""
    bar.total = bar.n  # fewer products than expected if their number was odd, or if the rank of A is small
    value, error = (number.cpu().numpy()[()] for number in estimate)
    return Estimate(value, error, estimate.method)


def _times_power_of_two(tensor: Tensor, exponent: int) -> Tensor:
    """Multiply a tensor by a power of two without rounding, although the power itself may overflow."""
    half = exponent // 2
    return tensor * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


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
        Distance from `known` to its lower and upper bounds.
    """
    if not len(values):
        value, spread = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
        low, high = value - half_width, value + half_width
    else:
        value, spread = sample_mean(values)
        low, high = low.mean(0) - half_width, high.mean(0) + half_width
    error = np.maximum(np.hypot(spread, (high - low) / 4), rounding)
    return BoundedEstimate((value + known)[()], error[()], (low + known)[()], (high + known)[()])
