"""Closed-form derivatives of losses: they equal autograd's, and apply to torch's own losses only."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import LOSSES, N, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from curvop.kernels.losses import class_targets, loss_derivative, loss_divisor, loss_setting
from curvop.kernels.memory import measured

CLOSED = [name for name in LOSSES if name.startswith(("mse", "ce", "bce", "f-"))]
SHAPES = {"matrix": (N, 3), "sequence": (N, 3, 4), "image": (2, 3, 2, 2), "one": (3,)}


def autograd(loss_function, prediction: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first derivative of the loss, and the second one along a fixed direction."""
    (first,) = torch.autograd.grad(loss_function(prediction, y), prediction, create_graph=True)
    return first, second(first, prediction)


def second(first: Tensor, prediction: Tensor) -> Tensor:
    along = torch.linspace(-1.0, 1.0, first.numel(), dtype=first.dtype).view_as(first)
    return torch.autograd.grad(first, prediction, along, allow_unused=True, materialize_grads=True)[0]


def check(loss_function, prediction: Tensor, y: Tensor) -> None:
    prediction = prediction.detach().requires_grad_()
    divisor = loss_divisor(loss_function)(prediction, None, y)
    first = loss_derivative(loss_function)(prediction, y, divisor).first(None)
    expected = autograd(loss_function, prediction, y)
    torch.testing.assert_close(first, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(second(first, prediction), expected[1], rtol=1e-12, atol=1e-14)


@seeded
def example(name: str) -> tuple[object, Tensor, Tensor]:
    loss_function, y = LOSSES[name]()
    return loss_function, torch.randn(N, 3), y


@pytest.mark.parametrize("name", CLOSED)
def test_every_setting(name: str) -> None:
    check(*example(name))


WEIGHTS = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["plain", "weights"])
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_cross_entropy_of_any_shape(shape: str, smoothing: float, weight, probabilities: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(SHAPES[shape], generator=generator, dtype=torch.float64)
    axis = min(1, scores.ndim - 1)
    if probabilities:
        y = torch.rand(scores.shape, generator=generator, dtype=torch.float64).softmax(axis)
    else:
        y = torch.randint(0, 3, scores.amax(axis).shape, generator=generator)
        if y.ndim > 1:
            y[0] = -100
    loss_function = nn.CrossEntropyLoss(weight, label_smoothing=smoothing)
    check(loss_function, scores, y)
    targets = class_targets(functools.partial(loss_setting, loss_function), scores, y)
    divisor = loss_divisor(loss_function)(scores, None, y)
    torch.testing.assert_close(-(targets * scores.log_softmax(axis)).sum() / divisor, loss_function(scores, y))


def test_scores_of_minus_infinity_are_classes_left_out() -> None:
    scores = torch.randn(4, 3, dtype=torch.float64)
    check(nn.CrossEntropyLoss(), F.pad(scores, (0, 1), value=-torch.inf), torch.tensor([0, 1, 2, 0]))


class Doubled(nn.MSELoss):
    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        return 2 * super().forward(prediction, y)


def hooked() -> nn.Module:
    loss_function = nn.MSELoss()
    loss_function.register_forward_hook(lambda module, inputs, loss: 2 * loss)
    return loss_function


def patched() -> nn.Module:
    loss_function = nn.MSELoss()
    loss_function.forward = lambda prediction, y: ((prediction - y) ** 4).mean()
    return loss_function


@pytest.mark.parametrize(
    "loss_function",
    [
        *(Doubled(), hooked(), patched(), nn.L1Loss(), lambda prediction, y: prediction.sum()),
        *(functools.partial(F.mse_loss, size_average=True), functools.partial(hooked())),
    ],
)
def test_no_closed_form_of_a_loss_that_is_not_torchs_own(loss_function) -> None:
    assert loss_derivative(loss_function) is None


@pytest.mark.parametrize(
    ("loss_function", "prediction", "y"),
    [
        (nn.MSELoss(), torch.randn(4, 1), torch.randn(4)),  # broadcasts
        (nn.MSELoss(), torch.randn(4), torch.randn(4, dtype=torch.float64)),  # widens
        (nn.MSELoss(), torch.randn(4), torch.arange(4)),
        (nn.MSELoss(), torch.randn(4, dtype=torch.complex64), torch.randn(4)),
        (functools.partial(F.mse_loss, weight=torch.ones(4)), torch.randn(4), torch.randn(4)),
        (nn.CrossEntropyLoss(), nn.Parameter(torch.randn(4, 3)), torch.tensor([0, 1, 2, 0])),
    ],
)
def test_unusual_pairs_go_the_general_way(loss_function, prediction, y) -> None:
    assert loss_derivative(loss_function)(prediction, y, 4.0) is None


def test_cross_entropy_retains_the_probabilities_alone() -> None:
    scores = torch.randn(100, 50, requires_grad=True)
    y = torch.randint(0, 50, (100,))

    def closed() -> Tensor:
        return loss_derivative(nn.CrossEntropyLoss())(scores * 1.0, y, 100.0).first(None)

    def general() -> Tensor:
        prediction = scores * 1.0
        return torch.autograd.grad(F.cross_entropy(prediction, y), prediction, create_graph=True)[0]

    matrix = scores.numel() * scores.element_size()
    assert matrix <= measured(closed, [])[1] < 1.1 * matrix
    assert measured(general, [])[1] > 2 * matrix
