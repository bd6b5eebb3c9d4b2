"""Comparison with matrices of the same definition in curvlinops; a dense matrix decides if they differ.

Not part of the default run: ``python -m pip install -e ".[bench,test]" && python -m pytest -m peers``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Problem, cut, mlp, seeded
from torch import nn

import curvop
from curvop.examples.functorch import (
    functorch_empirical_fisher,
    functorch_ggn,
    functorch_hessian,
    functorch_jacobian,
)

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]  # warnings from curvlinops do not matter here

LOSSES = {"mse": nn.MSELoss, "ce": nn.CrossEntropyLoss, "bce": nn.BCEWithLogitsLoss}


@pytest.fixture(scope="module")
def curvlinops() -> Any:
    return pytest.importorskip("curvlinops")


@seeded
def problem_of(loss: str, reduction: str, model: Any = mlp) -> Problem:
    targets = {
        "mse": torch.randn(9, 3),
        "ce": torch.randint(0, 3, (9,)),
        "bce": torch.randint(0, 2, (9, 3)).double(),
    }
    return Problem(model(), LOSSES[loss](reduction=reduction), cut(torch.randn(9, 4), targets[loss], (6, 3)))


def theirs(operator: Any, problem: Problem, *args: Any, **options: Any) -> np.ndarray:
    A = operator(problem.model, *args, list(problem.params.values()), problem.data, **options)
    return (A @ torch.eye(A.shape[1], dtype=torch.float64)).detach().numpy()


def ours(operator: Any, problem: Problem, *args: Any, **options: Any) -> np.ndarray:
    A = operator(problem.model, *args, problem.params, problem.data, **options)
    return A @ np.eye(A.shape[1])


def agree(found: np.ndarray, expected: np.ndarray, rtol: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["Hessian", "GGN", "EF"])
def test_matrices_of_the_same_definition(curvlinops: Any, name: str, loss: str, reduction: str) -> None:
    problem = problem_of(loss, reduction)
    kind = f"{name}LinearOperator"
    agree(
        ours(getattr(curvop, kind), problem, problem.loss_function),
        theirs(getattr(curvlinops, kind), problem, problem.loss_function),
    )


@pytest.mark.parametrize("kind", ["JacobianLinearOperator", "TransposedJacobianLinearOperator"])
def test_jacobians(curvlinops: Any, kind: str) -> None:
    problem = problem_of("mse", "mean")
    agree(ours(getattr(curvop, kind), problem), theirs(getattr(curvlinops, kind), problem))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_sampled_fishers_estimate_the_same_matrix(curvlinops: Any, loss: str, reduction: str) -> None:
    problem = problem_of(loss, reduction)
    own = ours(curvop.FisherLinearOperator, problem, problem.loss_function, mc_samples=2000, rng=0)
    other = theirs(curvlinops.FisherMCLinearOperator, problem, problem.loss_function, mc_samples=2000)
    exact = functorch_ggn(problem.model, problem.loss_function, problem.params, problem.data).numpy()
    agree(own, exact, 0.1)
    agree(other, exact, 0.1)


def normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    nn.init.normal_(model[1].weight)
    return model


REFERENCES = {"Hessian": functorch_hessian, "GGN": functorch_ggn, "EF": functorch_empirical_fisher}


def both(curvlinops: Any, name: str, problem: Problem) -> tuple[float, float]:
    """Return the relative errors of curvop and curvlinops against the dense matrix."""
    exact = REFERENCES[name](problem.model, problem.loss_function, problem.params, problem.data).numpy()
    kind = f"{name}LinearOperator"
    found = (
        ours(getattr(curvop, kind), problem, problem.loss_function),
        theirs(getattr(curvlinops, kind), problem, problem.loss_function),
    )
    own, other = (float(np.linalg.norm(one - exact) / np.linalg.norm(exact)) for one in found)
    return own, other


@pytest.mark.parametrize("name", ["GGN", "EF"])
def test_products_through_norms(curvlinops: Any, name: str) -> None:
    assert max(both(curvlinops, name, problem_of("ce", "mean", normed))) < 1e-10


def test_their_hessian_is_wrong_through_trainable_norms(curvlinops: Any) -> None:
    """Its forward derivative of a backward pass treats the saved mean and deviation of the norm as constants."""
    own, other = both(curvlinops, "Hessian", problem_of("ce", "mean", normed))
    assert own < 1e-10
    assert other > 1e-2


@seeded
def weighted(ignored: bool) -> Problem:
    y = torch.tensor([0, -100, 1, 2, -100, -100, 1, 0, -100]) if ignored else torch.randint(0, 3, (9,))
    weight = None if ignored else torch.tensor([0.1, 1.0, 3.0])
    return Problem(mlp(), nn.CrossEntropyLoss(weight), cut(torch.randn(9, 4), y, (6, 3)))


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("name", REFERENCES)
def test_their_weights_are_wrong_where_examples_do_not_count_alike(curvlinops: Any, name: str, ignored: bool) -> None:
    """It weights batches by size, although the mean is over targets that are not ignored, or by class weights."""
    own, other = both(curvlinops, name, weighted(ignored))
    assert own < 1e-10
    assert other > 1e-2


def test_jacobians_through_norms(curvlinops: Any) -> None:
    problem = problem_of("mse", "mean", normed)
    exact = functorch_jacobian(problem.model, problem.params, problem.data).numpy()
    agree(ours(curvop.JacobianLinearOperator, problem), exact)
    agree(theirs(curvlinops.JacobianLinearOperator, problem), exact)


class Convolutions(nn.Sequential):
    """A convolution, and a linear layer, for three numbers in and three numbers out."""

    def __init__(self) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
        )


MODELS = {"mlp": mlp, "cnn": Convolutions}


def kronecker(
    curvlinops: Any,
    problem: Problem,
    fisher: str,
    joint_bias: bool = True,
    sharing: str = "expand",
    ekfac: bool = False,
) -> tuple[Any, Any]:
    """Return the operators of both packages."""
    prefix = "EKFAC" if ekfac else "KFAC"
    args = problem.model, problem.loss_function
    own = getattr(curvop, f"{prefix}LinearOperator")(
        *args, problem.params, problem.data, fisher=fisher, sharing=sharing, joint_bias=joint_bias
    )
    other = getattr(curvlinops, f"{prefix}LinearOperator")(
        *args,
        list(problem.params.values()),
        problem.data,
        fisher_type=fisher,
        kfac_approx=sharing,
        separate_weight_and_bias=not joint_bias,
        check_deterministic=False,
    )
    return own, other


def dense(A: Any) -> np.ndarray:
    return (A @ torch.eye(A.shape[1], dtype=torch.float64)).detach().numpy()


class TestKroneckerFactors:
    @pytest.mark.parametrize("joint_bias", [True, False], ids=["joint", "apart"])
    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
    def test_factors(
        self, curvlinops: Any, fisher: str, loss: str, reduction: str, model: str, joint_bias: bool
    ) -> None:
        own, other = kronecker(curvlinops, problem_of(loss, reduction, MODELS[model]), fisher, joint_bias)
        agree(dense(own), dense(other))
        assert own.trace() == pytest.approx(float(other.trace), rel=1e-10)
        assert own.frobenius_norm() == pytest.approx(float(other.frobenius_norm), rel=1e-10)

    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_reduced_positions(self, curvlinops: Any, fisher: str) -> None:
        own, other = kronecker(curvlinops, problem_of("ce", "mean", Convolutions), fisher, sharing="reduce")
        agree(dense(own), dense(other))

    @pytest.mark.parametrize("model", MODELS)
    @pytest.mark.parametrize("fisher", ["type-2", "empirical"])
    def test_corrected_eigenvalues(self, curvlinops: Any, fisher: str, model: str) -> None:
        own, other = kronecker(curvlinops, problem_of("ce", "mean", MODELS[model]), fisher, ekfac=True)
        agree(dense(own), dense(other), 1e-8)  # eigenvectors of nearly equal eigenvalues differ

    @pytest.mark.parametrize("loss", LOSSES)
    def test_sampled_targets_have_the_same_mean(self, curvlinops: Any, loss: str) -> None:
        problem = problem_of(loss, "mean")
        options = {"fisher": "mc", "mc_samples": 4000}
        own = curvop.KFACLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)
        _, other = kronecker(curvlinops, problem, "type-2")
        agree(own @ np.eye(own.shape[1]), dense(other), 0.1)

    @pytest.mark.parametrize(("kind", "ekfac"), [("exact", False), ("heuristic", False), ("exact", True)])
    def test_inverses(self, curvlinops: Any, kind: str, ekfac: bool) -> None:
        own, other = kronecker(curvlinops, problem_of("ce", "mean"), "type-2", ekfac=ekfac)
        options = {f"use_{kind}_damping": True}
        theirs = curvlinops.KFACInverseLinearOperator(other, damping=1e-2, **options)
        agree(dense(own.inverse(1e-2, kind=kind)), dense(theirs), 1e-8 if ekfac else 1e-10)


def test_factors_are_those_of_kronfluence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient factors are sums over positions, which the benchmark divides by the number of loss terms."""
    pytest.importorskip("kronfluence")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from kfac import Kronfluence, factor_error, kronfluence_factors

    for model in MODELS.values():
        problem = problem_of("ce", "mean", model)
        theirs = Kronfluence({"model": problem.model.float(), "data": [(X.float(), y) for X, y in problem.data]})
        problem = problem_of("ce", "mean", model)
        K = curvop.KFACLinearOperator(
            problem.model, problem.loss_function, problem.params, problem.data, fisher="empirical"
        )
        own = {
            name.removesuffix(".weight"): (factors.input, factors.output)
            for name, factors in K.factors.items()
            if name.endswith(".weight")
        }
        assert factor_error(kronfluence_factors(theirs.covariances("empirical"), 9), own, "empirical") < 1e-5
