"""Exact diagonals: cost and refused cases. Each operator's tests check their values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from agreement import close
from cases import Problem, cut, seeded
from scipy.sparse.linalg import aslinearoperator
from sklearn.datasets import load_digits
from submatrix_cases import numpys
from torch import Tensor, nn
from torch.func import functional_call

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    SubmatrixLinearOperator,
    solve,
    spectrum,
)
from curvop.kernels import diagonal
from curvop.kernels.errors import NonFiniteProductError
from curvop.kernels.ggn_kernel import couples_examples
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
    """A least-squares problem with more than 1000 unknowns and inputs of different scales."""
    data = cut(torch.randn(500, 64) * scales, torch.randn(500, 20), (300, 200))
    return Problem(nn.Linear(64, 20), nn.MSELoss(), data)


@pytest.mark.default_cases("GGN*")
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
    monkeypatch.setattr(diagonal, "_MAX_ENTRIES", 100)  # two
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


SATURATED = {
    "closed form": nn.CrossEntropyLoss(),
    "function": lambda z, y: nn.functional.cross_entropy(z, y),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("loss", SATURATED)
@pytest.mark.filterwarnings("ignore:the matrix is zero:RuntimeWarning")
def test_saturated_predictions(loss: str, scale: float, dtype: torch.dtype) -> None:
    """The probabilities are so close to 0 and 1 that products of the loss's Hessian are differences of like numbers."""
    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Linear(3, 4, dtype=dtype)
        with torch.no_grad():
            model.weight.mul_(scale)
        data = [(torch.randn(5, 3, dtype=dtype), torch.randint(4, (5,)))]
        G = GGNLinearOperator(model, SATURATED[loss], dict(model.named_parameters()), data)
        expected = of_dense(G)
        np.testing.assert_allclose(G.diagonal(), expected, rtol=0, atol=1e-4 * expected.max() + torch.finfo(dtype).tiny)


class TestCoupling:
    """A Hessian of the loss is block-diagonal, up to the rounding errors of products."""

    @pytest.mark.parametrize("first", range(7))
    def test_any_two_coupled_examples_are_found(self, first: int) -> None:
        for second in range(first):
            hessian = torch.eye(14).double()
            hessian[2 * first, 2 * second] = hessian[2 * second, 2 * first] = 1e-3
            assert couples_examples(*self.of(hessian))
        assert not couples_examples(*self.of(torch.eye(14).double()))

    def test_blocks_below_the_rounding_errors_of_products(self) -> None:
        hessian = torch.block_diag(*torch.full((7, 2, 2), 1e-20).double())
        noise = lambda X: 1e-16 * (X != 0)  # noqa: E731
        multiply, blocks = self.of(hessian)
        assert not couples_examples(lambda X: multiply(X) + noise(X), blocks)
        hessian[0, 3] = hessian[3, 0] = 1e-20
        multiply, blocks = self.of(hessian)
        assert couples_examples(lambda X: multiply(X) + noise(X), blocks)

    def test_a_single_example(self) -> None:
        assert not couples_examples(lambda X: X + 1e-3, torch.eye(2).double()[None])

    def of(self, hessian: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return the product with a Hessian of examples with two outputs, and the sums of its blocks."""
        multiply = lambda X: (hessian @ X.reshape(-1)).view_as(X)  # noqa: E731
        units = torch.eye(2).double()
        return multiply, torch.stack([multiply(unit.expand(len(hessian) // 2, 2)) for unit in units], -1)


def coupled(z: Tensor, y: Tensor) -> Tensor:
    return (z @ z.T).square().mean()


@pytest.mark.parametrize("operator", [GGNLinearOperator, EFLinearOperator])
def test_a_function_that_holds_parameters_of_its_own(operator) -> None:
    problem = mlp_problem()
    last = {name: value for name, value in problem.params.items() if name.startswith("2.")}

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.functional_call(problem.model, params, (X,))

    A = operator(model, problem.loss_function, last, problem.data)
    close(A.diagonal(), of_dense(A))


def test_a_covariance_is_centred_in_double_precision() -> None:
    far = mlp_problem(lambda z, y: (z.sum(1) / 3 + 0 * y).sum() / len(z))  # one gradient, of every example
    C = build(GradientCovarianceLinearOperator, far, dtype=np.float32)
    F = build(EFLinearOperator, far, dtype=np.float32)
    assert abs(C.diagonal()[-3:]).max() <= 1e-12 * F.diagonal()[-3:].max()
    assert C.diagonal().dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operator", [GGNLinearOperator, EFLinearOperator])
def test_one_example_of_two_classes(operator, dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    data = [(torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype), torch.tensor([1]))]
    A = operator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    np.testing.assert_allclose(A.diagonal(), of_dense(A), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parameter_without_effect(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.InstanceNorm2d(2), nn.Flatten(), nn.Linear(18, 3)).to(dtype)
    data = [(torch.randn(4, 1, 4, 4, dtype=dtype), torch.tensor([0, 1, 2, 1]))]
    G = GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    np.testing.assert_allclose(G.block("0.bias").diagonal(), 0.0, atol=1e-12)


class Shared(nn.Module):
    """An input that is not split into examples."""

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


EXACT = [GGNLinearOperator, EFLinearOperator, FisherLinearOperator, GradientCovarianceLinearOperator]
SELECTIONS = {
    "one parameter": slice(22, 40),
    "two, in another order": [41, 3, 40, 0],
    "repeated": [5, 5, 42, -1, 5],
    "mask": np.arange(43) % 3 == 0,
    "tensor": torch.tensor([30, 2]),
    "everything": slice(None),
    "nothing": slice(0),
}


@pytest.mark.parametrize("operator", EXACT)
class TestOfParts:
    def test_damping_is_added(self, operator) -> None:
        A = build(operator, mlp_problem())
        D = A.damped(0.3).damped(0.2)
        close(D.diagonal(), np.diagonal(A @ np.eye(43)) + 0.5)
        close(D.block("2.weight").diagonal(), np.diagonal(D @ np.eye(43))[A.params_slices["2.weight"]])
        close(D.H.diagonal(), D.diagonal())

    @pytest.mark.parametrize("name", SELECTIONS)
    def test_a_submatrix_gathers(self, operator, name: str) -> None:
        A, idxs = build(operator, mlp_problem()), SELECTIONS[name]
        dense = A @ np.eye(43)
        before = A.num_products
        for damping, B in ((0.0, A), (0.7, A.damped(0.7))):
            S = B.submatrix(idxs)
            expected = np.diagonal(dense)[numpys(idxs)] + damping
            close(S.diagonal(), expected)
            assert S.diagonal().shape == S.shape[:1]
            close(S.submatrix(slice(None, None, -1)).diagonal(), expected[::-1])
        assert A.num_products == before


def test_a_submatrix_takes_only_the_parameters_it_touches() -> None:
    G = build(GGNLinearOperator, mlp_problem())
    S = G.submatrix(G.params_slices["2.bias"])
    assert S.args[0].shape == (3, 3)
    assert build(GGNLinearOperator, mlp_problem(), dtype=np.float32).submatrix([0, 1]).diagonal().dtype == np.float32


class TestRefuses:
    @pytest.mark.parametrize("part", [lambda A: A, lambda A: A.damped(0.5), lambda A: A.submatrix([1, 2])])
    def test_what_is_known_by_products_only(self, part) -> None:
        A = part(build(HessianLinearOperator, mlp_problem()))
        with pytest.raises(NotImplementedError, match=r"does not know its diagonal: curvop\.spectrum\.diagonal"):
            A.diagonal()
        assert A.num_products == 0
        found = spectrum.diagonal(A, 43)
        close(found.value, of_dense(A))

    def test_a_submatrix_of_a_matrix(self) -> None:
        with pytest.raises(NotImplementedError, match="SubmatrixLinearOperator does not know its diagonal"):
            SubmatrixLinearOperator(aslinearoperator(np.eye(3)), [0, 1], [0, 1]).diagonal()

    @pytest.mark.parametrize(
        ("rows", "cols"), [([0, 1], [1, 0]), ([0, 1, 2], [0, 1]), ([0, 1], [0, 2]), ([0, 40], [40, 0]), ([], [1])]
    )
    def test_a_submatrix_that_is_not_principal(self, rows, cols) -> None:
        G = build(GGNLinearOperator, mlp_problem())
        for A in (G, G.damped(1.0)):
            with pytest.raises(ValueError, match=r"rows and columns .* are different: take the principal one"):
                A.submatrix(rows, cols).diagonal()

    def test_a_submatrix_whose_rows_and_columns_lie_alike_in_different_parameters(self) -> None:
        G = build(GGNLinearOperator, mlp_problem())
        starts = [G.params_slices[name].start for name in ("0.weight", "2.weight")]
        for A in (G, G.damped(1.0)):
            with pytest.raises(ValueError, match="off the diagonal"):
                A.submatrix([starts[0]], [starts[1]]).diagonal()

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
        with pytest.raises(NotImplementedError, match=rf"because .*{match}.*: curvop\.spectrum\.diagonal estimates it"):
            build(GGNLinearOperator, make()).diagonal()

    def test_inputs_without_examples(self) -> None:
        data = [((torch.ones(4, 5), torch.ones(4, 3)), torch.zeros(5, 3))]
        shared = Shared()
        G = GGNLinearOperator(
            lambda params, X: functional_call(shared, params, ((X[0].T, X[1]),)),
            nn.MSELoss(),
            dict(shared.named_parameters()),
            data,
        )
        with pytest.raises(NotImplementedError, match="no tensor of the inputs has the examples"):
            G.diagonal()

    def test_a_block_off_the_diagonal(self) -> None:
        with pytest.raises(ValueError, match="off the diagonal"):
            build(GGNLinearOperator, mlp_problem()).block("0.weight", "2.weight").diagonal()

    def test_what_is_not_finite(self) -> None:
        problem = mlp_problem()
        problem.data[0][0][0, 0] = torch.nan
        for operator in EXACT:
            with pytest.raises(NonFiniteProductError, match="the diagonal is not finite at batch 0 in the prediction"):
                build(operator, problem).diagonal()

    def test_targets_that_are_not_finite(self) -> None:
        problem = regression(torch.ones(64))
        problem.data[1][1][0, 0] = torch.nan
        with pytest.raises(NonFiniteProductError, match=r"at batch 1 in the curvature of the loss .*batch is nan"):
            build(EFLinearOperator, problem).diagonal()
        assert np.isfinite(build(GGNLinearOperator, problem).diagonal()).all()  # it does not depend on the targets

    def test_derivatives_that_are_not_finite(self) -> None:
        class Root(nn.Linear):
            def forward(self, X: Tensor) -> Tensor:
                return (0 * super().forward(X)).sqrt()

        problem = mlp_problem(None, lambda: Root(4, 3))
        with pytest.raises(NonFiniteProductError, match="at batch 0 in parameter 'weight'"):
            build(GGNLinearOperator, problem).diagonal()


class TestJacobi:
    def test_many_rows_are_exact_without_a_product(self) -> None:
        G = build(GGNLinearOperator, digits(torch.float64))
        M = jacobi(G, 1e-3)
        assert G.num_products == 0
        close(M @ np.ones(G.shape[0]), 1 / (of_dense(G) + 1e-3))

    @pytest.mark.slow
    def test_parts_are_exact_without_a_product(self) -> None:
        G = build(GGNLinearOperator, digits(torch.float64))
        for A in (G.block("0.weight"), G.submatrix(range(0, 1200, 2)), G.damped(0.1)):
            M = jacobi(A, 1e-3)
            assert A.num_products == 0
            close(M @ np.ones(A.shape[0]), 1 / (of_dense(A) + 1e-3))

    @pytest.mark.filterwarnings(
        "ignore:batches 0 and 1. evaluated as one batch:RuntimeWarning"
    )  # because the loss couples them
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
