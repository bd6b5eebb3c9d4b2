"""Solves for many right-hand sides: solutions against dense ones, kinds of right-hand sides, and what columns cost."""

from __future__ import annotations

import pickle
import time
import warnings

import numpy as np
import pytest
import torch
from cases import slow
from matrices import CountingMatrix, matrix
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg
from torch import nn

from curvop import DiagonalLinearOperator, GGNLinearOperator, InverseLinearOperator, preconditioner, solve
from curvop.problems import digits

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
DATA = [(torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,)))]
PARAMS = dict(MODEL.named_parameters())
G = GGNLinearOperator(MODEL, nn.CrossEntropyLoss(), PARAMS, DATA)
P = G.shape[0]
DENSE = G @ np.eye(P)

DEFINITE = {
    "flat": np.linspace(0.5, 1, 60),
    "decaying": np.logspace(-5, 1, 60),
    "few large": np.r_[np.logspace(1, 4, 8), np.full(52, 1e-2)],
    "clusters": np.repeat([1e-3, 1.0, 30.0], 20),
}


def sides(n: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, count))


def quietly(A, b, damping, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return solve(A, b, damping, progress=False, **options)


def true_residuals(A: np.ndarray, x: np.ndarray, b: np.ndarray, damping: float) -> np.ndarray:
    norms = np.linalg.norm(b, axis=0)
    return np.linalg.norm(b - A @ x - damping * x, axis=0) / np.where(norms > 0, norms, 1)


class TestAgainstDenseSolutions:
    @pytest.mark.parametrize("count", [1, 2, 7, 50])
    @pytest.mark.parametrize("spectrum", DEFINITE)
    def test_definite(self, spectrum: str, count: int) -> None:
        A, b = matrix(DEFINITE[spectrum]), sides(60, count)
        result = solve(A, b, 1e-3, rtol=1e-10, progress=False)
        assert result.converged.all()
        assert result.solver == "cg"
        found = true_residuals(A, result.solution, b, 1e-3)
        assert found.max() <= 1.1e-10
        rounding = 4 * np.finfo(float).eps * DEFINITE[spectrum].max() * np.linalg.norm(result.solution, axis=0)
        assert (np.abs(result.residual - found) <= rounding / np.linalg.norm(b, axis=0)).all()
        errors = np.linalg.norm(result.solution - np.linalg.solve(A + 1e-3 * np.eye(60), b), axis=0)
        smallest = DEFINITE[spectrum].min() + 1e-3
        assert (errors <= 1.1e-10 / smallest * np.linalg.norm(b, axis=0)).all()

    @pytest.mark.parametrize("scale_of_b", [1e-20, 1.0, 1e20])
    @pytest.mark.parametrize("scale_of_A", [1e-20, 1.0, 1e20])
    @pytest.mark.parametrize("lowest", [0.1, -1.0])
    def test_every_scale(self, scale_of_A: float, scale_of_b: float, lowest: float) -> None:
        A, b = matrix([lowest, *np.logspace(0, 2, 39)]), sides(40, 3) * [1, 1e-3, 1e3]
        result = quietly(scale_of_A * A, scale_of_b * b, 0.2 * scale_of_A, rtol=1e-10)
        assert result.converged.all()
        assert result.solver == ("cg" if lowest > 0 else "minres")
        exact = np.linalg.solve(A + 0.2 * np.eye(40), b) * (scale_of_b / scale_of_A)
        for column, expected in zip(result.solution.T, exact.T, strict=True):
            assert np.linalg.norm(column - expected) <= 1e-7 * np.linalg.norm(expected)

    @pytest.mark.parametrize("count", [1, 5, *slow(50)])
    def test_indefinite(self, count: int) -> None:
        A, b = matrix([-1.0, -0.5, *np.linspace(0.1, 2, 48)]), sides(50, count)
        with pytest.warns(RuntimeWarning, match=r"^converged.*indefinite.*larger damping"):
            result = solve(A, b, 0.2, rtol=1e-10, progress=False)
        assert result.converged.all()
        assert result.solver == "minres"
        assert -0.8 - 1e-12 <= result.negative_curvature < 0
        np.testing.assert_allclose(result.solution, np.linalg.solve(A + 0.2 * np.eye(50), b), atol=1e-8)

    def test_singular_and_consistent(self) -> None:
        A = matrix([*np.zeros(10), *np.logspace(0, 2, 40)])
        b = A @ sides(50, 4)
        result = quietly(A, b, 0.0, rtol=1e-9)
        assert result.converged.all()
        assert true_residuals(A, result.solution, b, 0.0).max() <= 1.1e-9

    def test_singular_and_inconsistent(self) -> None:
        A, b = matrix([*np.zeros(10), *np.logspace(0, 2, 40)]), sides(50, 4)
        with pytest.warns(RuntimeWarning, match="not converged.*numerically singular.*larger damping"):
            result = solve(A, b, 0.0, progress=False)
        assert result.negative_curvature is None
        least = np.linalg.lstsq(A, b, rcond=1e-10)[0]
        assert (result.residual <= 1.01 * true_residuals(A, least, b, 0.0)).all()
        assert (np.linalg.norm(result.solution, axis=0) < 100 * np.linalg.norm(least, axis=0)).all()

    @pytest.mark.parametrize("kind", ["indefinite", "definite"])
    def test_a_preconditioner(self, kind: str) -> None:
        values = np.r_[-1.0 if kind == "indefinite" else 1.0, np.logspace(-3, 2, 59)]
        A, b = matrix(values), sides(60, 5)
        M = np.linalg.inv(matrix(np.abs(values) * np.linspace(1, 2, 60)) + 0.1 * np.eye(60))
        result = quietly(A, b, 0.1, rtol=1e-11, preconditioner=M)
        assert result.converged.all()
        assert true_residuals(A, result.solution, b, 0.1).max() <= 1.1e-11


class TestDegenerateColumns:
    def test_zero_and_dependent_columns(self) -> None:
        A, B = CountingMatrix(matrix(np.logspace(-3, 1, 60))), sides(60, 3)
        b = np.c_[np.zeros(60), B, B @ [1.0, -2.0, 3.0], 1e-9 * B[:, 0], B[:, 1]]
        result = solve(A, b, 1e-3, rtol=1e-10, progress=False)
        assert result.converged.all()
        assert true_residuals(A.A, result.solution, b, 1e-3).max() <= 1.1e-10
        assert not result.solution[:, 0].any()
        assert (result.products[0], result.residual[0]) == (0, 0.0)
        independent = CountingMatrix(A.A)
        solve(independent, B, 1e-3, rtol=1e-10, progress=False)
        assert A.columns <= independent.columns + 2 * 6  # the residuals of two runs

    def test_a_column_that_converges_at_once_stops_costing(self) -> None:
        values = np.logspace(-3, 1, 80)
        A = CountingMatrix(np.diag(values))
        b = np.c_[np.eye(80)[:, :5], np.ones(80)]  # five eigenvectors, and a sum of all
        result = solve(A, b, 1e-3, rtol=1e-8, progress=False)
        assert result.converged.all()
        alone = solve(np.diag(values), b[:, -1], 1e-3, rtol=1e-8, progress=False)
        assert A.columns <= alone.products + 20

    def test_more_columns_than_rows(self) -> None:
        A, b = matrix(np.linspace(1, 2, 6)), sides(6, 200)
        result = solve(A, b, 0.0, rtol=1e-12, progress=False)
        assert result.converged.all()
        np.testing.assert_allclose(result.solution, np.linalg.solve(A, b), atol=1e-11)

    def test_no_column(self) -> None:
        result = solve(np.eye(3), np.zeros((3, 0)), 1.0, progress=False)
        assert result.solution.shape == (3, 0)
        assert result.residual.shape == result.products.shape == result.converged.shape == (0,)
        assert str(result).startswith("converged")


class TestKinds:
    """The solution is of the kind of the right-hand side."""

    @pytest.mark.parametrize("shape", [(P,), (P, 1), (P, 3)])
    def test_arrays_and_tensors(self, shape: tuple[int, ...]) -> None:
        b = np.random.default_rng(0).standard_normal(shape)
        exact = np.linalg.solve(DENSE + 0.1 * np.eye(P), b)
        for A in (G, DENSE, aslinearoperator(DENSE), csr_array(DENSE)):
            for side in (b, torch.from_numpy(b)):
                result = solve(A, side, 0.1, rtol=1e-13, progress=False)
                assert type(result.solution) is type(side)
                assert result.solution.shape == shape
                np.testing.assert_allclose(result.solution, exact, atol=1e-11)
                assert np.shape(result.residual) == np.shape(result.products) == np.shape(result.converged) == shape[1:]

    def test_one_tensor_per_parameter(self) -> None:
        gradients = {name: torch.randn_like(value) for name, value in PARAMS.items()}
        vector = torch.cat([part.reshape(-1) for part in gradients.values()])
        exact = torch.linalg.solve(torch.from_numpy(DENSE) + 0.1 * torch.eye(P, dtype=torch.float64), vector)
        for b in (gradients, list(gradients.values()), tuple(gradients.values())):
            result = solve(G, b, 0.1, rtol=1e-13, progress=False)
            assert type(result.solution) is type(b)
            parts = result.solution.values() if isinstance(b, dict) else result.solution
            assert [part.shape for part in parts] == [value.shape for value in PARAMS.values()]
            torch.testing.assert_close(torch.cat([part.reshape(-1) for part in parts]), exact, rtol=0, atol=1e-11)
            assert isinstance(result.residual, float)

    def test_dtypes(self) -> None:
        single = GGNLinearOperator(MODEL.float(), nn.CrossEntropyLoss(), PARAMS, [(X.float(), y) for X, y in DATA])
        try:
            assert solve(single, torch.ones(P), 0.1, progress=False).solution.dtype == torch.float32
            assert solve(single, torch.ones(P).double(), 0.1, progress=False).solution.dtype == torch.float64
            assert solve(single, np.ones(P, np.float32), 0.1, progress=False).solution.dtype == np.float64
        finally:
            MODEL.double()
        assert solve(G, torch.ones(P), 0.1, progress=False).solution.dtype == torch.float64
        assert solve(G, torch.ones(P, dtype=torch.int64), 0.1, progress=False).solution.dtype == torch.float64

    def test_the_right_hand_side_is_left_alone(self) -> None:
        b = torch.ones(P, 2, dtype=torch.float64, requires_grad=True)
        before = b.detach().clone()
        assert not solve(G, b, 0.1, progress=False).solution.requires_grad
        assert torch.equal(b, before)

    @pytest.mark.parametrize("kind", ["operator", "matrix", "sparse", "tensor", "diagonal", "callable"])
    def test_preconditioners(self, kind: str) -> None:
        scales = 1 / (np.diag(DENSE) + 0.1)
        M = {
            "operator": aslinearoperator(np.diag(scales)),
            "matrix": np.diag(scales),
            "sparse": csr_array(np.diag(scales)),
            "tensor": torch.from_numpy(np.diag(scales)),
            "diagonal": DiagonalLinearOperator(scales),
            "callable": lambda X: X * (scales if isinstance(X, np.ndarray) else torch.from_numpy(scales))[:, None],
        }[kind]
        b = sides(P, 3)
        exact = np.linalg.solve(DENSE + 0.1 * np.eye(P), b)
        for side in (b, torch.from_numpy(b)):
            result = solve(G, side, 0.1, rtol=1e-12, preconditioner=M, progress=False)
            np.testing.assert_allclose(result.solution, exact, atol=1e-10)
        np.testing.assert_allclose(InverseLinearOperator(G, 0.1, rtol=1e-12, preconditioner=M) @ b, exact, atol=1e-10)


class TestOptions:
    def test_an_initial_guess(self) -> None:
        A, b = matrix(np.logspace(-3, 1, 60)), sides(60, 3)
        exact = np.linalg.solve(A + 1e-3 * np.eye(60), b)
        result = solve(A, b, 1e-3, rtol=1e-8, x0=exact, progress=False)
        assert result.products.tolist() == [1, 1, 1]
        near = solve(A, b, 1e-3, rtol=1e-8, x0=exact * (1 + 1e-6), progress=False)
        assert near.converged.all()
        assert near.products.sum() < solve(A, b, 1e-3, rtol=1e-8, progress=False).products.sum()

    def test_time_runs_out(self) -> None:
        A = matrix(np.logspace(-6, 1, 200))

        def slowly(X: np.ndarray) -> np.ndarray:
            time.sleep(0.02)
            return A @ X

        operator = LinearOperator(A.shape, matvec=slowly, matmat=slowly, dtype=float)
        begun = time.monotonic()
        with pytest.warns(RuntimeWarning, match="not converged.*ran out of time: increase seconds"):
            result = solve(operator, sides(200, 3), 1e-6, rtol=1e-10, seconds=0.5, progress=False)
        assert time.monotonic() - begun < 1.5
        assert result.status == "seconds"
        assert result.products.sum() > 10
        found = true_residuals(A, result.solution, sides(200, 3), 1e-6)
        np.testing.assert_allclose(result.residual, found, rtol=1e-6)
        assert quietly(operator, sides(200, 3), 1e-6, seconds=0).products.sum() == 0

    def test_the_number_of_steps(self) -> None:
        A, b = matrix(np.logspace(-6, 1, 200)), sides(200, 3)
        with pytest.warns(
            RuntimeWarning,
            match=r"not converged: .* \(rtol is 1e-10\) after 15 products.*reached maxiter: increase maxiter",
        ):
            result = solve(A, b, 1e-6, rtol=1e-10, maxiter=4, progress=False)
        assert result.products.tolist() == [5, 5, 5]
        assert result.status == "maxiter"

    def test_the_products_are_those_of_the_operator(self) -> None:
        for values in (np.logspace(-3, 1, 60), np.linspace(-1, 1, 60)):
            A = CountingMatrix(matrix(values))
            result = quietly(A, sides(60, 7), 1e-3, rtol=1e-9)
            assert result.products.sum() == A.columns
            assert result.products.dtype == np.int64

    def test_the_callback_receives_solutions_of_the_kind_of_b(self) -> None:
        seen: list[torch.Tensor] = []
        b = torch.from_numpy(sides(60, 3))
        result = solve(matrix(np.logspace(-3, 1, 60)), b, 1e-3, rtol=1e-9, callback=seen.append, progress=False)
        assert torch.equal(seen[-1], result.solution)
        assert seen[0].shape == b.shape

    def test_the_result_pickles(self) -> None:
        result = pickle.loads(pickle.dumps(solve(G, torch.ones(P, 2), 0.1, progress=False)))
        assert result.converged.all()


class TestPrecision:
    def test_the_limit_of_single_precision_is_reported_without_more_products(self) -> None:
        values = np.r_[np.logspace(0, 2, 20), np.full(180, 1e-2)]
        A = matrix(values).astype(np.float32)

        class Single(LinearOperator):
            def _matmat(self, X):
                return A @ X.astype(np.float32)

            _matvec = _matmat

        operator, b = Single(np.float32, A.shape), sides(200, 4)
        with pytest.warns(RuntimeWarning, match="not converged.*precision of the products.*float64 parameters"):
            result = solve(operator, b, 1e-2, rtol=1e-9, progress=False)
        assert result.status == "precision"
        reachable = solve(operator, b, 1e-2, rtol=3 * result.residual.max(), progress=False)
        assert reachable.converged.all()
        assert result.products.sum() < 2 * reachable.products.sum()
        assert result.residual.max() < 1e-3

    @pytest.mark.slow
    @pytest.mark.parametrize("count", [1, 10])
    def test_float32_digits(self, count: int) -> None:
        problem = digits()
        dense = GGNLinearOperator(**problem).to_dense()
        largest = np.linalg.eigvalsh(dense)[-1]
        model, data = problem["model"].float(), [(X.float(), y) for X, y in problem["data"]]
        arguments = problem | {"params": dict(model.named_parameters()), "data": data}
        G, b = GGNLinearOperator(**arguments), sides(len(dense), count).astype(np.float32)
        # Single precision suffices for this tolerance, and takes as many products as double precision.
        result = solve(G, torch.from_numpy(b), 1e-3 * largest, rtol=1e-5, progress=False)
        assert result.converged.all()
        exact = solve(dense, b, 1e-3 * largest, rtol=1e-5, progress=False)
        assert result.products.sum() <= 1.05 * exact.products.sum()
        assert true_residuals(dense, result.solution.double().numpy(), b, 1e-3 * largest).max() <= 1.3e-5
        # Below, the attained residual is reported after a few more products than double precision takes for it.
        for fraction, rtol in ((1e-3, 1e-7), (1e-4, 1e-6), (1e-5, 1e-6)):
            result = quietly(G, torch.from_numpy(b), fraction * largest, rtol=rtol)
            assert result.status == "precision"
            exact = solve(dense, b, fraction * largest, rtol=result.residual.max(), progress=False)
            assert result.products.sum() <= 1.15 * exact.products.sum() + count


def scipy_columns(A, b: np.ndarray, damping: float, rtol: float) -> int:
    """Return the number of products that SciPy's cg takes, one column after another."""
    counting = CountingMatrix(A)
    for column in b.T:
        cg(counting + damping * aslinearoperator(np.eye(len(b))), column, rtol=rtol)
    return counting.columns


def hard_cases() -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Return matrices and right-hand sides for which a shared Krylov space saves little."""
    decaying = matrix(np.logspace(-3, 1, 80))
    eigenvectors = np.linalg.eigh(decaying)[1]
    few = matrix(np.r_[np.logspace(1, 4, 8), np.full(92, 1e-2)])
    return {
        "well-conditioned": (matrix(np.linspace(1, 2, 300)), sides(300, 10), 1e-8),
        "well-conditioned, two columns": (matrix(np.linspace(1, 2, 300)), sides(300, 2), 1e-8),
        "one step": (np.diag(np.full(50, 3.0)), sides(50, 20), 1e-8),
        "two columns, one easy": (decaying, np.c_[eigenvectors[:, 0], sides(80, 1)], 1e-8),
        "two columns, separate spaces": (np.diag(np.logspace(-3, 1, 80)), np.kron(np.eye(2), sides(40, 1)), 1e-8),
        "two columns of different norms": (decaying, sides(80, 2) * [1e-8, 1e8], 1e-8),
        "many easy columns": (decaying, np.c_[eigenvectors[:, :8], sides(80, 1)], 1e-8),
        "half as many columns as rows": (matrix(np.logspace(-3, 1, 40)), sides(40, 20), 1e-8),
        "more columns than rows": (matrix(np.logspace(-3, 1, 20)), sides(20, 30), 1e-8),
        "few large eigenvalues, low accuracy": (few, sides(100, 5), 1e-2),
        "similar columns": (decaying, sides(80, 1) + 1e-3 * sides(80, 6, seed=1), 1e-8),
    }


HARD = hard_cases()


class TestShared:
    """Columns multiplied, in units of single solves by SciPy's cg."""

    def test_a_few_large_eigenvalues(self) -> None:
        A, b = matrix(np.r_[np.logspace(0, 4, 60), np.full(340, 1e-2)]), sides(400, 30)
        single = scipy_columns(A, b[:, :10], 1e-2, 1e-6)
        assert solve(A, b[:, :10], 1e-2, rtol=1e-6, progress=False).products.sum() <= 0.35 * single
        assert solve(A, b, 1e-2, rtol=1e-6, progress=False).products.sum() <= 0.2 * 3 * single
        assert solve(A, b[:, 0], 1e-2, rtol=1e-6, progress=False).products <= 0.6 * single / 10

    @pytest.mark.slow
    def test_digits(self) -> None:
        A = GGNLinearOperator(**digits())
        dense = A.to_dense()
        damping = 1e-4 * np.linalg.eigvalsh(dense)[-1]
        b = sides(A.shape[0], 30)
        single = scipy_columns(dense, b[:, :10], damping, 1e-6)
        for count, most in ((10, 0.35), (30, 0.2)):
            result = solve(A, torch.from_numpy(b[:, :count]), damping, rtol=1e-6, progress=False)
            assert result.converged.all()
            assert true_residuals(dense, result.solution.numpy(), b[:, :count], damping).max() <= 1.01e-6
            assert result.products.sum() <= most * single * count / 10
            # The fractions of single solves of this package, which keep their residuals orthogonal, too.
            own = count * solve(A, b[:, 0], damping, rtol=1e-6, progress=False).products
            assert result.products.sum() <= (most + 0.01) * own

    @pytest.mark.parametrize("preconditioned", [False, *slow(True)])
    @pytest.mark.parametrize("case", HARD)
    def test_a_block_costs_no_more_than_single_solves(self, case: str, preconditioned: bool) -> None:
        A, b, rtol = HARD[case]
        M = np.diag(1 / np.diag(A)) if preconditioned else None
        options = {"rtol": rtol, "preconditioner": M, "progress": False}
        single = sum(solve(A, column, 0.0, **options).products for column in b.T)
        block = solve(A, b, 0.0, **options)
        assert block.converged.all()
        assert block.products.sum() <= single


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"x0": np.ones(P)}, ValueError, r"x0 has shape \(26,\) and b has shape \(26, 2\)"),
            ({"x0": np.full((P, 2), np.inf)}, ValueError, "x0 is not finite"),
            ({"seconds": -1}, ValueError, "seconds is -1"),
            ({"seconds": "1"}, TypeError, "seconds is '1'"),
            ({"preconditioner": np.eye(3)}, ValueError, r"preconditioner has shape \(3, 3\).*or a callable"),
            ({"preconditioner": 3.0}, ValueError, "preconditioner has shape None"),
            ({"preconditioner": lambda X: X[0]}, ValueError, r"preconditioner returned an array of shape \(1,\)"),
        ],
    )
    def test_options(self, options, error, match) -> None:
        with pytest.raises(error, match=match):
            solve(G, np.ones((P, 2)), 0.1, progress=False, **options)

    def test_dicts(self) -> None:
        with pytest.raises(ValueError, match=r"b lacks '0.bias'"):
            solve(G, {"0.weight": PARAMS["0.weight"]}, 0.1)
        with pytest.raises(TypeError, match="b is a dict, but the columns of A are not parameters"):
            solve(DENSE, dict(PARAMS), 0.1)


class TestFindings:
    """Systems for which an earlier version failed."""

    def test_a_column_that_is_solved_before_negative_curvature_is_met(self) -> None:
        A = np.diag([1.0, 1, 1, 2, -1])
        B = np.c_[np.eye(5)[:, 0], np.ones(5)]
        with pytest.warns(RuntimeWarning, match="indefinite"):
            result = solve(A, B, 0.0, progress=False)
        np.testing.assert_allclose(A @ result.solution, B, atol=1e-5)

    def test_more_directions_than_rows(self) -> None:
        rng = np.random.default_rng(1)
        V = np.linalg.qr(rng.standard_normal((4, 4)))[0]
        M = (V * np.logspace(0, -14, 4)) @ V.T
        B = rng.standard_normal((4, 5))[:, :3]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # it may not converge, but must not fail
            result = solve(np.eye(4), B, 0.0, rtol=1e-10, preconditioner=(M + M.T) / 2, progress=False)
        residuals = np.linalg.norm(result.solution - B, axis=0) / np.linalg.norm(B, axis=0)
        np.testing.assert_allclose(result.residual, residuals, atol=1e-12)

    def test_solutions_outside_the_range_of_their_dtype(self) -> None:
        for scale, entry in ((1e-20, 1e25), (1e20, 1e-30)):
            b = torch.full((2,), entry)
            found = solve(np.eye(2, dtype=np.float32) * np.float32(scale), b, 0.0, progress=False).solution
            np.testing.assert_allclose(found, entry / scale, rtol=1e-5)
            A = DiagonalLinearOperator(torch.full((2,), scale))
            with pytest.raises(ValueError, match=r"the solution is outside the range of torch\.float32"):
                solve(A, b, 0.0, progress=False)

    def test_a_float32_matrix_of_scipy(self) -> None:
        V = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0]
        A = ((V * np.logspace(0, -6, 20)) @ V.T).astype(np.float32)
        A = (A + A.T) / 2
        result = solve(aslinearoperator(A), torch.ones(20), 1e-6, rtol=1e-6, progress=False)
        x = result.solution.double().numpy()
        assert np.linalg.norm(A.astype(np.float64) @ x + 1e-6 * x - 1) <= 1e-6 * 20**0.5

    def test_preconditioners_of_all_kinds(self) -> None:
        A, b = np.diag(np.arange(1.0, 6)), np.ones(5)

        def in_place(X: np.ndarray) -> np.ndarray:
            X /= np.arange(1.0, 6)[:, None]
            return X

        for M in (torch.diag(1 / torch.arange(1.0, 6)).requires_grad_(), in_place):
            assert solve(A, b, 0.0, preconditioner=M, progress=False).converged
        with pytest.raises(TypeError, match="preconditioner is complex"):
            solve(A, b, 0.0, preconditioner=torch.eye(5) * 1j, progress=False)

    def test_nystrom_of_views(self) -> None:
        w, V = np.linalg.eigh(np.diag(np.arange(1.0, 6)))
        M = preconditioner.NystromPreconditioner(V[:, ::-1], w[::-1], 1.0)
        np.testing.assert_allclose(M @ np.eye(5), np.diag(2 / (np.arange(1.0, 6) + 1)))
