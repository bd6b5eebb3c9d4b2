"""Convolutions whose derivatives are the package's own two bilinear maps."""

from __future__ import annotations

import itertools
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
from curvop.kernels.differentiable import TwiceDifferentiable, _gradient

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


@pytest.mark.default_cases("one dimension", "three dimensions", "transposed", "no batch")
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
    # Neither the gradient nor the product has a part for the images of the first layer.
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


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_only_the_wanted_gradients_are_returned(wanted: tuple[bool, bool, bool]) -> None:
    """For a bias alone, torch also returns a gradient of the weight, here in the wrong shape (3, 4, 1, 3)."""

    @seeded
    def made() -> list[Tensor]:
        return [torch.randn(2, 3, 3).float().mT, torch.randn(2, 3, 4).float().mT, torch.randn(3, 4, 3).float()]

    grad, x, weight = made()
    found = _gradient(grad, x, weight, ([1], [1], [1], False, [0], 1), wanted)
    assert [part is not None for part in found] == list(wanted)
    inputs = [x.requires_grad_(), weight.requires_grad_(), torch.zeros(3, requires_grad=True, dtype=torch.float32)]
    expected = torch.autograd.grad(F.conv1d(*inputs, padding=1), inputs, grad)
    for part, other in zip(found, expected, strict=True):
        if part is not None:
            torch.testing.assert_close(part, other)


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
    assert 1e-4 < difference < 0.1  # three digits, so it is computed in bfloat16


def penalised(params: dict[str, Tensor], batch: tuple[Tensor, Tensor], own: dict[str, object], way: str) -> Tensor:
    """Add the squared derivatives of the scores by the images, batched or one by one."""
    X = batch[0].clone().requires_grad_()
    scores = torch.func.functional_call(own["model"], params, (X,))
    total, directions = scores.sum(0), torch.eye(scores.shape[1])
    if way == "at once":
        (jacobian,) = torch.autograd.grad(total, X, directions, is_grads_batched=True, create_graph=True)
    elif way == "vmap":
        jacobian = torch.vmap(lambda v: torch.autograd.grad(total, X, v, create_graph=True)[0])(directions)
    else:
        jacobian = torch.stack([torch.autograd.grad(total, X, v, create_graph=True)[0] for v in directions])
    return F.mse_loss(scores, batch[1]) + jacobian.square().mean()


@pytest.mark.parametrize("way", ["at once", "vmap"])
def test_losses_that_hold_batched_derivatives(way: str) -> None:
    own = problem()

    def product(way: str) -> np.ndarray:
        H = HessianLinearOperator.from_objective(
            lambda params, batch: penalised(params, batch, own, way), own["params"], own["data"]
        )
        return H @ np.ones(H.shape[1])

    np.testing.assert_allclose(product(way), product("one by one"), rtol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by its own forward mode
@pytest.mark.parametrize("way", ["func", "dual"])
def test_models_with_forward_mode_inside(way: str) -> None:
    own = problem()

    def derivative(params: dict[str, Tensor], X: Tensor) -> Tensor:
        def model(X: Tensor) -> Tensor:
            return torch.func.functional_call(own["model"], params, (X,))

        if way == "func":
            return torch.func.jvp(model, (X,), (torch.ones_like(X),))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
            return torch.autograd.forward_ad.unpack_dual(model(dual)).tangent

    def expected(params: dict[str, Tensor], X: Tensor) -> Tensor:
        X = X.clone().requires_grad_()
        y = torch.func.functional_call(own["model"], params, (X,))
        v = torch.zeros_like(y, requires_grad=True)
        (gradient,) = torch.autograd.grad(y, X, v, create_graph=True)
        return torch.autograd.grad(gradient, v, torch.ones_like(X), create_graph=True)[0]

    products = []
    for model in (derivative, expected):
        H = HessianLinearOperator(model, own["loss_function"], own["params"], own["data"])
        products.append(H @ np.ones(H.shape[1]))
    np.testing.assert_allclose(*products, rtol=1e-8)


def test_settings_of_any_kind_of_integer() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3, dtype=torch.float64))
    data = [(torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(2, 36, dtype=torch.float64))]

    def product(stride: object, padding: object) -> np.ndarray:
        def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
            return F.conv2d(X, params["weight"], stride=stride, padding=padding).flatten(1)

        return HessianLinearOperator(model, nn.MSELoss(), {"weight": weight}, data) @ np.ones(108)

    np.testing.assert_array_equal(product(np.int64(2), torch.tensor(1)), product(2, 1))


def test_shapes_asked_of_the_meta_device() -> None:
    probe = nn.Conv1d(4, 4, 1, device="meta")
    params = {"weight": torch.randn(4, 3, dtype=torch.float64, requires_grad=True)}

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        assert probe(X.float().to("meta")[:, :, None]).shape == (6, 4, 1)
        return X @ params["weight"]

    data = [(torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64))]
    assert (HessianLinearOperator(model, nn.MSELoss(), params, data) @ np.ones(12)).any()
