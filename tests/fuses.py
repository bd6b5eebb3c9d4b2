"""Fuses in layers, losses and loaders that blow at a chosen moment, and the state that a product must leave."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from cases import APPROXIMATIONS, seeded
from torch import Tensor, nn

from curvop import (
    EFLinearOperator,
    GGNLinearOperator,
    GradientCovarianceLinearOperator,
    HessianLinearOperator,
    JacobianLinearOperator,
)

KINDS = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "ef": EFLinearOperator,
    "covariance": GradientCovarianceLinearOperator,
    "jacobian": JacobianLinearOperator,
    **APPROXIMATIONS,
}


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
    if kind == "ekfac":  # it needs the gradient of each data item
        model[1].eval()
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


@contextlib.contextmanager
def interrupted_at(moment: int, files: tuple[str, ...], functions: frozenset[str] = frozenset()) -> Iterator[list[int]]:
    """Interrupt at a line of these files, within these functions if there are any; count the lines."""
    lines = [0]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files) or (functions and frame.f_code.co_name not in functions):
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
