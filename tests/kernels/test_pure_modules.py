"""Pure modules have no side effects, and everything that could have some is not treated as pure.

The reference for products is double backward through the user's own module, called as the user calls it.
"""

from __future__ import annotations

import copy
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

from curvop import HessianLinearOperator
from curvop.kernels import differentiable, pure_modules
from curvop.kernels.guard import Guard
from curvop.kernels.pure_modules import are_pure, have_hooks

ARGUMENTS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (4, 4),
    nn.Bilinear: (4, 4, 3),
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
    if kind is nn.Bilinear:
        return X, X.clone()
    return (torch.randn(2, 3, 4, 4),) if kind in (nn.MaxPool2d, nn.AvgPool2d) else (X,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", sorted(pure_modules._PURE, key=lambda kind: kind.__name__))
def test_pure_modules_only_compute(kind: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    part, args = kind(*ARGUMENTS.get(kind, ())).train(training), inputs(kind)
    assert are_pure([part])
    assert not have_hooks([part])
    attributes, tensors = dict(vars(part)), [*part.parameters(), *part.buffers(), *args]
    values, versions = copy.deepcopy([tensor.detach() for tensor in tensors]), [tensor._version for tensor in tensors]
    with Handled() as handled:
        result = part(*args)
    assert handled.found == []
    assert list(vars(part).items()) == list(attributes.items())
    assert [tensor._version for tensor in tensors] == versions
    assert all(map(torch.equal, tensors, values))
    assert isinstance(result, Tensor)


class Subclass(nn.Sequential):
    """Counts its calls."""

    calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(X)


def patched() -> nn.Module:
    layer = nn.Linear(4, 5)
    layer.forward = lambda X: F.linear(X, layer.weight, layer.bias).sin()  # type: ignore[method-assign]
    return layer


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
    assert have_hooks([part])
    handle.remove()
    assert not have_hooks([part])


def test_hooks_of_all_modules_are_seen() -> None:
    handle = register_module_forward_hook(lambda *_: None)
    assert have_hooks([nn.Linear(4, 5)])
    handle.remove()
    assert not have_hooks([nn.Linear(4, 5)])


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
    module.calls = getattr(module, "calls", 0) + 1  # type: ignore[assignment]
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
