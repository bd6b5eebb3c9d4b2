"""Fisher matrices against dense matrices computed in another way, in float64."""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from agreement import assert_matrix, close
from architectures import ARCHITECTURES, RECURRENT, architecture_problem
from cases import BATCHINGS, LOSSES, Problem, input_problem, log_problem, loss_problem, nightly, sequences
from test_ggn import two_heads
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    NonDeterministicObjectiveError,
)
from curvop.examples.functorch import functorch_empirical_fisher, functorch_ggn
from curvop.kernels.losses import Likelihood

LIKELIHOODS = [name for name in LOSSES if name.startswith(("mse", "ce", "bce", "f-"))]


def ef(problem: Problem, **options) -> EFLinearOperator:
    return EFLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def fisher(problem: Problem, **options) -> FisherLinearOperator:
    return FisherLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)


def assert_ef(problem: Problem, **options) -> None:
    dense = functorch_empirical_fisher(problem.model, problem.loss_function, problem.params, problem.data).numpy()
    assert_matrix(functools.partial(ef, problem), dense, **options)


def dense_of(A) -> np.ndarray:
    return A @ np.eye(A.shape[1])


class TestEmpirical:
    @pytest.mark.default_cases(
        "mse-unequal", "ce-*-unequal", "bce-weights-unequal", "callable-unequal", "subclass-unequal"
    )
    @pytest.mark.parametrize("batching", ["one", "unequal", *nightly("singles")])  # run by default in test_hessian.py
    @pytest.mark.parametrize("loss", LOSSES)
    def test_every_loss_however_the_data_is_cut(self, loss: str, batching: str) -> None:
        assert_ef(loss_problem(loss, batching))

    @pytest.mark.filterwarnings("ignore:reduction.*divides:UserWarning")  # torch warns about KLDivLoss
    @pytest.mark.parametrize("loss", ["nll", "nll-weights", "kl-batchmean", "kl-mean"])
    def test_losses_over_log_probabilities(self, loss: str) -> None:
        assert_ef(log_problem(loss))

    @pytest.mark.parametrize("batching", BATCHINGS)
    def test_sequence_outputs_with_ignored_positions(self, batching: str) -> None:
        assert_ef(sequences(batching))

    @pytest.mark.parametrize("kind", ["dict", "userdict", "namedtuple", "nested"])
    def test_inputs_that_are_trees_of_tensors(self, kind: str) -> None:
        assert_ef(input_problem(kind))

    @pytest.mark.default_cases("lstm", "attention-softmax", "*conv*", "*norm*")
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_architecture(self, name: str) -> None:
        assert_ef(architecture_problem(name), diagonal=name not in RECURRENT)

    @pytest.mark.slow
    def test_the_compiled_engine(self) -> None:
        problem = loss_problem("ce-everything", "one")
        close(dense_of(ef(problem, engine="compiled", columns=1)), dense_of(ef(problem)))

    @pytest.mark.nightly
    @pytest.mark.parametrize("batching", ["one", "unequal"])
    def test_all_parts_compiled(self, batching: str) -> None:
        assert_ef(loss_problem("ce-everything", batching), engine="compiled", columns=1)

    @pytest.mark.nightly
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_architecture_compiled(self, name: str) -> None:
        assert_ef(architecture_problem(name), diagonal=name not in RECURRENT, engine="compiled")

    @pytest.mark.parametrize("loss", ["mse", "mse-sum", "ce", "ce-weights", "bce"])
    def test_it_is_the_sum_over_single_examples(self, loss: str) -> None:
        # Computed from the gradients of single examples, with a summed loss.
        problem = loss_problem(loss)
        weight = getattr(problem.loss_function, "weight", None)
        summed = copy.copy(problem.loss_function)
        summed.reduction = "sum"
        total = 0.0
        for X, y in problem.data:
            for n in range(len(X)):
                g = torch.autograd.grad(summed(problem.model(X[n : n + 1]), y[n : n + 1]), problem.params.values())
                flat = torch.cat([part.reshape(-1) for part in g])
                total = total + torch.outer(flat, flat)
        divisor = {"mse": 27.0, "bce": 27.0, "ce": 9.0, "mse-sum": 1.0}.get(loss)
        if divisor is None:
            divisor = sum(float(weight[y].sum()) for _, y in problem.data)
        close(dense_of(ef(problem)), (total / divisor).numpy())

    def test_predictions_that_are_trees_have_examples_along_the_first_dimension(self) -> None:
        problem = two_heads()
        total = 0.0
        for X, y in problem.data:
            for n in range(len(X)):
                loss = problem.loss_function(problem.model(X[n : n + 1]), y[n : n + 1])
                flat = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, problem.params.values())])
                total = total + torch.outer(flat, flat)
        close(dense_of(ef(problem)), (total / 9).numpy())

    @pytest.mark.parametrize("loss", ["ce", "mse"])
    @pytest.mark.parametrize("weight", [lambda batch: 10.0 * len(batch[0]), lambda batch: 1.0])
    def test_of_the_weights_of_batches_only_the_ratio_counts(self, loss: str, weight) -> None:
        problem = loss_problem(loss)
        problem.data = [tuple(part[:3] for part in batch) for batch in problem.data]  # equal batches
        for kind in (EFLinearOperator, GradientCovarianceLinearOperator):
            arguments = problem.model, problem.loss_function, problem.params, problem.data
            close(dense_of(kind(*arguments, batch_weight=weight)), dense_of(kind(*arguments)))

    def test_of_a_function_of_ones_own_the_weight_is_the_divisor(self) -> None:
        problem = loss_problem("ce-ignored")
        for kind in (EFLinearOperator, GradientCovarianceLinearOperator):
            own = kind(
                problem.model,
                lambda prediction, y: nn.functional.cross_entropy(prediction, y),
                problem.params,
                problem.data,
                batch_weight=lambda batch: float((batch[1] != -100).sum()),
            )
            if kind is EFLinearOperator:
                close(dense_of(own), dense_of(kind(problem.model, problem.loss_function, problem.params, problem.data)))
            one = [tuple(torch.cat(parts) for parts in zip(*problem.data, strict=True))]
            whole = kind(
                problem.model,
                lambda prediction, y: nn.functional.cross_entropy(prediction, y),
                problem.params,
                one,
                batch_weight=lambda batch: float((batch[1] != -100).sum()),
            )
            close(dense_of(own), dense_of(whole))

    def test_of_a_mean_over_nobody_knows_what_it_is_refused(self) -> None:
        problem = loss_problem("callable")
        X, y = problem.data[0]
        problem.data = [({"X": X, "more": X[:2]}, y)]
        model = lambda params, X: torch.func.functional_call(problem.model, params, (X["X"],))  # noqa: E731
        with pytest.raises(ValueError, match="pass batch_weight="):
            EFLinearOperator(model, problem.loss_function, problem.params, problem.data) @ np.ones(43)
        told = EFLinearOperator(
            model, problem.loss_function, problem.params, problem.data, batch_weight=lambda batch: len(batch[1])
        )
        problem.data = [(X, y)]
        close(dense_of(told), dense_of(ef(problem)))

    def test_parts_of_a_prediction_that_the_loss_does_not_use(self) -> None:
        problem = loss_problem("callable")

        def model(params, X):
            z = torch.func.functional_call(problem.model, params, (X,))
            return {"hidden": 2 * z, "z": z, "aux": torch.ones(2, 3), "scale": torch.ones(())}

        def loss(prediction, y):
            return problem.loss_function(prediction["z"], y)

        for kind in (EFLinearOperator, GradientCovarianceLinearOperator):
            there = kind(model, loss, problem.params, problem.data)
            here = kind(problem.model, problem.loss_function, problem.params, problem.data)
            close(dense_of(there), dense_of(here))

    def test_a_prediction_that_is_a_parameter(self) -> None:
        w = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
        y = torch.arange(9) % 3
        A = EFLinearOperator(lambda p, X: p["w"], nn.CrossEntropyLoss(), {"w": w}, [(torch.zeros(9), y)])
        r = w.detach().softmax(1) - nn.functional.one_hot(y, 3)
        expected = torch.block_diag(*(torch.outer(one, one) for one in r)) / 9
        close(dense_of(A), expected.numpy())

    @pytest.mark.parametrize(
        ("wrapped", "match"),
        [
            (lambda z: (z[:, :1], torch.distributions.Categorical(logits=z)), "holds a Categorical"),
            (lambda z: torch.complex(z, z), "complex"),
            (lambda z: {"classes": z.argmax(1)}, "no tensor of real numbers"),
        ],
    )
    def test_predictions_that_cannot_be_looked_into_are_refused(self, wrapped, match) -> None:
        problem = loss_problem("ce")
        model = lambda params, X: wrapped(torch.func.functional_call(problem.model, params, (X,)))  # noqa: E731
        for kind in (EFLinearOperator, GGNLinearOperator):
            with pytest.raises(TypeError, match=match):
                kind(model, problem.loss_function, problem.params, problem.data) @ np.ones(43)

    def test_the_losses_own_settings_are_watched(self) -> None:
        problem = loss_problem("ce")
        A = ef(problem)
        A @ np.ones(43)
        problem.loss_function.ignore_index = 1
        close(A @ np.ones(43), ef(problem) @ np.ones(43))


class TestCovariance:
    def test_examples_without_weight_count_however_the_data_is_cut(self) -> None:
        problem = loss_problem("ce", "one")
        [(X, y)] = problem.data
        loss_function = nn.CrossEntropyLoss(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
        parts = [(X[y == 0], y[y == 0]), (X[y != 0], y[y != 0])]
        apart, whole = (
            GradientCovarianceLinearOperator(problem.model, loss_function, problem.params, data)
            for data in (parts, [(X, y)])
        )
        close(dense_of(apart), dense_of(whole))

    def test_a_batch_that_is_written_to_is_noticed(self) -> None:
        problem = loss_problem("ce")
        C = GradientCovarianceLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        C @ np.ones(43)
        problem.data[0][0].mul_(2)
        fresh = GradientCovarianceLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        close(C @ np.ones(43), fresh @ np.ones(43))

    def test_float32_vectors_do_not_cancel(self) -> None:
        X = 1000 + torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        model = nn.Linear(1, 1, dtype=torch.float64)
        arguments = model, nn.MSELoss(), dict(model.named_parameters()), [(X, X + 1)]
        exact = dense_of(GradientCovarianceLinearOperator(*arguments))
        rounded = dense_of(GradientCovarianceLinearOperator(*arguments, dtype=np.float32))
        np.testing.assert_allclose(rounded, exact, rtol=1e-4, atol=1e-6 * np.abs(exact).max())

    @pytest.mark.parametrize("engine", ["autograd", *nightly("compiled")])
    @pytest.mark.parametrize("loss", ["mse", "mse-sum", "ce", "ce-weights", "ce-ignored", "bce", "callable"])
    def test_it_is_the_centred_second_moment(self, loss: str, engine: str) -> None:
        problem = loss_problem(loss)
        summed = copy.copy(problem.loss_function)
        if loss != "callable":
            summed.reduction = "sum"
        gradients, divisor = [], 0.0
        for X, y in problem.data:
            divisor += weight_of(loss, problem.loss_function, y)
            for n in range(len(X)):
                if loss != "ce-ignored" or y[n] >= 0:
                    one = summed(problem.model(X[n : n + 1]), y[n : n + 1])
                    parts = torch.autograd.grad(one, problem.params.values())
                    gradients.append(torch.cat([part.reshape(-1) for part in parts]))
        G = torch.stack(gradients).numpy()
        G -= G.mean(0)
        build = functools.partial(
            GradientCovarianceLinearOperator, problem.model, problem.loss_function, problem.params, problem.data
        )
        assert_matrix(build, G.T @ G / (1.0 if loss == "mse-sum" else divisor), engine=engine)

    def test_it_follows_the_parameters(self) -> None:
        problem = loss_problem("ce")
        C = GradientCovarianceLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        before = C @ np.ones(43)
        with torch.no_grad():
            problem.params["0.weight"] *= 2
        fresh = GradientCovarianceLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        close(C @ np.ones(43), fresh @ np.ones(43))
        assert not np.allclose(before, C @ np.ones(43))
        close(pickle.loads(pickle.dumps(C)) @ np.ones(43), fresh @ np.ones(43))


def weight_of(loss: str, loss_function, y: torch.Tensor) -> float:
    if loss == "ce-weights":
        return float(loss_function.weight[y].sum())
    if loss in ("mse", "bce"):
        return float(y.numel())
    return float((y != -100).sum()) if loss.startswith("ce") else float(len(y))


class TestExact:
    @pytest.mark.parametrize("loss", LIKELIHOODS)
    def test_it_is_the_gauss_newton_matrix(self, loss: str) -> None:
        problem = loss_problem(loss)
        dense = functorch_ggn(problem.model, problem.loss_function, problem.params, problem.data).numpy()
        assert_matrix(functools.partial(fisher, problem), dense)

    def test_of_a_classifier_it_is_the_expectation_over_the_classes(self) -> None:
        problem = loss_problem("ce")
        total = 0.0
        for X, _ in problem.data:
            for x in X:
                p = problem.model(x[None]).softmax(1).detach()[0]
                for c in range(3):
                    loss = nn.functional.cross_entropy(problem.model(x[None]), torch.tensor([c]))
                    flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, problem.params.values())])
                    total = total + p[c] * torch.outer(flat, flat)
        close(dense_of(fisher(problem)), (total / 9).numpy())

    def test_it_is_the_hessian_of_softmax_regression(self) -> None:
        problem = loss_problem("ce-everything")
        torch.manual_seed(1)
        problem = Problem(nn.Linear(4, 3, dtype=torch.float64), problem.loss_function, problem.data)
        H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        close(dense_of(fisher(problem)), dense_of(H))

    @pytest.mark.parametrize("loss", ["l1", "huber", "callable", "subclass"])
    def test_losses_that_are_no_likelihood_are_refused(self, loss: str) -> None:
        with pytest.raises(ValueError, match="no known log-likelihood"):
            fisher(loss_problem(loss))


class TestSampled:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "loss", ["mse", *nightly("mse-sum"), "ce-everything", *nightly("ce-probabilities"), "bce-weights"]
    )
    def test_the_mean_over_many_draws_is_the_exact_matrix(self, loss: str) -> None:
        problem = loss_problem(loss)
        exact = dense_of(fisher(problem))
        errors = []
        for samples in (400, 6400):
            drawn = dense_of(fisher(problem, mc_samples=samples, rng=0))
            errors.append(np.linalg.norm(drawn - exact) / np.linalg.norm(exact))
        assert errors[1] < 0.06
        assert errors[1] < errors[0] / 2  # by 4 in expectation

    @pytest.mark.parametrize("problem", [loss_problem("ce"), sequences()], ids=["ce", "sequences"])
    def test_every_way_to_multiply_sees_the_same_draws(self, problem: Problem) -> None:
        build = functools.partial(fisher, problem, mc_samples=2, rng=5)
        dense = dense_of(build())
        assert_matrix(build, dense)
        assert np.linalg.eigvalsh(dense).min() > -1e-12

    def test_the_compiled_engine_draws_the_same(self) -> None:
        build = functools.partial(fisher, loss_problem("ce-everything"), mc_samples=2, rng=5)
        close(dense_of(build(engine="compiled", columns=1)), dense_of(build()))

    @pytest.mark.nightly
    @pytest.mark.parametrize("loss", ["ce-everything", "mse", "bce-weights"])
    def test_all_parts_compiled(self, loss: str) -> None:
        build = functools.partial(fisher, loss_problem(loss), mc_samples=2, rng=5)
        assert_matrix(functools.partial(build, columns=1), dense_of(build()), engine="compiled")

    def test_seeds(self) -> None:
        problem = loss_problem("ce")
        one, same, other = (
            dense_of(fisher(problem, mc_samples=1, rng=rng)) for rng in (1, np.random.default_rng(1), 2)
        )
        close(one, same)
        assert not np.allclose(one, other)
        assert not np.allclose(*(dense_of(fisher(problem, mc_samples=1)) for _ in range(2)))

    def test_shuffled_loaders_are_refused(self) -> None:
        problem = loss_problem("ce", "singles")
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        problem.data = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True)
        A = fisher(problem, mc_samples=1, cache=0)
        with pytest.raises(NonDeterministicObjectiveError, match="shuffle=False"):
            [A @ np.ones(43) for _ in range(5)]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_draws_in_low_precision_are_those_in_high(self, dtype) -> None:
        z = torch.linspace(-1, 1, 3000).repeat(40, 1).to(dtype)
        likelihood = Likelihood(nn.CrossEntropyLoss())
        noise = torch.rand(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn = [likelihood.derivative(one, torch.zeros(40).long(), noise, {}).argmin(1) for one in (z, z.double())]
        assert torch.equal(*drawn)

    def test_numpy_counts_are_counts(self) -> None:
        fisher(loss_problem("ce"), mc_samples=np.int64(2)) @ np.ones(43)

    def test_pickles_keep_their_draws(self) -> None:
        A = fisher(loss_problem("ce"), mc_samples=1)
        close(dense_of(pickle.loads(pickle.dumps(A))), dense_of(A))

    def test_draws_leave_the_global_generators_alone(self) -> None:
        state = torch.get_rng_state()
        fisher(loss_problem("ce"), mc_samples=1, rng=0) @ np.ones(43)
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("mc_samples", [-1, 1.5, "many"])
    def test_bad_numbers_of_draws(self, mc_samples) -> None:
        with pytest.raises(ValueError, match="mc_samples is"):
            fisher(loss_problem("ce"), mc_samples=mc_samples)
