"""The model, its gradients, buffers, flags and all global state are as found, whatever goes wrong, wherever it does.

Fuses are laid in every layer, forward and backward, in the loss and in the loader. A first run counts how often they
are passed; then a product is made for each time, in which the fuse blows at that moment.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import seeded, slow
from torch import Tensor, nn

from curvop import (
    EFLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
    check,
)
from curvop.kernels.generators import Generators

KINDS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
    "jacobian": JacobianLinearOperator,
}

pytestmark = pytest.mark.filterwarnings("ignore:'1' .BatchNorm1d. normalises each of the 2 batches:RuntimeWarning")


class Fuse:
    """Counts how often it is passed, and blows the one time that it is told to."""

    def __init__(self) -> None:
        self.passed, self.blows_at, self.error = 0, -1, KeyboardInterrupt

    def set(self, blows_at: int, error: Any = KeyboardInterrupt) -> None:
        self.passed, self.blows_at, self.error = 0, blows_at, error

    def __call__(self) -> None:
        self.passed += 1
        if self.passed == self.blows_at:
            raise self.error("the fuse has blown")


class Fused(nn.Module):
    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def forward(self, X: Tensor) -> Tensor:
        self.fuse()
        if X.requires_grad:
            X = X.clone()
            X.register_hook(lambda gradient: self.fuse())
        return X


class Loader:
    """Draws random numbers, as loaders do."""

    def __init__(self, batches: list[Any], fuse: Fuse) -> None:
        self.batches, self.fuse = batches, fuse

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            torch.rand(3)
            self.fuse()
            yield batch
        self.fuse()


@seeded
def made(kind: str, fuse: Fuse, options: dict[str, Any]) -> tuple[nn.Module, list[Any], Any]:
    """Return a model, its batches, and an operator; half in training mode, with gradients, and a layer frozen."""
    model = nn.Sequential(
        nn.Linear(3, 4),
        nn.BatchNorm1d(4),
        Fused(fuse),
        nn.Tanh(),
        nn.Linear(4, 4),
        Fused(fuse),
        nn.Dropout(),
        nn.Linear(4, 2),
    )
    model[6].eval()
    model[4].requires_grad_(False)
    for index, value in enumerate(model.parameters()):
        value.grad = torch.full_like(value, index) if index % 2 and value.requires_grad else None
    data = [(torch.randn(size, 3), torch.randn(size, 2)) for size in (4, 3)]

    def loss_function(prediction: Tensor, y: Tensor) -> Tensor:
        fuse()
        return ((prediction - y) ** 2).mean()

    params = {name: value for name, value in model.named_parameters() if value.requires_grad}
    given = (
        (model, params, Loader(data, fuse))
        if kind == "jacobian"
        else (model, loss_function, params, Loader(data, fuse))
    )
    return model, data, KINDS[kind](*given, **options)


def state(model: nn.Module, data: list[Any]) -> list[Any]:
    """Return all that may not change, with copies of what could be written to."""
    tensors = [*model.parameters(), *model.buffers(), *(part for pair in data for part in pair)]
    gradients = [value.grad for value in model.parameters()]
    backends = torch.backends.cuda, torch.backends.mha
    return [
        [id(tensor) for tensor in tensors],
        [tensor.tolist() for tensor in tensors],
        [(tensor.requires_grad, tensor.grad_fn) for tensor in tensors],
        [None if gradient is None else (id(gradient), gradient.tolist()) for gradient in gradients],
        [part.training for part in model.modules()],
        [[(name, id(value)) for name, value in vars(part).items()] for part in model.modules()],
        [[len(value) for value in vars(part).values() if isinstance(value, dict | list)] for part in model.modules()],
        torch.get_rng_state().tolist(),
        [torch.cuda.get_rng_state(device).tolist() for device in range(torch.cuda.device_count())],
        [getattr(backends[0], f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "cudnn", "math")],
        (backends[1].get_fastpath_enabled(), torch.backends.cudnn.enabled),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._len_torch_function_stack()),
    ]


def probe(A: Any) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((A.shape[1], 2))


def moments(kind: str, options: dict[str, Any], run: Any) -> range:
    """Return how often the fuse is passed while ``run(A)`` runs, counted from 1."""
    fuse = Fuse()
    _, _, A = made(kind, fuse, options)
    fuse.set(-1)
    run(A)
    return range(1, fuse.passed + 1)


def twice(A: Any) -> None:
    A @ probe(A)
    A @ probe(A)


def expected(kind: str) -> np.ndarray:
    _, _, A = made(kind, Fuse(), {})
    return A @ probe(A)


def writing(model: nn.Module) -> None:
    """Let a model write to its batch and to a buffer."""

    def write(model: nn.Module, args: tuple[Tensor]) -> None:
        args[0].add_(1.0)
        model.calls.add_(1.0)

    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(write)


@pytest.mark.parametrize("cache", ["auto", 0])
@pytest.mark.parametrize("kind", KINDS)
def test_wherever_a_product_is_interrupted(kind: str, cache: Any) -> None:
    exact, found = expected(kind), moments(kind, {"cache": cache}, twice)
    assert len(found) > 15
    for moment in found:
        fuse = Fuse()
        model, data, A = made(kind, fuse, {"cache": cache})
        before = state(model, data)
        fuse.set(moment)
        with pytest.raises(KeyboardInterrupt):
            twice(A)
        assert state(model, data) == before
        fuse.set(-1)
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)
        assert state(model, data) == before


OWN = ("kernels/generators.py", "kernels/differentiable.py")
MODES = ("torch/overrides.py",)
GUARD = ("kernels/guard.py",)


@contextlib.contextmanager
def interrupted_at(moment: int, files: tuple[str, ...]) -> Iterator[list[int]]:
    """Interrupt at a line of these files; count the lines."""
    lines = [0]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            lines[0] += 1
            if lines[0] == moment:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("files", "change"),
    [(OWN, None), (MODES, None), (GUARD, None), (GUARD, writing)],
    ids=["random numbers and backends", "modes of functions", "swapping parameters", "undoing writes"],
)
def test_wherever_a_line_is_interrupted(files: tuple[str, ...], change: Any) -> None:
    def fresh() -> tuple[nn.Module, list[Any], Any]:
        model, data, A = made("hessian", Fuse(), {})
        if change is not None:
            change(model)
        return model, data, A

    _, _, A = fresh()
    with interrupted_at(-1, files) as lines:
        exact = A @ probe(A)
    assert lines[0] > 100
    for moment in range(1, lines[0] + 1, max(1, lines[0] // 200)):
        model, data, A = fresh()
        before = state(model, data)
        with pytest.raises(KeyboardInterrupt), interrupted_at(moment, files):
            A @ probe(A)
        assert state(model, data) == before
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)
        assert state(model, data) == before


def test_random_numbers_of_every_gpu(monkeypatch) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    states = {first: torch.tensor([1]), second: torch.tensor([2])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", states.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    generators, outside = Generators(), dict(states)
    for number, devices in enumerate([{first, second}, {second}, {torch.device("cpu"), first}]):
        with contextlib.suppress(KeyboardInterrupt), generators.private(devices):
            assert number == 0 or states[first] == outside[first]  # what they drew is forgotten where they are left
            assert number != 1 or states[second] == 12
            states.update({device: state + 10 for device, state in states.items() if device in devices})
            raise KeyboardInterrupt
        assert states == outside


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_raised_or_overcome(kind: str) -> None:
    exact = expected(kind)
    for moment in moments(kind, {}, twice):
        fuse = Fuse()
        model, data, A = made(kind, fuse, {})
        before = state(model, data)
        fuse.set(moment, RuntimeError)
        with contextlib.suppress(RuntimeError):
            twice(A)
        assert state(model, data) == before
        fuse.set(-1)
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("what", ["gradient_and_loss", "check", "fingerprint"])
def test_besides_products(what: str) -> None:
    def run(A: Any) -> object:
        return check(A, rng=0) if what == "check" else getattr(A, what)()

    exact = expected("hessian")
    for moment in moments("hessian", {}, run):
        fuse = Fuse()
        model, data, A = made("hessian", fuse, {})
        before = state(model, data)
        fuse.set(moment)
        with pytest.raises(KeyboardInterrupt):
            run(A)
        assert state(model, data) == before
        fuse.set(-1)
        np.testing.assert_allclose(A @ probe(A), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("moment", [1, *slow(2, 4), 12])
def test_the_compiled_engine(moment: int) -> None:
    fuse = Fuse()
    model, data, A = made("hessian", fuse, {"engine": "compiled"})
    before = state(model, data)
    fuse.set(moment)
    with pytest.raises(KeyboardInterrupt):
        A @ probe(A)
    assert state(model, data) == before
    fuse.set(-1)
    np.testing.assert_allclose(A @ probe(A), expected("hessian"), rtol=1e-9, atol=1e-12)
    assert state(model, data) == before
