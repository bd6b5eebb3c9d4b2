"""Objectives in two parts: ``predict(params, batch)`` and ``loss(prediction, batch)``, over batches of any type."""

from __future__ import annotations

import copy
import functools
import pickle
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from agreement import assert_matrix, close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import curvop
from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TargetLoss,
    TransposedJacobianLinearOperator,
)

CLASSES = 3


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


MODEL = network()
PARAMS = {f"net.{name}": value for name, value in MODEL.named_parameters()}  # the names are the functions' own
SIZE = sum(value.numel() for value in PARAMS.values())


def predict(params: dict[str, Tensor], batch: Any) -> Tensor:
    """Return scores of shape (n, classes), from two parts of a batch."""
    first, bias, last, shift = params.values()
    return batch["scale"] * (torch.tanh(batch["inputs"] @ first.T + bias) @ last.T + shift)


def labels_of(batch: Any) -> Tensor:
    return batch["labels"]


def loss(scores: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(scores, batch["labels"])


def valid(batch: Any) -> float:
    return float((batch["labels"] != -100).sum())


def whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 2, dtype=torch.float64, generator=generator)
    scale = 1 + torch.rand(7, 1, dtype=torch.float64, generator=generator)
    return {"inputs": inputs, "scale": scale, "labels": torch.tensor([0, -100, 1, 2, 2, -100, -100])}


def batches(kind: Any = dict) -> list[Any]:
    """Cut the data into a batch with one ignored target, one without, and one that is ignored as a whole."""
    parts = slice(0, 3), slice(3, 5), slice(5, 7)
    return [kind({name: value[part] for name, value in whole().items()}) for part in parts]


def rows(values: Tensor, params: list[Tensor]) -> Tensor:
    """Return the gradients of the entries of `values`, as rows."""
    found = [
        torch.autograd.grad(value, params, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in values.reshape(-1)
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in found])


def dense(matrix: str) -> np.ndarray:
    """Return a matrix of the whole data set, from its definition."""
    leaves = {name: value.detach().requires_grad_() for name, value in PARAMS.items()}
    params, batch = list(leaves.values()), whole()
    scores = predict(leaves, batch)
    J = rows(scores, params)
    counted = batch["labels"] != -100
    if matrix == "jacobian":
        return J.numpy()
    if matrix == "hessian":
        gradient = torch.autograd.grad(loss(scores, batch), params, create_graph=True)
        return rows(torch.cat([part.reshape(-1) for part in gradient]), params).detach().numpy()
    if matrix == "ggn":
        p = scores.detach().softmax(1)
        middle = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) * counted[:, None, None] / counted.sum()
        J = J.view(7, CLASSES, -1)
        return torch.einsum("nip,nij,njq->pq", J, middle, J).numpy()
    terms = rows(F.cross_entropy(scores, batch["labels"], reduction="none")[counted], params)
    second = terms.T @ terms / counted.sum()
    mean = terms.mean(0)
    return (second if matrix == "ef" else second - mean.outer(mean)).numpy()


OPERATORS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
}


def build(operator: Any, loss: Any = loss, data: Any = None, **options: Any) -> Any:
    return operator.from_functions(predict, loss, PARAMS, batches() if data is None else data, **options)


class TestTargetLoss:
    loss = TargetLoss(nn.CrossEntropyLoss(), labels_of)

    @pytest.mark.parametrize("matrix", OPERATORS)
    def test_batches_are_weighted_by_the_targets_that_count(self, matrix: str) -> None:
        assert_matrix(functools.partial(build, OPERATORS[matrix], self.loss), dense(matrix))

    def test_the_likelihood_is_known(self) -> None:
        assert_matrix(functools.partial(build, FisherLinearOperator, self.loss), dense("ggn"))
        pairs = [(batch, batch["labels"]) for batch in batches()]
        drawn = FisherLinearOperator(predict, nn.CrossEntropyLoss(), PARAMS, pairs, mc_samples=2, rng=0) @ np.eye(SIZE)
        close(build(FisherLinearOperator, self.loss, mc_samples=2, rng=0) @ np.eye(SIZE), drawn)
        assert np.linalg.norm(drawn - dense("ggn")) > 1e-3  # two draws are not the expectation

    def test_a_function_of_the_same_loss_needs_weights(self) -> None:
        A = build(HessianLinearOperator, batch_weight=valid)
        close(A @ np.eye(SIZE), dense("hessian"))
        close(build(EFLinearOperator, batch_weight=valid) @ np.eye(SIZE), dense("ef"))  # a row is a target
        with pytest.warns(RuntimeWarning, match="pass batch_weight="):
            product = build(HessianLinearOperator, data=batches()[:2]) @ np.eye(SIZE)
        assert np.linalg.norm(product - dense("hessian")) > 0.01

    def test_it_is_the_loss(self) -> None:
        scores = predict(PARAMS, whole())
        assert torch.equal(self.loss(scores, whole()), loss(scores, whole()))
        assert TargetLoss(nn.MSELoss(reduction="sum"), labels_of).reduction == "sum"

    def test_sums_have_no_weights(self) -> None:
        A = build(GGNLinearOperator, TargetLoss(nn.CrossEntropyLoss(reduction="sum"), labels_of))
        close(A @ np.eye(SIZE), 4 * dense("ggn"))

    def test_a_loss_of_its_own_is_weighted_by_the_size_of_the_batch(self) -> None:
        squares = TargetLoss(lambda z, y: z.square().mean(), lambda batch: None)
        J = dense("jacobian")
        close(build(GGNLinearOperator, squares) @ np.eye(SIZE), 2 * J.T @ J / len(J))


@pytest.mark.parametrize("kind", [JacobianLinearOperator, TransposedJacobianLinearOperator])
def test_jacobians_take_the_prediction_only(kind: Any) -> None:
    J = kind.from_functions(predict, PARAMS, batches())
    expected = dense("jacobian") if kind is JacobianLinearOperator else dense("jacobian").T
    assert J.shape == expected.shape
    close(J @ np.eye(J.shape[1]), expected)
    close((J.T @ torch.eye(J.shape[0], dtype=torch.float64)).numpy(), expected.T)
    same = kind.from_functions(predict, loss=loss, batch_weight=valid, params=PARAMS, data=batches())
    close(same @ np.eye(J.shape[1]), expected)


class TestBatches:
    def test_mappings_keep_their_type(self) -> None:
        def checked(params: dict[str, Tensor], batch: Any) -> Tensor:
            assert type(batch) is UserDict
            return predict(params, batch)

        H = HessianLinearOperator.from_functions(
            checked, TargetLoss(nn.CrossEntropyLoss(), labels_of), PARAMS, batches(UserDict)
        )
        close(H @ np.eye(SIZE), dense("hessian"))

    def test_pairs_and_tensors(self) -> None:
        data = [(batch, batch["labels"]) for batch in batches()]
        pairs = TargetLoss(nn.CrossEntropyLoss(), lambda batch: batch[1])
        G = GGNLinearOperator.from_functions(lambda params, batch: predict(params, batch[0]), pairs, PARAMS, data)
        close(G @ np.eye(SIZE), dense("ggn"))
        w, X = torch.ones(2, dtype=torch.float64), whole()["inputs"]  # an autoencoder: the batch is the target
        G = GGNLinearOperator.from_functions(lambda params, X: X * params["w"], nn.MSELoss(), {"w": w}, [X[:5], X[5:]])
        close(G @ np.eye(2), np.diag(2 * (X**2).sum(0) / X.numel()))

    def test_objects_need_a_weight(self) -> None:
        class Batch:
            def __init__(self, parts: dict[str, Tensor]) -> None:
                self.parts = parts

        data = [Batch(batch) for batch in batches()]
        A = functools.partial(
            HessianLinearOperator.from_functions,
            lambda params, batch: predict(params, batch.parts),
            lambda scores, batch: loss(scores, batch.parts),
            PARAMS,
            data,
        )
        with pytest.raises(ValueError, match="the size of batch 0 is not known"):
            A() @ np.ones(SIZE)
        close(A(batch_weight=lambda batch: valid(batch.parts)) @ np.eye(SIZE), dense("hessian"))


class Normalized(nn.Module):
    """In training mode, the batch normalization writes to its buffers in every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(MODEL)
        self.norm = nn.BatchNorm1d(CLASSES).double()
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.net(inputs))

    def scores(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        return functional_call(self, params, (batch["inputs"],))


GLOBAL = Normalized()


def by_global(params: dict[str, Tensor], batch: Any) -> Tensor:
    return GLOBAL.scores(params, batch)


class Holder:
    def __init__(self, model: Normalized) -> None:
        self.model = model

    def __call__(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        return self.model.scores(params, batch)

    def method(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        return self(params, batch)


def scores_of(model: Normalized, params: dict[str, Tensor], batch: Any) -> Tensor:
    return model.scores(params, batch)


WAYS = {
    "closure": lambda model: lambda params, batch: model.scores(params, batch),
    "global": lambda model: by_global,
    "method": lambda model: model.scores,
    "method of an object": lambda model: Holder(model).method,
    "object": Holder,
    "partial": lambda model: functools.partial(scores_of, model),
    "default": lambda model: lambda params, batch, model=model: model.scores(params, batch),
    "container": lambda model: lambda params, batch, models={"one": [model]}: models["one"][0].scores(params, batch),
}


class TestModules:
    @pytest.mark.parametrize("way", WAYS)
    def test_a_model_behind_functional_call_is_left_as_found(self, way: str) -> None:
        model = GLOBAL if way == "global" else Normalized()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        versions = [value._version for value in model.buffers()]
        params = dict(model.named_parameters())
        data = [{name: value[:5] for name, value in whole().items()}]
        H = HessianLinearOperator.from_functions(
            WAYS[way](model), TargetLoss(nn.CrossEntropyLoss(), labels_of), params, data
        )
        product = H @ np.ones(H.shape[1])
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert [value.grad_fn for value in model.buffers()] == [None] * len(versions)
        assert model.calls == 0
        assert all(value.grad is None and value.requires_grad for value in params.values())
        expected = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), params, [(data[0]["inputs"], labels_of(data[0]))]
        )
        close(product, expected @ np.ones(H.shape[1]))

    def test_other_values_than_the_models_own(self) -> None:
        model = Normalized().eval()
        params = {name: (value * 1.5).detach() for name, value in model.named_parameters()}
        H = HessianLinearOperator.from_functions(
            model.scores, TargetLoss(nn.CrossEntropyLoss(), labels_of), params, batches()
        )
        changed = copy.deepcopy(model)
        changed.load_state_dict(params, strict=False)
        data = [(batch["inputs"], batch["labels"]) for batch in batches()]
        close(
            H @ np.ones(H.shape[1]),
            HessianLinearOperator(changed, nn.CrossEntropyLoss(), dict(changed.named_parameters()), data)
            @ np.ones(H.shape[1]),
        )

    def test_recomputed_layers_need_the_models_own_parameters(self) -> None:
        class Checkpointed(Normalized):
            def forward(self, inputs: Tensor) -> Tensor:
                return checkpoint(self.net, inputs, use_reentrant=False)

        model = Checkpointed().eval()
        own = {name: value for name, value in model.named_parameters() if name.startswith("net")}
        targets, data = TargetLoss(nn.CrossEntropyLoss(), labels_of), batches()
        pairs = [(batch["inputs"], batch["labels"]) for batch in data]
        H = HessianLinearOperator.from_functions(model.scores, targets, own, data)
        plain = HessianLinearOperator(model.net, nn.CrossEntropyLoss(), dict(model.net.named_parameters()), pairs)
        close(H @ np.eye(SIZE), plain @ np.eye(SIZE))
        others = {name: (value * 1.5).detach() for name, value in own.items()}
        H = HessianLinearOperator.from_functions(model.scores, targets, others, data)
        with pytest.raises(RuntimeError, match=r"gradient checkpointing.*pass the model's own"):
            H @ np.ones(SIZE)

    def test_dropout_is_named(self) -> None:
        model = nn.Sequential(copy.deepcopy(MODEL), nn.Dropout(0.5))
        G = GGNLinearOperator.from_functions(
            lambda params, batch: functional_call(model, params, (batch["inputs"],)),
            TargetLoss(nn.CrossEntropyLoss(), labels_of),
            dict(model.named_parameters()),
            batches(),
        )
        with pytest.raises(curvop.NonDeterministicObjectiveError, match=r"dropout is active in '1'"):
            G @ np.ones(SIZE)


class TestErrors:
    def test_a_penalty_in_the_loss(self) -> None:
        model = copy.deepcopy(MODEL)

        def penalized(scores: Tensor, batch: Any) -> Tensor:
            return loss(scores, batch) + sum(value.square().sum() for value in model.parameters())

        G = functools.partial(
            GGNLinearOperator.from_functions,
            lambda params, batch: functional_call(model, params, (batch["inputs"],)),
            penalized,
            dict(model.named_parameters()),
            batches()[:2],
            batch_weight=valid,
        )
        with pytest.raises(ValueError, match=r"the loss depends on '0.weight' in another way.*G.damped\(2 \* decay\)"):
            G() @ np.ones(SIZE)

    def test_a_hessian_has_the_curvature_of_a_penalty(self) -> None:
        model = copy.deepcopy(MODEL)
        H = HessianLinearOperator.from_functions(
            lambda params, batch: functional_call(model, params, (batch["inputs"],)),
            lambda scores, batch: scores.sum() * 0 + sum(value.square().sum() for value in model.parameters()),
            dict(model.named_parameters()),
            batches()[:1],
        )
        close(H @ np.eye(SIZE), 2 * np.eye(SIZE))

    def test_a_parameter_that_is_reached_directly(self) -> None:
        w = nn.Parameter(torch.ones(2, dtype=torch.float64))
        G = GGNLinearOperator.from_functions(
            lambda params, X: X @ params["w"] + X @ w,
            lambda z, X: z.square().mean(),
            {"w": w},
            [torch.ones(3, 2).double()],
        )
        with pytest.raises(ValueError, match=r"params\['w'\] is reached directly"):
            G @ np.ones(2)

    def test_none_that_is_reached(self) -> None:
        G = GGNLinearOperator.from_functions(
            lambda params, X: X, lambda z, X: z.square().mean(), {"w": torch.ones(2)}, [torch.ones(3, 2)]
        )
        with pytest.raises(RuntimeError, match="the loss depends on none of the parameters"):
            G @ np.ones(2)


class TestChecks:
    @pytest.mark.parametrize("matrix", ["ggn", "ef"])
    @pytest.mark.parametrize("of_targets", [True, False], ids=["targets", "function"])
    def test_other_routes_agree(self, matrix: str, of_targets: bool) -> None:
        how: dict[str, Any] = {"loss": TestTargetLoss.loss} if of_targets else {"batch_weight": valid}
        report = curvop.check(build(OPERATORS[matrix], data=batches()[:2], **how), rng=0, progress=False)
        assert report.verdict.startswith("sound"), str(report)

    def test_operators_pickle(self) -> None:
        H = build(HessianLinearOperator, TestTargetLoss.loss)
        product = H @ np.ones(SIZE)
        close(pickle.loads(pickle.dumps(H)) @ np.ones(SIZE), product)

    def test_fingerprints_name_the_functions(self) -> None:
        before = build(GGNLinearOperator, TestTargetLoss.loss).fingerprint()
        after = build(GGNLinearOperator, TargetLoss(nn.CrossEntropyLoss(label_smoothing=0.1), labels_of)).fingerprint()
        assert {name for name in before if before[name] != after[name]} == {"loss"}
        assert "predict" in before


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "ef"])
def test_the_compiled_engine(matrix: str) -> None:
    model = copy.deepcopy(MODEL)
    data = [{**batch, "scale": torch.ones(())} for batch in batches()]
    functions = {
        "predict": lambda params, batch: functional_call(model, params, (batch["inputs"],)),
        "loss": TestTargetLoss.loss,
        "params": {"2.weight": model[2].weight},  # the others are constants of the model
        "data": data,
    }
    compiled = OPERATORS[matrix].from_functions(**functions, engine="compiled") @ np.eye(12)
    close(compiled, OPERATORS[matrix].from_functions(**functions) @ np.eye(12))


def test_float32_models_are_checked_in_float64() -> None:
    model = copy.deepcopy(MODEL).float()
    data = [{"inputs": batch["inputs"].float(), "labels": batch["labels"]} for batch in batches()[:2]]
    H = HessianLinearOperator.from_functions(
        lambda params, batch: functional_call(model, params, (batch["inputs"],)),
        TestTargetLoss.loss,
        {"2.weight": model[2].weight},
        data,
    )
    assert not [route.reason for route in H.other_routes(np.ones(12)) if route.reason]
