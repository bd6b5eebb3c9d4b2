"""Warnings and errors that precede a product, and user's code that writes to buffers and batches."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import APPROXIMATIONS, Problem, cut, loss_problem, mlp, seeded
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from curvop import (
    EFLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    NonDeterministicObjectiveError,
    check,
)

KINDS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
    "jacobian": JacobianLinearOperator,
}


def operator(problem: Problem, kind: str = "hessian", **options: Any) -> Any:
    given = (problem.params, problem.data)
    if kind != "jacobian":
        given = (problem.loss_function, *given)
    return (KINDS | APPROXIMATIONS)[kind](problem.model, *given, **options)


def product(A: Any) -> np.ndarray:
    return A @ np.random.default_rng(0).standard_normal(A.shape[1])


@seeded
def problem_of(model: nn.Module, sizes: tuple[int, ...] = (6, 3)) -> Problem:
    return Problem(model.double(), nn.MSELoss(), cut(torch.randn(9, 4), torch.randn(9, 3), sizes))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, num_layers=2, dropout=0.25, batch_first=True)

    def forward(self, X):
        return self.lstm(X[:, None])[0][:, 0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.25, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, X):
        X = X[:, None] * torch.tensor([[1.0], [2.0]]).to(X)
        return self.head(self.attention(X, X, X)[0].sum(1))


class DropPath(nn.Module):
    """Drops whole examples, as vision libraries do."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, X):
        return X * (torch.rand(len(X), 1) > self.drop_prob).to(X) if self.training else X


RANDOM = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.25)), r"'1' \(Dropout, p = 0.25\)"),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.AlphaDropout(0.25)), r"'1' \(AlphaDropout, p = 0.25\)"),
    "recurrent": (Recurrent, r"'lstm' \(LSTM, p = 0.25\)"),
    "attention": (Attending, r"'attention' \(MultiheadAttention, p = 0.25\)"),
    "drop path": (lambda: nn.Sequential(nn.Linear(4, 3), DropPath(0.25)), r"'1' \(DropPath, p = 0.25\)"),
}


class TestDropout:
    @pytest.mark.parametrize("cache", ["auto", 0])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", RANDOM)
    def test_it_is_named_by_every_product(self, name: str, kind: str, cache: Any) -> None:
        make, where = RANDOM[name]
        A = operator(problem_of(make().train()), kind, cache=cache)
        torch.manual_seed(1)  # two draws of so few numbers may coincide
        for _ in range(2):
            with pytest.raises(NonDeterministicObjectiveError, match=f"dropout is active in {where}: call model.eval"):
                product(A)

    @pytest.mark.parametrize("name", RANDOM)
    def test_a_gradient_is_that_of_one_draw(self, name: str) -> None:
        make, where = RANDOM[name]
        A = operator(problem_of(make().train()))
        with pytest.warns(RuntimeWarning, match=f"dropout is active in {where}.*call model.eval") as caught:
            A.gradient_and_loss()
        assert len(caught) == 1
        A.gradient_and_loss()  # no second warning

    @pytest.mark.parametrize("kind", KINDS)
    def test_in_evaluation_mode_or_without_a_rate_it_is_not_active(self, kind: str) -> None:
        product(operator(problem_of(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).eval()), kind))
        product(operator(problem_of(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).train()), kind))


class TestBatchNormalization:
    def model(self, **options: Any) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.Tanh(), nn.Linear(5, 3))

    @pytest.mark.parametrize("kind", KINDS)
    def test_over_several_batches(self, kind: str) -> None:
        A = operator(problem_of(self.model().train()), kind)
        with pytest.warns(RuntimeWarning, match=r"'1' \(BatchNorm1d\) normalizes each of the 2 batches") as caught:
            product(A)
        assert len(caught) == 1
        product(A)  # no second warning
        product(A.block("0.bias"))  # nor by blocks

    def test_without_running_statistics_evaluation_mode_does_not_help(self) -> None:
        model = self.model(track_running_stats=False).eval()
        with pytest.warns(RuntimeWarning, match="BatchNorm1d"):
            product(operator(problem_of(model)))

    def test_over_one_batch_it_is_the_whole_data_set(self) -> None:
        product(operator(problem_of(self.model().train(), (9,))))

    def test_in_evaluation_mode(self) -> None:
        product(operator(problem_of(self.model().eval())))


class TestHalfPrecision:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_is_refused(self, dtype: torch.dtype, kind: str) -> None:
        problem = problem_of(mlp())
        data = [(X.to(dtype), y.to(dtype)) for X, y in problem.data]
        with pytest.raises(ValueError, match=f"'0.weight'.* is {dtype}, too coarse.*: call model.float"):
            operator(Problem(problem.model.to(dtype), problem.loss_function, data), kind)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_model_that_is_cast_later_is_refused_until_it_is_cast_back(self, kind: str) -> None:
        problem = problem_of(mlp())
        A = operator(problem, kind)
        exact = product(A)
        problem.model.half()
        with pytest.raises(RuntimeError, match=r"'0.weight'.* is torch.float16, too coarse.*: call model.float"):
            product(A)
        problem.model.double()
        assert 1e-7 < np.linalg.norm(product(A) - exact) / np.linalg.norm(exact) < 0.1

    def test_other_layers_may_be_in_it(self) -> None:
        """Such as a frozen backbone in half precision, below a head of interest."""

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone, self.head = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 3).double()

            def forward(self, X):
                return self.head(self.backbone(X.bfloat16()).tanh().double())

        torch.manual_seed(0)
        model, y = Model(), torch.randn(9, 3).double()
        X = torch.randn(9, 4)
        features = model.backbone(X.bfloat16()).tanh().double().detach()
        whole = HessianLinearOperator(model, nn.MSELoss(), list(model.head.parameters()), [(X, y)])
        head = operator(Problem(model.head, nn.MSELoss(), [(features, y)]))
        np.testing.assert_allclose(product(whole), product(head), rtol=1e-12)


class TestAutocast:
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_told_once_by_the_first_product_within(self, kind: str) -> None:
        problem = problem_of(mlp())
        problem.model.float()
        problem.data = [(X.float(), y.float()) for X, y in problem.data]
        A = operator(problem, kind)
        exact = product(A)
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.warns(
                RuntimeWarning, match=r"torch.autocast is enabled.*bfloat16.*7\.8e-03.*outside"
            ) as caught:
                coarse = product(A)
            assert len(caught) == 1
            product(A)
        assert 1e-4 < np.linalg.norm(coarse - exact) / np.linalg.norm(exact) < 0.1
        np.testing.assert_allclose(product(A), exact, rtol=1e-5, atol=1e-6)

    def test_it_is_told_where_something_else_was_told_before(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        data = [(torch.randn(5, 4), torch.randn(5, 3)) for _ in range(2)]
        A = HessianLinearOperator(model, nn.MSELoss(), dict(model.named_parameters()), data)
        with pytest.warns(RuntimeWarning, match=r"^'1' \(BatchNorm1d\) normalizes each of the 2 batches"):
            product(A)
        with torch.autocast("cpu", torch.bfloat16), pytest.warns(RuntimeWarning, match=r"^torch.autocast is enabled"):
            product(A)

    @pytest.mark.parametrize("kind", KINDS)
    def test_double_precision_is_left_as_it_is(self, kind: str) -> None:
        A = operator(problem_of(mlp()), kind)
        exact = product(A)
        with torch.autocast("cpu", torch.bfloat16):
            np.testing.assert_allclose(product(A), exact, rtol=1e-12)


class Writing(nn.Module):
    """Writes to its input, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, X):
        self.calls += 1
        return self.mlp(X.add_(1.0))


def halved(prediction, y):
    return ((prediction - y.mul_(0.5)) ** 2).mean()


class Remembering(nn.Module):
    """Stores the largest input above 10, and then adds a buffer and deletes another."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()
        self.register_buffer("largest", torch.full((), 10.0, dtype=torch.float64))
        self.register_buffer("once", torch.ones(()))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        if X.max() > self.largest:
            self.largest.fill_(float(X.max()))
            self.register_buffer("new", torch.ones(2))
            del self.once
        return self.mlp(X)


class Imputing(nn.Module):
    """Replaces missing values in its input, if any, and counts its calls in a new buffer each time."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, X):
        self.calls = self.calls + 1
        missing = X.isnan()
        if missing.any():
            X[missing] = 0.0
        return self.mlp(X)


class Centred(nn.Module):
    """A loss with a running mean of the targets."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3).double())

    def forward(self, prediction, y):
        self.centre.mul_(0.9).add_(0.1 * y.mean(0))
        return ((prediction - y + self.centre) ** 2).mean()


class Normalized(nn.Module):
    """An objective that is a module, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()

    def forward(self, params, batch):
        prediction = torch.func.functional_call(self.model, params, (batch[0],))
        return F.mse_loss(prediction, batch[1])


class TestWhatUsersCodeWritesTo:
    @pytest.mark.slow_cases("*compiled*")
    @pytest.mark.parametrize("cache", ["auto", 0])
    @pytest.mark.parametrize(
        ("kind", "engine"),
        [
            *itertools.product([*KINDS, *APPROXIMATIONS], ["autograd"]),
            ("hessian", "compiled"),
            *(pytest.param(kind, "compiled", marks=pytest.mark.nightly) for kind in list(KINDS)[1:]),
        ],
    )
    def test_inputs_targets_and_buffers(self, kind: str, engine: str, cache: Any) -> None:
        problem = problem_of(Writing().eval())
        problem.loss_function = halved
        plain = Problem(
            problem.model.mlp, lambda z, y: ((z - y / 2) ** 2).mean(), [(X + 1, y) for X, y in problem.data]
        )
        expected = product(operator(plain, kind))
        before = copy.deepcopy(problem.data)
        A = operator(problem, kind, cache=cache, engine=engine)
        for _ in range(3):
            np.testing.assert_allclose(product(A), expected, rtol=1e-10, atol=1e-13)
        assert problem.model.calls == 0
        for pair, saved in zip(problem.data, before, strict=True):
            assert all(map(torch.equal, pair, saved))

    @pytest.mark.parametrize("cache", ["auto", 0])
    @pytest.mark.parametrize("kind", [*KINDS, *APPROXIMATIONS])
    def test_where_it_depends_on_the_batch(self, kind: str, cache: Any) -> None:
        problem = problem_of(Imputing().eval())
        problem.data[1][0][0, :2] = torch.nan
        filled = Problem(problem.model.mlp, problem.loss_function, [(X.nan_to_num(), y) for X, y in problem.data])
        expected = product(operator(filled, kind))
        A = operator(problem, kind, cache=cache)
        for _ in range(3):
            np.testing.assert_allclose(product(A), expected, rtol=1e-10, atol=1e-13)
        assert problem.data[1][0].isnan().sum() == 2
        assert problem.model.calls == 0

    @pytest.mark.parametrize("cache", ["auto", 0])
    @pytest.mark.parametrize("kind", [*KINDS, *APPROXIMATIONS])
    def test_buffers_that_a_later_batch_writes_to_makes_or_deletes(self, kind: str, cache: Any) -> None:
        problem = problem_of(Remembering().eval())
        problem.data[1][0].add_(20)
        before = copy.deepcopy(problem.model.state_dict())
        A = operator(problem, kind, cache=cache)
        expected = product(operator(Problem(problem.model.mlp, problem.loss_function, problem.data), kind))
        for _ in range(3):
            np.testing.assert_allclose(product(A), expected, rtol=1e-10, atol=1e-13)
        after = problem.model.state_dict()
        assert set(before) == set(after)
        assert all(torch.equal(after[name], value) for name, value in before.items())

    @pytest.mark.parametrize("cache", ["auto", 0])
    @pytest.mark.parametrize("kind", ["hessian", "ggn", "ef", *APPROXIMATIONS])
    @pytest.mark.filterwarnings(
        "ignore:batches 0 and 1. evaluated as one batch:RuntimeWarning"
    )  # each has its own centre
    def test_the_losses_own_buffers(self, kind: str, cache: Any) -> None:
        problem = problem_of(mlp())
        problem.loss_function = Centred()
        A = operator(problem, kind, cache=cache)
        first = product(A)
        np.testing.assert_array_equal(product(A), first)
        assert not problem.loss_function.centre.any()
        A = operator(problem, kind, cache=0)
        np.testing.assert_allclose(product(A), first, rtol=1e-12)

    @pytest.mark.filterwarnings("ignore:.*normalizes each of the 2 batches:RuntimeWarning")
    @pytest.mark.parametrize("cache", ["auto", 0])
    def test_the_buffers_of_an_objective_that_is_a_module(self, cache: Any) -> None:
        torch.manual_seed(0)
        objective = Normalized().train()
        before = copy.deepcopy(objective.state_dict())
        data = cut(torch.randn(9, 4).double(), torch.randn(9, 3).double(), (6, 3))
        params = dict(objective.model.named_parameters())
        H = HessianLinearOperator.from_objective(objective, params, data, cache=cache)
        exact = product(operator(Problem(objective.model, nn.MSELoss(), data)))
        for _ in range(2):
            np.testing.assert_allclose(product(H), exact, rtol=1e-10, atol=1e-13)
        for name, value in objective.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_by_an_objective(self) -> None:
        problem = problem_of(mlp())

        def objective(params, batch):
            X, y = batch
            return F.mse_loss(torch.func.functional_call(problem.model, params, (X.add_(1.0),)), y)

        expected = product(operator(Problem(problem.model, nn.MSELoss(), [(X + 1, y) for X, y in problem.data])))
        H = HessianLinearOperator.from_objective(objective, problem.params, problem.data)
        for _ in range(2):
            np.testing.assert_allclose(product(H), expected, rtol=1e-12, atol=1e-14)

    def test_a_dictionary_that_is_emptied(self) -> None:
        problem = problem_of(mlp())
        expected = product(operator(problem))
        model, data = problem.model, [({"X": X}, y) for X, y in problem.data]
        H = HessianLinearOperator(
            lambda params, X: torch.func.functional_call(model, params, (X.pop("X"),)),
            nn.MSELoss(),
            problem.params,
            data,
        )
        np.testing.assert_allclose(product(H), expected, rtol=1e-12)

    def test_what_raises_after_it_has_written(self) -> None:
        problem = problem_of(mlp())
        before = copy.deepcopy(problem.data)

        class Failing(nn.Module):
            def forward(self, X):
                X.zero_()
                raise KeyboardInterrupt

        H = operator(Problem(nn.Sequential(problem.model, Failing()), nn.MSELoss(), problem.data))
        problem.model.register_forward_pre_hook(lambda module, args: args[0].zero_())
        with pytest.raises(KeyboardInterrupt):
            product(H)
        for pair, saved in zip(problem.data, before, strict=True):
            assert all(map(torch.equal, pair, saved))


class Attention(nn.Module):
    """Requests flash attention, which has no second derivative."""

    def __init__(self, backend: SDPBackend | None) -> None:
        super().__init__()
        self.inputs, self.head, self.backend = nn.Linear(4, 12), nn.Linear(4, 3), backend

    def forward(self, X):
        q, k, v = self.inputs(X[:, None, None] * torch.tensor([[1.0], [2.0]]).to(X)).chunk(3, -1)
        if self.backend is None:
            return self.head(F.scaled_dot_product_attention(q, k, v).sum((1, 2)))
        with sdpa_kernel(self.backend):
            return self.head(F.scaled_dot_product_attention(q, k, v).sum((1, 2)))


class TestFusedAttention:
    @pytest.mark.parametrize("kind", [*KINDS, *APPROXIMATIONS])
    def test_the_math_backend_takes_its_place_within_the_call_only(self, kind: str) -> None:
        problem = problem_of(Attention(SDPBackend.FLASH_ATTENTION))
        plain = problem_of(Attention(None))
        plain.model.load_state_dict(problem.model.state_dict())
        chosen = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            found = product(operator(problem, kind))
            assert torch.backends.cuda.flash_sdp_enabled()
            assert not torch.backends.cuda.math_sdp_enabled()
        np.testing.assert_allclose(found, product(operator(plain, kind)), rtol=1e-10, atol=1e-13)
        assert chosen == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())


class TestInferenceTensors:
    def test_parameters_are_refused_and_a_copy_is_taken(self) -> None:
        with torch.inference_mode():
            problem = problem_of(mlp())
        with pytest.raises(ValueError, match=r"params\['0.weight'\].*inference_mode.*copy.deepcopy\(model\)"):
            operator(problem)
        product(operator(Problem(copy.deepcopy(problem.model), nn.MSELoss(), problem.data)))

    def test_data_buffers_and_frozen_parameters_are_taken(self) -> None:
        problem = problem_of(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval())
        problem.params = {name: problem.params[name] for name in ("2.weight", "0.bias")}
        expected = product(operator(problem))
        with torch.inference_mode():
            inferred = copy.deepcopy(problem.model)
            data = [(X.clone(), y.clone()) for X, y in problem.data]
        for name, value in problem.params.items():
            module, _, leaf = name.rpartition(".")
            setattr(inferred.get_submodule(module), leaf, value)
        assert inferred[0].weight.is_inference()
        assert inferred[1].running_mean.is_inference()
        found = product(operator(Problem(inferred, nn.MSELoss(), data, problem.params)))
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).to("meta")


def partly_on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5).to("meta"), nn.Linear(5, 3))


def buffer_on_meta() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_buffer("mask", torch.ones(3, device="meta"))
    return model


class TestTensorsWithoutValuesOrDerivatives:
    @pytest.mark.parametrize(
        ("make", "names", "message"),
        [
            (on_meta, None, r"params\['0.weight'\] is on the meta device.*to_empty"),
            (partly_on_meta, ["1.weight"], "the model's '0.weight' is on the meta device"),
            (buffer_on_meta, None, "the model's 'mask' is on the meta device"),
        ],
    )
    def test_models_on_meta(self, make, names, message: str) -> None:
        model = make()
        params = dict(model.named_parameters())
        params = params if names is None else {name: params[name] for name in names}
        with pytest.raises(ValueError, match=message):
            HessianLinearOperator(model, nn.MSELoss(), params, [])

    @pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
    @pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
    def test_sparse_parameters(self, layout: str) -> None:
        w = getattr(torch.eye(3), layout)().requires_grad_()
        with pytest.raises(ValueError, match=r"params\['w'\] has layout torch.sparse_.*to_dense"):
            HessianLinearOperator(lambda p, X: X, nn.MSELoss(), {"w": w}, [])

    def test_quantized_parameters(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has deprecated them
            w = torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)
        with pytest.raises(ValueError, match=r"params\['w'\] is quantized.*dequantize"):
            HessianLinearOperator(lambda p, X: X, nn.MSELoss(), {"w": w}, [])

    def test_nothing_but_quantized_layers(self) -> None:
        with pytest.raises(ValueError, match=r"params is empty.*quantized"):
            HessianLinearOperator(nn.Identity(), nn.MSELoss(), {}, [])


def test_nothing_is_told_of_what_is_sound() -> None:
    for kind in KINDS:
        product(operator(loss_problem("mse"), kind))


class Checkpointed(nn.Module):
    """Recomputes its first layers in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.last = nn.Linear(5, 3)

    def forward(self, X):
        return self.last(checkpoint(self.first, X, use_reentrant=False))


class TestGradientCheckpointing:
    @pytest.mark.parametrize("kind", [*KINDS, *APPROXIMATIONS])
    def test_with_the_models_own_parameters(self, kind: str) -> None:
        problem = problem_of(Checkpointed())
        plain = nn.Sequential(*problem.model.first, problem.model.last)
        expected = product(operator(Problem(plain, problem.loss_function, problem.data), kind))
        np.testing.assert_allclose(product(operator(problem, kind)), expected, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("kind", [*KINDS, *APPROXIMATIONS])
    def test_with_others_it_is_refused(self, kind: str) -> None:
        """Torch would recompute with the model's own parameters, and the product would be wrong."""
        problem = problem_of(Checkpointed())
        problem.params = {name: (1.3 * value.detach()).requires_grad_() for name, value in problem.params.items()}
        with pytest.raises(
            RuntimeError,
            match=r"gradient checkpointing.*: pass the model's own, which must require grad, or turn checkpointing",
        ):
            product(operator(problem, kind))

    def test_a_check_is_not_alarmed(self) -> None:
        report = check(operator(problem_of(Checkpointed())), rng=0)
        assert "not to be trusted" not in report.verdict
