"""Damped solves: accuracy, and reports about singular and indefinite systems."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import torch
from cases import loss_problem
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix, right_side
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg
from sklearn.datasets import load_digits
from torch import nn

from curvop import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, solve
from curvop.preconditioner import nystrom


def quietly(A, b, **options):
    return solve(A, b, progress=False, **options)


class TestPositiveDefinite:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 30), st.floats(1e-3, 1e2), st.integers(0, 100))
    def test_the_true_residual_is_small_enough(self, n: int, damping: float, seed: int) -> None:
        A, b = matrix(np.linspace(0, 1, n), seed), right_side(n)
        result = quietly(A, b, damping=damping, rtol=1e-10)
        assert result.converged
        assert result.negative_curvature is None
        assert result.solver == "cg"
        residual = np.linalg.norm(b - A @ result.solution - damping * result.solution) / np.linalg.norm(b)
        assert residual <= 1e-10
        assert result.residual == pytest.approx(residual, rel=1e-2, abs=1e-15)

    def test_model(self) -> None:
        problem = loss_problem("ce")
        G = GGNLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        b, _ = G.gradient_and_loss()
        result = quietly(G, b, damping=1e-3, rtol=1e-12)
        assert result.products == G.num_products
        np.testing.assert_allclose(
            result.solution, np.linalg.solve(G @ np.eye(43) + 1e-3 * np.eye(43), b), rtol=1e-7, atol=1e-10
        )

    def test_the_solver_restarts_if_its_own_residual_is_wrong(self) -> None:
        # The first run ends at 1.7e-8. The rounding errors of the products allow less than 1e-8.
        A, b = matrix(np.logspace(-6.5, 2, 60)), right_side(60)
        result = quietly(A, b, damping=1e-8, rtol=1e-8, maxiter=20_000)
        assert result.converged
        assert np.linalg.norm(b - A @ result.solution - 1e-8 * result.solution) <= 1e-8 * np.linalg.norm(b)

    def test_zero_right_hand_side(self) -> None:
        result = quietly(matrix([1.0, 2.0]), np.zeros(2), damping=1.0)
        assert (result.products, result.converged, result.residual) == (0, True, 0.0)
        assert not result.solution.any()

    def test_float32(self) -> None:
        A = aslinearoperator(matrix(np.linspace(0, 1, 20)).astype(np.float32))
        result = quietly(A, right_side(20).astype(np.float32), damping=0.1, rtol=1e-5)
        assert result.converged
        assert result.solution.dtype == np.float64

    @pytest.mark.parametrize("scale", [1e-24, 1e20])
    def test_a_right_hand_side_that_underflows_in_single_precision(self, scale: float) -> None:
        A, b = aslinearoperator(np.diag([1.0, 2.0, 3.0]).astype(np.float32)), np.float32(scale) * np.ones(3, np.float32)
        result = quietly(A, b, damping=1.0, rtol=1e-5)
        assert result.converged
        np.testing.assert_allclose(result.solution, b / [2.0, 3.0, 4.0], rtol=1e-5)


class TestSingular:
    """Matrices that are singular up to rounding; no eigenvalue is claimed to be negative."""

    def test_the_least_squares_solution_without_drift(self) -> None:
        A, b = matrix([*np.zeros(10), *np.logspace(0, 2, 40)]), right_side(50)
        with pytest.warns(RuntimeWarning, match="not converged.*numerically singular.*larger damping"):
            result = quietly(A, b, damping=0)
        assert result.negative_curvature is None
        least = np.linalg.lstsq(A, b, rcond=1e-10)[0]
        assert result.residual <= 1.01 * np.linalg.norm(b - A @ least) / np.linalg.norm(b)
        assert np.linalg.norm(result.solution) < 100 * np.linalg.norm(least)

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_semi_definite_matrix_of_a_model(self, dtype: torch.dtype, seed: int) -> None:
        problem = loss_problem("ce")
        data = [(X.to(dtype), y) for X, y in problem.data]
        model = problem.model.to(dtype)
        F = EFLinearOperator(model, problem.loss_function, dict(model.named_parameters()), data)
        b = np.random.default_rng(seed).normal(size=43)
        with pytest.warns(RuntimeWarning, match="not converged"):
            result = quietly(F, b, damping=0)
        assert result.negative_curvature is None

    def test_a_direction_of_no_curvature(self) -> None:
        with pytest.warns(RuntimeWarning, match="singular"):
            assert quietly(np.diag([1.0, 1.0, 0.0]), np.ones(3), damping=0).negative_curvature is None


class TestIndefinite:
    def test_reported_and_solved(self) -> None:
        A, b = matrix([-1.0, *np.linspace(0.1, 2, 30)]), right_side(31)
        with pytest.warns(RuntimeWarning, match=r"converged.*indefinite.*larger damping"):
            result = quietly(A, b, damping=0.2, rtol=1e-9)
        assert result.converged
        assert result.solver == "minres"
        assert -0.8 - 1e-12 <= result.negative_curvature <= 0
        np.testing.assert_allclose(result.solution, np.linalg.solve(A + 0.2 * np.eye(31), b), rtol=1e-6)

    def test_damping_makes_it_definite(self) -> None:
        A, b = matrix([-1.0, *np.linspace(0.1, 2, 30)]), right_side(31)
        assert quietly(A, b, damping=1.1).negative_curvature is None

    def test_a_hessian_that_is_slightly_indefinite_in_many_directions(self) -> None:
        eigenvalues = np.concatenate([-np.logspace(-4, -2, 20), np.logspace(-4, 1, 80)])
        A, b = matrix(eigenvalues), right_side(100)
        with pytest.warns(RuntimeWarning, match="indefinite"):
            result = quietly(A, b, damping=1e-5, rtol=1e-8, maxiter=5000)
        assert result.converged
        residual = np.linalg.norm(b - A @ result.solution - 1e-5 * result.solution) / np.linalg.norm(b)
        assert residual <= 1e-8

    @pytest.mark.parametrize("count", [1, 5])
    def test_reported_at_the_product_that_shows_it(self, count: int, monkeypatch) -> None:
        A, b = matrix([*-np.linspace(0.5, 1, 20), *np.linspace(0.5, 2, 180)]), np.random.default_rng(0)
        products = 0
        reports: list[tuple[int, str]] = []

        def multiply(X: np.ndarray) -> np.ndarray:
            nonlocal products
            products += X.shape[1] if X.ndim > 1 else 1
            return A @ X

        monkeypatch.setattr("tqdm.tqdm.set_postfix_str", lambda bar, text, refresh: reports.append((products, text)))
        operator = LinearOperator(A.shape, matvec=multiply, matmat=multiply, dtype=float)
        with pytest.warns(RuntimeWarning, match="converged.*indefinite"):
            result = quietly(operator, b.standard_normal((200, count)), damping=0.0, rtol=1e-10)
        (at, text), *others = reports
        assert not others
        assert text == f"indefinite: smallest eigenvalue <= {result.negative_curvature:.3g}"
        # A plain loop of conjugate gradients needs this many products until the curvature is negative. One more product
        # measures the norm of A.
        r = p = np.random.default_rng(0).standard_normal((200, count))[:, 0]
        steps = 1
        while p @ A @ p > 0:
            new = r - (r @ r) / (p @ A @ p) * (A @ p)
            r, p, steps = new, new + (new @ new) / (r @ r) * p, steps + 1
        assert at <= count * steps + 1
        assert at < 0.5 * result.products.sum()

    def test_with_a_preconditioner(self) -> None:
        A, b = matrix([-1.0, *np.logspace(-3, 2, 60)]), right_side(61)
        M = nystrom(matrix([0.0, *np.logspace(-3, 2, 60)]), 40, 0.1, rng=0)
        with pytest.warns(RuntimeWarning, match="indefinite"):
            result = quietly(A, b, damping=0.1, rtol=1e-9, preconditioner=M)
        assert result.converged

    @pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e20])
    @pytest.mark.parametrize("of", ["A", "b"])
    def test_at_every_scale(self, of: str, scale: float) -> None:
        A, b = matrix([*-np.logspace(-1, 0, 5), *np.logspace(0, 2, 45)]), right_side(50)
        A, b = (A * scale, b) if of == "A" else (A, b * scale)
        with pytest.warns(RuntimeWarning, match="converged.*indefinite"):
            result = quietly(A, b, damping=0, rtol=1e-8)
        assert result.converged
        assert result.products < 200


class TestLimitsOfMinres:
    """If a limit stopped MINRES, the warning says so."""

    A = matrix([*-np.linspace(0.1, 1, 60), *np.linspace(0.1, 1, 60)])

    def test_maxiter(self) -> None:
        with pytest.warns(RuntimeWarning, match=r"not converged.*indefinite.*reached maxiter: increase maxiter"):
            result = quietly(self.A, right_side(120), damping=0, rtol=1e-10, maxiter=6)
        assert (result.status, result.solver) == ("maxiter", "minres")

    def test_seconds(self) -> None:
        def slowly(X: np.ndarray) -> np.ndarray:
            time.sleep(0.01)
            return self.A @ X

        operator = LinearOperator(self.A.shape, matvec=slowly, matmat=slowly, dtype=float)
        with pytest.warns(RuntimeWarning, match=r"not converged.*indefinite.*ran out of time: increase seconds"):
            result = quietly(operator, right_side(120), damping=0, rtol=1e-10, seconds=0.3)
        assert (result.status, result.solver) == ("seconds", "minres")

    def test_a_preconditioner_that_is_zero_in_the_direction_of_the_residual(self) -> None:
        b = np.eye(3)[:, :2]
        with pytest.raises(ValueError, match="preconditioner is not positive definite"):
            quietly(np.diag([1.0, -2.0, 3.0]), b, damping=0, preconditioner=np.diag([0.0, 1.0, 1.0]))


class TestDefaultLimit:
    @pytest.mark.parametrize("N", [20, 400])
    def test_the_number_of_steps(self, N: int) -> None:
        seen: list[np.ndarray] = []
        # Every product has an error, so that the solver cannot converge, and restarts.
        rng, values = np.random.default_rng(0), np.logspace(-12, 0, N)

        def noisily(x: np.ndarray) -> np.ndarray:
            return values * x * (1 + 0.3 * rng.random(N))

        operator = LinearOperator((N, N), matvec=noisily, dtype=float)
        with pytest.warns(RuntimeWarning, match="not converged"):
            result = quietly(operator, right_side(N), damping=0, rtol=1e-12, callback=seen.append)
        assert len(seen) <= min(10 * N, 1000)
        assert result.status in ("maxiter", "stagnation")

    def test_the_verdict(self) -> None:
        values = np.logspace(-8, 0, 2000)
        steps: list[np.ndarray] = []
        operator = LinearOperator((2000, 2000), matvec=lambda x: values * x.ravel(), dtype=float)
        with pytest.warns(RuntimeWarning, match="reached maxiter: increase maxiter, or use a preconditioner"):
            result = quietly(operator, right_side(2000), damping=0, rtol=1e-12, callback=steps.append)
        assert (result.status, len(steps), result.products) == ("maxiter", 1000, 1001)


class TestReports:
    def test_too_few_products(self) -> None:
        A, b = matrix(np.logspace(-6, 0, 50)), right_side(50)
        with pytest.warns(RuntimeWarning, match=r"not converged: relative residual .* \(rtol is 1e-10\)"):
            result = quietly(A, b, damping=1e-8, rtol=1e-10, maxiter=5)
        assert not result.converged
        assert result.products <= 7
        assert result.residual > 1e-10
        error = b @ result.solution - result.solution @ (A @ result.solution) / 2
        assert error > 0  # the quadratic has decreased from zero

    def test_the_callback_receives_improving_solutions(self) -> None:
        A, b = matrix(np.linspace(0, 1, 30)), right_side(30)
        seen: list[np.ndarray] = []
        result = quietly(A, b, damping=0.1, rtol=1e-10, callback=seen.append)
        errors = [np.linalg.norm(b - A @ x - 0.1 * x) for x in seen]
        assert errors[-1] < 1e-3 * errors[0]
        np.testing.assert_array_equal(seen[-1], result.solution)
        assert not np.array_equal(seen[0], seen[1])

        def clear(x: np.ndarray) -> None:
            x[:] = 0

        assert quietly(A, b, damping=0.1, rtol=1e-10, callback=clear).converged

    def test_exceptions_of_the_callback_propagate(self) -> None:
        def stop(x: np.ndarray) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quietly(matrix([1.0, 2.0]), np.ones(2), damping=1.0, callback=stop)

    @pytest.mark.slow
    def test_progress_is_shown(self, capsys) -> None:
        A = matrix([1.0, 2.0])

        def slowly(x: np.ndarray) -> np.ndarray:
            time.sleep(0.6)
            return A @ x

        solve(LinearOperator((2, 2), matvec=slowly, dtype=float), np.ones(2), damping=1.0)
        assert "products" in capsys.readouterr().err
        quietly(matrix([1.0, 2.0]), np.ones(2), damping=1.0)
        assert not capsys.readouterr().err

    def test_str(self) -> None:
        text = str(quietly(matrix([1.0, 2.0]), np.ones(2), damping=1.0))
        assert text.startswith("converged: relative residual")
        assert text.endswith("products (cg)")


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"b": np.ones(3)}, r"b has shape \(3,\).*b \(2,\)"),
            ({"b": np.ones((3, 1))}, r"b has shape \(3, 1\).*\(2,\) or \(2, K\)"),
            ({"b": np.ones((2, 1, 1))}, r"b has shape \(2, 1, 1\)"),
            ({"b": np.array([1.0, np.nan])}, "b is not finite"),
            ({"A": np.ones((2, 3))}, r"A has shape \(2, 3\)"),
            ({"damping": np.inf}, "damping is inf"),
            ({"rtol": 0.0}, "rtol is 0"),
            ({"rtol": 1.0}, "rtol is 1"),
            ({"maxiter": 0}, "maxiter is 0"),
            ({"A": np.diag([np.nan, 1.0])}, "a product with A is not finite"),
            ({"preconditioner": np.zeros((2, 2))}, "preconditioner is not positive definite"),
            ({"preconditioner": -np.eye(2)}, "preconditioner is not positive definite"),
            ({"preconditioner": np.full((2, 2), np.nan)}, "preconditioner is not positive definite"),
        ],
    )
    def test_value_errors(self, change, match) -> None:
        arguments = {"A": matrix([1.0, 2.0]), "b": np.ones(2), "damping": 1.0, **change}
        with pytest.raises(ValueError, match=match):
            solve(**arguments)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"b": np.ones(2) * 1j}, "b has dtype complex128"),
            ({"A": np.eye(2) * 1j}, "A has dtype complex128"),
            ({"damping": None}, "damping is a NoneType"),
            ({"rtol": "1"}, "rtol is a str"),
        ],
    )
    def test_type_errors(self, change, match) -> None:
        arguments = {"A": matrix([1.0, 2.0]), "b": np.ones(2), "damping": 1.0, **change}
        with pytest.raises(TypeError, match=match):
            solve(**arguments)


@pytest.fixture(scope="module")
def digits() -> tuple[GGNLinearOperator, HessianLinearOperator]:
    """A network trained on the digits, whose Gauss-Newton matrix is ill-conditioned."""
    pixels, labels = load_digits(return_X_y=True)
    X, y = torch.from_numpy(pixels / 16), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    loss_function = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss_function(model(X), y).backward()
        optimizer.step()
    arguments = model, loss_function, dict(model.named_parameters()), [(X, y)]
    return GGNLinearOperator(*arguments), HessianLinearOperator(*arguments)


@pytest.mark.slow
def test_on_digits_the_preconditioner_saves_four_of_five_products_of_plain_cg(digits) -> None:
    G, _ = digits
    b, damping = right_side(G.shape[0]), 1e-5
    plain = quietly(G, b, damping=damping, rtol=1e-8)
    helped = quietly(G, b, damping=damping, rtol=1e-8, preconditioner=nystrom(G, 200, damping, rng=0))
    assert plain.converged
    assert helped.converged
    steps: list[int] = []
    cg(G.damped(damping), b, rtol=1e-8, callback=lambda _: steps.append(1))
    assert 5 * helped.products < len(steps)
    assert helped.products < plain.products < 0.5 * len(steps)
    np.testing.assert_allclose(helped.solution, plain.solution, rtol=1e-2, atol=1e-5 * np.abs(plain.solution).max())


def test_on_digits_the_hessian_is_found_to_be_indefinite(digits) -> None:
    _, H = digits
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = quietly(H, right_side(H.shape[0]), damping=1e-6, rtol=1e-6, maxiter=500)
    assert result.negative_curvature < 0
    assert "indefinite" in str(caught[-1].message)
