"""What the soak is about: small models at two points each, their dense matrices, and faults in the user's code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from models import Transformer
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvop

__all__ = ["INJECTED", "MATRICES", "Case", "Fault", "World", "modules", "references"]

MATRICES = {
    "hessian": curvop.HessianLinearOperator,
    "ggn": curvop.GGNLinearOperator,
    "ef": curvop.EFLinearOperator,
    "jacobian": curvop.JacobianLinearOperator,
}
SIZES = 20, 13, 7  # of the batches
INJECTED = {"loader raises": OSError, "interrupt": KeyboardInterrupt, "out of memory": torch.OutOfMemoryError}


class Rows(nn.Module):
    """An image as a sequence of its rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 8, 8)


class Mean(nn.Module):
    """The mean over a sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def modules() -> dict[str, nn.Module]:
    """Smooth ones: at a kink, float32 and float64 are on different sides."""
    return {
        "MLP": nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)),
        "CNN": nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10)),
        ),
        "attention": nn.Sequential(Rows(), Transformer(8, 2), Mean(), nn.Linear(8, 10)),
    }


def references(module: nn.Module, X: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Return all matrices in float64, in forward mode, from their definitions."""
    params = {name: value.detach().double() for name, value in module.named_parameters()}
    flat = torch.cat([value.flatten() for value in params.values()])

    def predict(vector: Tensor) -> Tensor:
        parts = vector.split([value.numel() for value in params.values()])
        own = {name: part.view_as(params[name]) for name, part in zip(params, parts, strict=True)}
        return functional_call(module, own, (X.double(),))

    def columns(function: Any) -> Tensor:
        multiply = vmap(lambda tangent: jvp(function, (flat,), (tangent,))[1], chunk_size=32)
        return multiply(torch.eye(len(flat), dtype=torch.float64)).detach().movedim(0, -1)

    with sdpa_kernel(SDPBackend.MATH):
        J, scores = columns(predict), predict(flat).detach()
        H = columns(grad(lambda vector: F.cross_entropy(predict(vector), y)))
    each = hessian(lambda z: F.cross_entropy(z, y, reduction="sum"))(scores).sum(2)  # examples know nothing of others
    slopes = grad(lambda z: F.cross_entropy(z, y, reduction="sum"))(scores)
    G = torch.einsum("nc,ncp->np", slopes, J)
    ggn = torch.einsum("ncp,ncd,ndq->pq", J, each, J) / len(y)
    found = {"hessian": H, "ggn": ggn, "ef": G.T @ G / len(y), "jacobian": J.flatten(0, 1)}
    return {name: matrix.numpy() for name, matrix in found.items()}


class Fault:
    """What is about to happen, if anything, after so many calls; not a setting of the model that it befalls."""

    def __init__(self, kind: str = "", wait: int = 0) -> None:
        self.kind, self.wait, self.struck = kind, wait, 0

    def strike(self) -> None:
        """Raise it where its time has come, once."""
        self.wait -= 1
        if self.wait < 0:
            self.struck += 1
            kind, self.kind = self.kind, ""
            raise INJECTED[kind](f"soak: {kind}")


class World(nn.Module):
    """A model with its data, at one of two points, and its fault."""

    def __init__(self, name: str, dtype: torch.dtype, points: list[dict[str, Tensor]], X: Tensor, y: Tensor) -> None:
        super().__init__()
        self.name, self.points, self.at = name, points, 0
        self.inner = modules()[name].to(dtype)
        self.batches = list(zip(X.to(dtype).split(SIZES), y.split(SIZES), strict=True))
        self.fault = Fault()
        self.move(0)

    def move(self, point: int) -> None:
        """Write to the parameters in place."""
        self.at = point
        with torch.no_grad():
            for name, value in self.inner.named_parameters():
                value.copy_(self.points[point][name])

    def forward(self, X: Tensor) -> Tensor:
        """Predict, unless something happens."""
        if self.fault.kind in ("interrupt", "out of memory"):
            self.fault.strike()
        prediction = self.inner(X)
        if self.fault.kind == "random loss":
            self.fault.struck += 1
            prediction = prediction * (1 + torch.rand(()))
        return prediction


class Loader:
    """Reads a world's data, which a fault may befall."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __len__(self) -> int:
        return len(self.world.batches)

    def __iter__(self) -> Iterator[Any]:
        fault = self.world.fault
        for index, (X, y) in enumerate(self.world.batches):
            if fault.kind == "loader raises":
                fault.strike()
            if fault.kind == "NaN" and index == fault.wait % len(self):
                fault.struck += 1
                X = X.clone()
                X[0, 5] = torch.nan
            yield X, y


class Case:
    """An operator, and what it is to be."""

    def __init__(self, world: World, matrix: str, dtype: Any, cache: Any, dense: Any) -> None:
        loss = () if matrix == "jacobian" else (nn.CrossEntropyLoss(),)
        params = dict(world.named_parameters())
        self.A = MATRICES[matrix](world, *loss, params, Loader(world), dtype=dtype, cache=cache)
        self.world, self.matrix, self._dense = world, matrix, dense
        double = next(world.inner.parameters()).dtype == torch.float64 and dtype == np.float64
        self.precision = "float64" if double else "float32"
        self.label = f"{world.name} {matrix} {self.precision}"

    @property
    def dense(self) -> np.ndarray:
        """The matrix at the point where the world is now."""
        return self._dense[self.world.name, self.world.at][self.matrix]
