"""The Jacobian and its transpose against dense matrices computed in another way, in float64."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from agreement import close
from architectures import ARCHITECTURES, architecture_problem
from cases import BATCHINGS, Problem, input_problem, loss_problem, nightly, sequences
from scipy.sparse.linalg import lsmr, svds
from test_ggn import two_heads
from torch.utils.data import DataLoader, TensorDataset

from curvop import JacobianLinearOperator, NonDeterministicObjectiveError, TransposedJacobianLinearOperator
from curvop.examples.functorch import functorch_jacobian


def jacobian(problem: Problem, **options) -> JacobianLinearOperator:
    return JacobianLinearOperator(problem.model, problem.params, problem.data, **options)


def assert_jacobian(problem: Problem, **options) -> None:
    dense = functorch_jacobian(problem.model, problem.params, problem.data).numpy()
    J = jacobian(problem, **options)
    assert J.shape == dense.shape
    close(J @ np.eye(dense.shape[1]), dense)
    close(J.T @ np.eye(dense.shape[0]), dense.T)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=dense.shape[1]), rng.normal(size=dense.shape[0])
    close(J @ x, dense @ x)
    close(J.H @ y, y @ dense)
    close(y @ J, y @ dense)
    close(y @ (J @ x), x @ (J.T @ y))
    close((J @ torch.from_numpy(x)).numpy(), dense @ x)
    transposed = TransposedJacobianLinearOperator(problem.model, problem.params, problem.data, cache=0, **options)
    assert transposed.shape == dense.T.shape
    close(transposed @ y, y @ dense)
    close(transposed.T @ x, dense @ x)
    close(J.T.T @ x, dense @ x)
    first, last = next(iter(J.params_slices)), list(J.params_slices)[-1]
    cols = J.params_slices[last]
    close(J.block(last) @ x[cols], dense[:, cols] @ x[cols])
    close(np.concatenate([B.T @ y for B in J.blocks()]), y @ dense)
    close(J.T.block([last, first]).T.block(last) @ x[cols], dense[:, cols] @ x[cols])
    some = [0, len(y) - 1, 0]
    close(J[some, :][:, cols] @ x[cols], dense[some, cols] @ x[cols])
    close(J.T[cols, :][:, some] @ y[some], dense[some, cols].T @ y[some])


def test_pickles() -> None:
    J = jacobian(loss_problem("mse"))
    for A in (J, J.T, J.block(next(iter(J.params_slices)))):
        again = pickle.loads(pickle.dumps(A))
        close(again @ np.ones(A.shape[1]), A @ np.ones(A.shape[1]))


@pytest.mark.parametrize("batching", BATCHINGS)
def test_however_the_data_is_cut(batching: str) -> None:
    assert_jacobian(loss_problem("mse", batching))


@pytest.mark.default_cases("lstm", "attention-softmax", "*conv*", "*norm*")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    assert_jacobian(architecture_problem(name))


@pytest.mark.parametrize("kind", ["dict", "userdict", "namedtuple", "nested"])
def test_inputs_that_are_trees_of_tensors(kind: str) -> None:
    assert_jacobian(input_problem(kind))


def test_sequences() -> None:
    assert_jacobian(sequences())


@pytest.mark.slow
def test_the_compiled_engine() -> None:
    problem = architecture_problem("unreached")
    dense = functorch_jacobian(problem.model, problem.params, problem.data).numpy()
    J = jacobian(problem, engine="compiled", columns=1)
    close(J @ np.eye(dense.shape[1]), dense)
    close(J.T @ np.eye(dense.shape[0]), dense.T)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_compiled(name: str) -> None:
    assert_jacobian(architecture_problem(name), engine="compiled")


@pytest.mark.slow_cases("*compiled*")
@pytest.mark.parametrize(
    "options", [{}, {"engine": "compiled", "columns": 1}, *nightly({"engine": "compiled"})], ids=str
)
def test_predictions_that_are_trees_follow_each_other_batch_by_batch(options: dict[str, Any]) -> None:
    problem = two_heads()
    J = jacobian(problem, **options)
    parts = [functorch_jacobian(problem.model, problem.params, [batch]).numpy() for batch in problem.data]
    close(J @ np.eye(J.shape[1]), np.concatenate(parts))


class TestSolvers:
    def test_svds(self) -> None:
        J = jacobian(loss_problem("mse"))
        values = svds(J, k=3, rng=0, return_singular_vectors=False)
        close(np.sort(values), np.sort(np.linalg.svd(J @ np.eye(J.shape[1]), compute_uv=False))[-3:])

    def test_lsmr(self) -> None:
        J = jacobian(loss_problem("mse"))
        b = np.random.default_rng(0).normal(size=J.shape[0])
        x = lsmr(J, b, atol=1e-14, btol=1e-14, maxiter=500)[0]
        np.testing.assert_allclose(J.T @ (J @ x - b), 0, atol=1e-8)

    def test_the_neural_tangent_kernel(self) -> None:
        J = jacobian(loss_problem("mse"))
        dense = J @ np.eye(J.shape[1])
        close((J @ J.T) @ np.eye(27), dense @ dense.T)


class TestData:
    def test_parameters_are_shown_as_they_are_now(self) -> None:
        problem = loss_problem("mse")
        J = jacobian(problem)
        before = J @ np.ones(43)
        with torch.no_grad():
            problem.params["0.weight"] *= 2
        assert not np.allclose(J @ np.ones(43), before)
        close(J @ np.ones(43), jacobian(problem) @ np.ones(43))

    @pytest.mark.parametrize("cache", [0, np.inf])
    def test_shuffled_data_is_told_whatever_the_model_predicts(self, cache: float) -> None:
        problem = loss_problem("mse", "singles")
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        problem.data = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True)
        for value in problem.params.values():  # the same prediction for every input
            value.data.zero_()
        J = jacobian(problem, cache=cache)
        with pytest.raises(NonDeterministicObjectiveError, match="shuffle=False"):
            J @ np.ones(43)
        with pytest.raises(NonDeterministicObjectiveError, match="shuffle=False"):
            J.T @ np.ones(27)

    def test_loaders_in_order(self) -> None:
        problem = loss_problem("mse")
        expected = jacobian(problem) @ np.eye(43)
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        problem.data = DataLoader(TensorDataset(X, y), batch_size=4)
        J = jacobian(problem, cache=0)
        close(J @ np.eye(43), expected)
        close(J.T @ np.eye(27), expected.T)

    def test_predictions_of_a_size_that_depends_on_values(self) -> None:
        problem = loss_problem("mse")
        model = lambda p, X: torch.func.functional_call(problem.model, p, (X,))[X[:, 0] > 0]  # noqa: E731
        J = jacobian(Problem(model, None, problem.data, problem.params))
        X = torch.cat([X for X, _ in problem.data])
        whole = jacobian(problem) @ np.eye(43)
        close(J @ np.eye(43), whole.reshape(9, 3, 43)[(X[:, 0] > 0).numpy()].reshape(-1, 43))

    def test_other_batches_than_at_first_are_refused(self) -> None:
        problem = loss_problem("mse")
        J = jacobian(problem)
        J @ np.ones(43)
        problem.data.append(problem.data[0])
        with pytest.raises(ValueError, match="make a new one"):
            J @ np.ones(43)
        with pytest.raises(ValueError, match="make a new one"):
            jacobian(problem, engine="compiled")._engine.kernel.buffers({}, 9, None)
        del problem.data[1:]
        with pytest.raises(ValueError, match="make a new one"):
            J @ np.ones(43)

    def test_no_batches(self) -> None:
        problem = loss_problem("mse")
        problem.data = []
        with pytest.raises(ValueError, match="data is empty"):
            jacobian(problem)


def test_vectors_and_parameter_dicts() -> None:
    problem = loss_problem("mse")
    J = jacobian(problem)
    x = J.ravel(problem.params)
    assert torch.equal(J.unravel(x)["2.bias"], problem.params["2.bias"])
    assert J.T.params_slices == J.params_slices


def test_cost() -> None:
    assert jacobian(loss_problem("mse")).cost().seconds > 0


def test_unknown_parameters() -> None:
    with pytest.raises(ValueError, match=r"2\.bias"):
        jacobian(loss_problem("mse")).block("2.bia")
