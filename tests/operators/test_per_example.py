"""Gradients of single examples against gradients of single terms of the user's own loss, in float64."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from agreement import close
from architectures import ARCHITECTURES, architecture_problem
from cases import BATCHINGS, LOSSES, Problem, input_problem, log_problem, loss_problem, nightly, sequences
from test_ggn import two_heads
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import curvop
from curvop import (
    EFLinearOperator,
    NonDeterministicObjectiveError,
    PerExampleGradientLinearOperator,
    TargetLoss,
    check,
    select,
)


def gradients(problem: Problem, **options: Any) -> PerExampleGradientLinearOperator:
    return PerExampleGradientLinearOperator(
        problem.model, problem.loss_function, problem.params, problem.data, **options
    )


def own_terms(problem: Problem, X: Any, y: Any) -> torch.Tensor:
    """Return the undivided terms of one batch, one per example, computed by the user's own model and loss."""
    prediction, loss = problem.model(X), problem.loss_function
    if isinstance(loss, nn.Module) and type(loss).__module__.startswith("torch.nn"):
        loss = copy.copy(loss)
        loss.reduction = "none"
        terms = loss(prediction, y)
    elif isinstance(loss, functools.partial) or getattr(loss, "__module__", "") == "torch.nn.functional":
        terms = functools.partial(loss, reduction="none")(prediction, y)
    else:
        return torch.stack([loss(problem.model(X[n : n + 1]), y[n : n + 1]) for n in range(len(X))])
    return (terms.sum(-1) if terms.shape == prediction.shape else terms).reshape(-1)


def dense_gradients(problem: Problem) -> np.ndarray:
    """Return the gradient of every term, from one call of ``torch.autograd.grad`` per term."""
    rows = []
    for X, y in problem.data:
        for term in own_terms(problem, X, y):
            parts = torch.autograd.grad(
                term, list(problem.params.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows).numpy()


def assert_gradients(problem: Problem, dense: np.ndarray | None = None, **options: Any) -> None:
    dense = dense_gradients(problem) if dense is None else dense
    G = gradients(problem, **options)
    assert G.shape == dense.shape
    close(G @ np.eye(dense.shape[1]), dense)
    close(G.T @ np.eye(dense.shape[0]), dense.T)
    rng = np.random.default_rng(0)
    x, u = rng.normal(size=dense.shape[1]), rng.normal(size=dense.shape[0])
    close(u @ (G @ x), x @ (G.H @ u))
    close((G @ torch.from_numpy(x)).numpy(), dense @ x)
    close((torch.from_numpy(u) @ G).numpy(), u @ dense)
    close(gradients(problem, **{"cache": 0, **options}).T @ u, u @ dense)
    first, last = next(iter(G.params_slices)), list(G.params_slices)[-1]
    cols, some = G.params_slices[last], [0, len(u) - 1, 0]
    close(G.block(last) @ x[cols], dense[:, cols] @ x[cols])
    close(G.T.block([last, first]).T.block(last) @ x[cols], dense[:, cols] @ x[cols])
    close(np.concatenate([B.T @ u for B in G.blocks()]), u @ dense)
    close(G[some, :][:, cols] @ x[cols], dense[some, cols] @ x[cols])
    close(G.T[cols, :][:, some] @ u[some], dense[some, cols].T @ u[some])


def assert_second_moment(problem: Problem, divisor: float, **options: Any) -> None:
    """The second moment of the rows, divided once, is the empirical Fisher matrix."""
    G = gradients(problem, **options)
    F = EFLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, **options)
    eye = np.eye(F.shape[0])
    close(G.T @ (G @ eye) / divisor, F @ eye)
    close(G.T @ np.ones(G.shape[0]) / divisor, F.gradient_and_loss()[0])


class TestTerms:
    @pytest.mark.default_cases(
        "mse-unequal", "ce-everything-*", "ce-probabilities-*", "bce-weights-*", "callable-unequal", "subclass-*"
    )
    @pytest.mark.parametrize("batching", ["unequal", *nightly("one", "singles")])
    @pytest.mark.parametrize("loss", LOSSES)
    def test_every_loss_however_the_data_is_cut(self, loss: str, batching: str) -> None:
        assert_gradients(loss_problem(loss, batching))

    @pytest.mark.filterwarnings("ignore:reduction.*divides:UserWarning")  # torch warns about KLDivLoss
    @pytest.mark.parametrize("loss", ["nll", "nll-weights", "kl-batchmean", "kl-mean"])
    def test_losses_over_log_probabilities(self, loss: str) -> None:
        assert_gradients(log_problem(loss))

    @pytest.mark.parametrize("batching", BATCHINGS)
    def test_sequence_outputs_with_ignored_positions(self, batching: str) -> None:
        assert_gradients(sequences(batching))

    @pytest.mark.parametrize("kind", ["dict", *nightly("userdict", "namedtuple", "nested")])
    def test_inputs_that_are_trees_of_tensors(self, kind: str) -> None:
        assert_gradients(input_problem(kind))

    @pytest.mark.default_cases("lstm", "attention-softmax")
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_architecture(self, name: str) -> None:
        assert_gradients(architecture_problem(name))

    def test_predictions_that_are_trees_have_examples_along_the_first_dimension(self) -> None:
        problem = two_heads()
        rows = []
        for X, y in problem.data:
            for n in range(len(X)):
                loss = problem.loss_function(problem.model(X[n : n + 1]), y[n : n + 1])
                parts = torch.autograd.grad(loss, list(problem.params.values()))
                rows.append(torch.cat([part.reshape(-1) for part in parts]))
        assert_gradients(problem, torch.stack(rows).numpy())

    def test_parts_of_a_prediction_that_the_loss_does_not_use(self) -> None:
        problem = loss_problem("callable")

        def model(params, X):
            z = torch.func.functional_call(problem.model, params, (X,))
            return {"z": z, "aux": torch.ones(2, 3), "scale": torch.ones(())}

        whole = Problem(model, lambda z, y: problem.loss_function(z["z"], y), problem.data, problem.params)
        assert_gradients(whole, dense_gradients(problem))

    def test_a_prediction_without_dimensions_is_one_example(self) -> None:
        problem = loss_problem("mse")
        model = lambda p, X: torch.func.functional_call(problem.model, p, (X,)).square().sum()  # noqa: E731
        data = [(X, torch.ones((), dtype=torch.float64)) for X, _ in problem.data]
        G = gradients(Problem(model, nn.functional.mse_loss, data, problem.params))
        rows = []
        for X, _ in data:
            parts = torch.autograd.grad((problem.model(X).square().sum() - 1) ** 2, list(problem.params.values()))
            rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
        close(G @ np.eye(43), np.stack(rows))
        assert G.items.tolist() == [0, 1]

    def test_ignored_targets_are_zero_rows(self) -> None:
        problem = loss_problem("ce-ignored")
        ignored = torch.cat([y for _, y in problem.data]) == -100
        dense = gradients(problem) @ np.eye(43)
        assert not dense[ignored.numpy()].any()
        assert dense[~ignored.numpy()].any(axis=1).all()

    @pytest.mark.slow
    def test_the_compiled_engine(self) -> None:
        problem = loss_problem("ce-everything", "one")
        G = gradients(problem, engine="compiled", columns=1)
        dense = dense_gradients(problem)
        close(G @ np.eye(43), dense)
        close(G.T @ np.eye(9), dense.T)

    @pytest.mark.nightly
    @pytest.mark.parametrize("loss", ["ce-ignored", "mse", "callable"])
    def test_all_parts_compiled(self, loss: str) -> None:
        assert_gradients(loss_problem(loss), engine="compiled", columns=1)


class TestSecondMoment:
    @pytest.mark.parametrize(
        ("loss", "divisor"),
        [
            ("mse", 27),
            ("mse-sum", 1),
            ("ce", 9),
            ("ce-weights", None),
            ("ce-smoothed", 9),
            ("ce-ignored", 4),
            ("ce-ignored-sum", 1),
            ("ce-probabilities", 9),
            ("bce-weights", 27),
            ("callable", 9),
            ("callable-sum", 1),
            ("subclass", 9),
        ],
    )
    def test_it_is_the_empirical_fisher_matrix(self, loss: str, divisor: float | None) -> None:
        problem = loss_problem(loss)
        if divisor is None:
            divisor = sum(float(problem.loss_function.weight[y].sum()) for _, y in problem.data)
        assert_second_moment(problem, divisor)

    def test_batch_weights_of_a_function_of_ones_own(self) -> None:
        problem = loss_problem("ce-ignored")
        own = lambda prediction, y: nn.functional.cross_entropy(prediction, y)  # noqa: E731
        counted = Problem(problem.model, own, problem.data, problem.params)
        valid = lambda batch: float((batch[1] != -100).sum())  # noqa: E731
        assert_second_moment(counted, 4, batch_weight=valid)
        dense = dense_gradients(problem)
        close(gradients(counted, batch_weight=valid) @ np.eye(43), dense)

    @pytest.mark.parametrize("loss", ["ce", "mse"])
    def test_batch_weights_that_are_not_the_divisor(self, loss: str) -> None:
        problem = loss_problem(loss)
        weight = lambda batch: 2.0 * len(batch[0]) ** 2  # noqa: E731
        G = gradients(problem, batch_weight=weight)
        F = EFLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, batch_weight=weight)
        close(G.T @ (G @ np.eye(43)) / (2 * (36 + 9)), F @ np.eye(43))


class TestItems:
    def test_a_row_is_the_sum_of_the_terms_of_an_item(self) -> None:
        problem = sequences()
        dense = dense_gradients(problem)
        assert_gradients(problem, dense.reshape(9, 5, -1).sum(1), examples="items")

    def test_the_item_of_each_row(self) -> None:
        assert gradients(sequences()).items.tolist() == [n for n in range(9) for _ in range(5)]
        assert gradients(sequences(), examples="items").items.tolist() == list(range(9))
        assert gradients(loss_problem("ce")).items.tolist() == list(range(9))
        assert np.issubdtype(gradients(loss_problem("ce")).items.dtype, np.integer)

    def test_a_model_that_flattens_its_predictions(self) -> None:
        problem = sequences()
        flat = lambda p, X: (  # noqa: E731
            torch.func.functional_call(problem.model, p, (X,)).transpose(1, 2).reshape(-1, 3)
        )
        flattened = Problem(flat, problem.loss_function, [(X, y.reshape(-1)) for X, y in problem.data], problem.params)
        close(gradients(flattened) @ np.eye(39), gradients(problem) @ np.eye(39))
        close(gradients(flattened, examples="items") @ np.eye(39), gradients(problem, examples="items") @ np.eye(39))
        assert gradients(flattened).items.tolist() == gradients(problem).items.tolist()

    def test_terms_that_belong_to_no_item(self) -> None:
        problem = loss_problem("mse")
        pooled = lambda p, X: torch.func.functional_call(problem.model, p, (X,))[:-1]  # noqa: E731
        odd = Problem(pooled, problem.loss_function, [(X, y[:-1]) for X, y in problem.data], problem.params)
        with pytest.raises(ValueError, match="examples='terms'"):
            gradients(odd, examples="items")
        G = gradients(odd)
        assert G.shape == (7, 43)
        with pytest.raises(ValueError, match="data items of a batch are not known") as caught:
            _ = G.items
        assert "examples=" not in str(caught.value)  # which is 'terms' here


class TestOperator:
    @pytest.mark.parametrize("examples", ["terms", "items"])
    @pytest.mark.parametrize("problem", [loss_problem("ce-everything"), sequences()], ids=["ce", "sequences"])
    def test_other_routes_agree(self, problem: Problem, examples: str) -> None:
        G = gradients(problem, examples=examples)
        for A in (G, G.T, G.block(list(problem.params)[-1])):
            assert check(A, rng=0, progress=False).ok

    def test_pickles(self) -> None:
        G = gradients(sequences(), examples="items")
        for A in (G, G.T, G.block("head.weight")):
            again = pickle.loads(pickle.dumps(A))
            close(again @ np.ones(A.shape[1]), A @ np.ones(A.shape[1]))
        assert pickle.loads(pickle.dumps(G)).items.tolist() == G.items.tolist()

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_within_other_grad_modes(self, mode: Any) -> None:
        problem = two_heads()
        expected = gradients(problem) @ np.eye(gradients(problem).shape[1])
        with mode():
            close(gradients(problem) @ np.eye(expected.shape[1]), expected)

    def test_shapes_of_vectors(self) -> None:
        G = gradients(loss_problem("ce"))
        dense = G @ np.eye(43)
        for x in (np.ones(43), np.ones((43, 1)), np.ones((43, 3)), np.ones((43, 0))):
            close(G @ x, dense @ x)
            product = G @ torch.from_numpy(x)
            assert isinstance(product, torch.Tensor)
            close(product.numpy(), dense @ x)

    def test_the_fingerprint_tells_terms_from_items(self) -> None:
        problem = sequences()
        terms, items = gradients(problem).fingerprint(), gradients(problem, examples="items").fingerprint()
        assert {name for name in terms if terms[name] != items.get(name)} == {"shape", "examples"}

    def test_gradients_of_the_parameters_as_they_are_now(self) -> None:
        problem = loss_problem("ce")
        G = gradients(problem)
        G @ np.ones(43)
        with torch.no_grad():
            problem.params["0.weight"] *= 2
        close(G @ np.eye(43), dense_gradients(problem))

    @pytest.mark.parametrize("cache", [0, np.inf])
    def test_shuffled_data_is_refused(self, cache: float) -> None:
        problem = loss_problem("ce", "singles")
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        problem.data = DataLoader(TensorDataset(X, y), batch_size=3, shuffle=True)
        with pytest.raises(NonDeterministicObjectiveError, match="shuffle=False"):
            gradients(problem, cache=cache) @ np.ones(43)

    def test_a_product_is_one_jvp_or_one_vjp(self) -> None:
        calls = []
        problem = loss_problem("ce")
        G = gradients(problem)
        handle = problem.model.register_forward_hook(lambda *_: calls.append(1))
        G @ np.ones(43), G.T @ np.ones(9)
        before = len(calls)
        G @ np.ones(43), G.T @ np.ones(9)
        handle.remove()
        assert len(calls) == before  # all batches are cached
        assert G.num_products == 4
        assert G.cost(repeats=1).seconds > 0


class TestFromFunctions:
    def test_rows_are_those_of_the_constructor(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        X, y = torch.randn(7, 3).double(), torch.tensor([0, 1, -100, 1, 0, 0, 1])
        params, loss = dict(model.named_parameters()), nn.CrossEntropyLoss()
        G = PerExampleGradientLinearOperator(model, loss, params, [(X[:4], y[:4]), (X[4:], y[4:])])
        parts = PerExampleGradientLinearOperator.from_functions(
            lambda params, batch: torch.func.functional_call(model, params, (batch["inputs"],)),
            TargetLoss(loss, lambda batch: batch["labels"]),
            params,
            [{"inputs": X[:4], "labels": y[:4]}, {"inputs": X[4:], "labels": y[4:]}],
        )
        close(parts @ np.eye(G.shape[1]), G @ np.eye(G.shape[1]))
        assert not (parts.to_dense()[2]).any()

    def test_tokens_of_a_language_model(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        config._attn_implementation = "eager"
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double().eval()
        ids = torch.randint(7, (2, 5))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["labels"][1, 3:] = -100
        params = select(model, "*.c_fc.*")
        G = PerExampleGradientLinearOperator.from_functions(
            **curvop.huggingface.causal_lm(model), params=params, data=[batch]
        )
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].reshape(-1, 7)
        terms = nn.functional.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1), reduction="none")
        rows = [torch.autograd.grad(term, list(params.values()), retain_graph=True) for term in terms]
        close(G @ np.eye(G.shape[1]), torch.stack([torch.cat([p.reshape(-1) for p in row]) for row in rows]).numpy())
        assert list(G.items) == [0, 0, 0, 0, 1, 1, 1, 1]
