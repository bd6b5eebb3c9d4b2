"""The inverse operator: products with it against dense inverses, and what it does if a solve fails."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from matrices import matrix
from scipy.sparse.linalg import aslinearoperator, eigsh
from torch import nn

from curvop import (
    DiagonalLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    InverseLinearOperator,
    JacobianLinearOperator,
    NotConvergedError,
    preconditioner,
    solve,
)

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
DATA = [(torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,)))]
PARAMS = dict(MODEL.named_parameters())
G = GGNLinearOperator(MODEL, nn.CrossEntropyLoss(), PARAMS, DATA)
H = HessianLinearOperator(MODEL, nn.CrossEntropyLoss(), PARAMS, DATA)
J = JacobianLinearOperator(MODEL, PARAMS, DATA)
P = G.shape[0]
DENSE = G @ np.eye(P)
INVERSE = np.linalg.inv(DENSE + 0.1 * np.eye(P))


def inverse(**options: Any) -> InverseLinearOperator:
    return InverseLinearOperator(G, 0.1, **({"rtol": 1e-12} | options))


class TestProducts:
    def test_arrays_tensors_and_columns(self) -> None:
        A = inverse()
        X = np.random.default_rng(0).normal(size=(P, 3))
        for B in (A, A.T, A.H):
            np.testing.assert_allclose(B @ X, INVERSE @ X, atol=1e-10)
            np.testing.assert_allclose(B @ X[:, 0], INVERSE @ X[:, 0], atol=1e-10)
            np.testing.assert_allclose(B @ torch.from_numpy(X), INVERSE @ X, atol=1e-10)
            assert (B @ X[:, :0]).shape == (P, 0)
        assert (A @ torch.ones(P)).dtype == torch.float32
        assert A.is_symmetric
        assert A.T is A

    def test_the_true_residuals_are_kept(self) -> None:
        A = inverse(rtol=1e-6)
        X = np.random.default_rng(0).normal(size=(P, 2))
        solutions = A @ X
        assert len(A.last) == 2
        for column, result in enumerate(A.last):
            rest = X[:, column] - DENSE @ solutions[:, column] - 0.1 * solutions[:, column]
            residual = np.linalg.norm(rest) / np.linalg.norm(X[:, column])
            assert residual <= 1e-6
            assert abs(result.residual - residual) <= 1e-12
            assert result.converged

    def test_it_composes(self) -> None:
        covariance = J @ inverse() @ J.T
        jacobian = J @ np.eye(P)
        np.testing.assert_allclose(covariance.to_dense(), jacobian @ INVERSE @ jacobian.T, atol=1e-9)
        assert covariance.is_symmetric
        A = G @ inverse()
        np.testing.assert_allclose(A @ np.ones(P), DENSE @ INVERSE @ np.ones(P), atol=1e-10)
        np.testing.assert_allclose((inverse() + G) @ np.ones(P), (INVERSE + DENSE) @ np.ones(P), atol=1e-10)

    def test_blocks_are_blocks_of_the_inverse(self) -> None:
        where = G.params_slices["2.weight"]
        block = inverse().block("2.weight")
        np.testing.assert_allclose(block @ np.eye(block.shape[1]), INVERSE[where, where], atol=1e-10)
        assert block.params_slices == {"2.weight": slice(0, 8)}
        rows = [3, 20]
        np.testing.assert_allclose(inverse()[rows, :][:, rows] @ np.eye(2), INVERSE[np.ix_(rows, rows)], atol=1e-10)
        product = inverse() @ dict(PARAMS)
        assert {name: part.shape for name, part in product.items()} == {n: p.shape for n, p in PARAMS.items()}

    def test_operators_of_scipy_and_preconditioners(self) -> None:
        S = matrix(np.logspace(-2, 2, 30))
        A = InverseLinearOperator(aslinearoperator(S), 0.0, rtol=1e-12)
        np.testing.assert_allclose(A @ np.ones(30), np.linalg.solve(S, np.ones(30)), rtol=1e-8, atol=1e-8)
        M = preconditioner.nystrom(aslinearoperator(S), 10, damping=0.5, rng=0)
        fast, slow = (InverseLinearOperator(S, 0.5, rtol=1e-10, preconditioner=p) for p in (M, None))
        np.testing.assert_allclose(fast @ np.ones(30), slow @ np.ones(30), atol=1e-8)
        assert fast.last[0].products < slow.last[0].products

    def test_the_smallest_eigenvalue_by_the_inverse(self) -> None:
        largest = eigsh(inverse(), k=1, which="LM", return_eigenvectors=False)[0]
        assert abs(1 / largest - 0.1 - np.linalg.eigvalsh(DENSE)[0]) < 1e-9

    def test_counting(self) -> None:
        A = inverse()
        before = G.num_products
        A @ np.ones((P, 2))
        assert A.num_products == 2
        assert G.num_products - before == sum(result.products for result in A.last)

    def test_it_pickles(self) -> None:
        A = pickle.loads(pickle.dumps(inverse()))
        np.testing.assert_allclose(A @ np.ones(P), INVERSE @ np.ones(P), atol=1e-10)


class TestFailures:
    def test_the_error_has_the_best_solution(self) -> None:
        A = inverse(rtol=1e-10, maxiter=2)
        with pytest.raises(NotConvergedError, match=r"2 of 2 columns: not converged.*increase maxiter") as caught:
            A @ np.eye(P)[:, :2]
        assert caught.value.solution.shape == (P, 2)
        assert caught.value.results is A.last
        rest = np.eye(P)[:, 0] - DENSE @ caught.value.solution[:, 0] - 0.1 * caught.value.solution[:, 0]
        assert abs(np.linalg.norm(rest) - A.last[0].residual) < 1e-12
        again = pickle.loads(pickle.dumps(caught.value))
        assert str(again) == str(caught.value)

    def test_the_remedy_fits_the_reason(self) -> None:
        A = InverseLinearOperator(aslinearoperator(matrix([0.0, *np.logspace(-6, 0, 20)])), 1e-13, rtol=1e-15)
        with pytest.raises(NotConvergedError, match=r"rounding errors.*larger damping or rtol") as caught:
            A @ np.ones(21)
        assert "maxiter" not in str(caught.value)
        assert str(caught.value).endswith("contains the best solutions; on_failure='warn' returns them")

    def test_or_it_warns(self) -> None:
        A = inverse(rtol=1e-10, maxiter=2, on_failure="warn")
        with pytest.warns(RuntimeWarning, match="not converged"):
            x = A @ np.ones(P)
        assert x.shape == (P,)

    def test_an_indefinite_matrix_is_warned_of(self) -> None:
        A = InverseLinearOperator(H, -0.001, rtol=1e-6)
        with pytest.warns(RuntimeWarning, match="indefinite"):
            x = A @ np.ones(P)
        np.testing.assert_allclose(H @ x - 0.001 * x, np.ones(P), atol=1e-4)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"on_failure": "ignore"}, ValueError, "on_failure is 'ignore'"),
            ({"rtol": 2}, ValueError, "rtol is 2"),
            ({"maxiter": 0}, ValueError, "maxiter is 0"),
            ({"preconditioner": np.eye(2)}, ValueError, "preconditioner has shape"),
        ],
    )
    def test_bad_input(self, options: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            inverse(**options)
        with pytest.raises(ValueError, match=r"A has shape \(18, 26\), but must be square"):
            InverseLinearOperator(J, 0.1)

    def test_a_matrix_that_is_not_symmetric_is_refused(self) -> None:
        D = DiagonalLinearOperator(np.linspace(1, 2, P))
        A = InverseLinearOperator(D @ G, 1.0)
        with pytest.raises(ValueError, match="A is not symmetric"):
            A @ np.ones(P)
        S = InverseLinearOperator(aslinearoperator(DENSE), torch.tensor(1.0), rtol=1e-10)
        np.testing.assert_allclose(S @ np.ones(P), np.linalg.solve(DENSE + np.eye(P), np.ones(P)), atol=1e-8)

    def test_the_results_are_those_of_the_last_product(self) -> None:
        A = inverse()
        A @ np.ones((P, 2))
        A @ np.ones((P, 0))
        assert A.last == []

    def test_it_agrees_with_solve(self) -> None:
        b = np.arange(P) / P
        result = solve(G, b, damping=0.1, rtol=1e-8, progress=False)
        np.testing.assert_array_equal(inverse(rtol=1e-8) @ b, result.solution)
