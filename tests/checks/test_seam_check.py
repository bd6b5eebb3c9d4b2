"""`check` calls the user's code as the user does: it finds what an operator misses, and restores everything.

The faults are planted in the operator only: its engine multiplies by a matrix that is known to differ from that of the
user's code. The tests therefore do not depend on what the operator itself gets right or refuses.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import loss_problem, mlp, nightly
from fuses import Fuse, interrupted_at, made, state
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvop import (
    CheckReport,
    EFLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    check,
)
from curvop.kernels import batches as joining
from curvop.kernels import user_code
from curvop.kernels.model_objective import ModelObjective

KINDS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
    "jacobian": JacobianLinearOperator,
}
OWN = ("finite differences", "gradient")


def operator(kind: str, model: Any, loss_function: Any, params: Any, data: Any, **options: Any) -> Any:
    arguments = (model, params, data) if kind == "jacobian" else (model, loss_function, params, data)
    return KINDS[kind](*arguments, **options)


def multiplying(A: Any, dense: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make an operator multiply by another matrix."""
    matrix = torch.from_numpy(dense)

    def apply_by(matrix: Tensor) -> Callable[[Tensor, Tensor, Any], None]:
        return lambda vectors, products, tick: products.copy_(vectors.double() @ matrix.T)

    monkeypatch.setattr(A._adjoint_engine, "apply", apply_by(matrix.T))
    monkeypatch.setattr(A._engine, "apply", apply_by(matrix))
    return A


def statuses(report: CheckReport) -> dict[str, str]:
    return {finding.name: finding.status for finding in report.findings}


def wrong(report: CheckReport) -> list[str]:
    return [finding.name for finding in report.findings if finding.status == "wrong"]


def dense_hessian(loss: Callable[[], Tensor], own: list[Tensor]) -> np.ndarray:
    """Return the Hessian by double backward, without the package."""
    gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss(), own, create_graph=True)])
    rows = [torch.autograd.grad(entry, own, retain_graph=True, allow_unused=True) for entry in gradient]
    parts = [[torch.zeros_like(v) if g is None else g for g, v in zip(row, own, strict=True)] for row in rows]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in parts]).numpy()


def classification(count: int = 20) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return mlp().double(), torch.randn(count, 4).double(), torch.randint(0, 3, (count,))


class TestWhatAnOperatorMisses:
    @pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
    def test_a_penalty_that_the_loss_takes_from_the_model(self, activation: Any, monkeypatch) -> None:
        model, X, y = classification()
        model[1] = activation()

        def loss_function(z, y):
            return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in model.parameters())

        params, own = dict(model.named_parameters()), list(model.parameters())
        data = [(X[:12], y[:12]), (X[12:], y[12:])]
        exact = dense_hessian(lambda: loss_function(model(X), y), own)
        H = multiplying(HessianLinearOperator(model, loss_function, params, data), exact, monkeypatch)
        assert statuses(check(H, rng=0))["finite differences"] == "ok"
        missed = exact - 0.2 * np.eye(len(exact))
        gradient = torch.cat([part.reshape(-1) for part in torch.autograd.grad(F.cross_entropy(model(X), y), own)])
        monkeypatch.setattr(H, "_gradient", lambda: (gradient, 0.0))  # the gradient misses the penalty, too
        report = check(multiplying(H, missed, monkeypatch), rng=0)
        assert {"finite differences", "gradient"} <= set(wrong(report)), report
        assert "parameters that the loss does not get" in report["finite differences"].remedy

    def test_a_term_of_the_loss_that_the_model_leaves_in_an_attribute(self) -> None:
        net, X, y = classification()

        class Leaving(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.hidden = net, None

            def forward(self, X: Tensor) -> Tensor:
                self.hidden = net[1](net[0](X))
                return net[2](self.hidden)

        model = Leaving()
        loss_function = lambda z, y: F.cross_entropy(z, y) + model.hidden.square().mean()  # noqa: E731
        data = [(X[:12], y[:12]), (X[12:], y[12:])]
        report = check(HessianLinearOperator(model, loss_function, dict(model.named_parameters()), data), rng=0)
        assert report.verdict.startswith("sound"), report  # though the term is that of the last batch

    @pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
    def test_a_penalty_whose_gradient_is_zero_here(self, activation: Any, monkeypatch) -> None:
        model, X, y = classification()
        model[1] = activation()
        anchors = [value.detach().clone() for value in model.parameters()]

        def loss_function(z, y):
            pairs = zip(model.parameters(), anchors, strict=True)
            return F.cross_entropy(z, y) + 0.1 * sum((p - anchor).square().sum() for p, anchor in pairs)

        params, own = dict(model.named_parameters()), list(model.parameters())
        H = HessianLinearOperator(model, loss_function, params, [(X, y)])
        exact = dense_hessian(lambda: loss_function(model(X), y), own)
        report = check(multiplying(H, exact, monkeypatch), rng=0)
        assert {statuses(report)[name] for name in ("double backward", *OWN)} == {"ok"}, report
        report = check(multiplying(H, exact - 0.2 * np.eye(len(exact)), monkeypatch), rng=0)
        assert {"double backward", "finite differences"} <= set(wrong(report)), report
        assert "parameters that the loss does not get" in report["double backward"].remedy

    def test_a_gradient_that_misses_a_penalty(self, monkeypatch) -> None:
        model, X, y = classification()

        def loss_function(z, y):
            return F.cross_entropy(z, y) + 0.1 * sum(p.square().sum() for p in model.parameters())

        H = HessianLinearOperator(model, loss_function, dict(model.named_parameters()), [(X, y)])
        plain = torch.autograd.grad(F.cross_entropy(model(X), y), list(model.parameters()))
        missed = torch.cat([part.reshape(-1) for part in plain])
        monkeypatch.setattr(H, "_gradient", lambda: (missed, 0.0))
        assert "gradient" in wrong(check(H, rng=0))

    def test_weights_of_lists_of_images(self, monkeypatch) -> None:
        class Detector(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(3, 2)

            def forward(self, images):
                return torch.stack([self.head(image.mean((1, 2))).tanh() for image in images])

        torch.manual_seed(0)
        model = Detector().double()
        images = [torch.randn(3, size, size + 1).double() for size in (4, 6, 5)]
        y = torch.randn(3, 2).double()

        def loss_function(z, y):
            return ((z - y) ** 2).sum(1).mean()

        own, cut = list(model.parameters()), [(images[:2], y[:2]), (images[2:], y[2:])]
        H = HessianLinearOperator(model, loss_function, dict(model.named_parameters()), cut)
        exact = dense_hessian(lambda: loss_function(model(images), y), own)
        halves = [dense_hessian(lambda a=a, b=b: loss_function(model(a), b), own) for a, b in cut]
        # A list of images with three channels counts as three examples.
        monkeypatch.setattr(ModelObjective, "_weight", lambda *args: 3.0)
        assert statuses(check(multiplying(H, exact, monkeypatch), rng=0))["finite differences"] == "ok"
        report = check(multiplying(H, sum(halves) / 2, monkeypatch), rng=0)
        assert {"double backward", *OWN} <= set(wrong(report)), report
        assert "all data as one batch" in report["finite differences"].text

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_labels_of_an_objective_that_do_not_count(self, reduction: str, monkeypatch) -> None:
        model, X, y = classification()
        y[:9] = -100

        def loss(X, y):
            return F.cross_entropy(model(X), y, reduction=reduction)

        def objective(params, batch):
            z = torch.func.functional_call(model, params, (batch["x"],))
            return F.cross_entropy(z, batch["labels"], reduction=reduction)

        objective.reduction = reduction
        params, own = dict(model.named_parameters()), list(model.parameters())
        data = [{"x": a, "labels": b} for a, b in zip(X.split(10), y.split(10), strict=True)]
        H = HessianLinearOperator.from_objective(objective, params, data, batch_weight=None)
        exact = dense_hessian(lambda: loss(X, y), own)
        halves = [
            dense_hessian(lambda a=a, b=b: loss(a, b), own) for a, b in zip(X.split(10), y.split(10), strict=True)
        ]
        assert statuses(check(multiplying(H, exact, monkeypatch), rng=0))["finite differences"] == "ok"
        if reduction == "sum":
            np.testing.assert_allclose(sum(halves), exact, atol=1e-12)
            return
        report = check(multiplying(H, sum(halves) / 2, monkeypatch), rng=0)
        assert "finite differences" in wrong(report), report
        weighted = HessianLinearOperator.from_objective(
            objective, params, data, batch_weight=lambda batch: float((batch["labels"] >= 0).sum())
        )
        assert check(weighted, rng=0).ok

    @pytest.mark.parametrize("kind", ["hessian", "ggn", "ef"])
    def test_buffers_that_the_model_writes_to(self, kind: str, monkeypatch) -> None:
        class Cached(nn.Module):
            def __init__(self, static: bool) -> None:
                super().__init__()
                self.static, self.qkv, self.head = static, nn.Linear(4, 12), nn.Linear(4, 3)
                for name in "kv":
                    self.register_buffer(f"{name}_cache", torch.zeros(6, 8, 4), persistent=False)

            def forward(self, X):
                q, k, v = self.qkv(X).chunk(3, -1)
                if self.static:
                    self.k_cache[: len(X), : X.shape[1]] = k
                    self.v_cache[: len(X), : X.shape[1]] = v
                    k, v = self.k_cache[: len(X), : X.shape[1]], self.v_cache[: len(X), : X.shape[1]]
                return self.head(((q @ k.mT / 2).softmax(-1) @ v).mean(1))

        torch.manual_seed(0)
        model, plain, cut = Cached(True).double(), Cached(False).double(), Cached(False).double()
        for other in (plain, cut):
            other.load_state_dict(model.state_dict())
        X, y = torch.randn(6, 5, 4).double(), torch.randint(0, 3, (6,))
        data = [(X[:4], y[:4]), (X[4:], y[4:])]
        A, B = (
            operator(kind, one, nn.CrossEntropyLoss(), dict(one.named_parameters()), data) for one in (model, plain)
        )
        exact = B @ np.eye(B.shape[1])
        assert statuses(check(multiplying(A, exact, monkeypatch), rng=0))["finite differences"] == "ok"
        # Values that pass through the buffers are constants.
        constant = dict(cut.named_parameters())

        def detached(params, X):
            q, _, _ = F.linear(X, params["qkv.weight"], params["qkv.bias"]).chunk(3, -1)
            with torch.no_grad():
                _, k, v = F.linear(X, params["qkv.weight"], params["qkv.bias"]).chunk(3, -1)
            z = ((q @ k.mT / 2).softmax(-1) @ v).mean(1)
            return F.linear(z, params["head.weight"], params["head.bias"])

        C = operator(kind, detached, nn.CrossEntropyLoss(), constant, data)
        report = check(multiplying(A, C @ np.eye(C.shape[1]), monkeypatch), rng=0)
        assert "finite differences" in wrong(report), report
        for name in "kv":
            buffer = getattr(model, f"{name}_cache")
            assert not buffer.any()
            assert buffer.grad_fn is None
            assert not buffer.requires_grad
        copy.deepcopy(model)

    def test_third_derivatives_through_layer_normalization(self, monkeypatch) -> None:
        torch.manual_seed(0)
        X = torch.randn(8, 3).double()
        model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1)).double()
        nn.init.normal_(model[1].weight, 1.0, 0.3)

        def normalized(x, weight, bias):
            centered = x - x.mean(-1, keepdim=True)
            return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

        def penalty(call, x):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
            return ((slope.square().sum(1) + 1e-3).sqrt() - 1).square().mean()

        def elementary(x):
            return model[3](normalized(model[0](x), model[1].weight, model[1].bias).tanh())

        params = {name: value for name, value in model.named_parameters() if name != "3.bias"}
        own = list(params.values())
        fused, exact = (dense_hessian(lambda call=call: penalty(call, X), own) for call in (model, elementary))
        assert np.linalg.norm(fused - exact) > 0.05 * np.linalg.norm(exact), "torch is right here now"
        H = HessianLinearOperator.from_objective(
            lambda p, x: penalty(lambda x: torch.func.functional_call(model, p, (x,)), x), params, [X]
        )
        assert statuses(check(multiplying(H, exact, monkeypatch), rng=0))["finite differences"] == "ok"
        assert "finite differences" in wrong(check(multiplying(H, fused, monkeypatch), rng=0))

    def test_a_model_that_returns_its_loss(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 3)

            def forward(self, batch):
                logits = self.fc(batch["x"])
                return {"loss": F.cross_entropy(logits, batch["labels"]), "logits": logits}

        _, X, y = classification()
        model = Model().double()
        G = GGNLinearOperator(
            model, lambda out, y: out["loss"], dict(model.named_parameters()), [({"x": X, "labels": y}, y)]
        )
        report = check(G, rng=0)
        assert "zero matrix" in wrong(report)
        assert "use HessianLinearOperator, or return logits" in report["zero matrix"].remedy
        H = HessianLinearOperator(model, lambda out, y: out["loss"], dict(model.named_parameters()), G._objective.data)
        assert check(H, rng=0).ok

    @pytest.mark.parametrize("loss_function", [nn.L1Loss(), F.l1_loss, nn.L1Loss(reduction="sum")])
    def test_losses_of_torch_that_do_not_curve(self, loss_function: Any) -> None:
        model, X, _ = classification()
        G = GGNLinearOperator(model, loss_function, dict(model.named_parameters()), [(X, torch.randn(20, 3).double())])
        report = check(G, rng=0)
        assert report.ok
        assert statuses(report)["zero matrix"] == "warning"

    def test_a_block_that_the_prediction_does_not_reach_is_no_linear_loss(self) -> None:
        model, X, y = classification()
        model.idle = nn.Linear(2, 2).double()
        model.forward = lambda X: model[2](model[1](model[0](X)))
        G = GGNLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
        assert "zero matrix" not in statuses(check(G.block("idle.weight"), rng=0))

    def test_data_that_change_from_pass_to_pass(self) -> None:
        model, X, y = classification(12)
        loader = DataLoader(TensorDataset(X, y), batch_size=5, shuffle=True, drop_last=True)
        for kind in ("hessian", "ggn"):
            report = check(operator(kind, model, nn.CrossEntropyLoss(), dict(model.named_parameters()), loader), rng=0)
            assert "randomness" in wrong(report), report

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_matrix_is_compared(self, kind: str, monkeypatch) -> None:
        problem = loss_problem("ce")
        A = operator(kind, problem.model, problem.loss_function, problem.params, problem.data)
        exact = A @ np.eye(A.shape[1])
        spoilt = exact.copy()
        rows = A.params_slices["0.weight"] if kind != "jacobian" else slice(3)
        spoilt[rows] *= 1.001
        report = check(multiplying(A, spoilt, monkeypatch), rng=0)
        assert "finite differences" in wrong(report), report
        if kind == "jacobian":
            T = operator(kind, problem.model, problem.loss_function, problem.params, problem.data).T
            assert statuses(check(T, rng=0))["reverse mode"] == "ok"
            assert "reverse mode" in wrong(check(multiplying(T, spoilt.T, monkeypatch), rng=0))


class TestHowTheCodeIsCalled:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("frozen", [False, True])
    def test_copies_of_the_parameters(self, kind: str, frozen: bool) -> None:
        problem = loss_problem("ce")
        copies = {name: (value + 0.3).detach().requires_grad_() for name, value in problem.params.items()}
        if frozen:
            problem.model.requires_grad_(False)
        before = [value.clone() for value in problem.model.parameters()]
        report = check(operator(kind, problem.model, problem.loss_function, copies, problem.data), rng=0)
        assert report.verdict.startswith("sound"), report
        assert {statuses(report)[name] for name in OWN} == {"ok"}
        assert all(map(torch.equal, before, problem.model.parameters()))
        assert all(value.requires_grad != frozen for value in problem.model.parameters())

    @pytest.mark.parametrize("kind", KINDS)
    def test_functions_and_tensors_that_were_computed(self, kind: str) -> None:
        problem = loss_problem("mse")
        computed = {name: 1.1 * value for name, value in problem.params.items()}

        def model(params, X):
            return torch.func.functional_call(problem.model, params, (X,))

        for params in (problem.params, computed):
            report = check(operator(kind, model, problem.loss_function, params, problem.data), rng=0)
            assert report.verdict.startswith("sound"), report
            assert {statuses(report)[name] for name in OWN} == {"ok"}

    @pytest.mark.parametrize("kind", KINDS)
    def test_tied_parameters_blocks_and_submatrices(self, kind: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        model[2].weight = model[0].weight
        data = [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,))) for _ in range(2)]
        A = operator(kind, model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        parts = [A, A.block("0.weight"), A[:, ::2]] + ([] if kind == "jacobian" else [A.block("0.weight", "4.bias")])
        for part in parts:
            report = check(part, rng=0)
            assert report.verdict.startswith("sound"), report
            assert {statuses(report)[name] for name in OWN} == {"ok"}

    @pytest.mark.parametrize("kind", KINDS)
    def test_models_in_single_precision_are_run_in_double(self, kind: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval()
        loss_function = nn.CrossEntropyLoss(weight=torch.rand(3))
        data = [(torch.randn(9, 4), torch.randint(0, 3, (9,))) for _ in range(2)]
        A = operator(kind, model, loss_function, dict(model.named_parameters()), data)
        report = check(A, rng=0)
        assert report.verdict.startswith("sound"), report
        assert report["finite differences"].value < 1e-5
        tensors = [*model.parameters(), *model.buffers(), *loss_function.buffers()]
        assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}

    def test_a_model_that_fixes_its_dtype_is_run_in_that(self) -> None:
        class Hard(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mlp = mlp()

            def forward(self, X):
                return self.mlp(X.float())

        torch.manual_seed(0)
        model = Hard()
        data = [(torch.randn(20, 4), torch.randint(0, 3, (20,))) for _ in range(2)]
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        report = check(H, rng=0)
        assert statuses(report)["forward mode"] == "not applicable"
        assert {statuses(report)[name] for name in OWN} == {"ok"}, report
        assert 1e-8 < report["finite differences"].value < report["finite differences"].limit < 1e-2

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_under_modes_without_gradients(self, mode: Any) -> None:
        problem = loss_problem("ce")
        H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        with mode():
            assert {statuses(check(H, rng=0))[name] for name in OWN} == {"ok"}

    def test_a_graph_of_the_users_own_is_left_whole(self) -> None:
        torch.manual_seed(0)
        model, X, y = mlp(), torch.randn(20, 4), torch.randint(0, 3, (20,))
        own = list(model.parameters())
        gradient = torch.autograd.grad(F.cross_entropy(model(X), y), own, create_graph=True)
        expected = torch.autograd.grad(gradient[0].sum(), own, retain_graph=True, allow_unused=True)
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, y)])
        assert {statuses(check(H, rng=0))[name] for name in OWN} == {"ok"}
        found = torch.autograd.grad(gradient[0].sum(), own, allow_unused=True)
        assert all(map(torch.equal, found, expected))

    def test_a_loss_that_holds_something_constant_is_warned_of(self) -> None:
        problem = loss_problem("mse")
        problem.loss_function = lambda z, y: (z.detach().exp() * (z - y) ** 2).mean()
        H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        report = check(H, rng=0)
        assert report.ok
        assert statuses(report)["forward mode"] == "ok"
        assert statuses(report)["finite differences"] == "warning"
        assert "detach()" in report["finite differences"].remedy

    def test_a_loss_that_holds_constant_what_does_not_move_it_at_first(self) -> None:
        problem = loss_problem("mse")
        problem.loss_function = lambda z, y: ((z - y) ** 2).mean() + ((z - z.detach()) ** 2).mean()
        report = check(HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data), rng=0)
        assert report.ok
        assert statuses(report)["forward mode"] == statuses(report)["double backward"] == "ok"
        assert statuses(report)["finite differences"] == "warning"

    @pytest.mark.parametrize("kind", ["hessian", "ggn", "jacobian"])
    def test_rounding_that_passes_gradients_straight_through_is_warned_of(self, kind: str) -> None:
        class Rounded(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(4, 3)

            def forward(self, X):
                z = self.linear(X)
                return z + (z.round() - z).detach()

        torch.manual_seed(0)
        model, data = Rounded().double(), [(torch.randn(6, 4).double(), torch.randint(0, 3, (6,))) for _ in range(2)]
        report = check(operator(kind, model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data), rng=0)
        assert report.ok, report
        assert statuses(report)["finite differences"] == "warning"

    def test_a_layer_whose_state_changes_with_each_call(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), Writing(5)).double()
        data = [(torch.randn(4, 4).double(), torch.randn(4, 3).double()) for _ in range(2)]
        report = check(JacobianLinearOperator(model.eval(), dict(model.named_parameters()), data), rng=0)
        assert report.verdict.startswith("sound"), report
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
        assert {statuses(check(H, rng=0))[name] for name in OWN} == {"ok"}

    @pytest.mark.default_cases("dtype0")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_many_kinks(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5)).to(
            dtype
        )
        data = [(torch.randn(2000, 20, dtype=dtype), torch.randint(0, 5, (2000,)))]
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        assert {statuses(check(H, rng=0))[name] for name in OWN} == {"ok"}

    def test_batches_that_cannot_be_put_together(self) -> None:
        class Sequences(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = nn.Linear(4, 3)

            def forward(self, X):
                return self.head(X).tanh()

        torch.manual_seed(0)
        model = Sequences().double()
        data = [(torch.randn(5, size, 4).double(), torch.randn(5, size, 3).double()) for size in (2, 3)]
        report = check(HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data), rng=0)
        assert report.verdict.startswith("sound"), report
        assert report["finite differences"].text == "of your own code"

    def test_memory_for_one_batch_only(self, monkeypatch) -> None:
        problem = loss_problem("ce", "singles")
        H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)
        assert "all data as one batch" in check(H, rng=0)["finite differences"].text
        monkeypatch.setattr("curvop.kernels.reference._needed", lambda objective: 100)
        monkeypatch.setattr("curvop.operators.engine_operator.available_bytes", lambda device: 300)
        report = check(H, rng=0)
        assert report.verdict.startswith("sound"), report
        assert report["finite differences"].text == "of your own code"

    @pytest.mark.nightly
    def test_the_compiled_engine(self) -> None:
        problem = loss_problem("ce", "one")
        H = HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, engine="compiled")
        assert {statuses(check(H, rng=0))[name] for name in OWN} == {"ok"}


class TestJoining:
    def test_trees(self) -> None:
        a, b = torch.arange(6.0).reshape(3, 2), torch.arange(4.0).reshape(2, 2)
        pairs = [({"x": a, "n": "name"}, [a, a]), ({"x": b, "n": "name"}, [b, b])]
        found = joining.joined(pairs)
        assert torch.equal(found[0]["x"], torch.cat([a, b]))
        assert found[0]["n"] == "name"
        assert [part.shape for part in found[1]] == [(5, 2), (5, 2)]
        images = [([torch.ones(1, 2)] * 3, a), ([torch.ones(1, 4)] * 2, b)]
        assert [part.shape for part in joining.joined(images)[0]] == [(1, 2)] * 3 + [(1, 4)] * 2

    @pytest.mark.parametrize(
        "trees",
        [
            (torch.ones(2, 3), torch.ones(2, 4)),
            (torch.ones(()), torch.ones(())),
            ({"a": torch.ones(2)}, {"b": torch.ones(2)}),
            ((torch.ones(2), "first"), (torch.ones(2), "second")),
            ((torch.ones(2),), (torch.ones(2), torch.ones(2))),
            ({"x": torch.ones(2), "count": 2}, {"x": torch.ones(2), "count": 2}),  # joined, the count would be 4
        ],
    )
    def test_what_cannot_be(self, trees: Any) -> None:
        with pytest.raises(joining.CannotJoinError):
            joining.joined(trees)


class Writing(nn.Module):
    """Count calls in one buffer, and keep the outputs in another."""

    def __init__(self, inputs: int = 4) -> None:
        super().__init__()
        self.mlp = mlp(inputs)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(4, 3))

    def forward(self, X):
        self.calls += 1
        z = self.mlp(X)
        self.seen[: len(z)] = z[:4]
        return z + 0 * self.seen.sum()


class TestEverythingIsRestored:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", KINDS)
    def test_tensors_flags_gradients_and_what_is_kept(self, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        seen: list[Tensor] = []
        model[0].weight.register_hook(seen.append)
        for value in model.parameters():
            value.grad = torch.ones_like(value)
        data = [(torch.randn(9, 4, dtype=dtype), torch.randint(0, 3, (9,)))]
        A = operator(kind, model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
        x = np.random.default_rng(0).standard_normal(A.shape[1])
        product, token = A @ x, A.state()
        kept = dict(A._engine._pass.kept) if getattr(A._engine, "_pass", None) is not None else None
        before = tokens(model)
        check(A, rng=0)
        assert tokens(model) == before
        assert not seen
        assert A.state() == token
        if kept is not None:
            assert all(A._engine._pass.kept[index] is one for index, one in kept.items())
        np.testing.assert_array_equal(A @ x, product)
        model(data[0][0]).sum().backward()
        assert len(seen) == 1

    def test_buffers_that_are_written_to(self) -> None:
        torch.manual_seed(0)
        model = Writing().double()
        data = [(torch.randn(4, 4).double(), torch.randn(4, 3).double()) for _ in range(2)]
        H = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
        before = [(id(buffer), buffer.clone()) for buffer in model.buffers()]
        check(H, rng=0)
        for (identity, value), buffer in zip(before, model.buffers(), strict=True):
            assert id(buffer) == identity
            assert torch.equal(buffer, value)
            assert buffer.grad_fn is None

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:'1' .BatchNorm1d. normalizes each of the 2 batches:RuntimeWarning")
    @pytest.mark.parametrize("single", [False, True])
    @pytest.mark.parametrize("kind", ["hessian", *nightly("ggn", "ef")])
    def test_wherever_a_line_is_interrupted(self, kind: str, single: bool) -> None:
        files = ("kernels/user_code.py", "kernels/differences.py")

        def fresh() -> tuple[nn.Module, list[Any], Any]:
            model, data, A = made(kind, Fuse(), {})
            if single:
                model.float()
                data[:] = [(X.float(), y.float()) for X, y in data]
            return model, data, A

        model, _, A = fresh()
        vector = np.ones(A.shape[1])
        exact = A @ vector
        with interrupted_at(-1, files) as lines:
            assert check(A, rng=0).ok
        assert lines[0] > 500
        model, data, A = fresh()
        A @ vector
        before, token, places = state(model, data), A.state(), tokens(model)
        moments = range(1, lines[0] + 1, max(1, lines[0] // 80))
        for count, moment in enumerate(moments):  # noqa: B007
            with interrupted_at(moment, files), contextlib.suppress(KeyboardInterrupt):
                check(A, rng=0)
                break  # fewer lines run once the check knows that the model writes to buffers
            assert state(model, data) == before
            assert tokens(model) == places
            assert A.state() == token
        assert count > 30
        np.testing.assert_allclose(A @ vector, exact, rtol=1e-12, atol=1e-14)

    def test_wherever_putting_back_is_interrupted(self) -> None:
        torch.manual_seed(0)
        model, X, y = mlp(), torch.randn(9, 4), torch.randint(0, 3, (9,))
        model.requires_grad_(False)
        objective = ModelObjective(
            model, nn.CrossEntropyLoss(), {n: v.clone().requires_grad_() for n, v in model.named_parameters()}, [(X, y)]
        )
        before, moment = tokens(model), 0
        while True:
            moment += 1
            code = user_code.UserCode(objective, dict.fromkeys(objective.params), torch.float64)
            try:
                with interrupted_at(moment, ("kernels/user_code.py",)) as lines, code.lent():
                    pass
            except KeyboardInterrupt:
                assert tokens(model) == before, f"line {moment}"
            else:
                assert lines[0] < moment
                break
        assert moment > 60


def tokens(model: nn.Module) -> list[Any]:
    """Return identity, address, version and values of the tensors of a model."""
    return [
        (id(x), x.data_ptr(), x._version, x.dtype, x.requires_grad, x.grad_fn, id(x.grad), x.tolist())
        for x in (*model.parameters(), *model.buffers())
    ]
