"""Results scale with the matrix, for any power of two."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

from curvop import spectrum

SIZE = 60
_RNG = np.random.default_rng(0)
_BASIS = np.linalg.qr(_RNG.standard_normal((SIZE, SIZE)))[0]
VALUES = np.r_[np.linspace(-1, 1, SIZE - 3), 3.0, 5.0, 9.0]
MATRIX = (_BASIS * VALUES) @ _BASIS.T
MATRIX = (MATRIX + MATRIX.T) / 2


@pytest.fixture(params=[-990, -700, -400, 400, 700, 990], ids=lambda unit: f"2^{unit}")
def unit(request: pytest.FixtureRequest) -> int:
    """The exponent of the power of two that multiplies a matrix, which is exact."""
    return int(request.param)


def scaled(unit: int) -> Any:
    return aslinearoperator(np.ldexp(MATRIX, unit))


def test_a_density_has_the_same_nodes_in_other_units(unit: int) -> None:
    options = dict(num_probes=3, num_steps=20, progress=False)
    one, other = spectrum.density(scaled(0), **options), spectrum.density(scaled(unit), **options)
    np.testing.assert_allclose(np.ldexp(other.nodes, -unit), one.nodes, rtol=0, atol=1e-13)
    np.testing.assert_allclose(other.weights, one.weights, rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.ldexp(other.trace(), -unit), one.trace(), rtol=1e-10)


def test_a_density_stays_orthogonal(unit: int) -> None:
    import torch

    from curvop.spectrum.lanczos import Lanczos

    run = Lanczos(scaled(unit), torch.from_numpy(np.random.default_rng(1).standard_normal((2, SIZE))), SIZE)
    while run.running:
        run.step()
    for basis in run.basis[:, : SIZE - 1]:
        np.testing.assert_allclose((basis @ basis.T).numpy(), np.eye(SIZE - 1), atol=np.finfo(float).eps ** 0.5)


@pytest.mark.default_cases("2^-990-20-*", "2^700-40-trace", "2^990-120-*")
@pytest.mark.parametrize("estimate", [spectrum.trace, spectrum.diagonal, spectrum.frobenius_norm])
@pytest.mark.parametrize("products", [20, 40, 2 * SIZE])
def test_an_estimate_is_the_same_in_other_units(unit: int, estimate: Any, products: int) -> None:
    one, other = estimate(scaled(0), products, rng=0), estimate(scaled(unit), products, rng=0)
    np.testing.assert_allclose(np.ldexp(other.value, -unit), one.value, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.ldexp(other.error, -unit), one.error, rtol=1e-10, atol=1e-12)


@pytest.mark.default_cases("2^-990-*", "2^990-*")
@pytest.mark.parametrize("method", ["lanczos", "lobpcg", "dense"])
def test_eigenvalues_are_the_same_in_other_units(unit: int, method: str) -> None:
    result = spectrum.eigsh(scaled(unit), 3, method=method, progress=False)
    np.testing.assert_allclose(np.ldexp(result.values, -unit), [3, 5, 9], rtol=1e-9)
    assert result.ok
    assert np.ldexp(result.certificate.bounds, -unit).max() < 1e-6


def test_arpack_says_where_a_matrix_is_too_small_for_its_absolute_limits(unit: int) -> None:
    with np.errstate(all="ignore"):
        try:
            result = spectrum.eigsh(scaled(unit), 3, progress=False)
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}")
    right = np.allclose(np.ldexp(result.values, -unit), [3, 5, 9], rtol=1e-4)
    assert right or not result.ok


def test_a_certificate_is_the_same_in_other_units(unit: int) -> None:
    order = np.argsort(-VALUES)[:3]
    values, vectors = VALUES[order], _BASIS[:, order]
    one = spectrum.certify(scaled(0), values, vectors, which="LA", progress=False)
    other = spectrum.certify(scaled(unit), np.ldexp(values, unit), np.ldexp(vectors, 0), which="LA", progress=False)
    assert other.ok == one.ok is True
    assert np.ldexp(other.bounds, -unit).max() < 1e-12
    assert other.orthogonality < 1e-12


def test_pairs_whose_vectors_are_tiny_are_certified_for_what_they_are() -> None:
    order = np.argsort(-VALUES)[:3]
    found = spectrum.certify(scaled(0), VALUES[order], 1e-200 * _BASIS[:, order], which="LA", progress=False)
    assert found.residuals.max() < 1e-12
    assert not found.ok  # the vectors are not orthonormal
