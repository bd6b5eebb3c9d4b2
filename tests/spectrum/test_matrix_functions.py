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


def test_curvature_operators_with_tensors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    data = [(torch.randn(7, 4).double(), torch.randn(7, 2).double()) for _ in range(2)]
    G = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
    size = G.shape[0]
    b = torch.randn(size, 2, dtype=torch.float64)
    before = G.num_products
    result = apply(G.damped(0.05), "inv_sqrt", b, rtol=1e-11, **OPTIONS)
    assert G.num_products - before == result.num_products
    dense = G @ np.eye(size) + 0.05 * np.eye(size)
    np.testing.assert_allclose(result.value.numpy(), exact(dense, FUNCTIONS["inv_sqrt"], b.numpy()), atol=1e-10)
    half = apply(G.damped(0.05), "inv_sqrt", result.value, rtol=1e-11, **OPTIONS)
    np.testing.assert_allclose(half.value.numpy(), np.linalg.solve(dense, b.numpy()), atol=1e-9)


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
        ],
    )
    def test_vectors(self, b, error, match) -> None:
        with pytest.raises(error, match=match):
            apply(np.eye(N), "exp", b, **OPTIONS)


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
