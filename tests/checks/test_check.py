"""The check of an operator: correct operators pass, and the report names every planted fault."""

from __future__ import annotations

import itertools
import json
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, architecture_problem
from cases import LOSSES, Problem, cut, loss_problem, mlp, seeded
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvop import (
    CheckReport,
    EFLinearOperator,
    EKFACLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    JournaledLinearOperator,
    KFACLinearOperator,
    check,
)

OPERATORS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
}
RNG = np.random.default_rng(0)
S = RNG.standard_normal((30, 30))
SYMMETRIC = S + S.T


def operator(problem: Problem, kind: str = "hessian", **options: Any) -> Any:
    if kind == "jacobian":
        return JacobianLinearOperator(problem.model, problem.params, problem.data, **options)
    return OPERATORS[kind](problem.model, problem.loss_function, problem.params, problem.data, **options)


def with_status(report: CheckReport, status: str) -> list[str]:
    return [finding.name for finding in report.findings if finding.status == status]


def compared(report: CheckReport) -> list[str]:
    """Return the names of the routes that confirm the product."""
    return [name for name in with_status(report, "ok") if name in ("forward mode", "finite differences")]


def single(problem: Problem) -> Problem:
    model = problem.model.float()
    data = [(X.float(), y.float() if y.is_floating_point() else y) for X, y in problem.data]
    if isinstance(problem.loss_function, nn.Module):
        problem.loss_function.float()
    return Problem(model, problem.loss_function, data)


class TestSound:
    @pytest.mark.default_cases("*-hessian")
    @pytest.mark.parametrize("kind", [*OPERATORS, "jacobian"])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_layers(self, name: str, kind: str) -> None:
        report = check(operator(architecture_problem(name), kind), rng=0)
        assert report.ok, report
        assert with_status(report, "warning") == (["parameters reached"] if name == "unreached" else [])
        assert compared(report) == ["forward mode", "finite differences"]

    @pytest.mark.default_cases("*-ggn")
    @pytest.mark.parametrize("kind", OPERATORS)
    @pytest.mark.parametrize("name", LOSSES)
    def test_losses(self, name: str, kind: str) -> None:
        report = check(operator(loss_problem(name), kind), rng=0)
        assert report.ok, report
        assert with_status(report, "warning") == (["zero matrix"] if (name, kind) == ("l1", "ggn") else [])
        assert compared(report) == ["forward mode", "finite differences"]

    @pytest.mark.parametrize("kind", [*OPERATORS, "jacobian"])
    @pytest.mark.parametrize("name", ["conv", "attention-fused", "lstm", "layer-norm"])
    def test_single_precision_is_held_to_its_own_epsilon(self, name: str, kind: str) -> None:
        report = check(operator(single(architecture_problem(name)), kind), rng=0)
        assert report.verdict.startswith("sound"), report
        assert report["forward mode"].limit == pytest.approx(torch.finfo(torch.float32).eps ** (2 / 3))
        assert report["noise floor"].value > 1e-9

    def test_autocasts_epsilon(self) -> None:
        problem = single(loss_problem("ce"))
        with torch.autocast("cpu", torch.bfloat16):
            report = check(operator(problem), rng=0)
        assert with_status(report, "warning") == ["precision"], report
        assert "outside of torch.autocast" in report["precision"].remedy
        assert 1e-4 < report["forward mode"].value < report["forward mode"].limit < 0.05

    @pytest.mark.parametrize("kind", [*OPERATORS, "jacobian"])
    def test_parts_that_are_computed_in_single_precision(self, kind: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), SingleNorm(), nn.Tanh(), nn.Linear(6, 3)).double()
        problem = Problem(model, nn.CrossEntropyLoss(), [(torch.randn(20, 4).double(), torch.randint(0, 3, (20,)))])
        report = check(operator(problem, kind), rng=0)
        assert report.verdict.startswith("sound"), report
        assert "the parameters are float64, and parts of the loss are computed in float32" in report["precision"].text
        assert report["forward mode"].limit == pytest.approx(torch.finfo(torch.float32).eps ** (2 / 3))

    def test_data_in_single_precision_lowers_no_limit(self) -> None:
        problem = loss_problem("mse")
        model = problem.model

        def cast(params, X):
            return torch.func.functional_call(model, params, ((2 * X.float()).double(),))

        report = check(HessianLinearOperator(cast, nn.MSELoss(), problem.params, problem.data), rng=0)
        assert report["precision"].text == "the parameters are float64; epsilon 2.2e-16"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", OPERATORS)
    def test_kinks_are_no_fault(self, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 5))
        data = [(torch.randn(500, 20, dtype=dtype), torch.randint(0, 5, (500,)))]
        report = check(operator(Problem(model.to(dtype), nn.CrossEntropyLoss(), data), kind), rng=0)
        assert report.verdict.startswith("sound"), report
        assert report["forward mode"].status == "ok"
        assert report["finite differences"].status == "ok" or "kinks" in report["finite differences"].text

    @pytest.mark.parametrize("scale", [1.0, 1e-170])
    def test_at_a_kink_finite_differences_say_nothing(self, scale: float) -> None:
        params = {"w": torch.zeros(3, dtype=torch.float64, requires_grad=True)}

        def objective(p, batch):
            return scale * (p["w"].relu() + p["w"] ** 2).sum()

        H = HessianLinearOperator.from_objective(objective, params, [None])
        report = check(H, rng=0)
        assert report.verdict.startswith("sound"), report
        assert report["finite differences"].status == "not applicable"
        assert "the steps differ by 7.5e-01" in report["finite differences"].text

    @pytest.mark.slow_cases("options2")
    @pytest.mark.parametrize("options", [dict(cache=0), dict(dtype=np.float32), dict(engine="compiled")])
    def test_settings(self, options: dict[str, Any]) -> None:
        assert check(operator(loss_problem("ce", "one"), **options), rng=0).verdict.startswith("sound")

    def test_batch_normalization_in_training_mode_over_one_batch(self) -> None:
        report = check(operator(normalized((9,))), rng=0)
        assert report.verdict.startswith("sound"), report
        assert "the only one" in report["batch normalisation"].text

    def test_wrapped(self, tmp_path) -> None:
        H = operator(loss_problem("ce"))
        wrapped = [H.damped(0.1), H.submatrix(range(9)), H[::2, :][:, 1::3], H + 2 * H, H.block("0.bias", "2.weight")]
        for A in wrapped:
            report = check(A, rng=0)
            assert report.verdict.startswith("sound"), report
            assert compared(report) == ["forward mode", "finite differences"]

    def test_journals_answer_nothing(self, tmp_path) -> None:
        H = operator(loss_problem("ce"))
        with JournaledLinearOperator(H, tmp_path / "journal") as J:
            x = np.ones(J.shape[1])
            J @ x
            for A in (J, 3 * J):
                for _ in range(2):
                    before = J.num_products
                    report = check(A, rng=0)
                    assert report.verdict.startswith("sound"), report
                    assert J.num_products - before >= 7
            assert (J.num_recorded, J.num_answered) == (1, 0)
            J @ x
            assert J.num_answered == 1
            with pytest.raises(LookupError, match="not in the journal"):
                check(J.recall(), rng=0)

    def test_jacobians(self) -> None:
        J = operator(loss_problem("ce"), "jacobian")
        report = check(J.T, rng=0)
        assert report["adjoint"].status == report["reverse mode"].status == "ok"
        assert check(J.T @ J, rng=0).ok

    def test_functions(self) -> None:
        problem = loss_problem("mse")

        def objective(params, batch):
            return ((torch.func.functional_call(problem.model, params, (batch[0],)) - batch[1]) ** 2).mean()

        report = check(HessianLinearOperator.from_objective(objective, problem.params, problem.data), rng=0)
        assert report.verdict.startswith("sound"), report
        assert report["dropout"].status == "not applicable"

    @pytest.mark.parametrize("padding_idx", [0, -1])
    def test_rows_of_padding_are_constants(self, padding_idx: int) -> None:
        torch.manual_seed(0)
        problem = Problem(Padded(padding_idx).double(), nn.CrossEntropyLoss(), padded())
        for kind in (*OPERATORS, "jacobian"):
            report = check(operator(problem, kind), rng=0)
            assert report.verdict.startswith("sound"), report
            assert compared(report) == ["forward mode", "finite differences"]

        def model(params, X):
            return torch.func.functional_call(problem.model, params, (X,))

        def objective(params, batch):
            return nn.functional.cross_entropy(model(params, batch[0]), batch[1])

        of_function = HessianLinearOperator(model, nn.CrossEntropyLoss(), problem.params, problem.data)
        for H in (of_function, HessianLinearOperator.from_objective(objective, problem.params, problem.data)):
            report = check(H, rng=0)
            assert report.verdict.startswith("sound"), report
            assert compared(report) == ["forward mode", "finite differences"]

    def test_a_row_of_padding_that_another_module_uses(self) -> None:
        torch.manual_seed(0)
        model = Padded(0)
        model.out = nn.Linear(6, 10, bias=False)
        model.out.weight = model.embed.weight
        report = check(operator(Problem(model.double(), nn.CrossEntropyLoss(), padded())), rng=0)
        assert report.verdict.startswith("sound"), report
        assert compared(report) == ["forward mode", "finite differences"]

    def test_sampled_fisher_matrices_have_no_other_route(self) -> None:
        problem = loss_problem("ce")
        A = FisherLinearOperator(problem.model, problem.loss_function, problem.params, problem.data, mc_samples=2)
        report = check(A, rng=0)
        assert with_status(report, "warning") == ["independent route"]
        assert "drawn by the operator" in report["forward mode"].text


@seeded
def normalized(sizes: tuple[int, ...]) -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).train()
    return Problem(model, nn.MSELoss(), cut(torch.randn(9, 4), torch.randn(9, 3), sizes))


class SingleNorm(nn.Module):
    """Divide by the root mean square, in float32, as language models do."""

    def forward(self, X):
        single = X.float()
        return (single * torch.rsqrt(single.square().mean(-1, keepdim=True) + 1e-6)).to(X.dtype)


class Padded(nn.Module):
    def __init__(self, padding_idx: int) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 6, padding_idx=padding_idx), nn.Linear(6, 3)
        nn.init.normal_(self.embed.weight)

    def forward(self, X):
        return self.out(torch.tanh(self.embed(X)).mean(1))


def padded() -> list[tuple[torch.Tensor, torch.Tensor]]:
    places = torch.randint(0, 10, (20, 5))
    places[:10, 3:], places[10:, 3:] = 0, 9
    return [(places[::2], torch.randint(0, 3, (10,))), (places[1::2], torch.randint(0, 3, (10,)))]


class Direction(torch.autograd.Function):
    """x / |x|, with a backward that treats the norm as a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm()

    @staticmethod
    def backward(ctx, along):
        (x,) = ctx.saved_tensors
        norm = x.detach().norm()
        return along / norm - x * (x * along).sum() / norm**3


class Straight(torch.autograd.Function):
    """A square without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, along):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * along


class Augmented:
    def __iter__(self):
        for X, y in loss_problem("mse").data:
            yield X + 0.1 * torch.randn_like(X), y


class Noise(nn.Module):
    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, X):
        return X + self.sigma * torch.randn_like(X)


class TestFaults:
    def test_dropout(self) -> None:
        problem = loss_problem("mse")
        model = nn.Sequential(*problem.model, nn.Dropout(0.5)).train()
        report = check(operator(Problem(model, nn.MSELoss(), problem.data)), rng=0)
        assert not report.ok
        assert with_status(report, "wrong") == ["randomness", "dropout", "products"]
        assert "'3' (Dropout, p = 0.5)" in report["dropout"].text
        assert report["dropout"].remedy == "call model.eval()"

    def test_dropout_without_a_cache(self) -> None:
        problem = loss_problem("mse")
        model = nn.Sequential(*problem.model, nn.Dropout(0.5)).train()
        report = check(operator(Problem(model, nn.MSELoss(), problem.data), cache=0), rng=0)
        assert report["randomness"].status == report["products"].status == "wrong"

    def test_batches_normalized_one_by_one(self) -> None:
        report = check(operator(normalized((6, 3))), rng=0)
        assert report.ok
        assert with_status(report, "warning") == ["batch normalisation"]
        assert "'1' (BatchNorm1d)" in str(report)

    def test_shuffling(self) -> None:
        problem = loss_problem("mse")
        X, y = (torch.cat(parts) for parts in zip(*problem.data, strict=True))
        problem.data = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True)
        report = check(operator(problem), rng=0)
        assert with_status(report, "warning") == ["order of the data"]
        problem.data = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True, drop_last=True)
        assert check(operator(problem), rng=0)["randomness"].status == "wrong"
        problem.data = DataLoader(TensorDataset(X, y), batch_size=2, shuffle=True)
        assert with_status(check(operator(problem, "jacobian"), rng=0), "wrong") == ["order of the data"]

    def test_augmentation(self) -> None:
        problem = loss_problem("mse")
        problem.data = Augmented()
        report = check(operator(problem), rng=0)
        assert report["randomness"].status == "wrong"
        assert report["other routes"].status == "not applicable"

    @pytest.mark.parametrize(("sigma", "status"), [(1e-2, "wrong"), (1e-3, "warning")])
    def test_noise_in_a_layer(self, sigma: float, status: str) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.Tanh(), Noise(sigma), nn.Linear(16, 3)
        data = [(torch.randn(500, 8), torch.randint(0, 3, (500,))) for _ in range(4)]
        report = check(operator(Problem(nn.Sequential(*layers), nn.CrossEntropyLoss(), data)), rng=0)
        assert report["randomness"].status == status, report
        assert "in one pass and" in report["randomness"].text

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_losses_that_cancel_are_not_random(self, reduction: str) -> None:
        torch.manual_seed(0)
        policy = nn.Linear(8, 4).double()
        nn.init.zeros_(policy.weight), nn.init.zeros_(policy.bias)  # the loss is then the mean of the advantages
        advantages = torch.randn(256).double()
        advantages -= advantages.mean()
        rows = [
            *zip(torch.randn(256, 8).double(), zip(torch.randint(0, 4, (256,)), advantages, strict=True), strict=True)
        ]

        def loss(z, chosen):
            terms = -z.log_softmax(1).gather(1, chosen[0][:, None])[:, 0] * chosen[1]
            return getattr(terms, reduction)()

        loss.reduction = reduction
        shuffled = Problem(policy, loss, DataLoader(rows, 50, shuffle=True))
        report = check(operator(shuffled), rng=0)
        assert with_status(report, "warning") == ["order of the data"], report
        assert report.ok
        assert abs(HessianLinearOperator(policy, loss, shuffled.params, shuffled.data).gradient_and_loss()[1]) < 1e-12

    def test_a_derivative_that_is_wrong(self) -> None:
        problem = loss_problem("mse", "one")  # its loss couples the examples
        problem.loss_function = lambda prediction, y: ((Direction.apply(prediction) - y) ** 2).mean()
        report = check(operator(problem), rng=0)
        assert with_status(report, "wrong") == ["symmetry", "finite differences"]

    def test_a_second_derivative_that_is_lost_leaves_the_matrix_symmetric(self) -> None:
        problem = loss_problem("mse")
        problem.loss_function = lambda prediction, y: Straight.apply(prediction - y).mean()
        report = check(operator(problem), rng=0)
        assert with_status(report, "wrong") == ["finite differences"]
        assert report["finite differences"].value > 0.01
        assert "curvop.functorch_hessian" in report["finite differences"].remedy

    def test_a_derivative_that_is_wrong_among_many_kinks(self) -> None:
        torch.manual_seed(0)
        widths = (20, 200, 200, 3)
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
        data = [(torch.randn(500, 20).double(), torch.randn(500, 3).double())]
        wrong = Problem(nn.Sequential(*layers[:-1]).double(), lambda z, y: Straight.apply(z - y).mean(), data)
        report = check(operator(wrong), rng=0)
        assert report["forward mode"].status == "not applicable"
        assert with_status(report, "wrong") == ["finite differences"], report

    def test_a_derivative_that_no_route_can_be_compared_with_is_not_called_sound(self) -> None:
        params = {"w": torch.zeros(3, dtype=torch.float64, requires_grad=True)}

        def objective(p, batch):
            return (p["w"].relu() + Straight.apply(p["w"])).sum()

        report = check(HessianLinearOperator.from_objective(objective, params, [None]), rng=0)
        assert with_status(report, "warning") == ["independent route"], report
        assert {report[name].status for name in ("forward mode", "finite differences")} == {"not applicable"}
        assert report.verdict == "nothing is wrong, with 1 warning: independent route"
        assert "smooth activations" in report["independent route"].remedy

    def test_a_loss_that_couples_the_examples_of_several_batches(self) -> None:
        problem = loss_problem("mse")
        problem.loss_function = lambda prediction, y: ((prediction / prediction.norm() - y) ** 2).mean()
        report = check(operator(problem), rng=0)
        assert with_status(report, "wrong") == [
            "weights of batches",
            "double backward",
            "finite differences",
            "gradient",
        ]
        assert "a loss that couples the examples" in report["finite differences"].remedy
        one_batch = loss_problem("mse", "one")
        one_batch.loss_function = problem.loss_function
        assert check(operator(one_batch), rng=0).verdict.startswith("sound")
        assert check(operator(problem, batch_weight=lambda batch: len(batch[0])), rng=0).verdict.startswith("sound")

    def test_a_model_that_nothing_can_be_compared_with_is_not_called_sound(self) -> None:
        class Hard(nn.Linear):
            def forward(self, X):
                return super().forward(X.float()).relu()

        # Half of the outputs are at a kink.
        model = Hard(4, 6)
        with torch.no_grad():
            model.weight[:3], model.bias[:3] = 0.0, 0.0
        data = [(torch.randn(20, 4), torch.randn(20, 6))]
        report = check(operator(Problem(model, nn.MSELoss(), data)), rng=0)
        assert with_status(report, "warning") == ["independent route"], report
        assert "not in float64" in report["forward mode"].text

    def test_data_that_is_not_finite(self) -> None:
        problem = loss_problem("mse")
        problem.data[1][0][0, 0] = torch.nan
        report = check(operator(problem), rng=0)
        assert with_status(report, "wrong") == ["loss", "products"]
        assert "batch 1" in report["products"].text

    def test_too_little_memory_for_other_routes(self, monkeypatch) -> None:
        monkeypatch.setattr("curvop.operators.engine_operator.available_bytes", lambda device: 1000)
        report = check(operator(loss_problem("ce")), rng=0)
        assert with_status(report, "warning") == ["independent route"]
        assert "float64 takes" in report["forward mode"].text

    def test_warnings_of_products_are_findings(self) -> None:
        problem = loss_problem("ce")
        problem.loss_function = nn.CrossEntropyLoss()

        def model(params, X):
            float(X.sum())  # cannot be traced
            return torch.func.functional_call(problem_model, params, (X,))

        problem_model, problem.model = problem.model, model
        report = check(operator(problem, engine="compiled"), rng=0)
        assert report.ok
        assert "falls back" in report["warnings"].text


@seeded
def normalized_layers() -> tuple[HessianLinearOperator, Problem]:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    nn.init.normal_(model[1].weight)
    problem = Problem(model, nn.CrossEntropyLoss(), [(torch.randn(22, 6), torch.randint(0, 3, (22,)))])
    return operator(problem), problem


FAULTS = {
    "affine": (dict(matvec=lambda x: S @ x + 1), ["linearity"]),
    "quadratic": (dict(matvec=lambda x: S @ x**2), ["linearity"]),
    "random": (dict(matvec=lambda x: S @ x + RNG.standard_normal(x.shape)), ["repeatability"]),
    "another block": (dict(matvec=lambda x: S @ x, matmat=lambda X: S @ X * 2), ["matvec and matmat"]),
    "a block of zeros": (dict(matvec=lambda x: S @ x, matmat=np.zeros_like), ["matvec and matmat"]),
    "zero but for blocks": (dict(matvec=np.zeros_like, matmat=lambda X: S @ X), ["matvec and matmat"]),
    "an adjoint of zero": (dict(matvec=np.zeros_like, rmatvec=lambda x: S @ x), ["adjoint"]),
    "another adjoint": (dict(matvec=lambda x: S @ x, rmatvec=lambda x: S @ x), ["adjoint"]),
    "not finite": (dict(matvec=lambda x: S @ x + np.inf), ["finite"]),
}


class Attention(nn.Module):
    """A softmax does not change if all keys are shifted: the rows and columns of ``k.bias`` are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, size) for size in (8, 8, 8, 3))

    def forward(self, X):
        weights = (self.q(X) @ self.k(X).transpose(-1, -2) / 8**0.5).softmax(-1)
        return self.o((weights @ self.v(X)).mean(1))


class TestApproximations:
    @pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
    def test_the_error_is_part_of_the_report(self, kind: Any) -> None:
        problem = loss_problem("ce")
        K = kind(problem.model, problem.loss_function, problem.params, problem.data)
        report = check(K, num_probes=2, rng=0)
        assert report.ok
        finding = report["approximation"]
        exact, dense = K.exact @ np.eye(K.shape[0]), K @ np.eye(K.shape[0])
        value = np.linalg.norm(dense - exact) / np.linalg.norm(exact)
        shown = re.search(r"relative error (\S+) \+- (\S+) ", finding.text)
        assert float(shown[1]) == pytest.approx(finding.value, rel=1e-2)
        assert abs(finding.value - value) <= 4 * float(shown[2]) < 0.4 * value
        assert report["forward mode"].status == report["finite differences"].status == "ok"
        assert report["dropout"].status == "ok"

    def test_faults_of_the_model_are_found(self) -> None:
        problem = normalized((6, 3))
        params = {name: value for name, value in problem.params.items() if not name.startswith("1.")}
        with pytest.warns(RuntimeWarning, match="normalizes each of the 2 batches"):
            K = KFACLinearOperator(problem.model, problem.loss_function, params, problem.data)
        assert check(K, rng=0)["batch normalisation"].status == "warning"


class TestBlocksThatAreZeroUpToRounding:
    @pytest.mark.default_cases("hessian-*", "ggn-dtype0")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("kind", [*OPERATORS, "jacobian"])
    def test_biases_of_keys(self, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        data = [(torch.randn(20, 5, 8, dtype=dtype), torch.randint(0, 3, (20,))) for _ in range(2)]
        A = operator(Problem(Attention().to(dtype), nn.CrossEntropyLoss(), data), kind)
        assert check(A, rng=0).verdict.startswith("sound")
        assert check(A.block("q.bias"), rng=0).verdict.startswith("sound")
        zero = A.block("k.bias")
        wrapped = [zero, 2 * zero] if kind == "jacobian" else [zero, zero.submatrix(range(4)), zero.damped(1.0)]
        for B in [*wrapped, zero.T]:
            report = check(B, rng=0)
            assert report.ok, report
            assert with_status(report, "warning") == ["zero block"], report
        assert "rounding errors" in report["zero block"].remedy

    def test_bias_below_batch_normalization(self) -> None:
        H = operator(normalized((9,)))
        report = check(H.block("0.bias"), rng=0)
        assert with_status(report, "warning") == ["zero block"], report
        assert with_status(report, "wrong") == []

    def test_a_small_block_whose_derivative_is_wrong_is_not_called_zero(self) -> None:
        params = {name: torch.randn(5, dtype=torch.float64, requires_grad=True) for name in ("large", "small")}

        def objective(p, batch):
            return (p["large"] ** 4).sum() + 1e-13 * ((Direction.apply(p["small"]) - 0.3) ** 3).sum()

        report = check(HessianLinearOperator.from_objective(objective, params, [None]).block("small"), rng=0)
        assert "symmetry" in with_status(report, "wrong"), report
        assert "finite differences" in with_status(report, "wrong"), report


class TestAnyOperator:
    @pytest.mark.parametrize(
        "A", [SYMMETRIC, S, S[:, :9], S + 1j * S.T, S + S.T + 1j * (S - S.T), np.eye(5, dtype=int), np.zeros((3, 3))]
    )
    def test_matrices(self, A) -> None:
        report = check(aslinearoperator(A), rng=0)
        assert report.verdict.startswith("sound"), report
        symmetric = A.shape[0] == A.shape[1] and np.array_equal(A, A.conj().T)
        assert report["symmetry"].status == ("ok" if symmetric else "not applicable")
        assert report["model"].status == "not applicable"

    def test_the_defects_are_those_of_the_matrix(self) -> None:
        skew = 1e-9 * np.linalg.norm(SYMMETRIC) / np.linalg.norm(S - S.T) * (S - S.T)
        symmetry = check(aslinearoperator(SYMMETRIC + skew), num_probes=30, rng=0)["symmetry"]
        assert symmetry.status == "warning"
        assert symmetry.value == pytest.approx(2e-9, rel=0.5)

    @pytest.mark.parametrize("name", FAULTS)
    def test_faults(self, name: str) -> None:
        options, wrong = FAULTS[name]
        report = check(LinearOperator((30, 30), dtype=float, **options), rng=0)
        assert set(wrong) <= set(with_status(report, "wrong")), report
        assert not report.ok

    @pytest.mark.parametrize(
        ("scale", "dtype"), [(1e-170, np.float64), (1e160, np.float64), (1e-25, np.float32), (1e22, np.float32)]
    )
    @pytest.mark.parametrize("name", ["sound", *FAULTS])
    def test_scales_whose_squares_underflow_or_overflow(self, name: str, scale: float, dtype: type) -> None:
        options, wrong = FAULTS.get(name, (dict(matvec=lambda x: SYMMETRIC @ x), []))

        def scaled(product):
            return lambda x: (scale * product(x.astype(np.float64))).astype(dtype)

        products = {what: scaled(product) for what, product in options.items()}
        report = check(LinearOperator((30, 30), dtype=dtype, **products), rng=0)
        assert set(wrong) <= set(with_status(report, "wrong")), report
        assert report.ok == (not wrong)
        assert with_status(report, "warning") == []

    def test_a_curvature_of_any_scale(self) -> None:
        problem = loss_problem("mse")
        for scale in (1e-170, 1e-250, 1e160):
            problem.loss_function = lambda z, y, scale=scale: scale * ((z - y) ** 2).mean()
            report = check(operator(problem), rng=0)
            assert report.verdict.startswith("sound"), report
            assert compared(report) == ["forward mode", "finite differences"]
            problem.loss_function = lambda z, y, scale=scale: scale * Straight.apply(z - y).mean()
            assert with_status(check(operator(problem), rng=0), "wrong") == ["finite differences"]

    def test_without_an_adjoint(self) -> None:
        report = check(LinearOperator((30, 9), matvec=lambda x: S[:, :9] @ x, dtype=float), rng=0)
        assert report.verdict.startswith("sound")
        assert "rmatvec" in report["adjoint"].text

    def test_a_hessian_without_an_adjoint_that_is_not_symmetric(self) -> None:
        """``jvp(jacrev(loss))`` is wrong for a LayerNorm with a trainable weight; ``jvp(grad(loss))`` is right."""
        H, problem = normalized_layers()
        point = {name: value.detach() for name, value in problem.params.items()}
        [(X, y)] = problem.data

        def loss(params):
            return problem.loss_function(torch.func.functional_call(problem.model, params, (X,)), y)

        def product(derivative, x):
            return H.ravel(torch.func.jvp(derivative(loss), (point,), (H.unravel(x.reshape(-1)),))[1])

        def bare(derivative, **more):
            return LinearOperator(H.shape, matvec=lambda x: product(derivative, x), dtype=float, **more)

        report = check(bare(torch.func.jacrev), rng=0)
        assert with_status(report, "warning") == ["symmetry"], report
        assert report.verdict == "nothing is wrong, with 1 warning: symmetry"
        symmetry, dense = report["symmetry"], bare(torch.func.jacrev) @ np.eye(len(H.ravel(point)))
        assert symmetry.text == "A is not symmetric"
        defect = np.linalg.norm(dense - dense.T) / np.linalg.norm(dense)
        assert defect > 0.01
        assert defect / 5 < symmetry.value < 5 * defect
        for words in ("eigsh, cg and densities need a symmetric matrix", "pass rmatvec="):
            assert words in symmetry.remedy
        report = check(bare(torch.func.jacrev, rmatvec=lambda u: dense.T @ u), rng=0)
        assert report["symmetry"].status == "not applicable"
        assert report.verdict.startswith("sound"), report
        report = check(bare(torch.func.grad), rng=0)
        assert report["symmetry"].status == "ok"
        assert report.verdict.startswith("sound"), report

    @pytest.mark.parametrize("part", [1e-9, 1e-6, 1.0])
    def test_a_lack_of_symmetry_without_an_adjoint(self, part: float) -> None:
        A = SYMMETRIC + part * (S - S.T)
        bare = LinearOperator(A.shape, matvec=lambda x: A @ x, dtype=float)
        for wrapped in (bare, 2 * bare, bare + bare):
            report = check(wrapped, rng=0)
            assert with_status(report, "warning") == ["symmetry"], report
            assert "pass rmatvec=" in report["symmetry"].remedy

    @pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
    def test_empty(self, shape) -> None:
        report = check(aslinearoperator(np.ones(shape)))
        assert report.ok
        assert report.products == 0

    @pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
    @pytest.mark.parametrize("num_probes", [1, 5])
    def test_small(self, shape, num_probes: int) -> None:
        assert check(aslinearoperator(np.ones(shape)), num_probes=num_probes, rng=0).verdict.startswith("sound")


class TestTheReport:
    def test_products_are_counted(self) -> None:
        H = operator(loss_problem("ce"))
        assert check(H, rng=0).products == H.num_products == 7
        assert check(H, num_probes=5, rng=0).products == 13
        assert check(H.damped(1.0), rng=0).products == 8
        assert check(aslinearoperator(SYMMETRIC), rng=0).products == 9

    def test_it_repeats(self) -> None:
        values = [[finding.value for finding in check(operator(loss_problem("ce")), rng=1).findings] for _ in range(2)]
        assert values[0] == values[1]

    def test_the_model_and_the_random_numbers_are_left_as_found(self) -> None:
        problem = normalized((6, 3))
        before = {name: value.clone() for name, value in problem.model.state_dict().items()}
        flags, state = [part.training for part in problem.model.modules()], torch.get_rng_state()
        check(operator(problem))
        assert all(torch.equal(before[name], value) for name, value in problem.model.state_dict().items())
        assert flags == [part.training for part in problem.model.modules()]
        assert torch.equal(state, torch.get_rng_state())
        assert all(value.grad is None and value.requires_grad for value in problem.model.parameters())

    def test_products_warn_afterwards_as_they_would_have(self) -> None:
        H = operator(normalized((6, 3)))
        check(H, rng=0)
        with pytest.warns(RuntimeWarning, match="normalizes each of the 2 batches"):
            H.block("0.weight") @ np.ones(20)
        check(H, rng=0)
        H.block("0.bias") @ np.ones(5)  # no second warning

    @pytest.mark.slow
    def test_a_bar_where_it_takes_long(self, capsys) -> None:
        def slow(x):
            time.sleep(0.15)
            return SYMMETRIC @ x

        A = LinearOperator((30, 30), matvec=slow, dtype=float)
        check(A, rng=0, progress=False)
        check(aslinearoperator(SYMMETRIC), rng=0)
        assert capsys.readouterr().err == ""
        check(A, rng=0)
        assert "check: " in capsys.readouterr().err

    def test_it_prints_a_table_with_remedies(self) -> None:
        text = str(check(operator(normalized((6, 3))), rng=0))
        lines = text.splitlines()
        assert lines[0].startswith("check of HessianLinearOperator, 53 by 53, float64: 7 products, ")
        assert any(line.split()[:3] == ["warning", "batch", "normalisation"] for line in lines)
        assert "to do: call model.eval(), or pass one batch" in text
        assert lines[-1] == "nothing is wrong, with 1 warning: batch normalisation"
        assert max(map(len, lines)) <= 120

    def test_json(self) -> None:
        report = check(LinearOperator((3, 3), matvec=lambda x: x * np.nan, dtype=float))
        parsed = json.loads(json.dumps(report.json(), allow_nan=False))
        assert (parsed["ok"], parsed["findings"][1]["status"]) == (False, "wrong")

    def test_names_of_findings(self) -> None:
        with pytest.raises(KeyError, match=r"no finding is named 'symetry'; there are .*symmetry"):
            check(aslinearoperator(S))["symetry"]


class TestBadInput:
    def test_an_array_is_not_an_operator(self) -> None:
        with pytest.raises(TypeError, match=r"A is a ndarray.*aslinearoperator"):
            check(S)

    @pytest.mark.parametrize("num_probes", [0, -1, 1.5, "two", True])
    def test_numbers_of_probes(self, num_probes) -> None:
        with pytest.raises(ValueError, match=r"num_probes is .*must be an integer >= 1"):
            check(aslinearoperator(S), num_probes=num_probes)

    def test_a_problem_that_cannot_be_evaluated(self) -> None:
        problem = Problem(mlp().double(), nn.MSELoss(), [])
        with pytest.raises(ValueError, match="data is empty"):
            check(operator(problem))


@pytest.mark.parametrize(
    "part",
    [lambda K: K.inverse(1e-2), lambda K: K.block("0.weight"), lambda K: K.damped(1e-2), lambda K: K.sqrt()],
    ids=["inverse", "block", "damped", "square root"],
)
def test_matrices_of_float32_factors_are_sound(part) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    data = [(torch.randn(20, 4), torch.randint(3, (20,)))]
    K = KFACLinearOperator(model, torch.nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
    assert check(part(K), progress=False).ok
