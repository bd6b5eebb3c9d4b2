"""How exact and how symmetric an operator's products are, measured by a few of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curvop.spectrum.counting import CountedOperator
from curvop.spectrum.norms import column_norms, norm

__all__ = ["NUM_PRODUCTS", "Noise", "asymmetric", "measure"]

Array = NDArray[Any]

_PROBES, _SINGLE = 4, 4
NUM_PRODUCTS = _PROBES + _SINGLE
"""The products that `measure` takes, at most."""

# Symmetry is lost to rounding as linearity is, if to a few times more of it; below the second number it does no harm.
_SYMMETRY_OF_NOISE, _SYMMETRY = 10.0, 1e-10
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Noise:
    """The errors of an operator's products.

    Attributes
    ----------
    relative : float
        The largest that was met, relative to the product.
    error : float
        What the error's norm may be for a found vector of norm 1: twice the largest that was met.
    symmetry : float
        An estimate of ``||A - A'|| / ||A||``.
    skew : float
        An estimate of ``||(A - A') x||`` for a vector of norm 1.
    norm : float
        The largest norm of a product with a vector of norm 1.
    """

    relative: float
    error: float
    symmetry: float
    skew: float
    norm: float


def asymmetric(symmetry: float, relative: float) -> bool:
    """Whether a lack of symmetry is more than the `relative` noise of the products explains, and does harm."""
    return symmetry > max(_SYMMETRY_OF_NOISE * relative, _SYMMETRY)


def measure(A: CountedOperator, V: Array, AV: Array, rng: np.random.Generator) -> Noise:
    """Measure the errors of products with random vectors, and with combinations of found ones.

    Random vectors see all of the operator, but little of its largest eigenvalues; the found ones are those that matter.

    Parameters
    ----------
    A : CountedOperator, shape (N, N)
        Its products are in float64.
    V, AV : ndarray, shape (N, k)
        The found vectors, of norm 1, and their products.
    rng : numpy.random.Generator
    """
    size = len(V)
    X = rng.standard_normal((size, min(_PROBES, size)))
    X /= np.linalg.norm(X, axis=0)
    AX = A.matmat(X)
    norms = column_norms(AX)
    typical, largest = _rms(norms), float(max(norms.max(), column_norms(AV).max()))

    repeated = norm(A.matvec(X[:, 0]) - AX[:, 0])
    combined = max(repeated, _combined(A, X, AX, rng))
    found = max(_combined(A, V, AV, rng) for _ in range(2))

    # For x of norm 1 in a random direction, sqrt(N) |g' x| is |g| on the average of squares.
    of_found = math.sqrt(size) * _rms(AV.T @ X - V.T @ AX)
    mixed = X.T @ AX
    of_random = math.sqrt(size) * _rms((mixed - mixed.T)[np.triu_indices(len(mixed), 1)])
    return Noise(
        relative=max(_ratio(combined, typical), _ratio(found, largest)),
        error=2 * max(combined, found) + _EPS * largest,
        symmetry=max(_ratio(of_random, typical), _ratio(of_found, largest)),
        skew=max(of_random, of_found),
        norm=largest,
    )


def _combined(A: CountedOperator, X: Array, AX: Array, rng: np.random.Generator) -> float:
    """Return the norm of ``A (X c) - (A X) c`` for a random c of norm 1."""
    weights = rng.standard_normal((X.shape[1], 1))
    weights /= np.linalg.norm(weights)
    return norm(A.matvec((X @ weights)[:, 0]) - (AX @ weights)[:, 0])


def _rms(array: Array) -> float:
    return norm(array) / math.sqrt(array.size) if array.size else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
