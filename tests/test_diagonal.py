"""Exact diagonals: what they take, what is refused rather than wrong; their values are in every operator's tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import close
from cases import Problem, cut, seeded
from sklearn.datasets import load_digits
from torch import Tensor, nn

from curvop import EFLinearOperator, FisherLinearOperator, GGNLinearOperator, GradientCovarianceLinearOperator, solve
from curvop.kernels import diagonal
from curvop.kernels.errors import NonFiniteProductError
from curvop.preconditioner import jacobi


def build(operator, problem: Problem, **options):
    return operator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def of_dense(A) -> np.ndarray:
    return np.diagonal(A @ np.eye(A.shape[1]))


@seeded
def mlp_problem(loss=None, make=None) -> Problem:
    model = make() if make else nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    y = torch.tensor([0, 2, -100, 1, 1, 0, -100, -100, -100])
    return Problem(model, loss or nn.CrossEntropyLoss(), cut(torch.randn(9, 4), y, (6, 3)))


def digits(dtype: torch.dtype) -> Problem:
    X, y = load_digits(return_X_y=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).to(dtype)
    return Problem(model, nn.CrossEntropyLoss(), cut(torch.tensor(X, dtype=dtype) / 16, torch.tensor(y), (1000, 797)))


@seeded
def regression(scales: Tensor) -> Problem:
    """A least-squares problem of more than 1000 unknowns, whose inputs differ in scale."""
    data = cut(torch.randn(500, 64) * scales, torch.randn(500, 20), (300, 200))
    return Problem(nn.Linear(64, 20), nn.MSELoss(), data)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        (GGNLinearOperator, {}),
        (EFLinearOperator, {}),
        (GradientCovarianceLinearOperator, {}),
        (FisherLinearOperator, {"mc_samples": 4, "rng": 0}),
    ],
)
def test_digits_in_float32(operator, options) -> None:
    A = build(operator, digits(torch.float32), **options)
    found = A.diagonal()
    assert found.dtype == A.dtype
    assert A.num_products == 0
    np.testing.assert_allclose(found, of_dense(A), rtol=1e-4, atol=1e-6 * found.max())


def test_a_few_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    G = build(GGNLinearOperator, mlp_problem())
    expected = G.diagonal()
    monkeypatch.setattr(diagonal, "_ENTRIES", 100)  # two
    close(G.diagonal(), expected)


@pytest.mark.parametrize("operator", [GGNLinearOperator, GradientCovarianceLinearOperator])
def test_it_follows_the_parameters(operator) -> None:
    problem = mlp_problem()
    A = build(operator, problem)
    A.diagonal(), of_dense(A)
    with torch.no_grad():
        problem.params["2.weight"].mul_(3)
    close(A.diagonal(), of_dense(A))
    with torch.no_grad():
        problem.params["2.weight"].div_(3)
    close(A.diagonal(), of_dense(A))


def test_a_loss_that_is_not_convex() -> None:
    G = build(GGNLinearOperator, mlp_problem(lambda z, y: z.sin().square().sum(1).mean()))
    assert G.diagonal().min() < 0
    close(G.diagonal(), of_dense(G))


def coupled(z: Tensor, y: Tensor) -> Tensor:
    return (z @ z.T).square().mean()


class Shared(nn.Module):
    """An input that is not cut into examples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, X: tuple[Tensor, Tensor]) -> Tensor:
        return X[0] @ (X[1] * self.weight).tanh()


class InDerivatives(nn.Linear):
    """Values that do not depend on the other examples, and gradients that do."""

    def forward(self, X: Tensor) -> Tensor:
        z = super().forward(X)
        mean = z.mean(0)
        return z + mean - mean.detach()


class TestRefuses:
    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: mlp_problem(coupled), "the loss couples its examples"),
            (lambda: mlp_problem(None, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))), "the model"),
            (lambda: mlp_problem(None, lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout())), "the model"),
            (
                lambda: mlp_problem(
                    None, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
                ),
                "the model",
            ),
            (lambda: mlp_problem(None, lambda: InDerivatives(4, 3)), "in their derivatives"),
            (lambda: mlp_problem(None, lambda: nn.Linear(4, 300)), "300 outputs, more than 256"),
        ],
    )
    def test_what_cannot_be_taken_apart(self, make, match: str) -> None:
        with pytest.raises(NotImplementedError, match=match):
            build(GGNLinearOperator, make()).diagonal()

    def test_inputs_without_examples(self) -> None:
        data = [((torch.ones(5, 4), torch.ones(4, 3)), torch.zeros(5, 3))]
        with pytest.raises(NotImplementedError, match="first dimensions"):
            build(GGNLinearOperator, Problem(Shared(), nn.MSELoss(), data)).diagonal()

    def test_a_block_off_the_diagonal(self) -> None:
        with pytest.raises(ValueError, match="off the diagonal"):
            build(GGNLinearOperator, mlp_problem()).block("0.weight", "2.weight").diagonal()

    def test_what_is_not_finite(self) -> None:
        problem = mlp_problem()
        problem.data[0][0][0, 0] = torch.nan
        with pytest.raises((NonFiniteProductError, NotImplementedError)):
            build(GGNLinearOperator, problem).diagonal()


class TestJacobi:
    def test_many_rows_are_exact_without_a_product(self) -> None:
        G = build(GGNLinearOperator, digits(torch.float64))
        M = jacobi(G, 1e-3)
        assert G.num_products == 0
        close(M @ np.ones(G.shape[0]), 1 / (of_dense(G) + 1e-3))

    def test_it_estimates_what_has_no_exact_one(self) -> None:
        G = build(GGNLinearOperator, mlp_problem(coupled))
        np.testing.assert_allclose(jacobi(G, 1e-3) @ np.ones(43), 1 / (np.maximum(of_dense(G), 0) + 1e-3))

    def test_inputs_of_different_scales_cost_fewer_products(self) -> None:
        G = build(GGNLinearOperator, regression(torch.logspace(0, 3, 64)))
        b = np.ones(G.shape[0])
        plain, helped = (
            solve(G, b, damping=1e-3, rtol=1e-6, preconditioner=M, progress=False) for M in (None, jacobi(G, 1e-3))
        )
        assert plain.converged
        assert helped.converged
        assert helped.products < plain.products / 5
