"""Convolutions that are differentiated by their own two bilinear maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from cases import seeded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from curvop import HessianLinearOperator
from curvop.kernels.differentiable import TwiceDifferentiable

CASES: dict[str, tuple[Callable[..., Tensor], Sequence[tuple[int, ...]]]] = {
    "strided": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]),
    "dilated groups": (
        lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=1, dilation=2, groups=2),
        [(2, 4, 6, 6), (4, 2, 3, 3), (4,)],
    ),
    "depthwise": (lambda x, w: F.conv2d(x, w, padding=(1, 0), groups=3), [(2, 3, 4, 4), (3, 1, 3, 2)]),
    "a remainder that no window covers": (lambda x, w: F.conv2d(x, w, stride=3), [(2, 2, 7, 8), (3, 2, 3, 2)]),
    "one dimension": (lambda x, w, b: F.conv1d(x, w, bias=b, padding=(1,)), [(2, 3, 5), (2, 3, 3), (2,)]),
    "three dimensions": (lambda x, w, b: F.conv3d(x, w, b), [(1, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,)]),
    "transposed": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1),
        [(2, 3, 3, 3), (3, 2, 3, 3), (2,)],
    ),
    "transposed groups": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, groups=2, dilation=2),
        [(2, 4, 3), (4, 2, 3), (4,)],
    ),
    "words for padding": (lambda x, w: F.conv2d(x, w, padding="same"), [(2, 2, 4, 4), (3, 2, 3, 3)]),
    "no batch": (lambda x, w, b: F.conv2d(x, w, b), [(2, 4, 4), (3, 2, 2, 2), (3,)]),
    "arguments by name": (lambda x, w: F.conv2d(input=x, weight=w, stride=2), [(2, 2, 4, 4), (3, 2, 2, 2)]),
}


@seeded
def tensors(name: str) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in CASES[name][1]]


@pytest.mark.parametrize("name", CASES)
def test_derivatives_against_finite_differences(name: str) -> None:
    function, _ = CASES[name]
    inputs = tensors(name)

    def gradients(*inputs: Tensor) -> Sequence[Tensor]:
        with TwiceDifferentiable():
            y = function(*inputs)
        return torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)

    with TwiceDifferentiable():
        assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(gradients, inputs)  # the second derivative
    assert torch.autograd.gradgradcheck(gradients, inputs)  # the third and the fourth


@pytest.mark.parametrize("name", CASES)
def test_the_product_is_torchs_own(name: str) -> None:
    function, _ = CASES[name]
    inputs = tensors(name)
    seeds = [torch.randn_like(part) for part in inputs]

    def product() -> Sequence[Tensor]:
        gradient = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(gradient, inputs, seeds)

    expected = product()
    with TwiceDifferentiable():
        for one, other in zip(product(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@seeded
def problem() -> dict[str, object]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(20, 2))
    data = [(torch.randn(6, 3, 6, 6), torch.randn(6, 2))]
    return {"model": model, "loss_function": nn.MSELoss(), "params": dict(model.named_parameters()), "data": data}


def test_a_product_does_twice_the_work_of_a_gradient_and_no_more() -> None:
    own = problem()
    H = HessianLinearOperator(**own)
    x = np.ones(H.shape[1])
    H @ x
    [(X, y)] = own["data"]
    with FlopCounterMode(display=False) as gradient:
        F.mse_loss(own["model"](X), y).backward()
    with FlopCounterMode(display=False) as product:
        H @ x
    # The first layer has no part of the images, neither in the gradient nor in the product.
    assert product.get_total_flops() <= 2 * gradient.get_total_flops()


def test_a_block_of_weights_or_of_biases() -> None:
    own = problem()
    whole = HessianLinearOperator(**own)
    matrix = whole @ np.eye(whole.shape[1])
    where = whole.params_slices
    for rows, cols in (("0.weight", "2.bias"), ("2.bias", "0.weight"), ("2.bias", "0.bias"), ("2.weight", "2.weight")):
        block = whole.block(rows, cols)
        np.testing.assert_allclose(
            block @ np.eye(block.shape[1]), matrix[where[rows], where[cols]], rtol=1e-10, atol=1e-14
        )


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, X: Tensor) -> Tensor:
        return checkpoint(self.model, X, use_reentrant=False)


def test_checkpointed_convolutions() -> None:
    own = problem()
    expected = HessianLinearOperator(**own) @ np.ones(own_size(own))
    model = Checkpointed(own["model"])
    H = HessianLinearOperator(**own | {"model": model, "params": dict(model.named_parameters())})
    np.testing.assert_allclose(H @ np.ones(H.shape[1]), expected, rtol=1e-10)
    np.testing.assert_allclose(H @ np.ones(H.shape[1]), expected, rtol=1e-10)


def own_size(own: dict[str, object]) -> int:
    return sum(value.numel() for value in own["params"].values())


def test_models_that_use_function_transforms_of_their_own() -> None:
    own = problem()
    expected = HessianLinearOperator(**own) @ np.ones(own_size(own))

    def one_by_one(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return torch.func.vmap(lambda x: torch.func.functional_call(own["model"], params, (x[None],))[0])(X)

    H = HessianLinearOperator(one_by_one, own["loss_function"], own["params"], own["data"])
    np.testing.assert_allclose(H @ np.ones(H.shape[1]), expected, rtol=1e-10)


def test_under_autocast_as_torch_computes_it() -> None:
    own = problem()
    model = own["model"].float()
    data = [(X.float(), y.float()) for X, y in own["data"]]

    def lower(params: dict[str, Tensor], X: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.func.functional_call(model, params, (X,)).float()

    params = dict(model.named_parameters())
    H = HessianLinearOperator(lower, nn.MSELoss(), params, data)
    exact = HessianLinearOperator(model, nn.MSELoss(), params, data)
    x = np.ones(H.shape[1])
    difference = np.linalg.norm(H @ x - exact @ x) / np.linalg.norm(exact @ x)
    assert 1e-4 < difference < 0.1  # three digits: bfloat16 it is
