"""Solves with badly scaled matrices, ill-conditioned preconditioners, and solutions that are worse than the start."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from matrices import matrix

from curvop import preconditioner, solve


def quietly(A, b, damping=0.0, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return solve(A, b, damping, progress=False, **options)


def scaled(N: int, decades: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return A = D B D with a well-conditioned B and a diagonal D over some decades, its diagonal, and the solutions.

    The solutions are such that all unknowns contribute to the right-hand sides in their units.
    """
    rng = np.random.default_rng(seed)
    D, Z = np.logspace(-decades / 2, decades / 2, N), rng.standard_normal((N, N))
    A = D[:, None] * (np.eye(N) + 0.3 * Z @ Z.T / N) * D
    return A, np.diag(A).copy(), rng.standard_normal((N, 3)) / D[:, None]


class TestScales:
    """A positive definite matrix is not called singular because its entries are between 1e-20 and 1e20."""

    @pytest.mark.parametrize("count", [1, 5])
    @pytest.mark.parametrize("N", [10, 41, 100])
    def test_the_exact_diagonal_preconditioner_solves_a_diagonal_matrix_in_one_step(self, N: int, count: int) -> None:
        values, b = np.logspace(-20, 20, N), np.random.default_rng(N).standard_normal((N, count))
        result = solve(np.diag(values), b, 0.0, rtol=1e-8, preconditioner=np.diag(1 / values), progress=False)
        assert result.converged.all()
        assert result.solver == "cg"
        residuals = np.linalg.norm(values[:, None] * result.solution - b, axis=0) / np.linalg.norm(b, axis=0)
        assert residuals.max() <= 1.01e-8
        if count == 1:
            assert result.products.tolist() == [2]  # one step, and the true residual

    @pytest.mark.parametrize("decades", [18, 20, 30, 40])
    @pytest.mark.parametrize("N", [10, 41])
    def test_a_scaled_matrix_with_the_jacobi_preconditioner(self, N: int, decades: int) -> None:
        A, diagonal, x = scaled(N, decades)
        b = A @ x
        for sides in (b[:, 0], b):
            result = solve(A, sides, 0.0, preconditioner=np.diag(1 / diagonal), progress=False)
            assert np.all(result.converged)
            assert result.solver == "cg"
            found = np.linalg.norm(sides - A @ result.solution, axis=0) / np.linalg.norm(sides, axis=0)
            assert np.max(found) <= 1.01e-5
        assert result.products.max() < 25

    def test_jacobi_of_an_operator(self) -> None:
        values = np.logspace(-20, 20, 41)
        M = preconditioner.jacobi(np.diag(values), damping=1e-25)
        result = solve(np.diag(values), np.ones(41), 1e-25, rtol=1e-12, preconditioner=M, progress=False)
        assert (result.converged, result.solver, result.products) == (True, "cg", 2)

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_without_a_preconditioner(self, count: int) -> None:
        A, b = np.diag([1e18, 1.0, 2.0]), np.random.default_rng(1).standard_normal((3, count))
        result = solve(A, b, 0.0, rtol=1e-10, progress=False)
        assert result.converged.all()
        np.testing.assert_allclose(result.solution, b / np.diag(A)[:, None], rtol=1e-9)

    @pytest.mark.parametrize("count", [1, 4])
    def test_a_singular_matrix_is_still_called_singular(self, count: int) -> None:
        # The rounding errors of the products with the null space are as large as the curvature.
        A, b = matrix([*np.zeros(5), *np.logspace(0, 8, 20)]), np.random.default_rng(2).standard_normal((25, count))
        result = quietly(A, b)
        assert result.solver == "minres"
        assert result.negative_curvature is None
        assert not result.converged.any()

    @pytest.mark.parametrize("count", [1, 4])
    def test_an_indefinite_scaled_matrix_is_still_called_indefinite(self, count: int) -> None:
        A, diagonal, _ = scaled(20, 20)
        A[0, 0] *= -1
        b = np.random.default_rng(3).standard_normal((20, count)) * np.sqrt(diagonal)[:, None]
        assert quietly(A, b, preconditioner=np.diag(1 / diagonal)).solver == "minres"

    def test_no_column_takes_more_than_maxiter_steps(self) -> None:
        # The block stagnates, and its columns are continued one by one with the steps that are left.
        rng = np.random.default_rng(12)
        D, Q = 10 ** rng.uniform(-6, 6, 23), np.linalg.qr(rng.standard_normal((23, 23)))[0]
        A, b = D[:, None] * ((Q * np.logspace(-2, 0, 23)) @ Q.T) * D, rng.standard_normal((23, 8))
        changes, before = np.zeros(8, int), np.zeros((23, 8))

        def count(x: np.ndarray) -> None:
            nonlocal before
            changes[(x != before).any(0)] += 1
            before = x

        quietly((A + A.T) / 2, b, maxiter=27, callback=count)
        assert changes.max() <= 27

    def test_a_matrix_whose_squares_overflow_is_not_called_singular(self) -> None:
        A = 1e200 * matrix(np.linspace(1, 10, 20))
        with pytest.raises(ValueError, match="entries of A are too large for float64 arithmetic"):
            solve(A, np.ones(20), 0.0, progress=False)


class TestIllConditionedPreconditioners:
    """The true residual decides: residuals that have lost their orthogonality are not made small artificially."""

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_true_residuals(self, seed: int, count: int) -> None:
        rng = np.random.default_rng(seed)
        N = int(rng.integers(3, 12))
        Q, V = (np.linalg.qr(rng.standard_normal((N, N)))[0] for _ in range(2))
        A, M = (Q * np.logspace(0, -6, N)) @ Q.T, (V * np.logspace(0, -11, N)) @ V.T
        b = rng.standard_normal((N, count))
        result = quietly((A + A.T) / 2, b, rtol=1e-5, preconditioner=(M + M.T) / 2, maxiter=1000)
        found = np.linalg.norm(b - A @ result.solution, axis=0) / np.linalg.norm(b, axis=0)
        rounding = 1e-15 * np.linalg.norm(result.solution, axis=0) / np.linalg.norm(b, axis=0)
        assert (np.abs(result.residual - found) <= rounding + 1e-12).all()
        assert (found <= 1).all()
        assert (result.converged == (result.residual <= 1e-5)).all()
        if not result.converged.all():
            assert result.status == "stagnation"


class TestNeverWorseThanTheStart:
    @pytest.mark.parametrize("maxiter", [1, 2, 5, 10])
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("guess", [False, True])
    def test_the_residual_and_the_error(self, guess: bool, count: int, maxiter: int) -> None:
        # The residual of conjugate gradients grows in the first steps for this matrix.
        values = np.logspace(-6, 0, 50)
        A, rng = np.diag(values), np.random.default_rng(0)
        x = rng.standard_normal((50, count)) / values[:, None]
        b = A @ x
        x0 = x * (1 + 1e-4 * rng.standard_normal(x.shape)) if guess else np.zeros_like(x)
        result = quietly(A, b, rtol=1e-10, x0=x0 if guess else None, maxiter=maxiter)
        before = np.linalg.norm(b - A @ x0, axis=0) / np.linalg.norm(b, axis=0)
        found = np.linalg.norm(b - A @ result.solution, axis=0) / np.linalg.norm(b, axis=0)
        assert (found < before).all()
        np.testing.assert_allclose(result.residual, found, rtol=1e-8)
        errors = [np.einsum("ik,ij,jk->k", y - x, A, y - x) for y in (x0, result.solution)]
        assert (errors[1] < errors[0]).all()
