"""Estimates from block products against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import diags_array
from scipy.sparse.linalg import aslinearoperator
from test_solve import matrix

from curvop.estimators import diagonal


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_the_diagonal_is_exact_where_the_products_reach_the_rank(rank: int) -> None:
    A = matrix([*np.arange(1.0, rank + 1), *np.zeros(30 - rank)])
    np.testing.assert_allclose(diagonal(A, 2 * rank + 4, rng=0), np.diag(A), atol=1e-12)


def test_a_few_rows_among_many() -> None:
    """Few rows see few different signs, so that test vectors have equal products."""
    values = np.zeros(2000)
    values[[3, 77, 500]] = 5, 7, 9
    for seed in range(100):
        np.testing.assert_allclose(diagonal(aslinearoperator(diags_array(values)), 64, rng=seed), values, atol=1e-10)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        diagonal(np.full((20, 20), np.nan), 4)


def test_the_diagonal_is_unbiased() -> None:
    A = matrix(np.linspace(-1, 1, 20))
    estimates = np.array([diagonal(A, 10, rng=seed) for seed in range(2000)])
    error = estimates.mean(0) - np.diag(A)
    assert (np.abs(error) < 5 * estimates.std(0) / 2000**0.5).all()


def test_the_error_falls_with_the_eigenvalues() -> None:
    A = matrix(2.0 ** -np.arange(0, 100))
    errors = [np.abs(diagonal(A, count, rng=0) - np.diag(A)).max() for count in (10, 20, 40)]
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 100


def test_as_many_test_vectors_as_rows_give_the_diagonal() -> None:
    A = matrix(np.linspace(-1, 1, 10))
    np.testing.assert_allclose(diagonal(A, 20, rng=0), np.diag(A), atol=1e-8)


def test_seeds() -> None:
    A = matrix(np.linspace(0, 1, 20))
    np.testing.assert_array_equal(diagonal(A, 6, rng=1), diagonal(A, 6, rng=np.random.default_rng(1)))


@pytest.mark.parametrize(("A", "count"), [(np.ones((2, 3)), 4), (np.eye(2), 1)])
def test_bad_input(A, count) -> None:
    with pytest.raises(ValueError, match="A must be square"):
        diagonal(A, count)
