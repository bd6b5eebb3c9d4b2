"""What the benchmarks judge by: double backward without anything of this package, and medians of interleaved runs."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["double_backward", "exact", "finish", "flops", "medians", "on_device_ms"]

QUICK = 20.0
"""Milliseconds below which caches matter."""


def double_backward(
    problem: dict[str, Any], rows: Sequence[str] | None, cols: Sequence[str] | None, vectors: Sequence[Tensor]
) -> Tensor:
    """Return the block of the Hessian times each of the vectors, ``(K, M)``; `rows` and `cols` None for all."""
    params = dict(problem["model"].named_parameters())
    left = [params[name] for name in rows or problem["params"]]
    right = [params[name] for name in cols or problem["params"]]
    seeds = [
        [part.view_as(param) for part, param in zip(parts(vector, right), right, strict=True)] for vector in vectors
    ]
    total = torch.zeros(len(vectors), sum(param.numel() for param in left), dtype=left[0].dtype, device=left[0].device)
    examples = sum(len(X) for X, _ in problem["data"])
    for X, y in problem["data"]:
        loss = problem["loss_function"](problem["model"](X), y)
        gradient = torch.autograd.grad(loss, right, create_graph=True)
        for index, seed in enumerate(seeds):
            kept = index + 1 < len(seeds)
            product = torch.autograd.grad(gradient, left, seed, retain_graph=kept, materialize_grads=True)
            torch._foreach_add_(
                list(parts(total[index], left)), [p.reshape(-1) for p in product], alpha=len(X) / examples
            )
            del product
        del gradient, loss
    return total


def parts(vector: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor]:
    return vector.split([param.numel() for param in params])


def exact(
    problem: dict[str, Any],
    vectors: np.ndarray,
    rows: Sequence[str] | None = None,
    cols: Sequence[str] | None = None,
    matrix: str = "Hessian",
) -> np.ndarray:
    """Return the block times ``(N,)`` or ``(N, K)`` `vectors`, all in float64; of other matrices, the whole."""
    double = problem | {
        "model": copy.deepcopy(problem["model"]).double(),
        "data": [tuple(map(as_double, batch)) for batch in problem["data"]],
    }
    columns = torch.from_numpy(np.array(vectors.T, np.float64, ndmin=2, order="C"))
    columns = columns.to(next(double["model"].parameters()).device)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        if matrix in ("Gauss-Newton", "empirical Fisher"):
            products = torch.stack([through_predictions(double, vector, matrix) for vector in columns])
        else:
            products = double_backward(double, rows, cols, list(columns))
    products = products.numpy(force=True)
    return products[0] if vectors.ndim == 1 else products.T


def through_predictions(problem: dict[str, Any], vector: Tensor, matrix: str) -> Tensor:
    """Return one product of the Gauss-Newton or the empirical Fisher matrix, in forward and reverse mode."""
    params = {name: value.detach() for name, value in problem["model"].named_parameters()}
    tangents = dict(zip(params, parts(vector, list(params.values())), strict=True))
    tangents = {name: part.view_as(params[name]) for name, part in tangents.items()}
    total, examples = torch.zeros_like(vector), sum(len(X) for X, _ in problem["data"])
    for X, y in problem["data"]:

        def predict(params: dict[str, Tensor], X: Tensor = X) -> Tensor:
            return torch.func.functional_call(problem["model"], params, (X,))

        def loss(z: Tensor, y: Tensor = y) -> Tensor:
            return problem["loss_function"](z, y)

        z, tangent = torch.func.jvp(predict, (params,), (tangents,))
        if matrix == "Gauss-Newton":
            leaf = z.detach().requires_grad_()
            [residual] = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
            [inner] = torch.autograd.grad(residual, leaf, tangent)
        else:  # of cross-entropy, over positions; of a squared error, over rows, divided by all entries
            residual = torch.func.grad(loss)(z)
            inner = residual * (residual * tangent).sum(1, keepdim=True) * y.numel()
        [product] = torch.func.vjp(predict, params)[1](inner)
        total += len(X) / examples * torch.cat([part.reshape(-1) for part in product.values()])
    return total


def as_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def medians(*functions: Callable[[], object], repeats: int, warm: int = 2, fair: bool = False) -> list[float]:
    """Time functions in turns; return the median milliseconds of each. The first `warm` turns do not count.

    Where `fair`, every turn has an order of its own, and what is quick is called once more right before it is timed:
    or else each is charged for the caches that the one before it leaves behind, which differ by the neighbour.
    """
    times: list[list[float]] = [[] for _ in functions]
    order, shuffle = list(range(len(functions))), random.Random(0).shuffle
    for repeat in range(repeats + warm):
        if fair:
            shuffle(order)
        for index in order:
            if fair and times[index] and times[index][-1] < QUICK:
                functions[index]()
            finish()
            start = time.perf_counter()
            functions[index]()
            finish()
            if repeat >= warm:
                times[index].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def flops(multiply: Callable[[Any], object], vectors: Any) -> int:
    """Count the floating-point operations of a product, once it has linearized."""
    multiply(vectors)
    with FlopCounterMode(display=False) as counter:
        multiply(vectors)
    return counter.get_total_flops()


def finish() -> None:
    """Wait for a GPU to have done what it was asked to."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def on_device_ms(function: Callable[[], object], repeats: int) -> float:
    """Return the milliseconds that a GPU takes for one of several calls, by its own clock."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(repeats):
        function()
    ended.record()
    finish()
    return float(begun.elapsed_time(ended)) / repeats
