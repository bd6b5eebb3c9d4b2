"""The settings that lower the precision of products are found, named, and trusted only if they have an effect."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cases import Problem
from torch import Tensor, nn
from torch.backends import cuda, cudnn, mkldnn

from curvop import GGNLinearOperator, HessianLinearOperator, check
from curvop.kernels import precision
from curvop.kernels.precision import float32_settings, lowest_precision

SINGLE, TF32, BF16 = torch.finfo(torch.float32).eps, 2.0**-10, 2.0**-7


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Restore PyTorch's settings. The setters of the old and of the new settings change one another."""
    targets = [torch.backends, mkldnn.matmul, mkldnn.conv, cuda.matmul, cudnn.conv, cudnn.rnn]
    old = torch.get_float32_matmul_precision()
    before = [target.fp32_precision for target in targets]
    yield
    torch.set_float32_matmul_precision(old)
    for target, value in zip(targets, before, strict=True):
        target.fp32_precision = value
    cudnn.allow_tf32 = True  # the default


@pytest.fixture
def rounding(monkeypatch) -> None:
    """Pretend that the CPU has the instructions that the settings allow."""
    monkeypatch.setattr(precision, "_rounds", lambda setting, convolution: True)


def linear(dtype: torch.dtype = torch.float32) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return Problem(model, nn.CrossEntropyLoss(), [(torch.randn(9, 3, dtype=dtype), torch.randint(0, 2, (9,)))])


def convolution() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2))
    return Problem(model, nn.CrossEntropyLoss(), [(torch.randn(9, 1, 5), torch.randint(0, 2, (9,)))])


def hessian(problem: Problem) -> HessianLinearOperator:
    return HessianLinearOperator(problem.model, problem.loss_function, problem.params, problem.data)


class OnGPU:
    """A stand-in for a tensor on a GPU, of which only the dtype and the device are read."""

    dtype, device = torch.float32, torch.device("cuda")


def on_gpu(convolves: bool, dtype: torch.dtype = torch.float32) -> precision.Precision:
    value = OnGPU()
    value.dtype = dtype
    return lowest_precision(torch.zeros(1), [value], None, lambda: convolves)  # type: ignore[list-item]


class TestOfAGPU:
    def test_the_defaults_lower_the_precision_of_convolutions_only(self) -> None:
        cudnn.allow_tf32 = True
        assert on_gpu(convolves=False).epsilon == SINGLE
        found = on_gpu(convolves=True)
        assert found.epsilon == TF32
        assert "convolutions and recurrent layers" in found.cause
        assert "torch.backends.cudnn.allow_tf32 = False" in found.remedy
        assert on_gpu(convolves=True, dtype=torch.float64) == precision.Precision(SINGLE)  # the epsilon of the loss

    def test_the_remedy_for_convolutions(self) -> None:
        cudnn.allow_tf32 = False
        assert on_gpu(convolves=True) == precision.Precision(SINGLE)

    @pytest.mark.parametrize("old", [True, False])
    def test_matrix_products(self, old: bool) -> None:
        if old:
            torch.set_float32_matmul_precision("high")
        else:
            cuda.matmul.fp32_precision = "tf32"
        found = on_gpu(convolves=False)
        assert found.epsilon == TF32
        assert "matrix products" in found.cause
        assert found.remedy == "set torch.backends.cuda.matmul.allow_tf32 = False"
        cuda.matmul.allow_tf32 = False
        assert on_gpu(convolves=False) == precision.Precision(SINGLE)

    def test_old_and_new_settings_may_be_mixed(self) -> None:
        cudnn.allow_tf32 = True
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
        assert on_gpu(convolves=True) == precision.Precision(SINGLE)
        torch.backends.fp32_precision = "tf32"
        assert on_gpu(convolves=True).epsilon == TF32


class TestOfACPU:
    def test_nothing_is_computed_by_default(self, monkeypatch) -> None:
        monkeypatch.setattr(precision, "_rounds", None)
        assert hessian(convolution()).epsilon == SINGLE

    @pytest.mark.parametrize("setting", ["tf32", "bf16"])
    def test_the_setting_counts_only_if_the_cpu_obeys_it(self, setting: str) -> None:
        mkldnn.matmul.fp32_precision = setting
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
        exact = a.double() @ b.double()
        error = float(((a @ b).double() - exact).norm() / exact.norm())
        assert (hessian(linear()).epsilon > SINGLE) == (error > 1e-4)

    @pytest.mark.usefixtures("rounding")
    def test_matrix_products_and_convolutions(self) -> None:
        torch.set_float32_matmul_precision("medium")
        assert (hessian(linear()).epsilon, hessian(linear(torch.float64)).epsilon) == (BF16, torch.finfo(float).eps)
        torch.set_float32_matmul_precision("highest")
        mkldnn.conv.fp32_precision = "bf16"
        assert (hessian(linear()).epsilon, hessian(convolution()).epsilon) == (SINGLE, BF16)

    @pytest.mark.usefixtures("rounding")
    def test_the_cost_says_so_with_the_remedy(self) -> None:
        H = hessian(linear())
        assert H.cost(1).reduced_precision == ""
        mkldnn.matmul.fp32_precision = "bf16"
        cost = H.cost(1)
        assert str(cost).endswith(
            "; matrix products of float32 matrices use bfloat16 (epsilon 7.8e-03): "
            'set torch.backends.mkldnn.matmul.fp32_precision = "ieee"'
        )
        mkldnn.matmul.fp32_precision = "ieee"
        assert H.cost(1).reduced_precision == ""

    @pytest.mark.usefixtures("rounding")
    def test_the_check_says_so_with_the_remedy(self) -> None:
        mkldnn.matmul.fp32_precision = "tf32"
        report = check(hessian(linear()), rng=0)
        assert report.verdict == "nothing is wrong, with 1 warning: precision"
        finding = report["precision"]
        assert (
            finding.text == "the parameters are float32; matrix products of float32 matrices use TF32; epsilon 9.8e-04"
        )
        assert finding.remedy == 'set torch.backends.mkldnn.matmul.fp32_precision = "ieee"'
        assert report["symmetry"].limit == pytest.approx(TF32 ** (2 / 3))

    def test_the_probe_sees_rounded_entries(self, monkeypatch) -> None:
        multiply = Tensor.__matmul__

        def rounded(a: Tensor, b: Tensor) -> Tensor:
            return multiply(a.bfloat16().float(), b.bfloat16().float())

        assert not precision._rounds.__wrapped__("ieee", False)
        monkeypatch.setattr(Tensor, "__matmul__", rounded)
        assert precision._rounds.__wrapped__("bf16", False)


def test_autocast_is_named() -> None:
    H = hessian(linear())
    with torch.autocast("cpu", torch.bfloat16):
        found = H._precision()
    assert (found.epsilon, found.cause) == (BF16, "torch.autocast computes in bfloat16")
    assert math.isclose(H.epsilon, SINGLE)


@pytest.mark.parametrize("kind", [HessianLinearOperator, GGNLinearOperator])
def test_a_changed_setting_linearizes_again(kind) -> None:
    problem, passes = linear(), itertools.count()

    def model(params: dict[str, Tensor], X: Tensor) -> Tensor:
        next(passes)
        return torch.func.functional_call(problem.model, params, (X,))

    A = kind(model, problem.loss_function, problem.params, problem.data)
    x = np.ones(A.shape[1])
    products = [A @ x for _ in range(3)]
    before = next(passes)
    products.append(A @ x)
    assert next(passes) == before + 1  # nothing ran
    mkldnn.matmul.fp32_precision = "bf16" if float32_settings(A.device)[0] != "bf16" else "ieee"
    products.append(A @ x)
    assert next(passes) > before + 2
    for product in products[1:]:
        np.testing.assert_allclose(product, products[0], rtol=0.05, atol=0.01)
