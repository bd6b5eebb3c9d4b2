"""The Hessian against dense matrices computed in another way, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, architecture_problem
from cases import BATCHINGS, LOSSES, Problem, cut, input_problem, log_problem, loss_problem, seeded, sequences
from torch import nn

from curvop import HessianLinearOperator
from curvop.examples.functorch import functorch_hessian


def hessian(problem: Problem, **options) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def oracle(problem: Problem) -> np.ndarray:
    return functorch_hessian(problem.model, problem.loss_function, problem.params, problem.data).numpy()


def assert_hessian(problem: Problem) -> None:
    """All kinds of products give the dense Hessian of the data set evaluated as one batch."""
    H, dense = hessian(problem), oracle(problem)
    size = len(dense)
    assert H.shape == dense.shape
    product = H @ np.eye(size)
    np.testing.assert_allclose(product, dense, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(product, product.T, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose((H @ torch.eye(size, dtype=torch.float64)).numpy(), dense, rtol=1e-10, atol=1e-12)
    uncached = hessian(problem, cache=0)
    vector = np.random.default_rng(0).normal(size=size)
    np.testing.assert_allclose(uncached @ vector, dense @ vector, rtol=1e-10, atol=1e-12)
    first, last = next(iter(problem.params)), list(problem.params)[-1]
    rows, cols = H.params_slices[first], H.params_slices[last]
    np.testing.assert_allclose(
        H.block(first, last) @ vector[cols], dense[rows, cols] @ vector[cols], rtol=1e-10, atol=1e-12
    )


@pytest.mark.default_cases("*-unequal")
@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_however_the_data_is_cut(loss: str, batching: str) -> None:
    assert_hessian(loss_problem(loss, batching))


@pytest.mark.filterwarnings("ignore:reduction.*divides:UserWarning")  # torch warns about KLDivLoss
@pytest.mark.parametrize("loss", ["nll", "nll-weights", "kl-batchmean", "kl-mean"])
def test_losses_over_log_probabilities(loss: str) -> None:
    assert_hessian(log_problem(loss))


@pytest.mark.parametrize("batching", BATCHINGS)
def test_sequence_outputs_with_ignored_positions(batching: str) -> None:
    assert_hessian(sequences(batching))


@pytest.mark.parametrize("kind", ["dict", "userdict", "namedtuple", "nested"])
def test_inputs_that_are_trees_of_tensors(kind: str) -> None:
    assert_hessian(input_problem(kind))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    assert_hessian(architecture_problem(name))


def test_ragged_sequences_give_the_matrix_of_the_padded_batch() -> None:
    problem = sequences("one")
    (tokens, y), *_ = problem.data
    y[:, 3:] = -100
    ragged = [(tokens[:4, :3], y[:4, :3]), (tokens[4:], y[4:])]
    H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, ragged)
    np.testing.assert_allclose(H @ np.eye(len(H.ravel(problem.params))), oracle(problem), rtol=1e-10, atol=1e-12)


def test_a_batch_whose_targets_are_all_ignored_adds_nothing() -> None:
    problem = loss_problem("ce")
    (X, y), *_ = problem.data
    ignored = [(X, torch.full_like(y, -100)), *problem.data, (X[:2], torch.full_like(y[:2], -100))]
    H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, ignored)
    np.testing.assert_allclose(H @ np.eye(H.shape[1]), oracle(problem), rtol=1e-10, atol=1e-12)


class TestClosedForms:
    @seeded
    def linear(self, loss_function: nn.Module, y) -> tuple[np.ndarray, HessianLinearOperator, np.ndarray]:
        torch.manual_seed(3)
        X, model = torch.randn(9, 4), nn.Linear(4, 3, bias=False)
        y = y(X)
        H = HessianLinearOperator(model, loss_function, dict(model.named_parameters()), cut(X, y, (4, 5)))
        return X.numpy(), H, model(X).detach().numpy()

    def test_linear_regression(self) -> None:
        # L = |X W' - Y|^2 / (N C): the Hessian is 2 / (N C) I (x) X'X, whatever the targets.
        X, H, _ = self.linear(nn.MSELoss(), lambda X: torch.randn(9, 3))
        np.testing.assert_allclose(H @ np.eye(12), 2 / (9 * 3) * np.kron(np.eye(3), X.T @ X), rtol=1e-12, atol=1e-14)

    def test_softmax_regression(self) -> None:
        # L = mean CE: sum_n (diag(p_n) - p_n p_n') (x) x_n x_n' / N (Boehning, 1992).
        X, H, scores = self.linear(nn.CrossEntropyLoss(), lambda X: torch.randint(0, 3, (9,)))
        p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        dense = sum(np.kron(np.diag(q) - np.outer(q, q), np.outer(x, x)) for q, x in zip(p, X, strict=True)) / 9
        np.testing.assert_allclose(H @ np.eye(12), dense, rtol=1e-10, atol=1e-14)


class TestModelsAndParameters:
    def test_a_callable_model(self) -> None:
        problem = loss_problem("mse")
        H = HessianLinearOperator(
            lambda params, X: torch.func.functional_call(problem.model, params, (X,)),
            problem.loss_function,
            problem.params,
            problem.data,
        )
        np.testing.assert_allclose(H @ np.eye(H.shape[1]), oracle(problem), rtol=1e-10, atol=1e-12)

    def test_values_that_differ_from_the_modules_own(self) -> None:
        problem = loss_problem("mse")
        own = {name: value.clone() for name, value in problem.model.state_dict().items()}
        problem.params = {name: (2 * value).detach().requires_grad_() for name, value in problem.params.items()}
        there = hessian(problem) @ np.eye(43)
        assert all(torch.equal(own[name], value) for name, value in problem.model.state_dict().items())
        problem.model.load_state_dict(problem.params)
        problem.params = dict(problem.model.named_parameters())
        np.testing.assert_allclose(there, oracle(problem), rtol=1e-10, atol=1e-12)

    def test_params_in_another_order_and_as_a_list(self) -> None:
        problem = loss_problem("mse")
        names = list(problem.params)[::-1][:3]
        problem.params = {name: problem.params[name] for name in names}
        dense = oracle(problem)
        np.testing.assert_allclose(hessian(problem) @ np.eye(len(dense)), dense, rtol=1e-10, atol=1e-12)
        problem.params = list(problem.params.values())
        H = hessian(problem)
        assert list(H.params_slices) == names
        np.testing.assert_allclose(H @ np.eye(len(dense)), dense, rtol=1e-10, atol=1e-12)

    def test_an_objective_of_its_own(self) -> None:
        problem = loss_problem("ce-sum")
        decay = 0.3

        def objective(params, batch):
            X, y = batch
            loss = problem.loss_function(torch.func.functional_call(problem.model, params, (X,)), y)
            return loss + decay / 2 * len(X) * sum((value**2).sum() for value in params.values())

        objective.reduction = "sum"
        H = HessianLinearOperator.from_objective(objective, problem.params, problem.data)
        np.testing.assert_allclose(H @ np.eye(43), oracle(problem) + 9 * decay * np.eye(43), rtol=1e-10, atol=1e-12)

    def test_a_mean_objective_is_weighted_by_the_batch_size_or_as_told(self) -> None:
        problem = loss_problem("callable")

        def objective(params, batch):
            X, y = batch
            return problem.loss_function(torch.func.functional_call(problem.model, params, (X,)), y)

        H = HessianLinearOperator.from_objective(objective, problem.params, problem.data)
        np.testing.assert_allclose(H @ np.eye(43), oracle(problem), rtol=1e-10, atol=1e-12)
        equal = HessianLinearOperator.from_objective(
            objective, problem.params, problem.data, batch_weight=lambda batch: 7
        )
        apart = [
            HessianLinearOperator.from_objective(objective, problem.params, [batch]) @ np.eye(43)
            for batch in problem.data
        ]
        np.testing.assert_allclose(equal @ np.eye(43), sum(apart) / 2, rtol=1e-10, atol=1e-12)

    def test_a_sparse_gradient_of_zero_size_parameters(self) -> None:
        problem = loss_problem("mse")
        empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
        H = HessianLinearOperator(
            lambda params, X: torch.func.functional_call(
                problem.model, {name: value for name, value in params.items() if name != "empty"}, (X,)
            ),
            problem.loss_function,
            {"empty": empty, **problem.params},
            problem.data,
        )
        np.testing.assert_allclose(H @ np.eye(43), oracle(problem), rtol=1e-10, atol=1e-12)
        assert H[[3], :].shape == (1, 43)


def test_models_in_single_precision_are_as_exact_as_that() -> None:
    problem = loss_problem("ce")
    dense = oracle(problem)
    model = problem.model.float()
    data = [(X.float(), y) for X, y in problem.data]
    H = HessianLinearOperator(model, problem.loss_function, dict(model.named_parameters()), data)
    product = H @ np.eye(43)
    assert product.dtype == np.float64
    assert np.abs(product - dense).max() < 20 * torch.finfo(torch.float32).eps * np.abs(dense).max()


class TestGradientAndLoss:
    @pytest.mark.parametrize("loss", ["mse", "mse-sum", "ce-everything"])
    def test_they_are_those_of_the_whole_data_set(self, loss: str) -> None:
        problem = loss_problem(loss)
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        expected = problem.loss_function(problem.model(X), y)
        gradient = torch.autograd.grad(expected, list(problem.params.values()))
        H = hessian(problem)
        actual, value = H.gradient_and_loss()
        assert value == pytest.approx(expected.item(), rel=1e-12)
        np.testing.assert_allclose(
            actual, H.ravel(dict(zip(problem.params, gradient, strict=True))), rtol=1e-10, atol=1e-14
        )
        part, _ = H.block("2.bias", "0.weight").gradient_and_loss()
        np.testing.assert_allclose(part, actual[H.params_slices["2.bias"]], rtol=1e-10, atol=1e-14)
