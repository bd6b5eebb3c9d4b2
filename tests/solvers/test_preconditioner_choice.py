"""``preconditioner="auto"`` measures on real blocks of columns, and takes what needs fewer products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import loss_problem
from matrices import matrix
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

from curvop import DiagonalLinearOperator, GGNLinearOperator, KFACLinearOperator, SolveResult, solve
from curvop.operators.fisher import GradientCovarianceLinearOperator
from curvop.solvers import linear_solve
from curvop.testing.functorch_reference import functorch_ggn

RNG = np.random.default_rng(0)
#: Forty large eigenvalues that one block cannot find, above many small ones.
OUTLIERS = matrix(np.r_[np.logspace(1, 4, 40), RNG.uniform(0, 1e-2, 160)])


def auto(
    A: LinearOperator, B: np.ndarray, monkeypatch: pytest.MonkeyPatch, width: int, **options: object
) -> SolveResult:
    """Solve blocks of `width` columns."""
    monkeypatch.setattr(linear_solve, "_MAX_BLOCK", width)
    return solve(A, B, 1.0, preconditioner="auto", progress=False, **options)


def assert_solved(A: LinearOperator, B: np.ndarray, result: SolveResult, rtol: float = 1e-5) -> None:
    dense = A @ np.eye(len(B)) + np.eye(len(B))
    residuals = np.linalg.norm(B - dense @ result.solution, axis=0) / np.linalg.norm(B, axis=0)
    np.testing.assert_allclose(result.residual, residuals, rtol=1e-3, atol=1e-12)
    assert (residuals <= rtol).all()
    assert result.converged.all()


def test_outliers_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    B = RNG.standard_normal((200, 60))
    result = auto(OUTLIERS, B, monkeypatch, 2)
    assert_solved(OUTLIERS, B, result)
    assert result.preconditioner.startswith("nystrom(")
    assert "with none" in result.preconditioner
    assert str(result).endswith(result.preconditioner)
    assert result.products[4:].mean() < result.products[:2].mean() / 2
    assert result.products.shape == (60,)


def test_a_preconditioner_that_does_not_pay_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    A = matrix(RNG.uniform(1, 2, 200))
    B = RNG.standard_normal((200, 60))
    result = auto(A, B, monkeypatch, 2)
    assert_solved(A, B, result)
    assert result.preconditioner.startswith("none; products per column")


def test_outliers_are_kept_if_few_blocks_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    B = RNG.standard_normal((200, 16))
    result = auto(OUTLIERS, B, monkeypatch, 2)
    assert_solved(OUTLIERS, B, result)
    assert "nystrom" not in result.preconditioner
    more = auto(OUTLIERS, RNG.standard_normal((200, 18)), monkeypatch, 2)
    assert "with nystrom" in more.preconditioner


def test_scales_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = DiagonalLinearOperator(np.logspace(0, 3, 200))
    A = scales @ DiagonalLinearOperator(np.ones(200)) @ scales
    B = RNG.standard_normal((200, 12))
    result = auto(A, B, monkeypatch, 2)
    assert_solved(A, B, result)
    assert result.preconditioner.startswith("jacobi")


def test_a_trial_of_kfac_that_fails_takes_four_products(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = loss_problem("ce")
    G = GGNLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
    B = RNG.standard_normal((G.shape[0], 12))
    monkeypatch.setattr(linear_solve, "_MAX_BLOCK", 2)
    plain = solve(G, B, 1e-2, progress=False)
    before = G.num_products
    result = solve(G, B, 1e-2, preconditioner="auto", progress=False)
    np.testing.assert_allclose(result.solution, plain.solution, rtol=1e-11)  # repeated products are rounded differently
    assert "of one column after 3 steps with kfac" in result.preconditioner
    assert G.num_products - before == result.products.sum() == plain.products.sum() + 4


def test_an_exact_inverse_of_kfac_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gauss-Newton matrix of one linear layer and the squared error is a Kronecker product."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 3).double()
    X = torch.randn(200, 40).double() * torch.logspace(0, -2, 40)
    problem = model, torch.nn.MSELoss(), dict(model.named_parameters()), [(X, torch.randn(200, 3).double())]
    G = GGNLinearOperator(*problem)
    B = RNG.standard_normal((G.shape[0], 12))
    monkeypatch.setattr(linear_solve, "_MAX_BLOCK", 2)
    result = solve(G, B, 1e-4, preconditioner="auto", progress=False)
    expected = np.linalg.solve(functorch_ggn(*problem).numpy() + 1e-4 * np.eye(G.shape[0]), B)
    assert (np.linalg.norm(result.solution - expected, axis=0) <= 1e-3 * np.linalg.norm(expected, axis=0)).all()
    assert result.preconditioner.startswith("kfac")
    assert result.products[:2].min() > 10
    assert result.products[4:].max() <= 2


def test_one_block_is_not_measured() -> None:
    B = RNG.standard_normal((200, 5))
    result = solve(OUTLIERS, B, 1.0, preconditioner="auto", progress=False)
    plain = solve(OUTLIERS, B, 1.0, progress=False)
    np.testing.assert_array_equal(result.solution, plain.solution)
    assert result.preconditioner.startswith("none, and nothing was measured")
    assert plain.preconditioner == ""
    vector = solve(OUTLIERS, B[:, 0], 1.0, preconditioner="auto", progress=False)
    assert isinstance(vector.residual, float)


def linear_problem(loss: nn.Module, targets: torch.Tensor, scale: float = 1.0) -> GGNLinearOperator:
    """Return the matrix of one linear layer, whose inputs have very different scales."""
    inputs = torch.from_numpy(np.random.default_rng(1).standard_normal((200, 60)) * np.logspace(0, -2, 60))
    model = nn.Linear(60, 3).double()
    with torch.no_grad():
        model.weight.copy_(scale * torch.from_numpy(np.random.default_rng(2).standard_normal((3, 60))))
    return GGNLinearOperator(model, loss, dict(model.named_parameters()), [(inputs, targets)])


def test_maxiter_limits_the_steps_and_not_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # For nearly uniform predictions, the approximation is almost exact, and a few steps are sufficient.
    G = linear_problem(nn.CrossEntropyLoss(), torch.from_numpy(RNG.integers(3, size=200)), scale=1e-3)
    monkeypatch.setattr(linear_solve, "_MAX_BLOCK", 30)
    B = RNG.standard_normal((G.shape[0], 90))
    result = solve(G, B, 1e-6, preconditioner="auto", maxiter=25, progress=False)
    assert result.converged.all()
    assert result.preconditioner.startswith("kfac; ")
    assert result.products[30:60].sum() > 2 * 30  # a single step and the residuals would not be sufficient


@pytest.mark.parametrize("columns", [1, 3])
def test_kfac_is_used_for_one_block_if_it_is_almost_the_inverse(columns: int) -> None:
    """For a linear layer and a squared error, it is the inverse."""
    G = linear_problem(nn.MSELoss(), torch.zeros(200, 3).double())
    B = RNG.standard_normal((G.shape[0], columns))
    result = solve(G, B, 1e-6, preconditioner="auto", progress=False)
    assert result.products.sum() == G.num_products
    plain = solve(G, B, 1e-6, progress=False)
    assert result.preconditioner.startswith("kfac; relative residual ")
    assert result.products.sum() < 0.7 * plain.products.sum()
    expected = np.linalg.solve(G @ np.eye(len(B)) + 1e-6 * np.eye(len(B)), B)
    np.testing.assert_allclose(result.solution, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    residuals = np.linalg.norm(B - G @ result.solution - 1e-6 * result.solution, axis=0) / np.linalg.norm(B, axis=0)
    np.testing.assert_allclose(result.residual, residuals, rtol=1e-3, atol=1e-12)
    assert (residuals <= 1e-5).all()


def test_a_failed_trial_does_not_change_the_solution() -> None:
    # The approximation is poor if the predictions are confident.
    G = linear_problem(nn.CrossEntropyLoss(), torch.from_numpy(RNG.integers(3, size=200)), scale=30.0)
    B = RNG.standard_normal((G.shape[0], 2))
    result = solve(G, B, 1e-6, preconditioner="auto", progress=False)
    assert result.products.sum() == G.num_products
    plain = solve(G, B, 1e-6, progress=False)
    assert result.preconditioner.startswith("none; relative residual ")
    np.testing.assert_array_equal(result.solution, plain.solution)
    assert result.products.sum() == plain.products.sum() + 4


@pytest.mark.parametrize("columns", [1, 12])
def test_the_trial_computes_no_exact_blocks(columns: int, recwarn: pytest.WarningsRecorder) -> None:
    """The exact block of the scales would take 300 products, more than the solve of one column."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.ones(300))
            self.hidden, self.out = nn.Linear(20, 300), nn.Linear(300, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.scales * self.hidden(x))

    torch.manual_seed(0)
    model, calls = Scaled().double(), []
    original = KFACLinearOperator._other_blocks
    data = [(torch.randn(50, 20).double(), torch.randn(50, 3).double())]
    G = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KFACLinearOperator, "_other_blocks", lambda *args: calls.append(original(*args)))
        patch.setattr(linear_solve, "_MAX_BLOCK", max(1, columns // 4))
        result = solve(G, RNG.standard_normal((G.shape[0], columns)), 1e-4, preconditioner="auto", progress=False)
    assert result.converged.all()
    assert not calls
    assert not recwarn.list
    assert result.products.sum() == G.num_products


@pytest.mark.parametrize("columns", [1, 12])
def test_a_matrix_without_factors_is_solved(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = loss_problem("ce")
    A = GradientCovarianceLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
    B = RNG.standard_normal((A.shape[0], columns))
    monkeypatch.setattr(linear_solve, "_MAX_BLOCK", max(1, columns // 4))
    damping = 1e-8 * np.trace(A @ np.eye(len(B)))
    result = solve(A, B, damping, preconditioner="auto", progress=False)
    assert result.preconditioner.startswith("none")
    assert result.converged.all()


def test_a_short_solve_is_not_interrupted() -> None:
    G = linear_problem(nn.MSELoss(), torch.zeros(200, 3).double())
    result = solve(G, RNG.standard_normal(G.shape[0]), 1e-1, preconditioner="auto", progress=False)
    assert result.products < 16
    assert result.preconditioner.startswith("none, and nothing was measured, because the solve took less than 16 steps")


def test_an_indefinite_matrix_is_solved_without(monkeypatch: pytest.MonkeyPatch) -> None:
    A = matrix(np.r_[np.linspace(1, 2, 40), -3.0])
    with pytest.warns(RuntimeWarning, match="indefinite"):
        result = auto(A, RNG.standard_normal((41, 6)), monkeypatch, 2)
    assert result.converged.all()
    assert result.preconditioner == "none, because the matrix is not known to be positive definite"


@pytest.fixture
def wrong_diagonal(monkeypatch: pytest.MonkeyPatch) -> LinearOperator:
    """Return a matrix for which the inverse of its pretended diagonal is useless."""
    values = np.r_[np.logspace(1, 4, 40), RNG.uniform(0, 1e-2, 160)]
    Q = np.linalg.qr(RNG.standard_normal((200, 200)))[0]
    A = DiagonalLinearOperator(np.ones(200)) @ aslinearoperator((Q * values) @ Q.T)
    monkeypatch.setattr(type(A), "diagonal", lambda self: np.logspace(-3, 3, 200), raising=False)
    return A


def test_a_worse_preconditioner_leaves_no_unsolved_columns(
    wrong_diagonal: LinearOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block is solved with what was best before."""
    A = wrong_diagonal
    B = RNG.standard_normal((200, 60))
    result = auto(A, B, monkeypatch, 2)
    assert_solved(A, B, result)
    assert "with jacobi, unfinished" in result.preconditioner
    assert result.preconditioner.startswith("nystrom(")


def test_the_block_of_a_worse_preconditioner_is_solved_from_zero(
    wrong_diagonal: LinearOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    B = RNG.standard_normal((200, 12))
    result = auto(wrong_diagonal, B, monkeypatch, 4)
    assert result.preconditioner.startswith("none; ")
    assert "with jacobi, unfinished" in result.preconditioner
    fresh = solve(wrong_diagonal, B[:, 4:8], 1.0, progress=False)
    np.testing.assert_allclose(result.solution[:, 4:8], fresh.solution, rtol=1e-10)
    # A trial takes at most as many products as the first block, and one more for each residual.
    assert result.products[4:8].sum() <= fresh.products.sum() + result.products[:4].sum() + 4


def test_wrong_arguments() -> None:
    B = RNG.standard_normal((200, 2))
    with pytest.raises(ValueError, match="takes no callback and no x0"):
        solve(OUTLIERS, B, 1.0, preconditioner="auto", x0=B, progress=False)
    with pytest.raises(ValueError, match="must be an operator"):
        solve(OUTLIERS, B, 1.0, preconditioner="best", progress=False)
