"""Eigenpairs of ``S.T @ S`` from the smaller side are those of the matrix itself, with a certificate."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GramLinearOperator,
    HessianLinearOperator,
    PerExampleGradientLinearOperator,
)
from curvop.operators.gram import FactorLinearOperator, NotFactorableError
from curvop.spectrum import EigenResult, eigen, eigsh

N, CLASSES = 20, 5


def problem(seed: int = 0) -> tuple[Any, ...]:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        X, y = torch.rand(N, 16).double(), torch.randint(0, CLASSES, (N,))
        model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES)).double()
    data = list(zip(X.split(13), y.split(13), strict=True))
    return model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data


MATRICES = {
    "ef": lambda: EFLinearOperator(*problem()),
    "ggn": lambda: GGNLinearOperator(*problem()),
    "sampled": lambda: FisherLinearOperator(*problem(), mc_samples=2, rng=0),
    "damped": lambda: EFLinearOperator(*problem()).damped(0.5),
    "block": lambda: GGNLinearOperator(*problem()).block("0.weight"),
}


def exact(A: Any, k: int) -> np.ndarray:
    return np.linalg.eigvalsh(A @ np.eye(A.shape[0]))[-k:]


def assert_eigenpairs(A: Any, result: EigenResult, values: np.ndarray) -> None:
    """The result is certified, its bounds hold, and they are small."""
    assert result.ok
    scale = max(abs(values))
    assert (abs(result.values - values) <= result.certificate.bounds + 1e-14 * scale).all()
    assert result.certificate.bounds.max() < 1e-11 * scale
    residuals = np.linalg.norm(A @ result.vectors - result.vectors * result.values, axis=0)
    assert (residuals <= result.certificate.bounds).all()
    np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(len(values)), atol=1e-9)


class TestFormed:
    @pytest.mark.default_cases("*-7-LA", "ef-20-*", "damped-1-LM")
    @pytest.mark.parametrize("which", ["LA", "LM"])
    @pytest.mark.parametrize("k", [1, 7, N])
    @pytest.mark.parametrize("matrix", MATRICES)
    def test_eigenpairs(self, matrix: str, k: int, which: str) -> None:
        A = MATRICES[matrix]()
        result = eigsh(A, k, which, progress=False)
        assert "rows of its factor" in result.note
        assert result.products == result.certificate.products == 2
        assert_eigenpairs(A, result, exact(A, k))

    def test_beyond_the_rank_the_vectors_are_in_the_null_space(self) -> None:
        model, loss, params, data = problem()
        data = [(X, torch.where(torch.arange(len(y)) < 3, y, -100)) for X, y in data]
        A = EFLinearOperator(model, loss, params, data)
        result = eigsh(A, 10, progress=False)
        assert "rank 6" in result.note
        assert_eigenpairs(A, result, exact(A, 10))
        assert not result.values[:4].any()
        assert result.certificate.zeros == 4

    def test_a_matrix_that_is_zero(self) -> None:
        model, _, params, data = problem()
        A = GGNLinearOperator(model, nn.L1Loss(), params, [(X, torch.zeros(len(X), CLASSES).double()) for X, _ in data])
        result = eigsh(A, 3, progress=False)
        assert result.ok
        assert not result.values.any()
        np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(3), atol=1e-12)

    @pytest.mark.parametrize("scale", [1.0, 1e-90, 1e90])
    def test_singular_values_of_all_sizes(self, scale: float) -> None:
        rng = np.random.default_rng(0)
        U, V = (np.linalg.qr(rng.normal(size=(size, 8)))[0] for size in (8, 40))
        sigma = scale * 10.0 ** np.arange(-7.0, 1.0)
        X = torch.from_numpy((U * sigma) @ V.T)
        total = lambda z, y: z.sum()  # noqa: E731
        total.reduction = "sum"
        w = torch.ones(40, dtype=torch.float64)
        A = EFLinearOperator(lambda p, X: X @ p["w"], total, {"w": w}, [(X, torch.zeros(8))])
        result = eigsh(A, 8, progress=False)
        assert result.ok
        np.testing.assert_allclose(result.values / scale**2, (sigma / scale) ** 2, rtol=1e-8, atol=1e-15)
        np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(8), atol=1e-10)
        np.testing.assert_allclose(abs(np.sum(V * result.vectors, axis=0))[2:], 1, atol=1e-6)

    def test_a_float32_model(self) -> None:
        model, loss, _, data = problem()
        model = model.float()
        A = EFLinearOperator(model, loss, dict(model.named_parameters()), [(X.float(), y) for X, y in data])
        result = eigsh(A, N, progress=False)
        assert result.ok
        assert (abs(result.values - exact(A, N)) <= result.certificate.bounds).all()
        assert result.certificate.noise > 1e-9

    def test_the_certificate_notices_a_wrong_factor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = FactorLinearOperator.formed

        def without_an_example(self: Any, memory: Any = None) -> Any:
            rows = own(self, memory)
            rows[3] = 0
            return rows

        monkeypatch.setattr(FactorLinearOperator, "formed", without_an_example)
        with pytest.warns(RuntimeWarning, match="not certified"):
            result = eigsh(MATRICES["ef"](), N, progress=False)
        assert not result.ok

    def test_without_a_certificate(self) -> None:
        A = MATRICES["ef"]()
        result = eigsh(A, 3, certificate=False, progress=False)
        assert result.certificate is None
        np.testing.assert_allclose(result.values, exact(A, 3), rtol=1e-12)

    def test_it_can_be_saved(self, tmp_path: Any) -> None:
        result = eigsh(MATRICES["ef"](), 3, progress=False)
        result.save(tmp_path / "pairs.npz")
        assert str(EigenResult.load(tmp_path / "pairs.npz")) == str(result)


class TestProducts:
    @pytest.mark.parametrize("method", ["arpack", "lanczos", "dense"])
    @pytest.mark.parametrize("matrix", ["ggn", "damped"])
    def test_eigenpairs(self, monkeypatch: pytest.MonkeyPatch, matrix: str, method: str) -> None:
        monkeypatch.setattr(eigen, "fits", lambda *_: False)
        A = MATRICES[matrix]()
        result = eigsh(A, 6, method=method, progress=False)
        assert "from the Gram matrix" in result.note
        assert_eigenpairs(A, result, exact(A, 6))

    def test_beyond_the_rank_the_vectors_are_in_the_null_space(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eigen, "fits", lambda *_: False)
        model, loss, params, data = problem()
        data = [(X, torch.where(torch.arange(len(y)) < 3, y, -100)) for X, y in data]
        A = EFLinearOperator(model, loss, params, data)
        assert_eigenpairs(A, eigsh(A, 10, progress=False), exact(A, 10))

    def test_a_time_limit(self) -> None:
        A = MATRICES["ggn"]()
        result = eigsh(A, 3, method="lanczos", seconds=60, progress=False)
        assert "from the Gram matrix" in result.note
        assert_eigenpairs(A, result, exact(A, 3))

    def test_a_starting_vector(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eigen, "fits", lambda *_: False)
        A = MATRICES["ggn"]()
        result = eigsh(A, 2, side="examples", v0=np.ones(A.shape[0]), ncv=50, progress=False)
        assert_eigenpairs(A, result, exact(A, 2))

    def test_the_basis_is_as_long_as_the_gram_matrix(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(eigen, "fits", lambda *_: False)
        A = GGNLinearOperator(*problem())
        with pytest.raises(MemoryError, match="of 269 numbers"):
            eigsh(A, 2, side="parameters", ncv=60, memory=10_000, progress=False)
        with pytest.raises(MemoryError, match="of 100 numbers"):
            eigsh(A, 2, side="examples", ncv=60, memory=10_000, progress=False)


def is_own(A: Any, *args: Any, **options: Any) -> bool:
    """Return whether eigsh solves A itself."""
    result = eigsh(A, *args, **options, certificate=False, progress=False)
    return "factor" not in result.note and "Gram" not in result.note


class TestAuto:
    def test_it_takes_the_smaller_side(self) -> None:
        A = MATRICES["ef"]()
        assert not is_own(A, 3)
        assert is_own(A, 3, side="parameters")
        assert is_own(A, 3, "SA")
        assert is_own(A, 4, "BE")
        assert is_own(A, N + 1)
        assert is_own(A, 3, v0=np.ones(A.shape[0]))
        assert is_own(A.block("2.bias"), 3)  # 5 parameters, 20 examples
        assert is_own(HessianLinearOperator(*problem()), 3)
        assert is_own(A[:, :], 3)
        assert is_own(A.damped(-1.0), 3, "LM")
        assert not is_own(A.damped(-1.0), 3, "LA")

    def test_an_indefinite_loss(self) -> None:
        model, _, params, data = problem()
        A = GGNLinearOperator(model, lambda z, y: (z[:, 0] * z[:, 1]).mean(), params, data)
        assert is_own(A, 3)
        with pytest.raises(NotFactorableError, match="indefinite"):
            eigsh(A, 3, side="examples", progress=False)

    def test_shuffled_data(self) -> None:
        model, loss, params, data = problem()
        X, y = (torch.cat(parts) for parts in zip(*data, strict=True))
        loader = DataLoader(TensorDataset(X, y), batch_size=5, shuffle=True)
        A = EFLinearOperator(model, loss, params, loader, cache=0)
        result = eigsh(A, 2, progress=False)
        np.testing.assert_allclose(result.values, exact(EFLinearOperator(model, loss, params, data), 2), rtol=1e-10)


class TestErrors:
    @pytest.mark.parametrize(
        ("matrix", "options", "match"),
        [
            ("ef", {"side": "rows"}, "side is 'rows', but must be one of auto, parameters, examples"),
            ("ef", {"which": "SA", "side": "examples"}, "which is 'SA'.*side='parameters'"),
            ("ef", {"k": N + 1, "side": "examples"}, f"k is {N + 1}, but must be at most {N}"),
        ],
    )
    def test_arguments(self, matrix: str, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            eigsh(MATRICES[matrix](), **{"k": 2, **options}, progress=False)

    def test_matrices_without_a_gram_matrix(self) -> None:
        for A in (np.eye(4), HessianLinearOperator(*problem())):
            with pytest.raises(NotFactorableError, match=r"use GGN|pass side='parameters'"):
                eigsh(A, 2, side="examples", progress=False)
        with pytest.raises(ValueError, match="the damping is negative"):
            eigsh(MATRICES["ef"]().damped(-1.0), 2, "LM", side="examples", progress=False)


def test_the_certificate_is_that_of_certify_within_its_bounds() -> None:
    from curvop.spectrum import certify

    A = MATRICES["ggn"]()
    result = eigsh(A, 12, progress=False)
    again = certify(A, result.values, result.vectors, which="LA", progress=False)
    assert again.ok
    assert (again.residuals <= result.certificate.bounds).all()
    assert dataclasses.replace(result, certificate=again).ok


class TestIterative:
    """With a time limit, the Gram matrix is solved by products."""

    def test_damping_changes_no_vectors(self) -> None:
        model, loss, params, data = problem()
        F = EFLinearOperator(model, loss, params, data * 2)  # rank N, 2 N rows
        result = eigsh(F.damped(1e4), 25, "LA", seconds=600, progress=False)
        assert "Gram matrix" in result.note
        assert result.ok
        np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(25), atol=1e-10)
        np.testing.assert_allclose(result.values, exact(F, 25) + 1e4, rtol=1e-12)

    def test_small_singular_values(self) -> None:
        torch.manual_seed(0)
        scales = torch.logspace(0, -6.5, 30, dtype=torch.float64)
        X = (
            torch.linalg.qr(torch.randn(30, 30).double())[0]
            * scales
            @ torch.linalg.qr(torch.randn(60, 30).double())[0].T
        )
        model = nn.Linear(60, 1, bias=False).double()
        G = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, torch.zeros(30, 1).double())])
        result = eigsh(G, 25, "LA", seconds=600, progress=False)
        assert result.ok
        np.testing.assert_allclose(result.vectors.T @ result.vectors, np.eye(25), atol=1e-10)
        np.testing.assert_allclose(result.values, 2 / 30 * scales[:25].flip(0) ** 2, rtol=1e-6, atol=1e-15)


class TestMultiples:
    def test_a_multiple_of_a_product(self) -> None:
        model, loss, params, data = problem()
        G = PerExampleGradientLinearOperator(model, loss, params, data)
        F = EFLinearOperator(model, loss, params, data)
        A = G.T @ G / N
        np.testing.assert_allclose(A.gram().to_dense(), F.gram().to_dense(), atol=1e-14)
        result = eigsh(A, 5, side="examples", progress=False)
        assert_eigenpairs(F, result, exact(F, 5))
        with pytest.raises(NotFactorableError, match="a multiple by -1"):
            (-A).gram()

    def test_many_outputs_are_refused_at_once(self) -> None:
        model = nn.Linear(3, 300).double()
        data = [(torch.randn(4, 3).double(), torch.randint(300, (4,)))]
        G = GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        with pytest.raises(NotFactorableError, match="an example has 300 outputs"):
            G.gram()

    def test_an_array_is_no_factor(self) -> None:
        with pytest.raises(TypeError, match="factor is a ndarray"):
            GramLinearOperator(np.eye(3))
