"""`eigsh` repairs a result if the search finds an eigenvalue that the solver missed, whatever the solver.

The solvers are replaced by one that computes all eigenvectors densely and leaves some of them out.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from matrices import CountingMatrix, matrix

from curvop.spectrum import eigen
from curvop.spectrum.counting import CountedOperator
from curvop.spectrum.eigen import EigenResult

LEVELS = np.r_[3.0, 2.0, 2.0, 2.0, 1.5, 1.2, np.linspace(-0.9, 0.9, 290), -1.2, -1.5, -1.9, -2.5]


def eigsh_without(
    monkeypatch: pytest.MonkeyPatch, left_out: list[int], A: np.ndarray, k: int, which: str, **options: object
) -> tuple[EigenResult, int]:
    """Run `eigsh` with a solver that takes 100 products and leaves out the eigenvalues with these ranks.

    Return the result and the number of products.
    """
    values, vectors = np.linalg.eigh(A)

    def solver(problem: eigen._Problem) -> eigen._Eigenpairs:
        for _ in range(100):
            problem.A.matvec(np.ones(len(A)))
        chosen = np.delete(eigen._select(values, which, k + len(left_out)), left_out)
        return eigen._Eigenpairs(values[chosen], vectors[:, chosen], k, "arpack")

    monkeypatch.setitem(eigen._METHODS, "arpack", solver)
    operator = CountingMatrix(A)
    result = eigen.eigsh(operator, k, which, progress=False, **options)
    return result, operator.columns


def right(eigenvalues: np.ndarray, k: int, which: str) -> np.ndarray:
    key = {"LA": -eigenvalues, "SA": eigenvalues, "LM": -np.abs(eigenvalues)}[which]
    return np.sort(eigenvalues[np.argsort(key, kind="stable")[:k]])


@pytest.mark.parametrize(
    ("which", "left_out"),
    [("LA", [0]), ("LA", [1, 2]), ("LA", [0, 3, 4]), ("SA", [1]), ("SA", [0, 2]), ("LM", [0]), ("LM", [0, 1])],
)
def test_missed_eigenvalues_are_found(monkeypatch: pytest.MonkeyPatch, which: str, left_out: list[int]) -> None:
    A = matrix(LEVELS)
    result, count = eigsh_without(monkeypatch, left_out, A, 4, which)
    assert result.ok
    assert "found by the search" in result.note
    np.testing.assert_allclose(result.values, right(LEVELS, 4, which), atol=1e-12)
    np.testing.assert_allclose(A @ result.vectors, result.vectors * result.values, atol=1e-12)
    np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(4), atol=1e-12)
    assert result.certificate.bounds.max() < 1e-12
    assert result.certificate.which == which
    assert result.products == count == 100 + result.certificate.products


def test_bounds_belong_to_the_repaired_eigenpairs(monkeypatch: pytest.MonkeyPatch) -> None:
    A = matrix(LEVELS)
    result, _ = eigsh_without(monkeypatch, [1], A, 5, "LM")
    residuals = np.linalg.norm(A @ result.vectors - result.vectors * result.values, axis=0)
    np.testing.assert_allclose(residuals, result.certificate.residuals, atol=1e-14)
    assert (np.diff(result.values) >= 0).all()
    np.testing.assert_allclose(np.sort(np.abs(result.values)), [2, 2, 2, 2.5, 3], atol=1e-12)


def test_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 'BE', an eigenvalue that was missed at one end replaces one from the same end."""
    A = matrix(LEVELS)
    values, vectors = np.linalg.eigh(A)
    chosen = [0, 1, -5, -2, -1]  # 1.5 instead of one of the three eigenvalues 2

    def solver(problem: eigen._Problem) -> eigen._Eigenpairs:
        for _ in range(100):
            problem.A.matvec(np.ones(len(A)))
        return eigen._Eigenpairs(values[chosen], vectors[:, chosen], 5, "arpack")

    monkeypatch.setitem(eigen._METHODS, "arpack", solver)
    result = eigen.eigsh(A, 5, "BE", progress=False)
    assert result.ok
    np.testing.assert_allclose(result.values, [-2.5, -1.9, 2.0, 2.0, 3.0], atol=1e-12)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_scales(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    result, _ = eigsh_without(monkeypatch, [0], matrix(LEVELS) * scale, 3, "LA")
    assert result.ok
    np.testing.assert_allclose(result.values / scale, [2, 2, 3], atol=1e-12)


def test_a_small_matrix_needs_no_lanczos(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search computes all remaining eigenpairs, and the repair takes no further products with new vectors."""
    levels = np.r_[5.0, 5.0, 5.0, 4.0, np.linspace(-1, 1, 36)]
    result, count = eigsh_without(monkeypatch, [0, 1], matrix(levels), 3, "LA")
    assert result.ok
    np.testing.assert_allclose(result.values, [5, 5, 5], atol=1e-12)
    assert count == 100 + (3 + 8) + (40 - 3) + (40 - 3)


def test_coarse_eigenvectors_are_improved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old vectors have residuals of 1e-5, to which the new vector is orthogonal."""
    A = matrix(LEVELS)
    values, vectors = np.linalg.eigh(A)
    rng = np.random.default_rng(0)
    coarse = vectors[:, [-1, -2, -3, -5]] + 1e-5 / np.sqrt(len(A)) * rng.standard_normal((len(A), 4))

    def solver(problem: eigen._Problem) -> eigen._Eigenpairs:
        for _ in range(100):
            problem.A.matvec(np.ones(len(A)))
        return eigen._Eigenpairs(values[[-1, -2, -3, -5]], np.linalg.qr(coarse)[0], 4, "arpack")

    monkeypatch.setitem(eigen._METHODS, "arpack", solver)
    result = eigen.eigsh(A, 4, tol=1e-5, progress=False)
    assert result.ok
    assert (np.abs(result.values - [2, 2, 2, 3]) <= result.certificate.bounds).all()
    assert np.abs(result.values - [2, 2, 2, 3]).max() < 1e-9  # errors are quadratic in the residuals


def test_the_result_is_reported_if_there_is_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvop.spectrum.repair._MAX_REPAIRS", 0)
    with pytest.warns(RuntimeWarning, match="not certified: an eigenvalue at 2 or beyond was missed"):
        result, count = eigsh_without(monkeypatch, [1], matrix(LEVELS), 4, "LA")
    assert result.note == ""
    assert result.products == count


def test_repairs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repairs take at most as many products as the solver and the first search, before the last search."""
    levels = np.r_[1.0 + np.arange(12) / 1e3, np.linspace(-1, 0.99, 288)]
    with pytest.warns(RuntimeWarning, match="was missed"):
        result, count = eigsh_without(monkeypatch, list(range(8)), matrix(levels), 4, "LA")
    assert result.products == count
    assert count < 100 + (4 + 8 + 121) + (100 + 60) + 121


class Clock:
    """A clock by which each product takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("seconds", range(112, 200, 8))
def test_time_is_up_anywhere(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """The result is right and certified, or it says what is missing, and it is there in time."""
    clock = Clock()
    monkeypatch.setattr("curvop.spectrum.counting.time", clock)
    product = CountingMatrix._matmat

    def slowly(self: CountingMatrix, X: np.ndarray) -> np.ndarray:
        clock.now += X.shape[1]
        return product(self, X)

    monkeypatch.setattr(CountingMatrix, "_matmat", slowly)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result, count = eigsh_without(monkeypatch, [0, 1], matrix(LEVELS), 4, "LA", seconds=seconds)
    assert result.products == count <= seconds + 15  # a block of up to 16 products that has started is completed
    complete = np.allclose(result.values, [2, 2, 2, 3], atol=1e-10)
    certificate = result.certificate
    assert complete or certificate is None or certificate.missed is not None or certificate.resolution is None
    assert complete == ("found by the search" in result.note)


def test_tensors_stay_on_the_device_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repair multiplies rows on the device of the operator, as the solver does."""
    devices = []
    multiply = CountedOperator.multiply_rows

    def spy(self: CountedOperator, rows: torch.Tensor) -> torch.Tensor:
        devices.append((rows.device, self.device))
        return multiply(self, rows)

    monkeypatch.setattr(CountedOperator, "multiply_rows", spy)
    result, _ = eigsh_without(monkeypatch, [0], matrix(LEVELS), 3, "LA")
    assert result.ok
    assert devices
    assert all(one == other for one, other in devices)
