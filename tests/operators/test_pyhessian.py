"""Comparison with PyHessian: where docs/pyhessian.rst says that results agree or differ, they do.

Not part of the default run: ``python -m pip install -e ".[bench,test]" && python -m pytest -m peers``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import cut, seeded
from torch import nn

from curvop import HessianLinearOperator, spectrum

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]  # warnings from PyHessian do not matter here


@pytest.fixture(scope="module")
def hessian() -> Any:
    return pytest.importorskip("pyhessian").hessian


@seeded
def problem() -> tuple[nn.Module, list[Any]]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, cut(torch.randn(30, 4), torch.randint(0, 3, (30,)), (20, 10))


def ours(model: nn.Module, criterion: nn.Module, data: list[Any]) -> HessianLinearOperator:
    return HessianLinearOperator(model, criterion, dict(model.named_parameters()), data)


def product(theirs: Any, H: HessianLinearOperator, v: np.ndarray) -> np.ndarray:
    """Return the product of PyHessian with a vector."""
    parts = list(H.unravel(torch.from_numpy(v)).values())
    return H.ravel(dict(zip(H.params_slices, theirs.dataloader_hv_product(parts)[1], strict=True)))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_products_for_a_loader_agree(hessian: Any) -> None:
    model, data = problem()
    H = ours(model, nn.CrossEntropyLoss(), data)
    v = np.random.default_rng(0).standard_normal(H.shape[1])
    assert relative(product(hessian(model, nn.CrossEntropyLoss(), dataloader=data, cuda=False), H, v), H @ v) < 1e-12


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(ignore_index=0)])
def test_products_differ_if_the_loss_is_no_mean_over_all_examples(hessian: Any, criterion: nn.Module) -> None:
    model, data = problem()
    H = ours(model, criterion, data)
    v = np.random.default_rng(0).standard_normal(H.shape[1])
    assert relative(product(hessian(model, criterion, dataloader=data, cuda=False), H, v), H @ v) > 1e-3


def test_eigenvalues_agree_in_reverse_order(hessian: Any) -> None:
    model, data = problem()
    theirs, _ = hessian(model, nn.CrossEntropyLoss(), dataloader=data, cuda=False).eigenvalues(2000, 1e-9, top_n=3)
    found = spectrum.eigsh(ours(model, nn.CrossEntropyLoss(), data), 3, "LM", progress=False)
    np.testing.assert_allclose(found.values[::-1], theirs, rtol=1e-3)


def test_the_mean_of_their_samples_is_the_trace(hessian: Any) -> None:
    model, data = problem()  # the Hessian of a linear model has positive samples only, so that they do not stop
    samples = hessian(model[0], nn.CrossEntropyLoss(), dataloader=data, cuda=False).trace(maxIter=400, tol=0.0)
    assert len(samples) == 400
    exact = np.trace(ours(model[0], nn.CrossEntropyLoss(), data).to_dense())
    assert abs(np.mean(samples) - exact) < 5 * np.std(samples, ddof=1) / len(samples) ** 0.5


def test_their_trace_stops_if_the_mean_of_the_samples_is_negative(hessian: Any) -> None:
    class Concave(nn.Module):
        def forward(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -(z**2).mean() + 0 * y.sum()

    model, data = problem()
    assert len(hessian(model[0], Concave(), dataloader=data, cuda=False).trace(maxIter=100)) == 2


def test_their_density_needs_an_older_torch(hessian: Any) -> None:
    model, data = problem()
    with pytest.raises(RuntimeError, match=r"torch\.linalg\.eig"):
        hessian(model, nn.CrossEntropyLoss(), dataloader=data, cuda=False).density(iter=5)


def test_the_model_stays_in_evaluation_mode_and_loses_its_gradients(hessian: Any) -> None:
    model, data = problem()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    hessian(model, nn.CrossEntropyLoss(), dataloader=data, cuda=False).eigenvalues(maxIter=1)
    assert not model.training
    assert model[0].weight.grad is None


def test_one_batch_is_at_the_parameters_of_the_constructor(hessian: Any) -> None:
    model, data = problem()
    theirs = hessian(model, nn.CrossEntropyLoss(), data=data[0], cuda=False)
    H = ours(model, nn.CrossEntropyLoss(), data[:1])
    before = H.to_dense()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        theirs.eigenvalues()
    assert relative(H.to_dense(), before) > 1e-2
