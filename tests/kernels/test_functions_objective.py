"""The functions of an objective in two parts run in the guard: their modules and batches are left as found."""

from __future__ import annotations

import copy
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from agreement import close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    TargetLoss,
    check,
)

OPERATORS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
    "fisher": FisherLinearOperator,
}


def data(classes: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    y = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    labels = torch.tensor([1, 2, 2, 1, 2, 1])
    return [{"x": x[part], "y": labels[part] if classes else y[part]} for part in (slice(0, 4), slice(4, 6))]


PARAMS = {"w": torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)}


def predict(params: dict[str, Tensor], batch: Any) -> Tensor:
    return torch.tanh(batch["x"] @ params["w"].T)


def dense(matrix: str, targets: Any, loss: Any) -> np.ndarray:
    """Return a matrix from its definition. `targets` is a function of the whole data set."""
    whole = {key: torch.cat([batch[key] for batch in data(loss is F.cross_entropy)]) for key in ("x", "y")}
    x, y = whole["x"], targets(whole)

    def terms(w: Tensor) -> Tensor:
        values = loss(predict({"w": w.view(2, 3)}, whole), y, reduction="none")
        return values if values.ndim == 1 else values.sum(1)

    w = PARAMS["w"].reshape(-1)
    count = len(x) if loss is F.cross_entropy else 2 * len(x)  # the mean squared error divides by all entries
    if matrix == "hessian":
        return torch.autograd.functional.hessian(lambda w: terms(w).sum() / count, w).numpy()
    J = torch.autograd.functional.jacobian(lambda w: predict({"w": w.view(2, 3)}, whole), w)
    if matrix in ("ggn", "fisher"):
        z = predict(PARAMS, whole)
        p = z.softmax(1)
        blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None] if loss is F.cross_entropy else 2 * torch.eye(2)
        return torch.einsum("nip,nij,njq->pq", J, blocks.double().expand(len(x), 2, 2) / count, J).numpy()
    G = torch.autograd.functional.jacobian(terms, w)
    second = G.T @ G / count
    mean = G.sum(0) / len(x)
    return (second if matrix == "ef" else second - len(x) / count * mean.outer(mean)).numpy()


def in_place(batch: Any) -> Tensor:
    return batch["y"].mul_(2)


def shifted_in_place(batch: Any) -> Tensor:
    return batch["y"].sub_(1)


def popped(batch: Any) -> Tensor:
    return batch.pop("y") * 2


#: Targets that modify the batch, the same targets without side effects, and the loss.
TARGETS: dict[str, tuple[Any, Any, nn.Module, Any]] = {
    "in place": (in_place, lambda batch: batch["y"] * 2, nn.MSELoss(), F.mse_loss),
    "labels in place": (shifted_in_place, lambda batch: batch["y"] - 1, nn.CrossEntropyLoss(), F.cross_entropy),
    "removed from the batch": (popped, lambda batch: batch["y"] * 2, nn.MSELoss(), F.mse_loss),
}


class TestTargets:
    @pytest.mark.parametrize("what", TARGETS)
    @pytest.mark.parametrize("matrix", OPERATORS)
    def test_may_modify_the_batch(self, matrix: str, what: str) -> None:
        targets, pure, loss, function = TARGETS[what]
        batches = data(function is F.cross_entropy)
        before = copy.deepcopy(batches)
        A = OPERATORS[matrix].from_functions(predict, TargetLoss(loss, targets), PARAMS, batches)
        expected = dense(matrix, pure, function)
        close(A @ np.eye(6), expected)
        if matrix != "hessian":
            close(A.diagonal(), np.diag(expected))
        if matrix == "fisher":
            FisherLinearOperator.from_functions(
                predict, TargetLoss(loss, targets), PARAMS, batches, mc_samples=1, rng=0
            ) @ np.ones(6)
        assert all(found.keys() == kept.keys() for found, kept in zip(batches, before, strict=True))
        assert all(torch.equal(a[key], b[key]) for a, b in zip(batches, before, strict=True) for key in b)

    @pytest.mark.slow_cases("fisher", "covariance")
    @pytest.mark.parametrize("matrix", OPERATORS)
    def test_of_a_teacher_leave_its_buffers(self, matrix: str) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            teacher = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
        state = {name: value.clone() for name, value in teacher.state_dict().items()}
        frozen = copy.deepcopy(teacher)
        targets = TargetLoss(nn.MSELoss(), lambda batch: teacher(batch["x"]).detach())
        A = OPERATORS[matrix].from_functions(predict, targets, PARAMS, data()[:1])
        product = A @ np.ones(6)
        report = check(A, rng=0, progress=False)
        assert report.verdict.startswith(("sound", "nothing is wrong"))
        assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
        pure = [{**batch, "y": frozen(batch["x"]).detach()} for batch in data()[:1]]
        B = OPERATORS[matrix].from_functions(predict, TargetLoss(nn.MSELoss(), lambda b: b["y"]), PARAMS, pure)
        close(product, B @ np.ones(6))

    @pytest.mark.parametrize("matrix", OPERATORS)
    def test_are_computed_once_per_prediction(self, matrix: str) -> None:
        calls: list[str] = []

        def targets(batch: Any) -> Tensor:
            calls.append("targets")
            return batch["y"]

        def counted(params: dict[str, Tensor], batch: Any) -> Tensor:
            calls.append("prediction")
            return predict(params, batch)

        A = OPERATORS[matrix].from_functions(counted, TargetLoss(nn.MSELoss(), targets), PARAMS, data())
        A @ np.ones(6)
        assert calls.count("targets") == calls.count("prediction")

    def test_errors_name_them(self) -> None:
        for targets, error, match in (
            (lambda batch: batch["label"], KeyError, "label"),
            (lambda batch: None, TypeError, "targets returned a NoneType, but .* needs a tensor"),
            (lambda batch: batch["y"].numpy(), TypeError, "targets returned a ndarray, but .* needs a tensor"),
        ):
            G = GGNLinearOperator.from_functions(predict, TargetLoss(nn.MSELoss(), targets), PARAMS, data())
            with pytest.raises(error, match=match) as raised:
                G @ np.ones(6)
            if error is KeyError:
                [note] = [note for note in raised.value.__notes__ if "targets(batch)" in note]
                assert "keys 'x', 'y'" in note

    def test_the_size_of_the_batch_may_be_theirs(self) -> None:
        batches = [{**batch, "graph": torch.ones(9, 9)} for batch in data()]
        squares = TargetLoss(lambda z, y: (z - y).square().sum() / len(y), lambda batch: batch["y"])
        H = HessianLinearOperator.from_functions(predict, squares, PARAMS, batches)
        close(H @ np.eye(6), 2 * dense("hessian", lambda batch: batch["y"], F.mse_loss))


def test_a_subclass_with_another_loss_is_called() -> None:
    class Half(TargetLoss):
        def __call__(self, prediction: Any, batch: Any) -> Tensor:
            return super().__call__(prediction, batch) / 2

    G = GGNLinearOperator.from_functions(predict, Half(nn.MSELoss(), lambda batch: batch["y"]), PARAMS, data())
    close(G @ np.eye(6), dense("ggn", lambda batch: batch["y"], F.mse_loss) / 2)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer, self.norm = nn.Linear(3, 2).double(), nn.BatchNorm1d(2).double()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.layer(x))


def scores(model: nn.Module, params: dict[str, Tensor], batch: Any) -> Tensor:
    return functional_call(model, params, (batch["x"],))


MODELS: dict[str, nn.Module] = {}


def by_global_dict(params: dict[str, Tensor], batch: Any) -> Tensor:
    return scores(MODELS["one"], params, batch)


class Trainer:
    def __init__(self, model: nn.Module) -> None:
        self.state = SimpleNamespace(model=model)

    def predict(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        return scores(self.state.model, params, batch)


class Slots:
    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, params: dict[str, Tensor], batch: Any) -> Tensor:
        return scores(self.model, params, batch)


def of_another_file(model: nn.Module) -> Any:
    helpers = types.ModuleType("helpers")
    code = "MODEL = None\ndef predict(params, batch): return scores(MODEL, params, batch)"
    exec(code, helpers.__dict__ | {"scores": scores})
    names: dict[str, Any] = {"scores": scores, "MODEL": model}
    exec(code.partition("\n")[2], names)
    assert names["predict"].__module__ is None
    return lambda params, batch: names["predict"](params, batch)


def in_global_dict(model: nn.Module) -> Any:
    MODELS["one"] = model
    return by_global_dict


HIDDEN = {
    "attribute of an object": lambda model: (
        lambda trainer: lambda params, batch: scores(trainer.model, params, batch)
    )(SimpleNamespace(model=model)),
    "attribute of an attribute": lambda model: Trainer(model).predict,
    "global dict": in_global_dict,
    "slots": Slots,
    "another file": of_another_file,
}

bn = Normalized()  # a global variable with the name of an attribute of `Inner`


class TestModulesThatAreNotFoundInTheFunctions:
    @pytest.mark.parametrize("way", HIDDEN)
    @pytest.mark.parametrize("kind", ["hessian", "ef", "jacobian"])
    def test_are_left_as_found(self, kind: str, way: str) -> None:
        model = Normalized()
        frozen = copy.deepcopy(model)
        params, batches = dict(model.named_parameters()), data()[:1]
        how = HIDDEN[way](model)
        if kind == "jacobian":
            A = JacobianLinearOperator.from_functions(how, params, batches)
        else:
            A = OPERATORS[kind].from_functions(how, TargetLoss(nn.MSELoss(), lambda b: b["y"]), params, batches)
        product = A @ np.ones(A.shape[1])
        pairs = [(batch["x"], batch["y"]) for batch in batches]
        own = dict(frozen.named_parameters())
        B = JacobianLinearOperator(frozen, own, pairs) if kind == "jacobian" else None
        B = B or OPERATORS[kind](frozen, nn.MSELoss(), own, pairs)
        close(product, B @ np.ones(A.shape[1]))
        fresh = Normalized().state_dict()
        assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())
        assert all(buffer.grad_fn is None for buffer in model.buffers())
        assert model.calls == 0

    def test_changes_of_their_parameters_are_seen(self) -> None:
        model, holder = Normalized().eval(), SimpleNamespace()
        holder.temperature = nn.Linear(2, 2, bias=False).double()
        holder.model = model
        G = GGNLinearOperator.from_functions(
            lambda params, batch: holder.temperature(scores(holder.model, params, batch)),
            TargetLoss(nn.MSELoss(), lambda batch: batch["y"]),
            dict(model.named_parameters()),
            data(),
        )
        before = G @ np.ones(12)
        with torch.no_grad():
            holder.temperature.weight.mul_(3)
        close(G @ np.ones(12), 9 * before)

    def test_modules_made_in_each_call(self) -> None:
        def made(params: dict[str, Tensor], batch: Any) -> Tensor:
            z = nn.Tanh()(batch["x"] @ params["w"].T)
            return nn.Identity()(nn.Identity()(z))

        G = GGNLinearOperator.from_functions(made, TargetLoss(nn.MSELoss(), lambda b: b["y"]), PARAMS, data())
        close(G @ np.eye(6), dense("ggn", lambda batch: batch["y"], F.mse_loss))
        assert G._objective.modules[1:] == ()  # the loss only

    def test_unused_modules_are_not_blamed(self) -> None:
        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.bn = nn.Linear(3, 2).double()

        model = Inner()
        G = GGNLinearOperator.from_functions(
            lambda params, batch: functional_call(model.bn, params, (batch["x"],)),
            TargetLoss(nn.MSELoss(), lambda batch: batch["y"]),
            dict(model.bn.named_parameters()),
            data(),
        )
        G @ np.ones(8)  # no warning about the batch normalization of the global variable `bn`


@pytest.mark.parametrize("engine", ["autograd", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["loss", "targets"])
def test_modules_of_the_loss_may_change(engine: str, where: str) -> None:
    """With the compiled engine, a warning would say if no program could be used."""
    scale = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(scale.weight, 0.5)
    by_loss = where == "loss"
    loss = (
        (lambda z, batch: ((z * scale.weight - batch["y"]) ** 2).mean())
        if by_loss
        else TargetLoss(nn.MSELoss(), lambda batch: (batch["y"] * scale.weight).detach())
    )
    A = HessianLinearOperator.from_functions(predict, loss, PARAMS, data(), engine=engine)
    for value in (0.5, 2.0):
        nn.init.constant_(scale.weight, value)
        pure = dense("hessian", lambda batch, value=value: batch["y"] * (1 / value if by_loss else value), F.mse_loss)
        close(A @ np.eye(6), pure * (value**2 if by_loss else 1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (9, 9), (2, 3)])
@pytest.mark.parametrize("matrix", ["ggn", "ef", "fisher"])
def test_the_diagonal_with_other_tensors_in_the_batch(matrix: str, shape: tuple[int, ...]) -> None:
    """Tensors that do not have one row per example belong to every example."""
    batches = [{**batch, "factor": torch.full(shape, 2.0, dtype=torch.float64)} for batch in data()]
    A = OPERATORS[matrix].from_functions(
        lambda params, batch: batch["factor"].mean() * predict(params, batch),
        TargetLoss(nn.MSELoss(), lambda batch: 2 * batch["y"]),
        PARAMS,
        batches,
    )
    exact = dense(matrix, lambda batch: batch["y"], F.mse_loss) * (16 if matrix == "ef" else 4)
    close(A.diagonal(), np.diag(exact))


def test_a_target_loss_is_no_loss_of_pairs() -> None:
    model, loss = nn.Linear(3, 2).double(), TargetLoss(nn.MSELoss(), lambda batch: batch["y"])
    with pytest.raises(TypeError, match=r"loss_function is a TargetLoss.*from_functions.*pass its loss_function"):
        GGNLinearOperator(model, loss, dict(model.named_parameters()), [(b["x"], b["y"]) for b in data()])
