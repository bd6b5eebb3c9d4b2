"""The generalized Gauss-Newton matrix against dense matrices computed in another way, in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from agreement import assert_matrix, close
from architectures import ARCHITECTURES, RECURRENT, architecture_problem
from cases import (
    BATCHINGS,
    LOSSES,
    Problem,
    cut,
    input_problem,
    log_problem,
    loss_problem,
    nightly,
    seeded,
    sequences,
    slow,
)
from scipy.sparse.linalg import cg
from torch import Tensor, nn

from curvop import GGNLinearOperator, HessianLinearOperator
from curvop.examples.functorch import functorch_ggn

CONVEX = ["mse", "mse-sum", "ce", "ce-weights", "ce-everything", "ce-probabilities", "bce", "bce-weights"]


def ggn(problem: Problem, **options) -> GGNLinearOperator:
    return GGNLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def assert_ggn(problem: Problem, **options) -> None:
    dense = functorch_ggn(problem.model, problem.loss_function, problem.params, problem.data).numpy()
    assert_matrix(functools.partial(ggn, problem), dense, **options)


@pytest.mark.default_cases("*-unequal")
@pytest.mark.parametrize("batching", ["one", "unequal", *nightly("singles")])  # run by default in test_hessian.py
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_however_the_data_is_cut(loss: str, batching: str) -> None:
    assert_ggn(loss_problem(loss, batching))


@pytest.mark.filterwarnings("ignore:reduction.*divides:UserWarning")  # torch warns about KLDivLoss
@pytest.mark.parametrize("loss", ["nll", "nll-weights", "kl-batchmean", "kl-mean"])
def test_losses_over_log_probabilities(loss: str) -> None:
    assert_ggn(log_problem(loss))


@pytest.mark.parametrize("batching", BATCHINGS)
def test_sequence_outputs_with_ignored_positions(batching: str) -> None:
    assert_ggn(sequences(batching))


@pytest.mark.parametrize("kind", ["dict", "userdict", "namedtuple", "nested"])
def test_inputs_that_are_trees_of_tensors(kind: str) -> None:
    assert_ggn(input_problem(kind))


@pytest.mark.default_cases("lstm", "attention-softmax", "*conv*", "*norm*")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    assert_ggn(architecture_problem(name), diagonal=name not in RECURRENT)


@pytest.mark.slow
@pytest.mark.parametrize("batching", ["one", *nightly("unequal")])  # each batch shape is compiled separately
def test_the_compiled_engine(batching: str) -> None:
    assert_ggn(loss_problem("ce-everything", batching), engine="compiled")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_compiled(name: str) -> None:
    assert_ggn(architecture_problem(name), diagonal=name not in RECURRENT, engine="compiled")


class TwoHeads(nn.Module):
    """Predictions that are a tree: scores, a number, and a value that is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores, self.value = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        x = self.body(X).tanh()
        return {"scores": self.scores(x), "value": self.value(x), "sign": X > 0}


@seeded
def two_heads() -> Problem:
    def loss(prediction: dict[str, Tensor], y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(prediction["scores"], y) + prediction["value"].exp().mean()

    return Problem(TwoHeads(), loss, cut(torch.randn(9, 4), torch.randint(0, 3, (9,)), (6, 3)))


def test_predictions_that_are_trees() -> None:
    assert_ggn(two_heads(), diagonal=False)


@pytest.mark.nightly
def test_predictions_that_are_trees_compiled() -> None:
    assert_ggn(two_heads(), diagonal=False, engine="compiled")


@pytest.mark.parametrize("loss", CONVEX)
def test_convex_losses_make_it_positive_semi_definite(loss: str) -> None:
    G = ggn(loss_problem(loss))
    eigenvalues = np.linalg.eigvalsh(G @ np.eye(G.shape[1]))
    assert eigenvalues.min() > -1e-14 * eigenvalues.max()


@pytest.mark.parametrize("loss", ["mse", "ce", "ce-everything", "bce-weights", "callable"])
def test_it_is_the_hessian_of_a_linear_model(loss: str) -> None:
    problem = loss_problem(loss)
    torch.manual_seed(1)
    problem = Problem(nn.Linear(4, 3, dtype=torch.float64), problem.loss_function, problem.data)
    H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
    close(ggn(problem) @ np.eye(15), H @ np.eye(15))


def test_cg_solves_damped_systems() -> None:
    G = ggn(loss_problem("ce"))
    b = np.random.default_rng(0).normal(size=43)
    x, failed = cg(G.damped(1e-2), b, rtol=1e-12)
    assert not failed
    close(G @ x + 1e-2 * x, b)


def test_a_loss_that_does_not_bend_gives_zero() -> None:
    problem = loss_problem("l1", "one")
    assert not (ggn(problem) @ np.eye(43)).any()
    assert not (ggn(problem, engine="compiled") @ np.ones(43)).any()


@pytest.mark.parametrize("engine", ["autograd", *slow("compiled")])
def test_a_batch_whose_targets_are_all_ignored_adds_nothing(engine: str) -> None:
    problem = loss_problem("ce")
    (X, y), *_ = problem.data
    expected = ggn(problem) @ np.eye(43)
    problem.data = [(X, torch.full_like(y, -100)), *problem.data, (X[:2], torch.full_like(y[:2], -100))]
    close(ggn(problem, engine=engine) @ np.eye(43), expected)


def test_it_shows_the_parameters_as_they_are_now() -> None:
    problem = loss_problem("ce")
    G = ggn(problem)
    before = G @ np.ones(43)
    with torch.no_grad():
        problem.params["0.weight"] *= 2
    after = G @ np.ones(43)
    assert not np.allclose(before, after)
    close(after, ggn(problem) @ np.ones(43))
