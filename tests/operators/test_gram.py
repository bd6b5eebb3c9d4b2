"""Gram matrices and their factors against dense matrices computed in another way, in float64."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from agreement import close
from architectures import architecture_problem
from cases import Problem, log_problem, loss_problem, nightly, sequences
from test_ggn import two_heads
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    NonDeterministicObjectiveError,
    check,
)
from curvop.examples.functorch import functorch_empirical_fisher, functorch_ggn
from curvop.operators.gram import GramLinearOperator, NotFactorableError


def operator(kind: type, problem: Problem, **options: Any) -> Any:
    return kind(problem.model, problem.loss_function, problem.params, problem.data, **options)


def assert_gram(A: Any, dense: np.ndarray, rows: int) -> None:
    """``A.gram()`` is ``S @ S.T`` with `rows` rows, where ``S.T @ S`` is the matrix `dense`."""
    K = A.gram()
    S = K.factor
    assert isinstance(K, GramLinearOperator)
    assert K.shape == (rows, rows)
    assert S.shape == (rows, len(dense))
    rows_of_S = S @ np.eye(len(dense))
    close(S.T @ np.eye(rows), rows_of_S.T)
    close(rows_of_S.T @ rows_of_S, dense)
    close(K @ np.eye(rows), rows_of_S @ rows_of_S.T)
    close(S.formed().numpy(), rows_of_S)
    count = min(rows, len(dense))
    values = np.linalg.eigvalsh(K @ np.eye(rows))[::-1][:count]
    np.testing.assert_allclose(values, np.linalg.eigvalsh(dense)[::-1][:count], atol=1e-13 * max(values))


class TestEmpiricalFisher:
    @pytest.mark.parametrize(
        "loss",
        ["mse", "ce-everything", "ce-ignored-sum", "bce-weights", "callable", *nightly("l1", "huber", "f-partial")],
    )
    def test_one_row_per_example(self, loss: str) -> None:
        problem = loss_problem(loss)
        dense = functorch_empirical_fisher(problem.model, problem.loss_function, problem.params, problem.data).numpy()
        assert_gram(operator(EFLinearOperator, problem), dense, 9)

    def test_one_row_per_token(self) -> None:
        problem = sequences()
        dense = functorch_empirical_fisher(problem.model, problem.loss_function, problem.params, problem.data).numpy()
        assert_gram(operator(EFLinearOperator, problem), dense, 45)

    def test_predictions_that_are_trees(self) -> None:
        problem = two_heads()
        A = operator(EFLinearOperator, problem)
        assert_gram(A, A @ np.eye(A.shape[0]), 9)

    @pytest.mark.parametrize("loss", ["ce", "mse"])
    def test_batch_weights(self, loss: str) -> None:
        A = operator(EFLinearOperator, loss_problem(loss), batch_weight=lambda batch: 1.0 + len(batch[0]))
        assert_gram(A, A @ np.eye(43), 9)


class TestGGN:
    @pytest.mark.parametrize(
        "loss",
        ["mse", "ce", "ce-everything", "ce-ignored", "bce-weights", "callable-sum", "poisson", *nightly("huber")],
    )
    def test_one_row_per_example_and_output(self, loss: str) -> None:
        problem = loss_problem(loss)
        dense = functorch_ggn(problem.model, problem.loss_function, problem.params, problem.data).numpy()
        assert_gram(operator(GGNLinearOperator, problem), dense, 27)

    def test_losses_whose_hessian_has_zero_blocks(self) -> None:
        problem = log_problem("kl-batchmean")
        K = operator(GGNLinearOperator, problem).gram()
        assert not (K @ np.ones(27)).any()

    def test_sequences(self) -> None:
        problem = sequences()
        dense = functorch_ggn(problem.model, problem.loss_function, problem.params, problem.data).numpy()
        assert_gram(operator(GGNLinearOperator, problem), dense, 135)

    def test_several_outputs_are_stacked(self) -> None:
        problem = two_heads()
        A = operator(GGNLinearOperator, problem)
        assert_gram(A, A @ np.eye(A.shape[0]), A.gram().shape[0])

    def test_an_indefinite_loss(self) -> None:
        problem = loss_problem("mse")
        problem.loss_function = lambda z, y: (z[:, 0] * z[:, 1] + y[:, 0] * z[:, 2]).mean()
        with pytest.raises(NotFactorableError, match="indefinite"):
            operator(GGNLinearOperator, problem).gram() @ np.ones(27)

    def test_a_loss_that_couples_its_examples(self) -> None:
        problem = loss_problem("mse")
        problem.loss_function = lambda z, y: (z.mean(0) - y.mean(0)).square().sum()
        with pytest.raises(NotFactorableError, match="couples its examples"):
            operator(GGNLinearOperator, problem, batch_weight=lambda batch: 1.0).gram() @ np.ones(27)

    def test_too_many_outputs(self) -> None:
        model, X = nn.Linear(2, 257).double(), torch.ones(3, 2).double()
        A = GGNLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), [(X, torch.zeros(3, 257).double())])
        with pytest.raises(NotFactorableError, match=r"257 outputs.*EFLinearOperator"):
            A.gram() @ np.ones(771)


class TestFisher:
    @pytest.mark.parametrize("loss", ["mse", "ce-everything", "bce"])
    def test_one_row_per_drawn_target(self, loss: str) -> None:
        A = operator(FisherLinearOperator, loss_problem(loss), mc_samples=4, rng=0)
        assert_gram(A, A @ np.eye(43), 36)

    def test_the_exact_matrix_is_the_ggn(self) -> None:
        problem = loss_problem("ce")
        dense = functorch_ggn(problem.model, problem.loss_function, problem.params, problem.data).numpy()
        assert_gram(operator(FisherLinearOperator, problem), dense, 27)


class TestOtherMatrices:
    def test_damping_shifts_the_spectrum(self) -> None:
        A = operator(EFLinearOperator, loss_problem("ce"))
        K = A.damped(0.25).gram()
        close(K @ np.eye(9), A.gram() @ np.eye(9) + 0.25 * np.eye(9))
        close((K @ torch.eye(9, dtype=torch.float64)).numpy(), K @ np.eye(9))
        values, u = np.linalg.eigh(K @ np.eye(9))
        close(A.damped(0.25) @ K.lift(u), K.lift(u) * values)
        close(A.damped(0.25).damped(0.5).gram() @ np.eye(9), K @ np.eye(9) + 0.5 * np.eye(9))

    def test_blocks(self) -> None:
        A = operator(GGNLinearOperator, loss_problem("ce"))
        B = A.block(["2.weight", "0.bias"])
        assert_gram(B, B @ np.eye(B.shape[0]), 27)

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda p: operator(HessianLinearOperator, p), "a HessianLinearOperator is not of the form"),
            (lambda p: operator(HessianLinearOperator, p).damped(1.0), "a HessianLinearOperator is not of the form"),
            (lambda p: operator(GradientCovarianceLinearOperator, p), "use EFLinearOperator"),
            (lambda p: operator(GGNLinearOperator, p).block("0.bias", "2.bias"), "a block off the diagonal"),
            (lambda p: operator(EFLinearOperator, p).block("0.bias", "2.bias"), "a block off the diagonal"),
        ],
    )
    def test_matrices_without_one(self, make: Any, match: str) -> None:
        with pytest.raises(NotFactorableError, match=match):
            make(loss_problem("ce")).gram()


class TestOperator:
    def test_eigenvectors_are_lifted(self) -> None:
        A = operator(EFLinearOperator, loss_problem("mse"))
        K = A.gram()
        values, u = np.linalg.eigh(K @ np.eye(9))
        v = K.lift(u)
        close(v.T @ v, np.eye(9))
        close(A @ v, v * values)
        close(K.lift(u[:, 0]), v[:, 0])
        tensors = K.lift(torch.from_numpy(u))
        assert isinstance(tensors, Tensor)
        close(tensors.numpy(), v)
        assert not K.lift(np.zeros(9)).any()

    def test_vectors(self) -> None:
        K = operator(EFLinearOperator, loss_problem("ce")).gram()
        dense = K @ np.eye(9)
        close(dense, dense.T)
        assert K.H is K
        for x in (np.ones(9), np.ones((9, 1)), np.ones((9, 3)), np.ones((9, 0))):
            close(K @ x, dense @ x)
            close((K @ torch.from_numpy(x)).numpy(), dense @ x)
        close(K[[0, 3], :][:, [5]] @ np.eye(1), dense[[0, 3]][:, [5]])
        with pytest.raises(TypeError, match="complex"):
            K @ (1j * np.ones(9))

    def test_pickles(self) -> None:
        K = operator(FisherLinearOperator, loss_problem("ce"), mc_samples=2, rng=0).gram()
        again = pickle.loads(pickle.dumps(K))
        close(again @ np.eye(18), K @ np.eye(18))
        close(again.factor.formed().numpy(), K.factor.formed().numpy())

    def test_it_shows_the_parameters_as_they_are_now(self) -> None:
        problem = loss_problem("ce")
        A = operator(EFLinearOperator, problem)
        K = A.gram()
        K @ np.ones(9)
        with torch.no_grad():
            problem.params["0.weight"] *= 2
        S = K.factor @ np.eye(43)
        close(S.T @ S, operator(EFLinearOperator, problem) @ np.eye(43))

    def test_shuffled_data_is_refused_but_not_for_the_matrix_itself(self) -> None:
        problem = loss_problem("ce", "singles")
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        problem.data = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True)
        A = operator(EFLinearOperator, problem, cache=0)
        with pytest.raises(NonDeterministicObjectiveError, match="shuffle=False"):
            A.gram() @ np.ones(9)
        close(A @ np.ones(43), A @ np.ones(43))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_within_other_grad_modes(self, mode: Any) -> None:
        A = operator(GGNLinearOperator, loss_problem("ce"))
        expected = A.gram() @ np.eye(27)
        with mode():
            K = A.gram()
            close(K @ np.eye(27), expected)
            S = K.factor.formed()
        close((S @ S.T).numpy(), expected)

    def test_confident_predictions_in_single_precision(self) -> None:
        problem = loss_problem("ce")
        problem.model.float()
        problem.data = [(X.float(), y) for X, y in problem.data]
        with torch.no_grad():
            problem.params["2.weight"] *= 30
        A = operator(GGNLinearOperator, problem)
        S = A.gram().factor @ np.eye(43)
        dense = A @ np.eye(43)
        np.testing.assert_allclose(S.T @ S, dense, rtol=0, atol=20 * np.finfo(np.float32).eps * abs(dense).max())

    def test_it_passes_the_checks_of_its_algebra(self) -> None:
        K = operator(EFLinearOperator, loss_problem("ce")).gram()
        report = check(K, rng=0, progress=False)
        assert not [finding for finding in report.findings if finding.status == "wrong"]

    def test_fingerprints_tell_samples_apart(self) -> None:
        problem = loss_problem("ce")
        one, other = (operator(FisherLinearOperator, problem, mc_samples=2, rng=rng).gram() for rng in (0, 1))
        parts, others = one.factor.fingerprint(), other.factor.fingerprint()
        assert {name for name in parts if parts[name] != others[name]} == {"seed"}


class TestForming:
    @pytest.mark.parametrize("kind", [EFLinearOperator, GGNLinearOperator])
    @pytest.mark.parametrize("name", ["lstm", "attention-softmax"])
    def test_models_that_vmap_cannot_map(self, kind: type, name: str) -> None:
        S = operator(kind, architecture_problem(name)).gram().factor
        close(S.formed().numpy(), S @ np.eye(S.shape[1]))
        close(S.T.formed().numpy(), S.T @ np.eye(S.shape[0]))

    @pytest.mark.filterwarnings("ignore:.*normalizes:RuntimeWarning")
    def test_models_that_couple_their_examples(self) -> None:
        problem = loss_problem("mse", "one")
        problem.model = nn.Sequential(problem.model, nn.BatchNorm1d(3, affine=False)).double().train()
        problem.params = dict(problem.model.named_parameters())
        S = operator(EFLinearOperator, problem).gram().factor
        close(S.formed().numpy(), S @ np.eye(S.shape[1]))

    def test_a_matrix_that_does_not_fit(self) -> None:
        S = operator(EFLinearOperator, loss_problem("mse")).gram().factor
        with pytest.raises(MemoryError, match=r"the factor, a matrix of shape \(9, 43\)"):
            S.formed(memory=100)
