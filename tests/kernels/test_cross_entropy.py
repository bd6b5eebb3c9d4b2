"""Derivatives of the cross-entropy by chunks of rows: they are exact, and need little memory for large vocabularies."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvop import EFLinearOperator, FisherLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvop.kernels import cross_entropy
from curvop.kernels.cross_entropy import chunks
from curvop.kernels.losses import loss_derivative, loss_divisor, loss_value

close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the logits of the tests into many chunks, as if they were large."""
    monkeypatch.setattr(cross_entropy, "_CPU_ENTRIES", 12)
    monkeypatch.setattr(cross_entropy, "_FEW_ENTRIES", 0)


@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 5, 4), (2, 3, 1, 4), (3, 2, 2, 40), (0, 4), (1, 4)])
def test_chunks_cover_every_row_once(shape: tuple[int, ...]) -> None:
    count, sizes = torch.zeros(shape), []
    for at in chunks(count):
        count[at] += 1
        sizes.append(count[at].numel())
    assert (count == 1).all()
    assert max(sizes) <= max(12, shape[-1])


CLASSES, WEIGHTS = 4, torch.tensor([0.5, 2.0, 1.5, 0.0], dtype=torch.float64)
SETTINGS = {
    "plain": {},
    "weights": {"weight": WEIGHTS},
    "smoothed": {"label_smoothing": 0.2},
    "all": {"weight": WEIGHTS, "label_smoothing": 0.2, "ignore_index": 1, "reduction": "sum"},
}


def logits(layout: str) -> Tensor:
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {
        "one": lambda: draw(CLASSES),
        "matrix": lambda: draw(9, CLASSES),
        "columns": lambda: draw(CLASSES, 9).T,
        "sequence": lambda: draw(2, CLASSES, 5),
        "transposed": lambda: draw(2, 5, CLASSES).transpose(1, 2),
        "image": lambda: draw(2, CLASSES, 3, 2),
    }[layout]()


def targets(z: Tensor, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    axis = min(1, z.ndim - 1)
    if kind == "probabilities":
        return torch.rand(z.shape, generator=generator, dtype=torch.float64).softmax(axis)
    y = torch.randint(0, CLASSES - 1, z.amax(axis).shape, generator=generator)
    if y.ndim and kind == "ignored":
        y.view(-1)[::2] = -100
    return y


@pytest.mark.default_cases("all-*-transposed", "weights-classes-matrix", "plain-ignored-*", "smoothed-ignored-image")
@pytest.mark.parametrize("layout", ["one", "matrix", "columns", "sequence", "transposed", "image"])
@pytest.mark.parametrize("kind", ["classes", "ignored", "probabilities"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_derivatives_of_every_setting_and_layout(setting: str, kind: str, layout: str) -> None:
    settings = dict(SETTINGS[setting])
    if kind != "classes":
        settings.pop("ignore_index", None)
    loss_function, z = nn.CrossEntropyLoss(**settings), logits(layout)
    y = targets(z, kind)
    loss = functools.partial(F.cross_entropy, target=y, **settings)
    first = torch.func.grad(loss)
    w = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).view(z.shape).cos()
    second = torch.func.vjp(first, z)[1](w)[0]

    close(loss_value(loss_function, z, y), loss(z))
    leaf = z.detach().requires_grad_()
    closed = loss_derivative(loss_function)(leaf, y, loss_divisor(loss_function)(leaf, None, y))
    residual = closed.first(None)
    close(residual, first(z))
    close(closed.first(torch.full_like(z, torch.nan)), first(z))
    close(torch.autograd.grad(residual, leaf, w, retain_graph=True)[0], second)
    many = torch.stack([w, z])
    [batched] = torch.autograd.grad(residual, leaf, many, retain_graph=True, is_grads_batched=True)
    close(batched, torch.stack([second, torch.func.vjp(first, z)[1](z)[0]]))
    [again] = torch.autograd.grad(residual, leaf, w, create_graph=True)
    third = torch.func.grad(lambda z: (torch.func.vjp(first, z)[1](w)[0] * w.sin()).sum())(z)
    close(torch.autograd.grad((again * w.sin()).sum(), leaf)[0], third)
    for out in (None, torch.full_like(z, torch.nan)):
        M, own = closed.second(out), w.clone().movedim(closed.axis, -1)
        product = torch.empty_like(own)
        M.multiply(own, product)
        close(product.movedim(-1, closed.axis), second)
        M.multiply(own, own)
        close(own, product, rtol=0, atol=0)


def test_all_targets_ignored_and_no_targets() -> None:
    for z, y in ((logits("matrix"), torch.full((9,), -100)), (torch.empty(0, CLASSES), torch.empty(0).long())):
        assert torch.isnan(loss_value(nn.CrossEntropyLoss(), z, y))
        assert loss_value(nn.CrossEntropyLoss(reduction="sum"), z, y) == 0


def test_invalid_targets_raise_the_errors_of_torch() -> None:
    z = logits("matrix")
    for y in (torch.full((9,), CLASSES), torch.zeros(8).long(), torch.zeros(9)):
        with pytest.raises((IndexError, ValueError, RuntimeError)) as expected:
            F.cross_entropy(z, y)
        with pytest.raises(expected.type) as raised:
            loss_value(nn.CrossEntropyLoss(), z, y)
        assert str(raised.value).split("size")[0] == str(expected.value).split("size")[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_results_only(dtype: torch.dtype) -> None:
    z, y, w = logits("matrix").to(dtype), targets(logits("matrix"), "classes"), logits("columns").to(dtype)
    leaf = z.detach().requires_grad_()
    closed = loss_derivative(nn.CrossEntropyLoss())(leaf, y, 1e4)  # a divisor for which float16 would underflow
    p = z.double().softmax(-1)
    expected = (p * w.double() - p * (p * w.double()).sum(-1, keepdim=True)) / 1e4
    closed.second(None).multiply(w, product := torch.empty_like(w))
    [other] = torch.autograd.grad(closed.first(None), leaf, w)
    for found in (product, other):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def hessian(function):
    return torch.func.jacrev(torch.func.jacrev(function))


class Head(nn.Module):
    """Features and a linear head, as in a language model. The logits have the shape (B, C, T)."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 2), nn.Linear(2, CLASSES, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh()).transpose(1, 2)


def flat(model: nn.Module, loss) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Hessian, the GGN and the empirical Fisher matrix of `loss` by ``torch.func``.

    ``loss(z, reduction=)`` is the loss of the logits.
    """
    params = {name: value.detach() for name, value in model.named_parameters()}
    sizes = [value.numel() for value in params.values()]

    def predict(theta: Tensor) -> Tensor:
        parts = [part.view_as(value) for part, value in zip(theta.split(sizes), params.values(), strict=True)]
        return torch.func.functional_call(model, dict(zip(params, parts, strict=True)), (X,))

    theta = torch.cat([value.flatten() for value in params.values()])
    z, J = predict(theta), torch.func.jacrev(predict)(theta)
    n = z.numel()
    G = hessian(loss)(z).view(n, n)
    gradients = torch.func.jacrev(lambda theta: loss(predict(theta), reduction="none").flatten())(theta)
    count = (Y != -100).sum()
    J = J.reshape(n, -1)
    return hessian(lambda theta: loss(predict(theta)))(theta), J.T @ G @ J, gradients.T @ gradients / count


GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(3, 5, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, CLASSES, (3, 5), generator=GENERATOR)
Y[1, 2:] = -100


@pytest.mark.default_cases("autograd-*")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("engine", ["autograd", "compiled"])
def test_matrices_of_a_model_with_a_linear_head(engine: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = Head(bias).double()
    H, G, E = flat(model, functools.partial(F.cross_entropy, target=Y))
    arguments = (model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, Y)])
    cases = [
        (HessianLinearOperator, H),
        (GGNLinearOperator, G),
        (EFLinearOperator, E),
        (functools.partial(FisherLinearOperator, mc_samples=0), G),
    ]
    for make, expected in cases[: 4 if engine == "autograd" else 3]:
        for cache in ("auto", 0):
            A = make(*arguments, engine=engine, cache=cache, columns=2)
            x = torch.eye(A.shape[0], dtype=torch.float64)
            close(A @ x, expected, rtol=1e-10, atol=1e-12)
            for _ in range(2):  # the second product would show that the first one had overwritten a kept tensor
                close(A @ x[0], expected[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_sampled_fisher_is_the_mean_of_outer_products(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Head(bias=True).double()
    arguments = (model, nn.CrossEntropyLoss(), dict(model.named_parameters()), [(X, Y)])
    A = FisherLinearOperator(*arguments, mc_samples=samples, rng=0)
    chunked = A @ np.eye(A.shape[0])
    monkeypatch.setattr(cross_entropy, "_CPU_ENTRIES", 2**20)
    B = FisherLinearOperator(*arguments, mc_samples=samples, rng=0)
    np.testing.assert_allclose(chunked, B @ np.eye(A.shape[0]), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(chunked, chunked.T, rtol=1e-12, atol=1e-15)
    assert np.linalg.eigvalsh(chunked).min() > -1e-14


def test_vectors_that_are_tangents_of_the_logits_are_not_overwritten() -> None:
    w = nn.Parameter(logits("matrix"))
    y = targets(w, "classes")

    def own_logits(params: dict[str, Tensor], X: Tensor) -> Tensor:
        return params["w"]

    M = hessian(functools.partial(F.cross_entropy, target=y))(w.detach()).view(36, 36)
    for make in (GGNLinearOperator, HessianLinearOperator):
        A = make(own_logits, nn.CrossEntropyLoss(), {"w": w}, [(torch.zeros(9), y)])
        x = torch.linspace(0, 1, 36, dtype=torch.float64)
        kept = x.clone()
        for _ in range(2):
            close(A @ x, M @ x)
            close(A @ torch.stack([x, x.sin()], 1), M @ torch.stack([x, x.sin()], 1))
        close(x, kept, rtol=0, atol=0)


PEAKS = """
import sys, numpy as np, torch
from torch import nn
from curvop import EFLinearOperator, FisherLinearOperator, GGNLinearOperator, HessianLinearOperator
from curvop.kernels.memory import peak_rise

class Head(nn.Linear):
    def forward(self, x):
        return super().forward(x).transpose(1, 2)

torch.manual_seed(0)
model = Head(8, 20_000, bias=False)
data = [(torch.randn(2, 256, 8), torch.randint(0, 20_000, (2, 256)))]
arguments = (model, nn.CrossEntropyLoss(), dict(model.named_parameters()), data)
sampled = lambda *args, **kwargs: FisherLinearOperator(*args, **kwargs, mc_samples=1)
for name, make in {"Hessian": HessianLinearOperator, "GGN": GGNLinearOperator, "EF": EFLinearOperator,
                   "sampled": sampled}.items():
    for cache in (0, np.inf):
        A = make(*arguments, dtype=np.float32, cache=cache)
        x = np.ones(A.shape[1], np.float32)
        A @ x
        rise = peak_rise(lambda: A @ x, torch.device("cpu"))
        print(name, cache, -1 if rise is None else (A._engine.kept()[0] + rise) / (4 * 512 * 20_000))
        del A
"""


def test_products_need_two_tensors_of_the_size_of_the_logits() -> None:
    # With this setting, glibc returns freed memory at once, so that the peak is exact.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAKS], env=environment, capture_output=True, text=True, check=True)
    peaks = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()}
    if -1 in peaks.values():
        pytest.skip("the peak of memory is not known on this system")
    # A chunk takes 0.1 of the logits, and a chunk in which classes are drawn takes 0.5.
    goals = {"Hessian": 3.3, "GGN": 2.3, "EF": 2.4, "sampled": 2.8}
    assert len(peaks) == 8
    assert all(peak <= goals[name.split()[0]] for name, peak in peaks.items()), peaks


@pytest.mark.parametrize("turned", [False, True])
def test_a_hook_that_reads_the_gradient_of_the_logits(turned: bool) -> None:
    """The retained vector, at which the backward pass is differentiated, must then stay zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
        X, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    params = dict(model.named_parameters())

    def scores(params: dict[str, Tensor], X: Tensor, clipped: bool) -> Tensor:
        z = torch.func.functional_call(model, params, (X,))
        if clipped:
            z.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return z.view(1, 6, 3).transpose(1, 2) if turned else z

    products = []
    for clipped in (True, False):
        data = [(X, y[None] if turned else y)]
        G = GGNLinearOperator(functools.partial(scores, clipped=clipped), nn.CrossEntropyLoss(), params, data)
        products.append(G @ (1e-3 * np.ones(15)))
    np.testing.assert_allclose(*products, rtol=1e-12)
