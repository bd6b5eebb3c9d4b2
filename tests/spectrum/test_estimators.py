"""Compare estimates with dense matrices: exact at low rank, and with honest error bars otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from matrices import matrix
from scipy.sparse import diags_array
from scipy.sparse.linalg import aslinearoperator

from curvop.spectrum import Estimate, diagonal, frobenius_norm, trace

EXACT = {trace: np.trace, diagonal: np.diag, frobenius_norm: np.linalg.norm}
SPECTRA = {
    "uniform": np.linspace(-1, 1, 60),
    "decaying": 2.0 ** -np.arange(60),
    "outliers": np.r_[np.linspace(0, 1, 52), np.linspace(5, 50, 8)],
}


@pytest.fixture(params=EXACT, ids=lambda function: function.__name__)
def estimator(request):
    return request.param


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_no_error_if_the_products_reach_the_rank(estimator, rank: int) -> None:
    A = matrix([*np.arange(1.0, rank + 1), *np.zeros(30 - rank)])
    value, error = estimator(aslinearoperator(A), 2 * rank + 4, rng=0)
    np.testing.assert_allclose(value, EXACT[estimator](A), atol=1e-12)
    assert np.all(np.asarray(error) <= 1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_estimates_are_unbiased_and_have_error_bars(estimator, spectrum: str) -> None:
    A = matrix(SPECTRA[spectrum])
    found = [estimator(aslinearoperator(A), 24, rng=seed) for seed in range(400)]
    values, errors = (np.array(part) for part in zip(*found, strict=True))
    truth, spread = EXACT[estimator](A), values.std(0)
    # The squared norm is unbiased. Its root has a relative bias of an eighth of the squared relative spread.
    assert np.all(np.abs(values.mean(0) - truth) < 5 * spread / 20 + spread**2 / np.abs(truth))
    assert np.all(errors.mean(0) > spread * 0.6)
    assert np.all(errors.mean(0) < (5 if estimator is frobenius_norm else 2) * spread)


def test_the_error_falls_with_the_eigenvalues(estimator) -> None:
    A = matrix(2.0 ** -np.arange(0, 100))
    errors = [
        np.abs(estimator(aslinearoperator(A), count, rng=0).value - EXACT[estimator](A)).max() for count in (10, 20, 40)
    ]
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 10
    assert errors[2] < errors[1] / 100


def test_as_many_products_as_rows_give_exact_results(estimator) -> None:
    A = matrix(np.linspace(-1, 1, 10))
    value, error = estimator(aslinearoperator(A), 20, rng=0)
    np.testing.assert_allclose(value, EXACT[estimator](A), atol=1e-14)
    assert np.all(np.asarray(error) <= 1e-15)


@pytest.mark.default_cases("trace-random-equal-*")
@pytest.mark.parametrize("top", [1e14, 1e16, -1e16, 1e20])
@pytest.mark.parametrize("rest", ["positive", "equal", "signs"])
@pytest.mark.parametrize("basis", ["own", "random"])
def test_the_error_includes_eigenvalues_lost_in_rounding(estimator, top: float, rest, basis: str) -> None:
    """The error was once 0 although all other eigenvalues were lost, 250 in the trace."""
    rng = np.random.default_rng(0)
    others = {"positive": rng.uniform(size=299), "equal": np.ones(299), "signs": rng.choice([-1.0, 1.0], 299)}[rest]
    values = np.r_[top, others]
    A = matrix(values) if basis == "random" else np.diag(values)
    exact = EXACT[estimator](A)
    for seed in range(10):
        value, error = estimator(aslinearoperator(A), 20, rng=seed)
        assert np.all(np.asarray(error) >= 1e-17 * abs(top))
        if estimator is not diagonal:  # a single entry depends on few different test vectors
            assert abs(value - exact) <= 4 * error
            assert error <= 1e-13 * abs(top) + 2 * np.abs(others).sum()


def test_a_few_rows_among_many() -> None:
    """With few nonzero rows, many test vectors of signs have equal products."""
    values = np.zeros(2000)
    values[[3, 77, 500]] = 5, 7, 9
    for seed in range(100):
        np.testing.assert_allclose(
            diagonal(aslinearoperator(diags_array(values)), 64, rng=seed).value, values, atol=1e-10
        )


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_the_norm_of_a_rectangle(shape) -> None:
    A = np.random.default_rng(0).normal(size=shape)
    estimate = frobenius_norm(aslinearoperator(A), 20, rng=0)
    assert abs(estimate.value - np.linalg.norm(A)) < 4 * estimate.error < 1.0 * np.linalg.norm(A)
    np.testing.assert_allclose(frobenius_norm(aslinearoperator(A), 60).value, np.linalg.norm(A))


def test_seeds(estimator) -> None:
    A = aslinearoperator(matrix(np.linspace(0, 1, 20)))
    one, two = (estimator(A, 6, rng=rng) for rng in (1, np.random.default_rng(1)))
    np.testing.assert_array_equal(one.value, two.value)


def test_an_estimate_prints_as_a_number() -> None:
    assert str(Estimate(1234.5678, 0.0123)) == "1234.57 +- 0.012"


def test_products_that_are_not_finite_are_refused(estimator) -> None:
    with pytest.raises(ValueError, match="not finite"):
        estimator(aslinearoperator(np.full((20, 20), np.nan)), 4)


def test_bad_input(estimator) -> None:
    with pytest.raises(ValueError, match="num_products is 1"):
        estimator(aslinearoperator(np.eye(3)), 1)
    if estimator is not frobenius_norm:
        with pytest.raises(ValueError, match="must be square"):
            estimator(aslinearoperator(np.ones((2, 3))), 4)
