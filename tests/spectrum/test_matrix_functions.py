"""Functions of matrices times vectors, against dense eigendecompositions."""

from __future__ import annotations

import functools
import math
import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from matrices import matrix
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

from curvop import GGNLinearOperator, HessianLinearOperator
from curvop.spectrum import apply

N = 240
FUNCTIONS = {
    "exp": np.exp,
    "inv": lambda x: 1 / x,
    "inv_sqrt": lambda x: 1 / np.sqrt(x),
    "log": np.log,
    "sqrt": np.sqrt,
}
RANDOM = np.random.default_rng(3)
SPECTRA = {
    "even": np.linspace(0.01, 1, N),
    "decades": np.logspace(-3, 1, N),
    "outliers": np.r_[1e-2 + 1e-2 * RANDOM.random(N - 10), np.linspace(1, 30, 10)],
    "damped": 1e-2 + np.r_[np.zeros(N // 2), np.logspace(-8, 1, N - N // 2)],
    "decay": 1e-4 + 1 / np.arange(1, N + 1) ** 2.0,
    "clusters": np.repeat([0.1, 1.0, 3.0, 7.0], N // 4),
    "one small": np.r_[1e-4, np.linspace(1, 2, N - 1)],
    "indefinite": np.r_[np.linspace(-3, -0.2, N // 4), np.linspace(0.3, 5, N - N // 4)],
}
DEFINED = [(f, spectrum) for f in FUNCTIONS for spectrum in SPECTRA if spectrum != "indefinite" or f in ("exp", "inv")]
OPTIONS = {"progress": False}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def vectors(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(N, count))


@functools.cache
def matrix_of(spectrum: str) -> np.ndarray:
    return matrix(SPECTRA[spectrum])


def exact(A: np.ndarray, f, b: np.ndarray) -> np.ndarray:
    """Return f(A) b from a dense eigendecomposition."""
    values, V = np.linalg.eigh(A)
    return (V * f(values)) @ (V.T @ b)


def relative(value: np.ndarray, correct: np.ndarray) -> np.ndarray:
    return np.linalg.norm(value - correct, axis=0) / np.linalg.norm(correct, axis=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_named_functions_and_callables_agree_with_dense_matrix_functions(name) -> None:
    A, b = matrix(np.linspace(0.5, 3, N)), vectors()
    result = apply(A, name, b, rtol=1e-12, **OPTIONS)
    assert result.converged
    dense = {
        "exp": scipy.linalg.expm,
        "inv": np.linalg.inv,
        "inv_sqrt": lambda A: np.linalg.inv(scipy.linalg.sqrtm(A)),
        "log": scipy.linalg.logm,
        "sqrt": scipy.linalg.sqrtm,
    }[name](A)
    np.testing.assert_allclose(result.value, dense @ b, rtol=0, atol=1e-11 * np.abs(dense @ b).max())
    np.testing.assert_array_equal(apply(A, FUNCTIONS[name], b, rtol=1e-12, **OPTIONS).value, result.value)


class TestTheEstimatedError:
    @pytest.mark.parametrize(("name", "spectrum"), DEFINED)
    @pytest.mark.default_cases("inv_sqrt-*", "exp-one small", "log-decay", "sqrt-damped", "inv-indefinite")
    def test_is_not_less_than_the_error(self, name, spectrum) -> None:
        """The error is at most the estimate, and the estimate is not useless.

        Shorter runs may not have found the extreme eigenvalues (see the notes of `apply`).
        """
        A, b = matrix_of(spectrum), vectors(1)[:, 0]
        operator, correct, ratios = aslinearoperator(A), exact(A, FUNCTIONS[name], b), []
        for steps in range(20, 141, 20):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = apply(operator, name, b, num_steps=steps, rtol=1e-15, **OPTIONS)
            error = relative(result.value, correct)
            assert error <= 1.5 * result.error
            ratios.append(result.error / error)
        assert np.median(ratios) < 100

    @pytest.mark.parametrize("rtol", [1e-2, 1e-6])
    def test_holds_for_the_returned_vectors(self, rtol) -> None:
        for spectrum in ("even", "outliers", "decay", "one small"):
            A, b = matrix_of(spectrum), vectors(3)
            for name, f in FUNCTIONS.items():
                result = apply(A, name, b, num_steps=N, rtol=rtol, **OPTIONS)
                assert result.converged
                assert (result.error <= rtol).all()
                assert (relative(result.value, exact(A, f, b)) <= result.error).all()

    def test_costs_few_more_steps_than_needed(self) -> None:
        A, b = matrix_of("even"), vectors(1)[:, 0]
        correct = exact(A, FUNCTIONS["inv_sqrt"], b)
        steps = apply(A, "inv_sqrt", b, rtol=1e-6, **OPTIONS).num_steps
        with pytest.warns(RuntimeWarning, match="increase num_steps"):
            shorter = apply(A, "inv_sqrt", b, num_steps=int(0.7 * steps), rtol=1e-6, **OPTIONS)
        assert relative(shorter.value, correct) > 1e-6

    def test_includes_rounding_errors_of_float32_products(self) -> None:
        A, b = matrix(np.logspace(-3, 0, N)), vectors(1)[:, 0]
        single = aslinearoperator(A.astype(np.float32))
        with pytest.warns(RuntimeWarning, match="increase rtol, because rounding errors"):
            result = apply(single, "inv", b, num_steps=N, rtol=1e-7, **OPTIONS)
        error = relative(result.value, exact(A, FUNCTIONS["inv"], b))
        assert error <= result.error < 1000 * error

    def test_is_zero_for_polynomials_of_the_degree_that_the_steps_allow(self) -> None:
        A, b = matrix(np.linspace(-1, 2, N)), vectors(1)[:, 0]
        result = apply(A, lambda x: x**3 - 2 * x, b, rtol=1e-12, **OPTIONS)
        assert result.num_steps == 5
        assert relative(result.value, A @ (A @ (A @ b)) - 2 * A @ b) < 1e-13

    def test_includes_products_of_lower_precision_than_float32(self) -> None:
        """The products of this operator are rounded to bfloat16, as with autocast."""
        A, b = matrix(np.linspace(0.5, 2, N)), vectors(1)[:, 0]

        class Rounding(LinearOperator):
            epsilon = torch.finfo(torch.bfloat16).eps

            def _matvec(self, x):
                return torch.from_numpy(A @ x.reshape(-1)).bfloat16().double().numpy()

        for f in (lambda x: x, np.exp, lambda x: 1 / x):
            with pytest.warns(RuntimeWarning, match="increase rtol, because rounding errors.*float64 model"):
                result = apply(Rounding(np.float64, A.shape), f, b, rtol=1e-3, **OPTIONS)
            assert relative(result.value, exact(A, f, b)) <= result.error < 1

    def test_includes_the_residual_of_a_space_that_counts_as_invariant(self) -> None:
        values, b = np.ones(10_000), np.zeros(10_000)
        values[-1], b[:10], b[-1] = 1.5, 1, 4e-13
        result = apply(diags_array(values), "exp", b, **OPTIONS)
        assert result.num_steps == 1
        assert 1e-15 < relative(result.value, np.exp(values) * b) < 2 * result.error

    @pytest.mark.parametrize(
        ("kind", "rtol"), [(np.float32, 1e-12), (np.float16, 1e-5), (torch.float32, 1e-12), (torch.bfloat16, 1e-5)]
    )
    def test_includes_the_rounding_of_the_result(self, kind, rtol) -> None:
        A, b = matrix(np.linspace(0.5, 1, N)), vectors(1)[:, 0]
        given = torch.from_numpy(b).to(kind) if isinstance(kind, torch.dtype) else b.astype(kind)
        with pytest.warns(RuntimeWarning, match="pass b in float64, because the result is rounded"):
            result = apply(A, "exp", given, rtol=rtol, **OPTIONS)
        double = torch.as_tensor(given).double().numpy()
        error = relative(torch.as_tensor(result.value).double().numpy(), scipy.linalg.expm(A) @ double)
        assert error <= 1.001 * result.error < 2 * error + 2 * rtol
        assert apply(A, "exp", double, rtol=rtol, **OPTIONS).converged

    def test_is_small_only_if_f_was_seen_between_the_ritz_values(self) -> None:
        """Boxes and hats vanish at most Ritz values. With few steps, no Ritz value may lie inside of them."""
        even, b = np.linspace(0, 1, 400), np.random.default_rng(0).normal(size=400)
        for values in (even, np.logspace(-4, 0, 400)):
            for center in (0.1, 0.34, 0.5, 0.9):
                for f in (
                    lambda x, c=center: (np.abs(x - c) < 0.03) * 1.0,
                    lambda x, c=center: np.maximum(0.05 - np.abs(x - c), 0),
                    lambda x, c=center: 1 - np.maximum(0.05 - np.abs(x - c), 0),
                    lambda x, c=center: (x > c) * 1.0,
                ):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        result = apply(diags_array(values), f, b, rtol=1e-3, **OPTIONS)
                    error = np.linalg.norm(result.value - f(values) * b) / np.linalg.norm(f(values) * b)
                    assert error <= 2 * result.error

    def test_is_infinite_for_zeros_unless_no_step_can_change_them(self) -> None:
        A, b = matrix(np.linspace(0.5, 1, N)), vectors(1)[:, 0]
        with pytest.warns(RuntimeWarning, match=r"error inf after 7 steps.*increase num_steps"):
            result = apply(A, np.zeros_like, b, num_steps=7, **OPTIONS)
        assert result.error == math.inf
        assert apply(A, np.zeros_like, b, num_steps=N, **OPTIONS).error == 0
        eigenvector = np.linalg.eigh(A)[1][:, 3]
        assert apply(A, np.zeros_like, eigenvector, **OPTIONS).error == 0
        for f in (np.sqrt, lambda x: np.abs(x) ** 0.25):
            result = apply(np.zeros((4, 4)), f, np.ones(4), **OPTIONS)
            assert (result.value == 0).all()
            assert result.error == 0

    def test_ignores_a_pole_in_the_middle_of_a_gap(self) -> None:
        half = np.linspace(0.2, 3, N // 2)
        A, b = matrix(np.r_[-half, half]), vectors(1)[:, 0]
        correct = np.linalg.solve(A, b)
        for steps in (40, 60, 81, 100, 120, 140):
            with pytest.warns(RuntimeWarning, match="increase num_steps"):
                result = apply(A, "inv", b, num_steps=steps, rtol=1e-8, **OPTIONS)
            error = relative(result.value, correct)
            assert error < result.error < 60 * error

    def test_holds_for_square_roots_of_singular_matrices(self) -> None:
        factor, b = np.random.default_rng(0).normal(size=(N, 20)), vectors(1)[:, 0]
        U, singular_values, _ = np.linalg.svd(factor, full_matrices=False)
        correct = (U * singular_values) @ (U.T @ b)
        for kind, rtol in ((np.float64, 1e-5), (np.float32, 5e-3)):
            result = apply((factor @ factor.T).astype(kind), "sqrt", b, rtol=rtol, **OPTIONS)
            assert result.converged
            assert relative(result.value, correct) <= result.error

    def test_leads_to_the_right_remedy_if_rounding_dominates_at_the_last_step(self) -> None:
        single, b = matrix(np.logspace(-3, 0, N)).astype(np.float32), vectors(1)[:, 0]
        with pytest.warns(RuntimeWarning, match="increase rtol"):
            steps = apply(single, "inv", b, num_steps=N, rtol=1e-7, **OPTIONS).num_steps
        assert steps < N
        with pytest.warns(RuntimeWarning, match="increase rtol"):
            apply(single, "inv", b, num_steps=steps, rtol=1e-7, **OPTIONS)


def test_functions_that_are_defined_only_near_the_spectrum() -> None:
    def logarithm(x):
        assert x.min() > 0.01  # fails for empty arrays, too
        return np.log(x)

    A, b = matrix(np.linspace(0.5, 1, N)), vectors(1)[:, 0]
    assert relative(apply(A, logarithm, b, **OPTIONS).value, exact(A, np.log, b)) < 1e-5
    eigenvector = np.linalg.eigh(A)[1][:, 3]
    assert apply(A, logarithm, eigenvector, **OPTIONS).num_steps == 1


def test_functions_that_work_in_place() -> None:
    def exponential(x):
        x *= -1
        return np.exp(x, out=x)

    A, b = matrix_of("even"), vectors(1)[:, 0]
    expected = apply(A, lambda x: np.exp(-x), b, **OPTIONS)
    result = apply(A, exponential, b, **OPTIONS)
    np.testing.assert_array_equal(result.value, expected.value)
    assert result.error == expected.error


class TestSymmetry:
    @pytest.mark.parametrize("convert", [np.asarray, csr_array, aslinearoperator], ids=["dense", "sparse", "operator"])
    def test_matrices_that_are_not_symmetric(self, convert) -> None:
        A = matrix(np.linspace(0.5, 1, N))
        A[3, 100] += 1e-6
        with pytest.raises(ValueError, match=r"A is not symmetric \(\|\|A - A'\|\| / .* pass a symmetric operator"):
            apply(convert(A), "exp", vectors(), **OPTIONS)

    def test_operators_that_are_not_symmetric(self) -> None:
        A = np.triu(matrix(np.linspace(0.5, 1, N)))
        for dtype in (np.float32, np.float64):
            operator = LinearOperator(A.shape, matvec=lambda x: A @ x, dtype=dtype)
            with pytest.raises(ValueError, match="A is not symmetric"):
                apply(operator, "exp", vectors(), **OPTIONS)

    def test_the_check_of_an_operator_takes_three_products(self) -> None:
        A, b = matrix(np.linspace(0.5, 1, N)), vectors()
        operator = LinearOperator(A.shape, matvec=lambda x: A @ x, dtype=np.float64)
        result, dense = apply(operator, "exp", b, **OPTIONS), apply(A, "exp", b, **OPTIONS)
        assert result.num_products - 3 == dense.num_products == sum(dense.num_steps)

    def test_rounding_errors_are_not_asymmetry(self) -> None:
        A, b = matrix(np.linspace(0.5, 1, N)), vectors()
        noise = np.random.default_rng(1).normal(size=A.shape)
        assert apply(A + 1e-14 * noise, "exp", b, **OPTIONS).converged
        single = (A + 1e-9 * noise).astype(np.float32)
        assert apply(single, "exp", b, **OPTIONS).converged
        rounded = LinearOperator(A.shape, matvec=lambda x: (single @ x.astype(np.float32)).astype(float), dtype=float)
        assert apply(rounded, "exp", b, **OPTIONS).num_products > 0
        assert apply(np.array([[2.0]]), "exp", [1.0], **OPTIONS).converged


def test_kinked_functions() -> None:
    A, b = matrix_of("indefinite"), vectors(1)[:, 0]
    for f in (np.abs, np.sign):
        result = apply(A, f, b, num_steps=N, rtol=1e-6, **OPTIONS)
        assert relative(result.value, exact(A, f, b)) <= result.error <= 1e-6


class TestTheVector:
    @pytest.mark.parametrize("shape", [(N,), (N, 1), (N, 3), (N, 0)])
    @pytest.mark.parametrize("kind", [np.float64, np.float32, torch.float64, torch.float32])
    def test_the_result_has_its_type_shape_and_dtype(self, shape, kind) -> None:
        A = matrix(np.linspace(0.5, 3, N))
        b = np.random.default_rng(0).normal(size=shape)
        given = torch.from_numpy(b).to(kind) if isinstance(kind, torch.dtype) else b.astype(kind)
        result = apply(A, "sqrt", given, **OPTIONS)
        assert type(result.value) is type(given)
        assert result.value.dtype == given.dtype
        assert tuple(result.value.shape) == shape
        assert np.shape(result.error) == np.shape(result.num_steps) == shape[1:]
        np.testing.assert_allclose(np.asarray(result.value), exact(A, np.sqrt, b), rtol=0, atol=1e-4)
        assert result.num_products == np.sum(result.num_steps)

    def test_each_column_is_treated_as_if_it_were_alone(self) -> None:
        A, b = matrix_of("outliers"), vectors(3)
        b[:, 1] = 0
        b[:, 2] = np.linalg.eigh(A)[1][:, 5]
        b *= [1, 1, 1e-200]
        result = apply(A, "inv", b, rtol=1e-8, **OPTIONS)
        assert result.num_steps[1:].tolist() == [0, 1]
        assert (result.value[:, 1] == 0).all()
        alone = apply(A, "inv", b[:, 0], rtol=1e-8, **OPTIONS)
        assert alone.num_steps == result.num_steps[0]
        np.testing.assert_allclose(result.value[:, 0], alone.value, rtol=1e-10)
        np.testing.assert_allclose(result.value[:, 2] * 1e200, np.linalg.solve(A, b[:, 2] * 1e200), rtol=1e-10)

    def test_integers_lists_and_gradients(self) -> None:
        A = matrix(np.linspace(0.5, 3, 5))
        correct = exact(A, np.exp, np.arange(5.0))
        for b in ([0, 1, 2, 3, 4], torch.arange(5), torch.arange(5.0, dtype=torch.float64, requires_grad=True)):
            np.testing.assert_allclose(apply(A, "exp", b, **OPTIONS).value, correct, rtol=1e-10)
        assert b.tolist() == [0, 1, 2, 3, 4]

    def test_groups_of_columns_give_the_same_result(self) -> None:
        A, b = matrix_of("even"), vectors(5)
        memory = 2 * 8 * N * 106
        result, whole = apply(A, "exp", b, memory=memory, **OPTIONS), apply(A, "exp", b, **OPTIONS)
        np.testing.assert_allclose(result.value, whole.value, rtol=1e-8)
        with pytest.raises(MemoryError, match="the Lanczos basis of one column of b"):
            apply(A, "exp", b, memory=1000, **OPTIONS)


@pytest.mark.parametrize("device", DEVICES)
def test_curvature_operators_with_tensors(device) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double().to(device)
    data = [(torch.randn(7, 4).double().to(device), torch.randn(7, 2).double().to(device)) for _ in range(2)]
    G = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    size = G.shape[0]
    b = torch.randn(size, 2, dtype=torch.float64).to(device)
    before = G.num_products
    result = apply(G.damped(0.05), "inv_sqrt", b, rtol=1e-11, **OPTIONS)
    assert G.num_products - before == result.num_products
    assert result.value.device == b.device
    dense, vector = G @ np.eye(size) + 0.05 * np.eye(size), b.cpu().numpy()
    np.testing.assert_allclose(result.value.cpu().numpy(), exact(dense, FUNCTIONS["inv_sqrt"], vector), atol=1e-10)
    half = apply(G.damped(0.05), "inv_sqrt", result.value, rtol=1e-11, **OPTIONS)
    np.testing.assert_allclose(half.value.cpu().numpy(), np.linalg.solve(dense, vector), atol=1e-9)


def test_a_singular_matrix_has_a_square_root() -> None:
    A, b = matrix(np.r_[np.zeros(N // 2), np.linspace(1, 2, N // 2)]), vectors(1)[:, 0]
    result = apply(A, "sqrt", b, rtol=1e-6, **OPTIONS)
    values, V = np.linalg.eigh(A)
    correct = (V * np.sqrt(np.maximum(values, 0))) @ (V.T @ b)
    assert relative(result.value, correct) <= result.error
    for name in ("log", "inv_sqrt"):
        with pytest.raises(ValueError, match=r"needs a positive definite matrix.*A\.damped"):
            apply(A, name, b, **OPTIONS)


class TestDomains:
    def test_an_eigenvalue_that_is_positive_but_not_distinguishable_from_zero(self) -> None:
        single, b = np.diag(np.linspace(0, 1, N) + 1e-8).astype(np.float32), vectors(1)[:, 0]
        for name in ("log", "inv_sqrt"):
            with pytest.raises(
                ValueError, match=r"not distinguishable from 0.*with lam > 1e-06, or use a float64 model"
            ):
                apply(single, name, b, num_steps=N, **OPTIONS)
        damped = single + np.diag(np.full(N, 2e-6, np.float32))
        with pytest.warns(RuntimeWarning, match="not converged"):
            result = apply(damped, "inv_sqrt", b, num_steps=N, **OPTIONS)
        assert relative(result.value, exact(damped.astype(float), FUNCTIONS["inv_sqrt"], b)) <= result.error

    @pytest.mark.parametrize("name", ["log", "sqrt", "inv_sqrt"])
    def test_a_negative_eigenvalue(self, name) -> None:
        with pytest.raises(ValueError, match=rf"eigenvalue <= -\d.*'{name}' needs a positive .*definite matrix"):
            apply(matrix_of("indefinite"), name, vectors(), **OPTIONS)

    def test_a_callable_that_is_not_finite(self) -> None:
        with pytest.raises(ValueError, match=r"f is nan at -.*pass A\.damped"):
            apply(matrix_of("indefinite"), np.log, vectors(), **OPTIONS)

    def test_overflow(self) -> None:
        with pytest.raises(ValueError, match=r"'exp' is inf at .*scale or shift A"):
            apply(matrix(np.linspace(0, 5000, N)), "exp", vectors(), **OPTIONS)

    def test_a_result_that_overflows_the_dtype_of_b(self) -> None:
        A = np.diag(np.linspace(0, 20, N))
        for b in (np.ones(N, np.float16), torch.ones(N, dtype=torch.float16)):
            with pytest.raises(ValueError, match=r"f\(A\) b overflows float16, the dtype of b: pass b in float64"):
                apply(A, "exp", b, **OPTIONS)

        with pytest.raises(ValueError, match="overflows float64, the dtype of b: scale b"):
            apply(A, "exp", np.full(N, 1e305), **OPTIONS)

    def test_numbers_that_overflow_the_dtype_of_the_basis(self) -> None:
        A, b = matrix(np.linspace(0.5, 1, N)).astype(np.float32), vectors(1)[:, 0]
        expected = apply(A, "exp", b, rtol=1e-4, **OPTIONS).value
        np.testing.assert_allclose(apply(A, "exp", 1e60 * b, rtol=1e-4, **OPTIONS).value, 1e60 * expected, rtol=1e-3)
        large = apply(A, lambda x: 1e60 * np.exp(x), b, rtol=1e-4, **OPTIONS)
        np.testing.assert_allclose(large.value, 1e60 * expected, rtol=1e-3)

    def test_a_nonfinite_product(self) -> None:
        A = LinearOperator((N, N), matvec=lambda x: np.full(N, np.nan), dtype=np.float64)
        with pytest.raises(ValueError, match="a product with A is not finite"):
            apply(A, "exp", vectors(), **OPTIONS)


def test_a_time_limit_returns_the_current_approximation() -> None:
    A, b = matrix_of("decades"), vectors()
    with pytest.warns(RuntimeWarning, match="increase seconds"):
        result = apply(A, "inv", b, seconds=0, **OPTIONS)
    assert result.num_steps.tolist() == [1, 1]
    assert np.isfinite(result.value).all()
    assert (result.error > 1e-5).all()


def test_the_result_prints_and_pickles() -> None:
    A = matrix(np.linspace(0.5, 3, N))
    result = apply(A, "exp", vectors(1)[:, 0], **OPTIONS)
    assert str(result).startswith("converged: estimated relative error ")
    assert "\n" not in str(result)
    again = pickle.loads(pickle.dumps(result))
    assert str(again) == str(result)
    np.testing.assert_array_equal(again.value, result.value)
    assert "of 2 columns" in str(apply(A, "exp", vectors(2), **OPTIONS))


class TestBadInput:
    @pytest.mark.parametrize("f", [math.exp, torch.exp])
    def test_functions_of_other_libraries(self, f) -> None:
        with pytest.raises(TypeError, match=r"f cannot be applied to an array of eigenvalues.*use NumPy functions"):
            apply(matrix(np.linspace(1, 2, N)), f, vectors(), **OPTIONS)

    def test_functions_that_are_not_elementwise(self) -> None:
        with pytest.raises(ValueError, match=r"f returned an array of shape \(\) for 5 eigenvalues"):
            apply(matrix(np.linspace(1, 2, N)), np.sum, vectors(), **OPTIONS)

    @pytest.mark.parametrize(
        ("b", "error", "match"),
        [
            (np.ones(3), ValueError, r"b has shape \(3,\), but A has shape \(240, 240\): pass \(240,\) or"),
            (torch.ones(N, 2, 2), ValueError, "b has shape"),
            (np.ones(N, complex), TypeError, "b has dtype complex128"),
            (np.full(N, np.nan), ValueError, "b is not finite"),
            (torch.ones(N).to_sparse(), TypeError, "to_dense"),
            (["x"] * N, TypeError, "b has dtype"),
            ([1j] * N, TypeError, "b has dtype complex128"),
        ],
    )
    def test_vectors(self, b, error, match) -> None:
        with pytest.raises(error, match=match):
            apply(np.eye(N), "exp", b, **OPTIONS)


def test_the_tolerance_may_be_a_tensor() -> None:
    A, b = matrix_of("even"), vectors(1)[:, 0]
    assert apply(A, "exp", b, rtol=torch.tensor(1e-5), **OPTIONS).converged is True
    with pytest.warns(RuntimeWarning, match="but rtol is 1e-05: increase num_steps"):
        apply(A, "exp", b, rtol=torch.tensor(1e-5), num_steps=2, **OPTIONS)


def test_the_hessian_of_a_float32_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    data = [(torch.randn(7, 4), torch.randn(7, 2))]
    H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    b = np.random.default_rng(0).normal(size=H.shape[0])
    result = apply(H, "exp", b, **OPTIONS)
    double = HessianLinearOperator(
        model.double(), nn.MSELoss(), dict(model.named_parameters()), [(X.double(), y.double()) for X, y in data]
    )
    assert relative(result.value, exact(double @ np.eye(len(b)), np.exp, b)) <= result.error <= 1e-5
