"""Pure modules have no side effects, and everything that could have some is not treated as pure.

The reference for products is double backward through the user's own module, called as the user calls it.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import cut, seeded
from test_overhead import by_hand, close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

from curvop import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvop.kernels import differentiable, losses, pure_modules
from curvop.kernels.guard import Guard
from curvop.kernels.pure_modules import are_pure, runs_user_code

ARGUMENTS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (4, 4),
    nn.Embedding: (5, 3),
    nn.Unflatten: (1, (2, 2)),
    nn.Softmax: (1,),
    nn.LogSoftmax: (1,),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d), (2,)),
}
LOSSES = [kind for kind in pure_modules._PURE if kind.__name__.endswith("Loss")]


class Handled(TorchFunctionMode):
    """Collects the functions that `TwiceDifferentiable` handles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in differentiable._HANDLED:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


def inputs(kind: type[nn.Module]) -> tuple[Tensor, ...]:
    X = torch.randn(3, 4)
    if kind in LOSSES:
        return X, torch.randint(0, 4, (3,)) if kind in (nn.CrossEntropyLoss, nn.NLLLoss) else torch.rand(3, 4)
    if kind is nn.Embedding:
        return (torch.randint(0, 5, (3, 2)),)
    return (torch.randn(2, 3, 4, 4),) if kind in (nn.MaxPool2d, nn.AvgPool2d) else (X,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", sorted(pure_modules._PURE, key=lambda kind: kind.__name__))
def test_pure_modules_only_compute(kind: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    part, args = kind(*ARGUMENTS.get(kind, ())).train(training), inputs(kind)
    assert are_pure([part])
    assert not runs_user_code([part])
    attributes, tensors = dict(vars(part)), [*part.parameters(), *part.buffers(), *args]
    values, versions = copy.deepcopy([tensor.detach() for tensor in tensors]), [tensor._version for tensor in tensors]
    with Handled() as handled:
        result = part(*args)
    assert handled.found == []
    assert list(vars(part).items()) == list(attributes.items())
    assert [tensor._version for tensor in tensors] == versions
    assert all(map(torch.equal, tensors, values))
    assert isinstance(result, Tensor)


@pytest.mark.parametrize("function", losses._FUNCTIONS, ids=lambda function: function.__name__)
def test_functional_losses_call_no_function_that_is_replaced(function: Callable[..., Tensor]) -> None:
    z, y = inputs(losses._FUNCTIONS[function]) if losses._FUNCTIONS[function] in LOSSES else (torch.rand(3, 4),) * 2
    before = z.clone(), y.clone()
    with Handled() as handled:
        function(z, y, reduction="sum")
    assert handled.found == []
    assert torch.equal(z, before[0])
    assert torch.equal(y, before[1])


class Marked(nn.Parameter):
    """A tensor subclass, whose ``__torch_function__`` may do anything."""


class Subclass(nn.Sequential):
    """Counts its calls."""

    calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(X)


def patched() -> nn.Module:
    layer = nn.Linear(4, 5)
    layer.forward = lambda X: F.linear(X, layer.weight, layer.bias).sin()
    return layer


def with_parameter(parameter: nn.Parameter) -> nn.Module:
    layer = nn.Linear(4, 5)
    layer.bias = parameter
    return layer


def inference_parameter() -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(torch.randn(5), requires_grad=False)


def parametrized() -> nn.Module:
    layer = nn.Linear(4, 5)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


@pytest.mark.parametrize(
    "part",
    [
        nn.ReLU(inplace=True),
        nn.Dropout(inplace=True),
        nn.Embedding(5, 3, max_norm=1.0),
        nn.BatchNorm1d(4),
        nn.Conv1d(4, 4, 2),
        nn.LSTM(4, 4),
        nn.MultiheadAttention(4, 1),
        Subclass(),
        patched(),
        parametrized(),
        parametrizations.weight_norm(nn.Linear(4, 5)),
        nn.DataParallel(nn.Linear(4, 5)),
        with_parameter(Marked(torch.zeros(5))),
        with_parameter(inference_parameter()),
    ],
    ids=lambda part: type(part).__name__,
)
def test_others_are_not_pure(part: nn.Module) -> None:
    assert not are_pure([part])


HOOKS = ["register_forward_hook", "register_forward_pre_hook"]
HOOKS += ["register_full_backward_hook", "register_full_backward_pre_hook"]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_are_seen(register: str) -> None:
    part = nn.Linear(4, 5)
    handle = getattr(part, register)(lambda *_: None)
    assert runs_user_code([part])
    handle.remove()
    assert not runs_user_code([part])


def test_hooks_of_all_modules_are_seen() -> None:
    handle = register_module_forward_hook(lambda *_: None)
    assert runs_user_code([nn.Linear(4, 5)])
    handle.remove()
    assert not runs_user_code([nn.Linear(4, 5)])


@seeded
def problem(*first: nn.Module) -> tuple[nn.Sequential, list[Any]]:
    model = nn.Sequential(*first, nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return model, cut(torch.randn(12, 4), torch.randn(12, 2), (4, 4, 4))


def operator(model: nn.Module, data: Any, loss: Callable[..., Tensor] | None = None) -> HessianLinearOperator:
    params = dict(model.named_parameters())
    return HessianLinearOperator(model, nn.MSELoss() if loss is None else loss, params, data, cache=0)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with the number of evaluations without a guard."""
    count, run = [0], Guard.run_pure

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(Guard, "run_pure", counting)
    return count


@pytest.mark.parametrize("loss", [nn.MSELoss(), F.mse_loss, None])
def test_products_and_gradients_of_pure_models(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)
    model, data = problem()
    own = loss or (lambda z, y: (z - y).square().mean())
    A = HessianLinearOperator(
        model, own, dict(model.named_parameters()), data, cache=0, batch_weight=None if loss else lambda _: 1.0
    )
    expected = by_hand(model, F.mse_loss, data)
    for _ in range(3):
        close(A @ np.eye(A.shape[1]), expected)
    mean = sum(F.mse_loss(model(X), y) for X, y in data) / 3
    gradient = torch.autograd.grad(mean, list(model.parameters()))
    for _ in range(2):
        close(A.gradient_and_loss()[0], torch.cat([part.reshape(-1) for part in gradient]))
    assert (count[0] > 0) == (loss is not None)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, functools.partial], ids=["module", "partial"])
def test_losses_with_weights(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    count, weight = counted(monkeypatch), torch.tensor([1.0, 3.0], dtype=torch.float64)
    model, data = problem()
    data = [(X, y.argmax(1)) for X, y in data]
    own = functools.partial(F.cross_entropy, weight=weight) if loss is functools.partial else loss(weight=weight)
    A = operator(model, data, own)
    joined = [(torch.cat([X for X, _ in data]), torch.cat([y for _, y in data]))]
    expected = by_hand(model, own, joined)
    for _ in range(3):
        close(A @ np.eye(A.shape[1]), expected)
    assert count[0] > 0


def test_tied_weights_and_parameters_that_are_not_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)

    @seeded
    def made() -> tuple[nn.Sequential, list[Any]]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model, cut(torch.randn(12, 4), torch.randn(12, 4), (4, 4, 4))

    model, data = made()
    params = {name: value.detach() * 1.5 for name, value in model.named_parameters()}
    A = HessianLinearOperator(model, nn.MSELoss(), params, data, cache=0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    expected = by_hand(other, F.mse_loss, data)
    for _ in range(3):
        close(A @ np.eye(A.shape[1]), expected)
    assert count[0] > 0
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("cls", [HessianLinearOperator, GGNLinearOperator, EFLinearOperator])
def test_a_loss_that_holds_a_parameter_is_refused(cls: Any) -> None:
    """The parameter in the loss is not replaced, so a part of the curvature would be missing."""
    model, data = problem()
    loss = functools.partial(F.mse_loss, weight=model[2].bias.expand(4, 2))
    A = cls(model, loss, dict(model.named_parameters()), data, cache=0)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"params\['2\.bias'\] is reached directly"):
            A.gradient_and_loss()
        with pytest.raises(ValueError, match=r"params\['2\.bias'\] is reached directly"):
            A @ np.ones(A.shape[1])


def test_constants_created_in_inference_mode() -> None:
    model, data = problem()
    with torch.inference_mode():
        frozen = copy.deepcopy(model)
    frozen[0].weight = nn.Parameter(model[0].weight.detach().clone())
    A = HessianLinearOperator(frozen, nn.MSELoss(), {"0.weight": frozen[0].weight}, data, cache=0)
    expected = by_hand(model, F.mse_loss, data, {"0.weight"})
    for _ in range(3):
        close(A @ np.eye(12), expected)


def test_a_function_mode_of_the_user_is_active_in_every_pass() -> None:
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            return 2 * result if func is F.mse_loss else result

    model, data = problem()
    A = operator(model, data)
    expected = 2 * by_hand(model, F.mse_loss, data)
    with Doubled():
        for _ in range(3):
            close(A @ np.eye(A.shape[1]), expected)


def test_a_class_that_is_set_later() -> None:
    class Counting(nn.Tanh):
        calls = 0

        def forward(self, X: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(X) ** 2

    model, data = problem()
    A = operator(model, data)
    A @ np.ones(A.shape[1])
    model[1].__class__ = Counting
    with torch.no_grad():
        model[0].bias.add_(0.1)
    expected = by_hand(copy.deepcopy(model), F.mse_loss, data)
    close(A @ np.eye(A.shape[1]), expected)
    assert "calls" not in vars(model[1])


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    model, data = problem()
    params = {name: value for name, value in model.named_parameters() if name.startswith("0.")}
    A = HessianLinearOperator(model, nn.MSELoss(), params, data, cache=0)
    A @ np.ones(A.shape[1])
    own = list(model.parameters())
    monkeypatch.setattr(nn.MSELoss, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        A @ np.ones(A.shape[1])
    assert all(value is before for value, before in zip(model.parameters(), own, strict=True))
    assert all(value.requires_grad for value in own)


def test_frozen_parameters_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)
    model, data = problem()
    params = {name: value for name, value in model.named_parameters() if not name.startswith("2.")}
    A = HessianLinearOperator(model, nn.MSELoss(), params, data, cache=0)
    expected = by_hand(model, F.mse_loss, data, params)
    for _ in range(3):
        close(A @ np.eye(A.shape[1]), expected)
    assert count[0] > 0
    assert all(value.requires_grad for value in model.parameters())


def test_an_activation_that_writes_to_the_batch() -> None:
    model, data = problem(nn.ReLU(inplace=True))
    before = copy.deepcopy(data)
    expected = by_hand(model, F.mse_loss, copy.deepcopy(data))
    A = operator(model, data)
    for _ in range(3):
        close(A @ np.eye(A.shape[1]), expected)
    assert all(torch.equal(*pair) for pair in zip((X for X, _ in data), (X for X, _ in before), strict=True))


class Loader:
    """Changes the model before the second batch of the passes after the first two."""

    def __init__(self, data: list[Any], change: Callable[[], Any]) -> None:
        self.data, self.change, self.passes = data, change, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        for index, batch in enumerate(self.data):
            if index and self.passes == 3:
                self.change()
            yield batch


def scaled(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    module.calls = getattr(module, "calls", 0) + 1
    return result * 2


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "hook": lambda model: model[0].register_forward_hook(scaled) if not model[0]._forward_hooks else None,
    "layer": lambda model: model.__setitem__(1, nn.Sigmoid()),
    "forward": lambda model: setattr(model[1], "forward", torch.sigmoid),
    "slope": lambda model: model.__setitem__(1, nn.LeakyReLU(0.3)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_loader_that_changes_a_pure_model(change: str) -> None:
    model, data = problem()
    other = copy.deepcopy(model)
    before = [torch.autograd.grad(F.mse_loss(other(data[0][0]), data[0][1]), list(other.parameters()))]
    CHANGES[change](other)
    before += [torch.autograd.grad(F.mse_loss(other(X), y), list(other.parameters())) for X, y in data[1:]]
    expected = torch.cat([sum(parts).reshape(-1) / 3 for parts in zip(*before, strict=True)])
    A = operator(model, Loader(data, lambda: CHANGES[change](model)))
    A.gradient_and_loss()
    A.gradient_and_loss()
    close(A.gradient_and_loss()[0], expected)
    assert "calls" not in vars(model[0])  # what the hook has written is undone


def test_the_model_is_as_before_if_the_loss_fails() -> None:
    model, data = problem()
    A = operator(model, data)
    A.gradient_and_loss()
    A.gradient_and_loss()
    own = list(model.parameters())
    data[1] = (data[1][0], torch.randn(4, 5).double())
    with pytest.raises(RuntimeError, match="must match the size"), pytest.warns(UserWarning, match="target size"):
        A.gradient_and_loss()
    assert all(value is before for value, before in zip(model.parameters(), own, strict=True))
    assert all(value.requires_grad for value in own)


class Watched(nn.Sequential):
    """The same model for which nothing is assumed."""


# Torch has no second derivative of Hardsigmoid.
OTHERS = ("Sequential", "Linear", "Embedding", "Flatten", "Unflatten", "Hardsigmoid", "Loss", "1d", "2d")
ACTIVATIONS = [kind for kind in pure_modules._PURE if not kind.__name__.endswith(OTHERS)]


@seeded
def random_network(seed: int) -> tuple[list[nn.Module], Callable[..., Tensor], list[Any]]:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    layers: list[nn.Module] = [nn.Linear(4, 5)]
    data = [torch.randn(size, 4) for size in (3, 4, 2)]
    if draw.random() < 0.3:
        layers = [nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 5)]
        data = [torch.randint(0, 7, (size, 3)) for size in (3, 4, 2)]
    for _ in range(draw.randint(1, 3)):
        kind = draw.choice(ACTIVATIONS)
        layers += [kind(*ARGUMENTS.get(kind, ())), nn.Linear(5, 5)]
    layers = [nn.Sequential(*layers), nn.Linear(5, 3)]
    loss = draw.choice([nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss(), F.cross_entropy])
    if isinstance(loss, nn.MSELoss):
        return layers, loss, [(X, torch.randn(len(X), 3)) for X in data]
    return layers, loss, [(X, torch.randint(0, 3, (len(X),))) for X in data]


@pytest.mark.default_cases("[0-7]")
@pytest.mark.parametrize("seed", range(60))
def test_pure_models_agree_with_watched_models(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = counted(monkeypatch)
    layers, loss, data = random_network(seed)
    models = nn.Sequential(*layers).eval(), Watched(*layers).eval()
    params = [dict(model.named_parameters()) for model in models]
    for cls in (HessianLinearOperator, GGNLinearOperator, EFLinearOperator):
        for cache in (0, "auto"):
            pure, watched = (
                cls(model, loss, own, data, cache=cache) for model, own in zip(models, params, strict=True)
            )
            before = count[0]
            eye = np.eye(pure.shape[1])[:, ::7]
            matrix = pure @ eye
            gradient, value = pure.gradient_and_loss()
            assert count[0] > before
            close(matrix, watched @ eye)
            close(matrix, pure @ eye)
            expected, expected_value = watched.gradient_and_loss()
            close(gradient, expected)
            close(value, expected_value)
    assert all(value is own for value, own in zip(models[0].parameters(), params[0].values(), strict=True))
