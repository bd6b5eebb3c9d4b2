"""The accuracy and the symmetry of products with an operator, measured with random vectors and eigenvectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.spectrum.counting import CountedOperator
from curvop.spectrum.norms import column_norms, norm

__all__ = ["NUM_PRODUCTS", "Noise", "is_asymmetric", "measure_noise"]

Array = NDArray[Any]

_EPS = float(np.finfo(np.float64).eps)

_PROBES, _SINGLE_PRODUCTS = 4, 4
NUM_PRODUCTS = _PROBES + _SINGLE_PRODUCTS
"""The maximum number of products that `measure_noise` takes."""

# Rounding errors make products both nonlinear and asymmetric. The asymmetry can be a few times larger than the
# nonlinearity. An asymmetry below 1e-10 is harmless.
_SYMMETRY_PER_NOISE, _HARMLESS_ASYMMETRY = 10.0, 1e-10


@dataclasses.dataclass(frozen=True)
class Noise:
    """The measured errors of products with an operator.

    Attributes
    ----------
    relative : float
        The largest measured error of a product, relative to the norm of the product.
    error : float
        The assumed error (in the Euclidean norm) of a product with an eigenvector of norm 1: twice the largest measured
        error, plus a rounding error.
    symmetry : float
        An estimate of ``||A - A'|| / ||A||``.
    skew : float
        An estimate of ``||(A - A') x||`` for a vector x of norm 1.
    norm : float
        The largest norm of a measured product with a vector of norm 1.
    """

    relative: float
    error: float
    symmetry: float
    skew: float
    norm: float


def is_asymmetric(symmetry: float, relative: float) -> bool:
    """Return True if the relative asymmetry exceeds both 1e-10 and 10 times the relative noise of the products."""
    return symmetry > max(_SYMMETRY_PER_NOISE * relative, _HARMLESS_ASYMMETRY)


def measure_noise(A: CountedOperator, V: Array, AV: Array, rng: np.random.Generator) -> Noise:
    """Measure the errors of products with random vectors and with random combinations of eigenvectors.

    Random vectors test the whole operator, but have only small components along the dominant eigenvectors. The errors
    of products with eigenvectors are therefore measured separately.

    Parameters
    ----------
    A : CountedOperator, shape (N, N)
        The operator, with float64 products.
    V, AV : ndarray, shape (N, k)
        The eigenvectors, of norm 1, and the products ``A @ V``.
    rng : numpy.random.Generator
        The generator for the random vectors.
    """
    size = len(V)
    X = rng.standard_normal((size, min(_PROBES, size)))
    X /= np.linalg.norm(X, axis=0)
    AX = A.matmat(X)
    norms = column_norms(AX)
    typical, largest = _rms(norms), float(max(norms.max(), column_norms(AV).max()))

    repeated = norm(A.matvec(X[:, 0]) - AX[:, 0])
    random_error = max(repeated, _linearity_error(A, X, AX, rng))
    eigenvector_error = max(_linearity_error(A, V, AV, rng) for _ in range(2))

    # For random vectors x of norm 1, the root mean square of sqrt(N) |g' x| is |g|.
    eigenvector_skew = math.sqrt(size) * _rms(AV.T @ X - V.T @ AX)
    mixed = X.T @ AX
    random_skew = math.sqrt(size) * _rms((mixed - mixed.T)[np.triu_indices(len(mixed), 1)])
    return Noise(
        relative=max(_ratio(random_error, typical), _ratio(eigenvector_error, largest)),
        error=2 * max(random_error, eigenvector_error) + _EPS * largest,
        symmetry=max(_ratio(random_skew, typical), _ratio(eigenvector_skew, largest)),
        skew=max(random_skew, eigenvector_skew),
        norm=largest,
    )


def _linearity_error(A: CountedOperator, X: Array, AX: Array, rng: np.random.Generator) -> float:
    """Return the norm of ``A (X c) - (A X) c`` for a random c of norm 1."""
    weights = rng.standard_normal((X.shape[1], 1))
    weights /= np.linalg.norm(weights)
    return norm(A.matvec((X @ weights)[:, 0]) - (AX @ weights)[:, 0])


def _rms(array: Array) -> float:
    """Return the root mean square of the entries, or 0 for an empty array."""
    return norm(array) / math.sqrt(array.size) if array.size else 0.0


def _ratio(part: float, whole: float) -> float:
    """Return ``part / whole``, or 0 if `whole` is 0."""
    return part / whole if whole > 0 else 0.0
