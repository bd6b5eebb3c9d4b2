"""Preconditioners satisfy their formulas and their bounds."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import loss_problem
from matrices import matrix, right_side
from scipy.sparse import diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, lobpcg

from curvop import (
    DiagonalLinearOperator,
    EFLinearOperator,
    EKFACLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    KFACLinearOperator,
    solve,
)
from curvop.operators.base import TensorLinearOperator
from curvop.preconditioner import jacobi, kfac, nystrom
from curvop.solvers import preconditioners
from curvop.testing.functorch_reference import functorch_ggn

DECAYING = 2.0 ** -np.arange(0, 60)


def condition(A: np.ndarray, M: LinearOperator, damping: float) -> float:
    """Return the condition number of the preconditioned damped matrix."""
    eigenvalues = np.linalg.eigvals((M @ np.eye(len(A))) @ (A + damping * np.eye(len(A)))).real
    return eigenvalues.max() / eigenvalues.min()


class TestNystrom:
    def test_the_formula(self) -> None:
        M = nystrom(matrix(DECAYING), 10, 1e-3, rng=0)
        U, values = M.vectors, M.values
        np.testing.assert_allclose(U.T @ U, np.eye(10), atol=1e-12)
        assert (np.diff(values) <= 0).all()
        assert (values >= 0).all()
        dense = (values[-1] + 1e-3) * U @ np.diag(1 / (values + 1e-3)) @ U.T + np.eye(60) - U @ U.T
        np.testing.assert_allclose(M @ np.eye(60), dense, atol=1e-12)
        np.testing.assert_allclose(M.H @ np.ones(60), dense @ np.ones(60), atol=1e-12)

    def test_leading_eigenpairs_are_found(self) -> None:
        M = nystrom(matrix(DECAYING), 20, 1e-3, rng=0)
        np.testing.assert_allclose(M.values[:10], DECAYING[:10], rtol=1e-3)

    def test_full_rank_is_the_inverse_up_to_a_factor(self) -> None:
        A = matrix(np.linspace(0.1, 1, 20))
        M = nystrom(A, 20, 1e-2, rng=0)
        assert condition(A, M, 1e-2) == pytest.approx(1, abs=1e-8)

    @pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
    def test_the_condition_is_bounded_above_twice_the_effective_dimension(self, damping: float) -> None:
        # Frangella, Tropp, Udell (2023), theorems 2.2 and 5.1: less than 28 on average.
        A = matrix(DECAYING)
        effective = (DECAYING / (DECAYING + damping)).sum()
        rank = int(2 * np.ceil(1.5 * effective) + 1)
        conditions = [condition(A, nystrom(A, rank, damping, rng=seed), damping) for seed in range(10)]
        assert np.mean(conditions) < 28

    def test_it_takes_one_block_product(self) -> None:
        calls = []
        A = matrix(DECAYING)

        class Counting(LinearOperator):
            def _matmat(self, X):
                calls.append(X.shape)
                return A @ X

        nystrom(Counting(np.float64, A.shape), 7, 1e-3)
        assert calls == [(60, 7)]

    def test_seeds(self) -> None:
        A = matrix(DECAYING)
        first, same, other = (nystrom(A, 5, 1e-3, rng=rng) for rng in (0, np.random.default_rng(0), 1))
        np.testing.assert_array_equal(first.vectors, same.vectors)
        assert not np.allclose(first.vectors, other.vectors)

    def test_cg_accepts_it(self) -> None:
        A, b = matrix(DECAYING), right_side(60)
        steps: list[int] = []
        M = nystrom(A, 30, 1e-4, rng=0)
        x, failed = cg(A + 1e-4 * np.eye(60), b, M=M, rtol=1e-10, callback=lambda _: steps.append(1))
        assert not failed
        assert len(steps) < 12
        np.testing.assert_allclose(A @ x + 1e-4 * x, b, atol=1e-8)

    @pytest.mark.parametrize("rank", [3, 20])
    def test_matrices_of_lower_rank(self, rank: int) -> None:
        A = matrix([3.0, 2.0, *np.zeros(28)])
        M = nystrom(A, rank, 0.1, rng=0)
        np.testing.assert_allclose(M.values[:2], [3, 2], rtol=1e-6)
        assert condition(A, M, 0.1) < 1.01

    def test_the_zero_matrix(self) -> None:
        M = nystrom(np.zeros((5, 5)), 2, 0.1)
        np.testing.assert_allclose(M @ np.eye(5), np.eye(5), atol=1e-14)

    def test_float32(self) -> None:
        A = matrix(DECAYING).astype(np.float32)
        M = nystrom(aslinearoperator(A), 20, 1e-3, rng=0)
        assert condition(A.astype(float), M, 1e-3) < 3
        tiny = nystrom(aslinearoperator(A), 20, 1e-9, rng=0)
        assert np.linalg.eigvalsh(tiny @ np.eye(60)).min() > 0

    def test_non_finite_products_are_refused(self) -> None:
        with pytest.raises(ValueError, match="not finite"):
            nystrom(np.full((5, 5), np.nan), 2, 1.0)

    def test_an_indefinite_matrix_is_refused(self) -> None:
        with pytest.raises(ValueError, match="A is indefinite"):
            nystrom(matrix([-1.0, *np.linspace(0, 1, 20)]), 15, 1e-2, rng=0)

    def test_arrays_and_tensors(self) -> None:
        M = nystrom(matrix(DECAYING), 10, 1e-3, rng=0)
        dense, X = M @ np.eye(60), np.random.default_rng(0).standard_normal((60, 3))
        assert isinstance(M, TensorLinearOperator)
        assert M.is_symmetric
        for side in (X, X[:, 0], X[:, :1], X[:, :0]):
            np.testing.assert_allclose(M @ side, dense @ side, atol=1e-12)
            product = M @ torch.from_numpy(side)
            assert isinstance(product, torch.Tensor)
            np.testing.assert_allclose(product, dense @ side, atol=1e-12)
        assert (M @ torch.ones(60)).dtype == torch.float32
        np.testing.assert_allclose(M @ (X + 1j), dense @ (X + 1j), atol=1e-12)
        np.testing.assert_allclose(pickle.loads(pickle.dumps(M)) @ X, M @ X, atol=1e-14)

    def test_tensors_and_arrays_give_the_same_preconditioner(self) -> None:
        problem = loss_problem("ce")
        G = GGNLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        here, there = nystrom(G, 12, 1e-3, rng=0), nystrom(G @ np.eye(43), 12, 1e-3, rng=0)
        np.testing.assert_allclose(here @ np.eye(43), there @ np.eye(43), atol=1e-9)


class TestAutomaticRank:
    @pytest.mark.parametrize("damping", [1e-1, 1e-4, 1e-7])
    def test_the_error_is_below_the_damping(self, damping: float) -> None:
        A = matrix(DECAYING)
        M = nystrom(A, "auto", damping, rng=0)
        approximation = M.vectors * M.values @ M.vectors.T
        assert np.linalg.norm(A - approximation, 2) <= 1.5 * damping
        # The bound of Frangella, Tropp, Udell (2023)
        bound = (M.values[-1] + damping + np.linalg.norm(A - approximation, 2)) / damping
        assert condition(A, M, damping) <= bound * (1 + 1e-6) < 4

    def test_products(self) -> None:
        calls = []
        A = matrix(np.r_[np.logspace(0, 4, 30), np.full(270, 1e-4)])

        class Counting(LinearOperator):
            def _matmat(self, X):
                calls.append(X.shape[1])
                return A @ X

            def _matvec(self, x):
                calls.append(1)
                return A @ x

        M = nystrom(Counting(np.float64, A.shape), "auto", 1e-2, rng=0)
        assert len(M.values) == 64
        assert [count for count in calls if count > 1] == [16, 16, 32]  # the first products are kept
        assert M.construction_products == sum(calls) <= 64 + 2 * 10

    def test_a_flat_spectrum_takes_all_columns(self) -> None:
        A = matrix(np.linspace(1, 2, 40))
        M = nystrom(A, "auto", 1e-3, rng=0)
        assert len(M.values) == 40
        assert condition(A, M, 1e-3) == pytest.approx(1, abs=1e-8)

    def test_memory_runs_out(self, monkeypatch) -> None:
        monkeypatch.setattr(preconditioners, "available_bytes", lambda device: 5 * 8 * 300_000 * 20)
        scales = 1 / np.arange(1.0, 300_001)
        A = diags_array(scales)
        with pytest.warns(RuntimeWarning, match="rank='auto' stopped at 20.*larger than the damping"):
            M = nystrom(A, "auto", 1e-6, rng=0)
        assert len(M.values) == 20
        assert M.error > 1e-6


class TestJacobi:
    def test_it_is_an_operator_of_this_package(self) -> None:
        M = jacobi(matrix(DECAYING), 0.1)
        assert isinstance(M, DiagonalLinearOperator)
        X = torch.ones(60, 2, dtype=torch.float64)
        np.testing.assert_allclose(M @ X, M @ X.numpy(), atol=1e-15)

    def test_exact_if_there_are_enough_products(self) -> None:
        A = matrix(DECAYING)
        np.testing.assert_allclose(jacobi(A, 0.1) @ np.eye(60), np.diag(1 / (np.diag(A) + 0.1)), atol=1e-14)
        np.testing.assert_allclose(pickle.loads(pickle.dumps(jacobi(A, 0.1))) @ np.ones(60), 1 / (np.diag(A) + 0.1))

    def test_an_estimate_needs_no_arrays(self) -> None:
        A = matrix(np.r_[np.logspace(0, 2, 10), np.zeros(290)])

        class OnlyTensors(TensorLinearOperator):
            takes_tensors = True

            def _apply(self, rows):
                assert isinstance(rows, torch.Tensor)
                return rows @ torch.from_numpy(A)

        M = jacobi(OnlyTensors(np.float64, A.shape), 0.1, num_products=40, rng=0)  # XDiag is exact for a low rank
        np.testing.assert_allclose(M @ np.ones(300), 1 / (np.diag(A) + 0.1), rtol=1e-10)
        with pytest.raises(ValueError, match="num_products is 1"):
            jacobi(OnlyTensors(np.float64, A.shape), 0.1, num_products=1)

    def test_non_finite_products_are_refused(self) -> None:
        for size in (5, 100):
            with pytest.raises(ValueError, match="not finite"):
                jacobi(np.full((size, size), np.nan), 1.0)

    def test_large_diagonals_are_estimated(self) -> None:
        scales = np.concatenate([np.full(20, 100.0), np.full(1181, 1e-2)])
        A = LinearOperator((1201, 1201), matmat=lambda X: scales[:, None] * X, matvec=lambda x: scales * x, dtype=float)
        ratios = (jacobi(A, 1e-2, num_products=80, rng=0) @ np.ones(1201)) * (scales + 1e-2)
        np.testing.assert_allclose(ratios[:20], 1, rtol=1e-3)
        assert np.median(np.abs(ratios - 1)) < 0.1

    def test_scales_of_parameters_are_removed(self) -> None:
        scale = np.logspace(-3, 3, 60)
        A = scale[:, None] * matrix(np.linspace(0.5, 1, 60)) * scale
        assert condition(A, jacobi(A, 1e-9), 1e-9) < 10 < np.linalg.cond(A)


@pytest.mark.parametrize("make", [jacobi, lambda A, damping: nystrom(A, 1, damping)])
@pytest.mark.parametrize(
    ("A", "damping", "match"),
    [
        (np.ones((2, 3)), 1.0, "must be square"),
        (np.eye(2), 0.0, "damping is 0"),
        (np.eye(2), np.nan, "damping is nan"),
    ],
)
def test_bad_input(make, A, damping, match) -> None:
    with pytest.raises(ValueError, match=match):
        make(A, damping)


@pytest.mark.parametrize("rank", [0, 3, "all"])
def test_bad_ranks(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank!r}"):
        nystrom(np.eye(2), rank, 1.0)


class TestKfac:
    """The inverse of the approximation of an existing operator."""

    @pytest.mark.parametrize("ekfac", [True, False])
    def test_the_inverse_of_the_damped_approximation(self, ekfac: bool) -> None:
        problem = loss_problem("ce")
        args = problem.model, problem.loss_function, problem.params, problem.data
        G = GGNLinearOperator(*args)
        M = kfac(G, 0.1, ekfac=ekfac)
        K = (EKFACLinearOperator if ekfac else KFACLinearOperator)(*args)
        inverse = np.linalg.inv(K @ np.eye(len(K.diagonal())) + 0.1 * np.eye(G.shape[0]))
        np.testing.assert_allclose(M @ np.eye(G.shape[0]), inverse, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(kfac(K, 0.1) @ np.ones(G.shape[0]), M @ np.ones(G.shape[0]), rtol=1e-12)
        b = np.random.default_rng(0).standard_normal(G.shape[0])
        result = solve(G, b, 0.1, preconditioner=M, rtol=1e-10, progress=False)
        np.testing.assert_allclose(G @ result.solution + 0.1 * result.solution, b, atol=1e-8)

    @pytest.mark.parametrize(
        ("operator", "fisher", "options"),
        [
            (GGNLinearOperator, "type-2", {}),
            (EFLinearOperator, "empirical", {}),
            (FisherLinearOperator, "mc", {"mc_samples": 2, "rng": 5}),
        ],
    )
    def test_an_approximation_knows_its_exact_matrix(
        self, operator: type, fisher: str, options: dict[str, int]
    ) -> None:
        problem = loss_problem("ce")
        args = problem.model, problem.loss_function, problem.params, problem.data
        A, K = operator(*args, **options), KFACLinearOperator(*args, fisher=fisher, **options)
        x = np.random.default_rng(0).standard_normal(A.shape[0])
        assert type(K.exact) is operator
        np.testing.assert_allclose(K.exact @ x, A @ x, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(KFACLinearOperator.of(A) @ x, K @ x, rtol=1e-12, atol=1e-14)

    def test_blocks(self) -> None:
        problem = loss_problem("ce")
        G = GGNLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        names = list(problem.params)[2:]
        block = G.block(names)
        K = KFACLinearOperator.of(block)
        assert list(K.params_slices) == names
        x = np.random.default_rng(0).standard_normal(block.shape[0])
        np.testing.assert_allclose(K @ x, KFACLinearOperator.of(G).block(names) @ x, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(K.exact @ x, block @ x, rtol=1e-12, atol=1e-14)
        with pytest.raises(ValueError, match="a block off the diagonal"):
            KFACLinearOperator.of(G.block(names[:1], names[1:]))

    def test_wrong_arguments(self) -> None:
        problem = loss_problem("ce")
        args = problem.model, problem.loss_function, problem.params, problem.data
        for operator in (HessianLinearOperator, GradientCovarianceLinearOperator):
            with pytest.raises(TypeError, match=f"A is a {operator.__name__}: pass a GGNLinearOperator"):
                kfac(operator(*args), 0.1)
        with pytest.raises(ValueError, match="damping is 0, but must be positive"):
            kfac(GGNLinearOperator(*args), 0)

    def test_warnings_point_at_the_call(self) -> None:
        """Parameters without Kronecker factors are listed in a warning."""
        torch.manual_seed(0)
        params = {"W": torch.randn(3, 4).double(), "scale": torch.ones(3).double()}
        data = [(torch.randn(9, 4).double(), torch.randn(9, 3).double())]
        model = lambda params, X: torch.nn.functional.linear(X, params["W"]) * params["scale"]  # noqa: E731
        G = GGNLinearOperator(model, torch.nn.MSELoss(), params, data)
        for call in (lambda: kfac(G, 0.1), lambda: KFACLinearOperator.of(G)):
            with pytest.warns(RuntimeWarning, match="exact blocks: 'scale'") as caught:
                call()
            assert {warning.filename for warning in caught} == {__file__}


def exact_problem() -> tuple[GGNLinearOperator, np.ndarray]:
    """Return the Gauss-Newton matrix of one layer and the squared error, for which KFAC is exact, and its entries."""
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 2).double()
    X = torch.randn(100, 30).double() * torch.logspace(0, -2, 30)
    problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, torch.randn(100, 2).double())]
    return GGNLinearOperator(*problem), functorch_ggn(*problem).numpy()


def network_problem() -> tuple[GGNLinearOperator, np.ndarray]:
    problem = loss_problem("ce")
    problem = problem.model, problem.loss_function, problem.params, problem.data
    return GGNLinearOperator(*problem), functorch_ggn(*problem).numpy()


@pytest.mark.parametrize("make", [exact_problem, network_problem])
class TestSolversWithKfac:
    DAMPING = 1e-3

    def test_cg_of_scipy(self, make: Callable[[], Any]) -> None:
        G, dense = make()
        b = np.random.default_rng(0).standard_normal(len(dense))
        steps = []
        for M in (None, kfac(G, self.DAMPING)):
            norms: list[int] = []
            x, info = cg(G.damped(self.DAMPING), b, M=M, rtol=1e-12, callback=lambda x, norms=norms: norms.append(1))
            assert info == 0
            np.testing.assert_allclose(dense @ x + self.DAMPING * x, b, atol=1e-9)
            steps.append(len(norms))
        if make is exact_problem:
            assert steps[1] <= 2 < steps[0] / 5

    def test_many_right_hand_sides(self, make: Callable[[], Any]) -> None:
        G, dense = make()
        B = np.random.default_rng(0).standard_normal((len(dense), 7))
        results = [
            solve(G, B, self.DAMPING, preconditioner=M, rtol=1e-10, progress=False)
            for M in (None, kfac(G, self.DAMPING))
        ]
        expected = np.linalg.solve(dense + self.DAMPING * np.eye(len(dense)), B)
        for result in results:
            assert result.converged.all()
            np.testing.assert_allclose(result.solution, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        if make is exact_problem:
            assert results[1].products.sum() <= 2 * 7 < results[0].products.sum() / 2

    def test_the_smallest_eigenvalues_by_lobpcg(self, make: Callable[[], Any]) -> None:
        G, dense = make()
        A, values = G.damped(self.DAMPING), np.linalg.eigvalsh(dense) + self.DAMPING
        X = np.random.default_rng(0).standard_normal((len(dense), 4))
        options = {"tol": 1e-8, "largest": False}
        found, _ = lobpcg(A, X.copy(), M=kfac(G, self.DAMPING), maxiter=40, **options)  # unconverged, it would warn
        np.testing.assert_allclose(np.sort(found), values[:4], rtol=1e-6)
        if make is exact_problem:
            with pytest.warns(UserWarning, match="not reaching the requested tolerance"):
                lobpcg(A, X.copy(), maxiter=400, **options)
