"""The compiled engine: the same matrix as the autograd engine's, with one program for each shape of batch."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, architecture_problem
from cases import LOSSES, Problem, cut, input_problem, loss_problem, mlp, sequences
from torch import nn

from curvop import HessianLinearOperator, NonDeterministicObjectiveError

P = 43


def hessian(problem: Problem, engine: str = "compiled", **options) -> HessianLinearOperator:
    return HessianLinearOperator(
        problem.model, problem.loss_function, problem.params, problem.data, engine=engine, **options
    )


def check(problem: Problem, **options) -> HessianLinearOperator:
    """Compare with the autograd engine. A fallback would warn, and warnings are errors."""
    A, B = hessian(problem, "autograd"), hessian(problem, **options)
    np.testing.assert_allclose(B @ np.eye(B.shape[1]), A @ np.eye(B.shape[1]), rtol=1e-10, atol=1e-13)
    return B


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def compiled() -> tuple[Problem, HessianLinearOperator]:
    problem = loss_problem("ce-everything")
    problem.data[1][1][0] = 1  # a batch without a counted target has weight 0, and is not compiled
    return problem, check(problem)


class TestPrograms:
    @pytest.mark.slow
    def test_one_for_each_shape_of_batch(self, compiled) -> None:
        problem, H = compiled
        kernel = H._engine.kernel
        assert len(kernel._programs) == 2  # batches of 6 and of 3
        seconds = kernel.seconds
        assert seconds > 0
        assert H.cost().compile_seconds == seconds
        problem.data.append(tuple(part.flip(0) for part in problem.data[1]))
        check_again = hessian(problem, "autograd")
        np.testing.assert_allclose(H @ np.ones(P), check_again @ np.ones(P), rtol=1e-10, atol=1e-13)
        assert kernel.seconds == seconds  # the third batch has the shape of the second
        problem.data.pop()

    @pytest.mark.slow
    def test_serve_other_values_of_parameters_and_class_weights(self, compiled) -> None:
        problem, H = compiled
        seconds = H._engine.kernel.seconds
        with torch.no_grad():
            problem.model[0].weight.mul_(-0.5)
            problem.loss_function.weight[0] = 5.0
        for x in np.eye(P)[:4]:
            np.testing.assert_allclose(H @ x, hessian(problem, "autograd") @ x, rtol=1e-10, atol=1e-13)
        assert H._engine.kernel.seconds == seconds

    @pytest.mark.slow
    @pytest.mark.parametrize("cache", [0, 3000])
    def test_serve_whatever_is_kept(self, compiled, cache) -> None:
        problem, H = compiled
        again = hessian(problem, cache=cache)
        again._engine.kernel._programs = H._engine.kernel._programs
        for _ in range(2):
            np.testing.assert_allclose(again @ np.ones((P, 3)), H @ np.ones((P, 3)), rtol=1e-12, atol=1e-15)
        assert again._engine.kernel.seconds == H._engine.kernel.seconds

    @pytest.mark.parametrize("columns", ["auto", 4])
    def test_serve_several_columns_at_once(self, compiled, columns) -> None:
        problem, H = compiled
        many = hessian(problem, columns=columns)
        many._engine.kernel._programs = H._engine.kernel._programs
        for K in (9, 6, P):  # in fours, the remaining 1, 2 and 3 are padded
            X = np.random.default_rng(K).standard_normal((P, K))
            np.testing.assert_allclose(many @ X, hessian(problem, "autograd") @ X, rtol=1e-10, atol=1e-13)
        sizes = {size for program, _ in H._engine.kernel._programs.values() for size in program._many}
        assert sizes  # otherwise the columns were multiplied one by one

    def test_pickle_without_programs(self, compiled) -> None:
        _, H = compiled
        assert pickle.loads(pickle.dumps(H))._engine.kernel._programs == {}

    def test_residuals_are_counted(self, compiled) -> None:
        _, H = compiled
        H @ np.ones(P)
        tensors = [tensor for kept in H._engine._first.kept.values() for tensor in kept.tensors]
        assert 0 < H._engine._first.bytes <= sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_rectangular_blocks_and_their_adjoints() -> None:
    problem = loss_problem("mse", "one")
    dense = hessian(problem, "autograd") @ np.eye(P)
    H = hessian(problem)
    rows, cols = H.params_slices["2.bias"], H.params_slices["0.weight"]
    A = H.block("2.bias", "0.weight")
    np.testing.assert_allclose(A @ np.eye(20), dense[rows, cols], rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(A.H @ np.eye(3), dense[rows, cols].T, rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_training_mode_is_another_program_and_buffers_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    problem = Problem(model, nn.MSELoss(), cut(torch.randn(6, 4).double(), torch.randn(6, 3).double(), (6,)))
    H = check(problem, columns=1)  # one program for each mode, and no other for blocks of vectors
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    np.testing.assert_allclose(
        H @ np.eye(H.shape[1]), hessian(problem, "autograd") @ np.eye(H.shape[1]), rtol=1e-9, atol=1e-12
    )
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    assert len(H._engine.kernel._programs) == 2


@pytest.mark.slow
def test_settings_of_modules_are_part_of_the_program() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    problem = Problem(model, nn.MSELoss(), [(torch.randn(6, 4).double(), torch.randn(6, 3).double())])
    H = check(problem, columns=1)
    model[1].eps = 1.0
    model[0].bias.data.add_(0.1)
    np.testing.assert_allclose(H @ np.ones(21), hessian(problem, "autograd") @ np.ones(21), rtol=1e-10, atol=1e-13)


def test_dropout_in_training_mode_is_reported() -> None:
    problem = loss_problem("mse", "one")
    problem.model.insert(2, nn.Dropout(0.5)).train()
    problem.params = dict(problem.model.named_parameters())
    with (
        pytest.warns(RuntimeWarning, match="falls back.*differs"),
        pytest.raises(NonDeterministicObjectiveError, match="dropout"),
    ):
        hessian(problem) @ np.ones(P)


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)  # torch 2.11 does not compile it with another one, and the operator warns
    problem = loss_problem("ce", "one")
    problem.model.float()
    problem.data = [(X.float(), y) for X, y in problem.data]
    A, B = hessian(problem, "autograd"), hessian(problem)
    np.testing.assert_allclose(B @ np.ones(P), A @ np.ones(P), rtol=1e-4, atol=1e-6)


class TestFallingBack:
    def check(self, H: HessianLinearOperator, expected: np.ndarray, reason: str) -> None:
        with pytest.warns(RuntimeWarning, match=rf"falls back to 'autograd'.*{reason}") as caught:
            np.testing.assert_allclose(H @ np.eye(P), expected, rtol=1e-10, atol=1e-13)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(H @ np.eye(P), expected, rtol=1e-10, atol=1e-13)

    def test_values_that_python_looks_at(self) -> None:
        problem = loss_problem("mse")
        expected = hessian(problem, "autograd") @ np.eye(P)

        def loss_function(prediction, y):
            return nn.functional.mse_loss(prediction, y) * (1.0 if prediction.detach().sum().item() < 1e9 else 2.0)

        weights = {"batch_weight": lambda batch: batch[1].numel()}
        problem.loss_function = loss_function
        self.check(hessian(problem, **weights), expected, "DataDependent")

    def test_tensors_that_a_function_holds(self) -> None:
        model = mlp().double()
        scale = torch.full((3,), 2.0, dtype=torch.float64)
        data = [(torch.randn(5, 4).double(), torch.randn(5, 3).double())]

        def scaled(params, X):
            return scale * torch.func.functional_call(model, params, (X,))

        problem = Problem(scaled, nn.MSELoss(), data, dict(model.named_parameters()))
        self.check(hessian(problem), hessian(problem, "autograd") @ np.eye(P), "FakeTensor")

    def test_batches_that_hide_their_tensors(self) -> None:
        problem = input_problem("userdict")
        H = hessian(problem)
        expected = hessian(problem, "autograd") @ np.eye(P)
        self.check(H, expected, "a batch holds a UserDict")
        assert not H._engine.kernel._programs

    def test_the_users_own_error_comes_as_it_is(self) -> None:
        problem = loss_problem("mse")
        problem.data = [(X[:, :2], y) for X, y in problem.data]
        with pytest.raises(RuntimeError, match="shapes"):
            hessian(problem) @ np.ones(P)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    check(architecture_problem(name))


@pytest.mark.nightly
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name: str) -> None:
    check(loss_problem(name))


@pytest.mark.nightly
def test_sequences() -> None:
    check(sequences())


class Table(nn.Module):
    """Computes a table once and caches it, in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way, self.table = nn.Linear(4, 3), way, None

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        table = getattr(self, "kept", None) if self.way == "buffer" else self.table
        if table is None or len(table) < len(X):
            table = torch.linspace(0, 1, len(X))[:, None]
            if self.way == "buffer":
                self.register_buffer("kept", table)
            else:
                self.table = table
        z = self.linear(X) + table[: len(X)]
        if self.way == "aside":
            self.aside = z.square().mean()
        return z.tanh()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["attribute", "buffer", "aside"])
@pytest.mark.filterwarnings("ignore:engine='compiled' falls back:RuntimeWarning")
def test_what_a_model_computes_and_keeps_is_real(way) -> None:
    X, y = torch.randn(6, 4), torch.randn(6, 3)
    models = [Table(way), Table(way)]
    models[1].load_state_dict(models[0].state_dict())
    products = [
        hessian(Problem(model, nn.MSELoss(), [(X, y), (X[:3], y[:3])]), engine) @ np.ones(15)
        for model, engine in zip(models, ("autograd", "compiled"), strict=True)
    ]
    np.testing.assert_allclose(products[1], products[0], rtol=1e-10)
    assert torch.isfinite(models[1](X)).all()
    assert all(type(value) in (torch.Tensor, nn.Parameter) for value in models[1].state_dict(keep_vars=True).values())


class Python(nn.Module):
    """Depends on values outside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act, self.config, self.power = nn.Linear(4, 3), torch.tanh, {"scale": 1.0}, (2,)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(X) * self.config["scale"]) ** self.power[0]


CHANGES = {
    "a function": lambda model: setattr(model, "act", torch.sigmoid),
    "a dictionary": lambda model: model.config.update(scale=3.0),
    "a tuple": lambda model: setattr(model, "power", (3,)),
    "a hook": lambda model: model.linear.register_forward_hook(lambda module, args, z: 2 * z),
    "a layer": lambda model: setattr(model, "linear", Doubled(model.linear)),
}


class Doubled(nn.Linear):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(4, 3)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(X)


@pytest.mark.default_cases("a function")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_besides_the_parameters_is_seen_with_them(change) -> None:
    model = Python()
    problem = Problem(model, nn.MSELoss(), [(torch.randn(6, 4), torch.randn(6, 3))])
    H = hessian(problem, columns=1)
    H @ np.ones(15)
    CHANGES[change](model)
    with torch.no_grad():
        model.linear.weight.mul_(1.1)
    np.testing.assert_allclose(H @ np.eye(15), hessian(problem, "autograd") @ np.eye(15), rtol=1e-10, atol=1e-13)


def test_a_regularization_weight_is_seen_with_the_parameters() -> None:
    params = {"theta": torch.randn(3, requires_grad=True)}
    weight = {"decay": 1.0}

    def objective(params: dict[str, torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        return (params["theta"] @ batch).cos() + weight["decay"] * params["theta"].square().sum()

    data = [torch.randn(3)]
    H = HessianLinearOperator.from_objective(objective, params, data, engine="compiled")
    H @ np.ones(3)
    weight["decay"] = 5.0
    with torch.no_grad():
        params["theta"].mul_(1.1)
    expected = HessianLinearOperator.from_objective(objective, params, data) @ np.eye(3)
    np.testing.assert_allclose(H @ np.eye(3), expected, rtol=1e-10)


class Running(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        z = self.linear(X)
        self.mean.mul_(0.9).add_(z.detach().mean(0), alpha=0.1)
        return (z - self.mean).tanh()


@pytest.mark.default_cases("auto")
@pytest.mark.parametrize("cache", [0, "auto"])
def test_a_buffer_that_is_written_to_is_written_to_once(cache) -> None:
    X, y = torch.randn(6, 4), torch.randn(6, 3)
    problem = Problem(Running(), nn.MSELoss(), [(X, y), (X + 1, y)])
    expected = hessian(problem, "autograd", cache=cache) @ np.ones(15)
    np.testing.assert_allclose(hessian(problem, cache=cache) @ np.ones(15), expected, rtol=1e-10)


class Numbering:
    """Data that set the model's state before each batch."""

    def __init__(self, model: nn.Module, batches: list[Any]) -> None:
        self.model, self.batches = model, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            self.model.number = number
            yield batch


@pytest.mark.slow
def test_a_model_whose_settings_change_in_every_batch_falls_back() -> None:
    X, y = torch.randn(6, 4), torch.randn(6, 3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    problem = Problem(model, nn.MSELoss(), Numbering(model, [(X + shift, y) for shift in range(6)]))
    H = hessian(problem, cache=0)
    with pytest.warns(RuntimeWarning, match="changes with every batch"):
        product = H @ np.ones(15)
    np.testing.assert_allclose(product, hessian(problem, "autograd") @ np.ones(15), rtol=1e-10)
    assert len(H._engine.kernel._programs) <= 4


@pytest.mark.slow
def test_inputs_that_require_grad_and_numbers_are_distinguished() -> None:
    layer = nn.Linear(4, 3)

    def model(params, X):
        X, number = X
        scale = 2.0 if X.requires_grad else 1.0
        return (torch.func.functional_call(layer, params, (X,)) * scale).tanh() * (1.0 + (str(number)[0] == "-"))

    X, y = torch.randn(6, 4), torch.randn(6, 3)
    data = [((X.clone().requires_grad_(), 0.0), y), ((X, -0.0), y), ((X + 1, 0.0), y)]
    problem = Problem(model, nn.MSELoss(), data, dict(layer.named_parameters()))
    options = {"batch_weight": lambda batch: 6.0, "columns": 1}
    expected = hessian(problem, "autograd", **options) @ np.eye(15)
    np.testing.assert_allclose(hessian(problem, **options) @ np.eye(15), expected, rtol=1e-10, atol=1e-13)


def test_sparse_batches_fall_back() -> None:
    layer = nn.Linear(4, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        data = [((torch.eye(6).to_sparse_csr(), torch.randn(6, 4)), torch.randn(6, 3))]
        problem = Problem(
            lambda params, X: (X[0] @ torch.func.functional_call(layer, params, (X[1],))).tanh(),
            *(nn.MSELoss(), data, dict(layer.named_parameters())),
        )
        with pytest.warns(RuntimeWarning, match="falls back"):
            product = hessian(problem, batch_weight=lambda batch: 1.0) @ np.ones(15)
        expected = hessian(problem, "autograd", batch_weight=lambda batch: 1.0) @ np.ones(15)
    np.testing.assert_allclose(product, expected, rtol=1e-10)


def test_a_loss_that_is_no_scalar_is_refused_as_ever() -> None:
    layer = nn.Linear(4, 3)
    problem = Problem(
        layer, lambda z, y: (z.tanh() - y).square().mean().reshape(1), [(torch.randn(6, 4), torch.ones(3))]
    )
    with pytest.raises(ValueError, match="scalar"):
        hessian(problem) @ np.ones(15)


def test_blocks_that_the_loss_does_not_reach() -> None:
    params = {"used": torch.ones(2, requires_grad=True), "idle": torch.ones(2, requires_grad=True)}
    H = HessianLinearOperator.from_objective(
        lambda params, _: params["used"].cos().sum(), params, [0], engine="compiled", batch_weight=lambda _: 1.0
    )
    assert not (H.block("idle") @ np.eye(2)).any()
