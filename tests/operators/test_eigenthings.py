"""Comparison with hessian-eigenthings: where docs/eigenthings.rst says that results agree or differ, they do.

Not part of the default run: ``python -m pip install -e ".[bench,test]" && python -m pytest -m peers``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import cut, seeded
from pages import ROOT
from torch import nn

import curvop
from curvop import EFLinearOperator, GGNLinearOperator, HessianLinearOperator, spectrum

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]  # warnings of the peer do not matter here

EVEN, UNEVEN = (10, 10), (15, 5)
CLASSES = 3


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("hessian_eigenthings")


@seeded
def problem(sizes: tuple[int, ...], criterion: type[nn.Module] = nn.CrossEntropyLoss) -> tuple[nn.Module, list[Any]]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    y = torch.randint(0, CLASSES, (20,)) if criterion is nn.CrossEntropyLoss else torch.randn(20, CLASSES)
    return model, cut(torch.randn(20, 4), y, sizes)


def pair(peer: Any, name: str, model: nn.Module, data: list[Any], criterion: nn.Module) -> tuple[Any, Any]:
    """Return the operators of both packages."""
    own, other, arguments = {
        "Hessian": (HessianLinearOperator, "HessianOperator", [peer.supervised_loss(criterion)]),
        "GGN": (
            GGNLinearOperator,
            "GGNOperator",
            [peer.supervised_forward, peer.supervised_loss_of_output(criterion)],
        ),
        "EF": (EFLinearOperator, "EmpiricalFisherOperator", [peer.supervised_per_sample_loss(criterion)]),
    }[name]
    A = own(model, criterion, dict(model.named_parameters()), data)
    return A, getattr(peer, other)(model, data, *arguments)


def matrix(theirs: Any) -> np.ndarray:
    columns = [theirs @ column for column in torch.eye(theirs.size, dtype=torch.float64)]
    return torch.stack(columns, dim=1).detach().numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["Hessian", "GGN", "EF"])
def test_matrices_agree_if_the_batches_have_one_size(peer: Any, name: str) -> None:
    A, theirs = pair(peer, name, *problem(EVEN), nn.CrossEntropyLoss())
    assert relative(matrix(theirs), A.to_dense()) < 1e-12


@pytest.mark.parametrize("name", ["Hessian", "GGN", "EF"])
def test_matrices_differ_if_a_batch_is_smaller(peer: Any, name: str) -> None:
    A, theirs = pair(peer, name, *problem(UNEVEN), nn.CrossEntropyLoss())
    assert relative(matrix(theirs), A.to_dense()) > 1e-2


def test_empirical_fishers_of_a_squared_error_differ_by_the_number_of_outputs(peer: Any) -> None:
    F, theirs = pair(peer, "EF", *problem(EVEN, nn.MSELoss), nn.MSELoss())
    assert relative(CLASSES * matrix(theirs), F.to_dense()) < 1e-12


def test_eigenpairs_agree_in_reverse_order_after_enough_steps(peer: Any) -> None:
    H, theirs = pair(peer, "Hessian", *problem(EVEN), nn.CrossEntropyLoss())
    result = peer.lanczos(theirs, k=3, max_iter=40, seed=0)
    found = spectrum.eigsh(H, 3, "LM", progress=False)
    np.testing.assert_allclose(found.values[::-1], result.eigenvalues, rtol=1e-8)
    overlaps = np.abs(result.eigenvectors.numpy() @ found.vectors[:, ::-1])
    np.testing.assert_allclose(overlaps, np.eye(3), atol=1e-5)


def test_default_steps_may_not_converge(peer: Any) -> None:
    _, theirs = pair(peer, "Hessian", *problem(EVEN), nn.CrossEntropyLoss())
    assert not peer.lanczos(theirs, k=3, seed=0).converged.all()


def test_the_mean_of_a_density_is_the_trace_in_both(peer: Any) -> None:
    H, theirs = pair(peer, "Hessian", *problem(EVEN), nn.CrossEntropyLoss())
    exact = np.trace(H.to_dense())
    run = peer.spectral_density(theirs, num_runs=200, lanczos_steps=5)
    samples = theirs.size * (run.raw_eigenvalues * run.raw_weights).sum(1).numpy()
    assert abs(samples.mean() - exact) < 5 * samples.std(ddof=1) / len(samples) ** 0.5
    own = spectrum.density(H, num_probes=200, num_steps=5, progress=False).trace()
    assert abs(own.value - exact) < 5 * own.error


def test_dropout_is_noise_in_theirs_and_an_error_in_ours(peer: Any) -> None:
    model, data = problem(EVEN)
    noisy = nn.Sequential(model[0], nn.Dropout(0.5), *model[1:])
    H, theirs = pair(peer, "Hessian", noisy, data, nn.CrossEntropyLoss())
    v = torch.ones(theirs.size, dtype=torch.float64)
    assert not torch.equal(theirs @ v, theirs @ v)
    with pytest.raises(curvop.NonDeterministicObjectiveError):
        H @ v


def test_every_name_has_its_counterpart(peer: Any) -> None:
    page = (ROOT / "docs" / "eigenthings.rst").read_text()
    missing = [name for name in peer.__all__ if not name.startswith("__") and name not in page]
    assert not missing
