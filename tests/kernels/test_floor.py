"""Floating-point operations of kept products, counted by torch, in units of a gradient.

A layer that is bilinear in its input and its weight (linear layers, convolutions, attention) takes one unit of work
forward and two units backward, so a gradient takes three. A product with the Jacobian takes two units, and so does a
product with its transpose: matrices of the form J' M J take 4/3 gradients. A product with the Hessian differentiates
the three steps of a gradient, each of which takes twice its work: 2 gradients. The first layer takes less, because its
input has no derivative.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import seeded
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_backward_flop

from curvop import (
    EFLinearOperator,
    FisherLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)

HESSIAN, OTHERS = 2.0, 1.34
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "1-d, strided": lambda: stack(nn.Conv1d, 1, 3, stride=2, padding=1),
    "2-d, groups": lambda: stack(nn.Conv2d, 2, 3, groups=2),
    "2-d, dilated": lambda: stack(nn.Conv2d, 2, 3, dilation=2, padding=2, bias=False),
    "3-d": lambda: stack(nn.Conv3d, 3, 2),
    "1-d, transposed": lambda: stack(nn.ConvTranspose1d, 1, 3, stride=2, groups=2),
    "2-d, transposed": lambda: stack(nn.ConvTranspose2d, 2, 3, padding=1),
    "3-d, transposed": lambda: stack(nn.ConvTranspose3d, 3, 2, dilation=2),
}
MATRICES: dict[str, Callable[..., Any]] = {
    "Hessian": HessianLinearOperator,
    "GGN": GGNLinearOperator,
    "Fisher": FisherLinearOperator,
    "sampled Fisher": lambda *args, **kwargs: FisherLinearOperator(*args, **kwargs, mc_samples=1, rng=0),
    "empirical Fisher": EFLinearOperator,
    "Jacobian": lambda loss_function, **kwargs: Both(JacobianLinearOperator(**kwargs)),
}
MODELS = ("MLP 784-512-512-10", "CNN 32x32", "GPT 4 layers, d = 128", "ResNet-18 64x64, eval")


class Both:
    """A product with a Jacobian, then one with its transpose."""

    def __init__(self, J: JacobianLinearOperator) -> None:
        self._J, self.shape = J, (J.shape[1], J.shape[1])

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        return self._J.T @ (self._J @ x)


def stack(layer: Any, dimensions: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Three convolutions, of which the first has an input without a derivative."""
    layers = [layer(4, 8, *args, **kwargs), nn.Tanh(), layer(8, 8, *args, **kwargs), nn.Tanh()]
    return nn.Sequential(*layers, layer(8, 4, *args, **kwargs), nn.Flatten(2), Mean())


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-1)


@seeded
def convolutions(name: str) -> dict[str, Any]:
    model, dimensions = CONVOLUTIONS[name](), int(name[0])
    data = [(torch.randn(3, 4, *[13] * dimensions), torch.randint(0, 4, (3,)))]
    return {
        "model": model,
        "loss_function": nn.CrossEntropyLoss(),
        "params": dict(model.named_parameters()),
        "data": data,
    }


@seeded
def benchmark_problem(name: str) -> dict[str, Any]:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "models.py"
    spec = importlib.util.spec_from_file_location("benchmark_models", path)
    models = sys.modules.setdefault("benchmark_models", importlib.util.module_from_spec(spec))
    if not hasattr(models, "PROBLEMS"):
        spec.loader.exec_module(models)
    problem = models.PROBLEMS[name]()
    return problem | {"data": [tuple(part[:2] for part in problem["data"][0])]}


def counter() -> FlopCounterMode:
    """Count operations. Unlike torch's own formula, respect the groups in gradients with respect to weights."""

    def backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        *others, groups, (image, weight, bias) = args
        by_image = conv_backward_flop(*others, groups, [image, False, bias], out_val=out_val)
        return by_image + conv_backward_flop(*others, groups, [False, weight, bias], out_val=out_val) // groups

    backward._get_raw = True
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: backward})


def count(function: Callable[[], object]) -> int:
    with counter() as counted:
        function()
    return counted.get_total_flops()


def gradient_count(problem: dict[str, Any]) -> int:
    [(X, y)], params = problem["data"], list(problem["params"].values())
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count fused attention on a CPU
        return count(lambda: torch.autograd.grad(problem["loss_function"](problem["model"](X), y), params))


def product_count(A: Any) -> int:
    """Count a product whose linearizations are kept."""
    x = np.ones(A.shape[1])
    A @ x
    return count(lambda: A @ x)


def check(problem: dict[str, Any], matrix: str, engine: str = "autograd") -> None:
    A = MATRICES[matrix](**problem, engine=engine)
    assert 0 < product_count(A) <= (HESSIAN if matrix == "Hessian" else OTHERS) * gradient_count(problem)


@pytest.mark.default_cases("1-d, strided-*", "*-GGN")
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, matrix: str) -> None:
    check(convolutions(name), matrix)


@pytest.mark.default_cases("CNN*-GGN", "CNN*-Hessian", "ResNet*-GGN")
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_benchmarks(name: str, matrix: str) -> None:
    check(benchmark_problem(name), matrix)


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["Hessian", "GGN"])
@pytest.mark.parametrize("name", ["CNN 32x32", "MLP 784-512-512-10", "GPT 4 layers, d = 128"])
def test_models_of_the_benchmarks_with_the_compiled_engine(name: str, matrix: str) -> None:
    check(benchmark_problem(name), matrix, engine="compiled")


def test_a_block_off_the_diagonal_computes_no_gradients_of_other_layers() -> None:
    """The layers take 32, 64 and 32 units of work forward.

    A gradient takes 128 units forward, 128 units for the weights, and 96 units for the inputs of the last two layers.
    The product takes 32 units for the tangent of the last layer, 96 units for the inputs of the last two layers, and 32
    units for the weights of the first layer.
    """
    problem = convolutions("2-d, dilated")
    block = GGNLinearOperator(**problem).block(["0.weight"], ["4.weight"])
    assert product_count(block) / gradient_count(problem) == pytest.approx(160 / 352)
