"""Compare estimates with dense matrices: exact at low rank, and with honest error bars otherwise."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matrices import CountingMatrix, matrix
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from scipy.stats import t as student

from curvop.operators.base import TensorLinearOperator
from curvop.spectrum import BoundedEstimate, Estimate, density, diagonal, frobenius_norm, trace

EXACT = {trace: np.trace, diagonal: np.diag, frobenius_norm: np.linalg.norm}
SPECTRA = {
    "uniform": np.linspace(-1, 1, 60),
    "decaying": 2.0 ** -np.arange(60),
    "outliers": np.r_[np.linspace(0, 1, 52), np.linspace(5, 50, 8)],
}


#: ``Estimate(1.5, 0.5)``, when it was a named tuple without further attributes.
OLD_PICKLE = (
    b"\x80\x04\x95A\x00\x00\x00\x00\x00\x00\x00\x8c\x1acurvop.spectrum.estimators\x94\x8c\x08Estimate\x94\x93\x94"
    b"G?\xf8\x00\x00\x00\x00\x00\x00G?\xe0\x00\x00\x00\x00\x00\x00\x86\x94\x81\x94."
)


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


# Each method, written as in its paper: one orthonormal basis for each test vector, without it.


def probes_of(estimator, size: int, count: int, seed: int) -> np.ndarray:
    """Return the columns that the estimators document: random signs for a diagonal, otherwise points of a sphere."""
    rng = np.random.default_rng(seed)
    if estimator is diagonal:
        return rng.choice([-1.0, 1.0], (size, count))
    tests = rng.standard_normal((size, count))
    return tests * size**0.5 / np.linalg.norm(tests, axis=0)


def samples(estimator, A: np.ndarray, num_products: int, seed: int) -> np.ndarray:
    """Return the estimates from single test vectors; their mean is the estimate, for a norm that of its square."""
    few = num_products < 6
    X = probes_of(estimator, A.shape[1], num_products if few else num_products // 2, seed)
    found = []
    for i, x in enumerate(X.T):
        Q = np.linalg.qr(np.delete(A @ X, i, 1))[0] if not few else np.zeros((len(A), 0))
        rest = A @ x - Q @ (Q.T @ (A @ x))
        if estimator is frobenius_norm:
            found.append(np.linalg.norm(Q.T @ A) ** 2 + rest @ rest)
        elif estimator is diagonal:
            found.append(np.diag(Q @ Q.T @ A) + x * rest)
        else:
            y = x - Q @ (Q.T @ x)
            found.append(np.trace(Q.T @ A @ Q) + (len(A) - Q.shape[1]) * (y @ A @ y) / (y @ y))
    return np.array(found)


@pytest.mark.parametrize("num_products", [2, 3, 5, 6, 7, 20])
def test_the_estimates_are_those_of_the_papers(estimator, num_products: int) -> None:
    A = matrix(np.r_[np.linspace(-1, 1, 40), 5, 9])
    if estimator is frobenius_norm:
        A = A[:30]
    found = estimator(aslinearoperator(A), num_products, rng=3)
    each = samples(estimator, A, num_products, 3)
    value, spread, few = each.mean(0), each.std(0, ddof=1), num_products < 6
    error = spread / len(each) ** 0.5 * (1.0 if few else 1.5)
    if estimator is frobenius_norm:
        value = value**0.5
        error = spread / (2 * value) / (len(each) ** 0.5 if few else 1.0)
    np.testing.assert_allclose(found.value, value, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.error, error, rtol=1e-10, atol=1e-12)


def test_the_method_depends_on_the_number_of_products(estimator) -> None:
    A = aslinearoperator(matrix(np.linspace(0, 1, 20)))
    found = {count: estimator(A, count, rng=0).method for count in (2, 5, 6, 19, 40)}
    many = "xdiag" if estimator is diagonal else "xtrace"
    assert found == {2: "hutchinson", 5: "hutchinson", 6: many, 19: many, 40: "dense"}
    assert estimator(A).method == "dense"  # 60 products
    assert estimator(A, rng=0, num_products=4).method == "hutchinson"


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_no_product_is_wasted_if_there_are_few(count: int) -> None:
    """The variance of a quadratic form on a sphere is known (Watson, 1995)."""
    values = np.linspace(0, 1, 60)
    found = [trace(aslinearoperator(np.diag(values)), count, rng=seed).value for seed in range(500)]
    variance = 2 * 60 / 62 * (np.sum(values**2) - values.sum() ** 2 / 60) / count
    assert np.std(found) == pytest.approx(variance**0.5, rel=5 / (2 * 500) ** 0.5)


@pytest.mark.default_cases("trace-outliers-12", "trace-decaying-*")
@pytest.mark.parametrize("count", [3, 6, 12, 24])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_bars_cover(estimator, spectrum: str, count: int) -> None:
    """Student's interval for 95% of normally distributed samples contains the result in at least 168 of 200 runs."""
    A = matrix(SPECTRA[spectrum])
    found = [estimator(aslinearoperator(A), count, rng=seed) for seed in range(200)]
    values, errors = (np.array(part) for part in zip(*found, strict=True))
    factor = student.ppf(0.975, (count if count < 6 else count // 2) - 1)
    covered = np.abs(values - EXACT[estimator](A)) <= factor * errors
    assert covered.mean() >= 0.84
    assert np.mean(errors**2) < (4 if estimator is frobenius_norm else 2) ** 2 * np.mean(
        (values - EXACT[estimator](A)) ** 2
    )


class OnlyTensors(TensorLinearOperator):
    """A matrix on a device. It refuses NumPy arrays, and tensors in another dtype or on another device."""

    def __init__(self, A: np.ndarray, device: str = "cpu") -> None:
        super().__init__(np.float64, A.shape)
        self._rows = torch.from_numpy(A).to(device)

    @property
    def device(self) -> torch.device:
        return self._rows.device

    def _apply(self, rows):
        assert isinstance(rows, torch.Tensor)
        assert (rows.dtype, rows.device) == (torch.float64, self.device)
        return rows @ self._rows.T

    def _adjoint(self) -> LinearOperator:
        adjoint = copy.copy(self)
        adjoint._rows, adjoint.shape = self._rows.T, self.shape[::-1]
        return adjoint


@pytest.mark.parametrize("num_products", [4, 20, 200])
def test_products_take_tensors_if_the_operator_does(estimator, num_products: int) -> None:
    A = matrix(SPECTRA["outliers"])
    A = A[:, :40] if estimator is frobenius_norm else A
    found, expected = (estimator(B, num_products, rng=0) for B in (OnlyTensors(A), aslinearoperator(A)))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-10, atol=1e-13)
    assert isinstance(found.value, np.ndarray if estimator is diagonal else float)


def test_everything_is_computed_on_the_device_of_the_operator() -> None:
    """A second device is registered for a whole process."""
    code = """
import numpy as np
from second_device import SECOND
from matrices import matrix
from test_estimators import EXACT, OnlyTensors
A = matrix(2.0 ** -np.arange(30))
for estimator in EXACT:
    for count in (4, 12, 60):
        there, here = (estimator(OnlyTensors(A, device), count, rng=0) for device in (SECOND, "cpu"))
        np.testing.assert_allclose(there.value, here.value, rtol=1e-12)
        np.testing.assert_allclose(there.error, here.error, rtol=1e-6, atol=1e-14)
"""
    folder = Path(__file__).parent
    path = [str(folder), str(folder.parent), *sys.path]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


class OnlyArrays(TensorLinearOperator):
    """A matrix that refuses tensors, such as the sum of an operator on a GPU and an operator of SciPy."""

    takes_tensors, device = False, torch.device("meta")

    def __init__(self, A: np.ndarray) -> None:
        super().__init__(np.float64, A.shape)
        self._matrix = A

    def _apply(self, rows):
        assert isinstance(rows, np.ndarray)
        return rows @ self._matrix.T


def test_products_take_arrays_if_the_operator_does(estimator) -> None:
    A = matrix(SPECTRA["outliers"])
    found, expected = (estimator(B, 20, rng=0) for B in (OnlyArrays(A), aslinearoperator(A)))
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-12, atol=1e-13)
    with_density = density(OnlyArrays(A), 2, 5, progress=False)
    np.testing.assert_allclose(with_density.nodes, density(A, 2, 5, progress=False).nodes, rtol=1e-9, atol=1e-12)


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


class TestEstimate:
    def test_it_prints_as_a_number(self) -> None:
        assert str(Estimate(1234.5678, 0.0123)) == "1234.568 +- 0.012"
        assert str(Estimate(np.float64(40.9618), np.float64(5.63))) == "41 +- 6"  # no digits below those of the error
        assert str(Estimate(1.5, math.nan)) == "1.5 +- nan"
        assert str(Estimate(2.0, 0.0)) == "2 +- 0"

    def test_it_is_a_pair(self) -> None:
        estimate = trace(aslinearoperator(matrix(np.linspace(0, 1, 20))), 4, rng=0)
        value, error = estimate
        assert (value, error) == (estimate.value, estimate.error) == estimate
        assert estimate._fields == ("value", "error")
        value, error = trace(diags_array(np.linspace(0, 1, 200)))  # by default, 60 products
        assert abs(value - 100) < 5 * error
        assert repr(Estimate(1.5, 0.5, "xtrace")) == "Estimate(value=1.5, error=0.5)"

    def test_it_converts_to_a_number(self) -> None:
        found = density(np.diag(np.linspace(0, 1, 50)), 2, 10, progress=False).trace()
        assert float(Estimate(1.5, 0.5)) == 1.5
        assert float(found) == found.value
        assert math.sqrt(Estimate(np.array([4.0]), np.array([0.5]))) == 2.0
        with pytest.raises(TypeError, match=r"shape \(2,\): use its attribute value"):
            float(Estimate(np.ones(2), np.ones(2)))

    @pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
    def test_copies(self, again) -> None:
        for estimate in (Estimate(1.5, 0.5), Estimate(1.5, 0.5, "xtrace"), BoundedEstimate(1.5, 0.5, 1.0, 2.0)):
            other = again(estimate)
            assert type(other) is type(estimate)
            assert other == estimate
            assert other.method == estimate.method
        assert (other.low, other.high) == (1.0, 2.0)

    def test_pickles_of_the_version_before(self) -> None:
        other = pickle.loads(OLD_PICKLE)
        assert (type(other), tuple(other), other.method) == (Estimate, (1.5, 0.5), None)


def test_products_that_are_not_finite_are_refused(estimator) -> None:
    with pytest.raises(ValueError, match="not finite"):
        estimator(aslinearoperator(np.full((20, 20), np.nan)), 4)


def test_bad_input(estimator) -> None:
    with pytest.raises(ValueError, match="num_products is 1"):
        estimator(aslinearoperator(np.eye(3)), 1)
    if estimator is not frobenius_norm:
        with pytest.raises(ValueError, match="must be square"):
            estimator(aslinearoperator(np.ones((2, 3))), 4)


@pytest.mark.parametrize("num_products", [4, 20, 120])
@pytest.mark.parametrize("estimator", [trace, diagonal, frobenius_norm])
def test_a_progress_bar_counts_the_products(estimator, num_products: int, monkeypatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr("tqdm.tqdm.update", lambda bar, count=1: counts.append(count))
    A = CountingMatrix(np.diag(np.linspace(0.0, 1.0, 60)))
    estimator(A, num_products, rng=0, progress=True)
    assert sum(counts) == A.columns == min(num_products, 60)


@pytest.mark.parametrize("num_products", [7, 20])
def test_a_progress_bar_ends_complete(estimator, num_products: int, monkeypatch) -> None:
    # An odd number of products is rounded down, and a matrix of rank 3 needs only three products in the second block.
    bars = []
    monkeypatch.setattr("tqdm.tqdm.close", lambda bar: bars.append((bar.n, bar.total)))
    A = np.diag(np.r_[1.0, 2.0, 3.0, np.zeros(57)] if num_products == 20 else np.linspace(0.0, 1.0, 60))
    estimator(aslinearoperator(A), num_products, rng=0)
    count = 6 if num_products == 7 else 13
    assert bars[0] == (count, count)


def test_errors_of_dense_estimates_include_rounding(estimator) -> None:
    A = matrix(np.linspace(0.1, 1.0, 60)).astype(np.float32)

    class Rounded(LinearOperator):
        """A float32 matrix whose products are computed in single precision, also for float64 vectors."""

        def __init__(self) -> None:
            super().__init__(np.float32, A.shape)

        def _matmat(self, X):
            return A @ X.astype(np.float32) * np.float32(1 + 1e-7)

        def _adjoint(self):
            return self

    estimate = estimator(Rounded(), 120)
    assert estimate.method == "dense"
    distance = np.abs(estimate.value - EXACT[estimator](A.astype(np.float64)))
    assert np.all(distance <= 2 * estimate.error)
    assert np.all(estimate.error < 1e-5)
