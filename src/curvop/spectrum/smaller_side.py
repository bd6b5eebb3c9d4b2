r"""Eigenpairs of :math:`A = S^\top S` from the smaller matrix :math:`S S^\top`.

The Gram matrix :math:`K = S S^\top` has the same non-zero eigenvalues as A, and is smaller than A if S has fewer rows
than columns. If :math:`K u = \theta u` and :math:`\theta > 0`, then :math:`v = S^\top u / \sqrt\theta` is an
eigenvector of A. There are two ways to use K:

- `solve_formed` forms S, computes all eigenvalues of K, and certifies the eigenpairs of A. The residuals of the
  eigenvectors are :math:`A v - \theta v = S^\top (K u - \theta u) / \sqrt\theta`. Their inner products can therefore be
  computed from K and vectors of length n. Two products with A itself measure the errors of S and of the eigenvectors.
  The trace of K shows that no eigenvalue is missing.
- `lifted` maps eigenpairs of K that were computed by an iterative method to eigenpairs of A.

Eigenvalues of K up to ``n * eps`` times the largest one may be rounding errors, and are treated as zero. If products
with K are computed in single precision, this limit is 10 times the machine epsilon of the products, relative to the
largest eigenvalue. The null space of A is the orthogonal complement of the eigenvectors with non-zero eigenvalues.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curvop.operators.engine_operator import UNTRUSTED
from curvop.operators.gram import GramLinearOperator, NotFactorableError
from curvop.spectrum.certificate import Certificate, certificate_from
from curvop.spectrum.counting import CountedOperator
from curvop.spectrum.missed_search import SearchResult
from curvop.spectrum.noise import Noise
from curvop.spectrum.norms import norm

__all__ = ["SIDES", "UNSUITABLE", "Formed", "fits", "lifted", "smaller_side", "solve_formed"]

Array = NDArray[Any]

SIDES = ("auto", "parameters", "examples")
"""The values of the argument `side` of `curvop.spectrum.eigsh`."""

UNSUITABLE = (NotFactorableError, *UNTRUSTED)
"""Exceptions after which ``side='auto'`` uses A itself: it may be indefinite, or its data may be shuffled."""

_EPS = float(np.finfo(np.float64).eps)
_ENDS = ("LA", "LM")  # values of `which` that select non-zero eigenvalues of S.T @ S
_MIN_PRODUCTS = 30  # assumed number of products of an iterative search for one eigenvalue
# A product with A takes at least 8 n P operations. The Gram matrix takes 2 n^2 P operations, as many as n / 4 products.
_ROWS_PER_PRODUCT = 8
_ORTHOGONAL = 1e-10  # if lifted vectors deviate more from orthonormality, orthogonalize them
_SAFE_EXPONENT = 100  # entries of S between 2**-100 and 2**100 are not scaled


def smaller_side(A: Any, side: Any, k: int, which: str, has_start: bool) -> GramLinearOperator | None:
    """Return the Gram matrix that replaces A in `curvop.spectrum.eigsh`, or None if A itself is used.

    Parameters
    ----------
    A : LinearOperator
    side : {'auto', 'parameters', 'examples'}
    k, which
        See `curvop.spectrum.eigsh`.
    has_start : bool
        Whether the user passed a starting vector, which is a vector of parameters.

    Raises
    ------
    ValueError
        If `side` is invalid, or if it is 'examples' and the Gram matrix does not have the requested eigenvalues.
    NotFactorableError
        If `side` is 'examples' and A has no Gram matrix.
    """
    if side not in SIDES:
        raise ValueError(f"side is {side!r}, but must be one of {', '.join(SIDES)}")
    automatic = side == "auto"
    if side == "parameters" or (automatic and (which not in _ENDS or has_start or not hasattr(A, "gram"))):
        return None
    if which not in _ENDS:
        raise ValueError(f"which is {which!r}, but side='examples' supports only 'LA' and 'LM': pass side='parameters'")
    if not hasattr(A, "gram"):
        raise NotFactorableError(
            f"A is a {type(A).__name__}, which has no Gram matrix: pass side='parameters', or a GGN, an empirical "
            "Fisher or a Fisher matrix"
        )
    try:
        gram: GramLinearOperator = A.gram()
    except UNSUITABLE:
        if automatic:
            return None
        raise
    outside = which == "LM" and gram.shift < 0  # the null space may then have the largest eigenvalues in magnitude
    if automatic:
        return None if outside or k > gram.shape[0] or gram.shape[0] >= A.shape[0] else gram
    if outside:
        raise ValueError("which is 'LM', but the damping is negative: pass which='LA', or side='parameters'")
    if k > gram.shape[0]:
        raise ValueError(
            f"k is {k}, but must be at most {gram.shape[0]}, the number of rows of the Gram matrix: pass "
            "side='parameters', or a smaller k"
        )
    return gram


def fits(gram: GramLinearOperator, k: int, available: int) -> bool:
    """Return True if the factor fits into `available` bytes, and forming it is faster than an iterative method."""
    rows, cols = gram.factor.shape
    copies = 8 if gram.epsilon <= _EPS else 12  # single precision is converted to double precision
    needed = copies * rows * cols + 8 * (3 * k * cols + 4 * rows**2)
    return bool(needed <= available and rows <= _ROWS_PER_PRODUCT * max(2 * k + 1, _MIN_PRODUCTS))


def lifted(
    gram: GramLinearOperator, values: Array, vectors: Array, rng: np.random.Generator
) -> tuple[Array, Array, int]:
    """Map eigenpairs of the Gram matrix to eigenpairs of A.

    Parameters
    ----------
    gram : GramLinearOperator
        The Gram matrix without a shift. A large shift would hide the difference between zero and small eigenvalues.
    values, vectors : ndarray, shape (k,) and (n, k)
        Eigenpairs of the Gram matrix.
    rng : numpy.random.Generator
        The generator for vectors of the null space of A.

    Returns
    -------
    values, vectors : ndarray, shape (k,) and (P, k)
    products : int
        The number of products with the factor.
    """
    nonzero = values > max(gram.shape[0] * _EPS, 10 * gram.epsilon) * max(values.max(initial=0.0), 0.0)
    V: Array = gram.lift(vectors[:, nonzero])
    values, products = values[nonzero], int(nonzero.sum())
    if products and np.abs(V.T @ V - np.eye(products)).max() > _ORTHOGONAL:
        # Rounding errors are relative to the largest eigenvalue. Compute the eigenpairs again in the span of V.
        Q = np.linalg.qr(V)[0]
        _, sigma, W = np.linalg.svd(gram.factor @ Q, full_matrices=False)
        V, values, products = Q @ W.T, sigma**2, 2 * products
    null = _null_vectors(torch.from_numpy(V), int((~nonzero).sum()), rng)
    return np.append(values, np.zeros(null.shape[1])), np.hstack([V, null.numpy()]), products


@dataclasses.dataclass(frozen=True, eq=False)
class Formed:
    """The result of `solve_formed`.

    Attributes
    ----------
    values, vectors : ndarray, shape (k,) and (P, k)
        The largest eigenvalues in descending order, and their eigenvectors.
    certificate : Certificate or None
        The certificate, or None if no certificate was requested.
    rank : int
        The number of non-zero eigenvalues of ``S.T @ S``.
    """

    values: Array
    vectors: Array
    certificate: Certificate | None
    rank: int


def solve_formed(
    A: CountedOperator,
    gram: GramLinearOperator,
    k: int,
    which: str | None,
    tol: float,
    rng: np.random.Generator,
    memory: int,
) -> Formed:
    """Form the factor S, and compute the k largest eigenvalues of ``A = S.T @ S + shift * I``.

    Parameters
    ----------
    A : CountedOperator, shape (P, P)
        The operator. Two products with it verify the result.
    gram : GramLinearOperator, shape (n, n)
        The Gram matrix of A.
    k : int
        The number of eigenvalues, at most n.
    which : str or None
        The eigenvalues that the certificate is about, as in `curvop.spectrum.eigsh`, or None to compute no certificate.
    tol : float
        The tolerance of the certificate.
    rng : numpy.random.Generator
    memory : int
        The number of bytes that may be used.
    """
    S = gram.formed_factor(memory).double()
    halved = _exponent(S)
    for part in (halved // 2, halved - halved // 2):
        if part:
            S.mul_(2.0**-part)
    spectrum = _Spectrum(S, k, rng)
    exponent = 2 * halved
    shift = math.ldexp(gram.shift, -exponent)
    values = np.append(spectrum.values, np.zeros(k - spectrum.kept)) + shift
    certificate = None
    if which is not None:
        noise = _noise(A, spectrum, values, exponent, shift, rng)

        def remaining(ends: tuple[float, float], tolerance: float) -> SearchResult:
            low, high, deficit = spectrum.low + shift, spectrum.high + shift, spectrum.deficit
            return SearchResult(low, high, low - deficit, high + deficit)

        quotients = values  # Rayleigh quotients equal the eigenvalues up to rounding errors
        certificate = certificate_from(
            values,
            spectrum.vector_gram,
            spectrum.residual_gram,
            quotients,
            noise,
            remaining,
            exponent=exponent,
            size=A.shape[0],
            which=which,
            tol=tol,
        )
    return Formed(np.ldexp(values, exponent), spectrum.vectors.cpu().numpy(), certificate, spectrum.rank)


class _Spectrum:
    """The k largest eigenvalues of ``S.T @ S``, for a matrix S of shape ``(n, P)`` in double precision.

    Attributes
    ----------
    values : ndarray, shape (kept,)
        The non-zero eigenvalues among the k largest, in descending order.
    vectors : Tensor, shape (P, k)
        The eigenvectors, followed by vectors of the null space if there are fewer than k non-zero eigenvalues.
    vector_gram, residual_gram : ndarray, shape (k, k)
        ``V.T @ V`` and ``R.T @ R`` for the vectors V and their residuals ``R = S.T @ S @ V - V * values``.
    low, high : float
        The smallest and the largest of all other eigenvalues.
    deficit : float
        The absolute difference between the trace of ``S @ S.T`` and the sum of its computed eigenvalues, plus the limit
        up to which eigenvalues are treated as zero.
    rank : int
        The number of non-zero eigenvalues.
    """

    def __init__(self, S: Tensor, k: int, rng: np.random.Generator) -> None:
        self.S, self._rng = S, rng
        K = _gram(S)
        theta, U = torch.linalg.eigh(K)
        theta, U = theta.flip(0), U.flip(1)
        own = theta.cpu().numpy()
        limit = len(own) * _EPS * max(float(own.max(initial=0.0)), 0.0)
        self.rank = int((own > limit).sum())
        self.kept = min(k, self.rank)
        self.low = 0.0 if self.rank < S.shape[1] else float(own[self.rank - 1])
        self.high = float(own[k]) if k < self.rank else 0.0
        self.deficit = abs(float(K.diagonal().sum()) - float(own.sum())) + limit
        self.values = own[: self.kept]
        self._residual_factors: tuple[Tensor, ...] = ()  # their product is the transpose of the residuals
        self._lift(K, theta[: self.kept], U[:, : self.kept])
        if self.kept < k:
            self._append_null_vectors(k - self.kept)

    def _lift(self, K: Tensor, theta: Tensor, U: Tensor) -> None:
        scaled = U / theta.sqrt()
        self.vectors = (scaled.T @ self.S).T  # faster than S.T @ scaled, which writes short rows
        self.vector_gram = _array(scaled.T @ (K @ scaled))
        coefficients = K @ scaled - scaled * theta  # the residuals are S.T @ coefficients
        self.residual_gram = _array(coefficients.T @ (K @ coefficients))
        self._residual_factors = coefficients.T, self.S
        if self.kept and np.abs(self.vector_gram - np.eye(self.kept)).max() > _ORTHOGONAL:
            self._orthogonalize()

    def _orthogonalize(self) -> None:
        """Compute the eigenpairs again in the span of the vectors.

        The rounding errors of the lifted vectors are proportional to the largest singular value of S. They are
        therefore large compared with small singular values. A QR decomposition and a singular value decomposition avoid
        these errors, because both are backward stable.
        """
        Q = torch.linalg.qr(self.vectors).Q
        _, sigma, W = torch.linalg.svd(self.S @ Q, full_matrices=False)
        self.vectors, self.values = Q @ W.T, _array(sigma) ** 2
        residuals = self.S.T @ (self.S @ self.vectors) - self.vectors * sigma**2
        self.vector_gram = _array(self.vectors.T @ self.vectors)
        self.residual_gram = _array(residuals.T @ residuals)
        self._residual_factors = (residuals.T,)

    def _append_null_vectors(self, count: int) -> None:
        null = _null_vectors(self.vectors, count, self._rng)
        residuals = crossed = self.S.T @ (self.S @ null)
        for factor in reversed(self._residual_factors):
            crossed = factor @ crossed
        self.vector_gram = _bordered(self.vector_gram, _array(self.vectors.T @ null), _array(null.T @ null))
        self.residual_gram = _bordered(self.residual_gram, _array(crossed), _array(residuals.T @ residuals))
        self.vectors = torch.cat([self.vectors, null], 1)


def _noise(
    A: CountedOperator, spectrum: _Spectrum, values: Array, exponent: int, shift: float, rng: np.random.Generator
) -> Noise:
    """Measure the errors of two products with A. The expected products are computed from the eigenpairs and the factor.

    The first product is with a combination ``V c`` of the k eigenvectors V, with random coefficients c of norm 1. On
    average, the norm of ``A V c - V diag(values) c`` is that of the residuals of all eigenvectors, divided by
    ``sqrt(k)``. The measured norm is therefore multiplied by ``sqrt(k)``. The second product is with a random vector,
    and verifies that ``S.T @ S`` (plus the shift) is A.
    """
    V, S, size, k = spectrum.vectors, spectrum.S, A.shape[0], len(values)
    weights = torch.from_numpy(rng.standard_normal(k)).to(V.device)
    weights /= weights.norm()
    random = torch.from_numpy(rng.standard_normal(size)).to(V.device)
    random /= random.norm()
    combination = V @ weights
    expected = torch.stack(
        [V @ (torch.from_numpy(values).to(V.device) * weights), S.T @ (S @ random) + shift * random], 1
    )
    X = np.ascontiguousarray(np.stack([_array(combination), _array(random)], 1))
    AX = np.ldexp(A.matmat(X), -exponent)
    errors = [norm(difference) for difference in (AX - _array(expected)).T]
    sizes = [norm(product) for product in AX.T]
    # Because of rounding errors, `vector_gram` is not exactly the Gram matrix of the computed vectors. The same
    # combination measures the difference.
    drift = V.T @ combination - torch.from_numpy(spectrum.vector_gram).to(V.device) @ weights
    eigenvector_error = math.sqrt(k) * (errors[0] + float(drift.norm()) * max(values, default=0.0))
    largest = max(*sizes, float(np.abs(values).max(initial=0.0)))
    skew = math.sqrt(size) * abs(float(X[:, 0] @ AX[:, 1] - X[:, 1] @ AX[:, 0]))
    relative = max(error / product if product else 0.0 for error, product in zip(errors, sizes, strict=True))

    def unscaled(number: float) -> float:
        return float(np.ldexp(number, exponent))

    return Noise(
        relative=relative,
        error=unscaled(2 * max(eigenvector_error, errors[1]) + _EPS * largest),
        symmetry=skew / largest if largest else 0.0,
        skew=unscaled(skew),
        norm=unscaled(largest),
    )


def _gram(S: Tensor) -> Tensor:
    """Return ``S @ S.T``. On the CPU, NumPy is used, because it computes only half of the symmetric product."""
    if S.device.type != "cpu":
        return S @ S.T
    rows = S.numpy()
    return torch.from_numpy(rows @ rows.T)


def _null_vectors(V: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Return `count` orthonormal vectors that are orthogonal to the columns of V."""
    null = torch.from_numpy(rng.standard_normal((len(V), count))).to(V.device)
    for _ in range(2):
        null -= V @ (V.T @ null)
        null = torch.linalg.qr(null).Q
    return null


def _exponent(S: Tensor) -> int:
    """Return the exponent e for which the Gram matrix of ``S / 2**e`` neither underflows nor overflows."""
    exponent = math.frexp(float(torch.linalg.vector_norm(S, math.inf)) if S.numel() else 0.0)[1]
    return exponent if abs(exponent) > _SAFE_EXPONENT else 0


def _bordered(corner: Array, border: Array, rest: Array) -> Array:
    return np.block([[corner, border], [border.T, rest]])


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.cpu().numpy()
    return array
