r"""Derivatives of the cross-entropy, computed for a few rows of the logits at a time.

With a large vocabulary, the logits are the largest tensor of a model. The functions in this module therefore use only
one buffer of the size of the logits. They divide the rows of the logits into chunks, and compute all intermediate
values for one chunk at a time. A chunk fits into the cache of a processor, so this also saves time.

For a row `z` of the logits, let :math:`p` be the softmax of `z`. Let `s` be the sum of the targets of this row, which
are one-hot vectors :math:`e_y`, smoothed one-hot vectors or probabilities, multiplied by the class weights and divided
by the divisor of the loss. The derivatives of the loss are

.. math:: r = s\,p - T, \qquad M w = s\,(p \circ w - p\,\langle p, w \rangle).

In this module, the classes are on the last axis of all tensors, and the tensors of row weights have the shape of the
logits, with 1 in place of the number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvop.kernels.differentiable import backward_only

__all__ = ["SoftmaxHessian", "chunks", "draw_classes", "hard_residual", "is_small", "outer_product"]

# Number of entries in a chunk. On a CPU, a chunk of 4 MB fits into the cache. On a GPU, smaller chunks would not occupy
# all processors.
_CPU_ENTRIES, _GPU_ENTRIES = 2**20, 2**24
# Derivatives with fewer entries are computed without chunks. They take less than 0.1 milliseconds, so that the time of
# Python code matters.
_FEW_ENTRIES = 2**18


def is_small(w: Tensor) -> bool:
    """Return True if a product with `w` is faster without chunks, and without conversions to a higher precision."""
    return w.numel() < _FEW_ENTRIES and w.dtype == _wide(w.dtype)


def chunks(tensor: Tensor) -> Iterator[Any]:
    """Yield indices that divide all axes of a tensor but the last one into chunks.

    A tensor of a subclass, such as a tensor that a compiler traces, is one chunk.
    """
    entries = _CPU_ENTRIES if tensor.device.type == "cpu" else _GPU_ENTRIES
    yield from _chunks(tensor.shape, math.inf if type(tensor) is not Tensor else entries)


def _chunks(shape: Sequence[int], entries: float) -> Iterator[tuple[int | slice, ...]]:
    size = math.prod(shape)
    if len(shape) < 2 or size <= entries:
        yield ()
        return
    row = size // shape[0]
    if row <= entries or len(shape) == 2:
        step = max(1, int(entries // row))
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)
        return
    for index in range(shape[0]):
        for rest in _chunks(shape[1:], entries):
            yield index, *rest


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of `dtype` are combined: at least single precision."""
    return torch.promote_types(dtype, torch.float32)


def _results(out: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Yield ``(at, result)`` for each chunk of `out`.

    Here `at` are the indices of the chunk, and `result` is a tensor for its entries, at least in single precision. When
    the next chunk is requested, the entries have been written to `out`.
    """
    wide = _wide(out.dtype)
    for at in chunks(out):
        own = out[at]
        result = own if own.dtype == wide else torch.empty_like(own, dtype=wide)
        yield at, result
        if result is not own:
            own.copy_(result)


class SoftmaxHessian:
    """The second derivative of the cross-entropy, the linear map ``w -> s (p * w - p (p . w))`` of each row.

    Parameters
    ----------
    z : Tensor, shape (..., C)
        The logits.
    weights : Tensor, shape (..., 1)
        The row weights `s`.
    out : Tensor, shape (..., C), optional
        Memory for the attribute `p`.

    Attributes
    ----------
    p : Tensor, shape (..., C)
        The softmax of the logits.
    """

    def __init__(self, z: Tensor, weights: Tensor, out: Tensor | None = None) -> None:
        z = z.detach()
        self.p, self.weights = torch.empty_like(z) if out is None else out, weights
        for at in chunks(z):
            self.p[at] = z[at].softmax(-1, _wide(z.dtype))

    def product(self, w: Tensor) -> Tensor:
        """Return the product with a small tensor `w`. It may have an additional first dimension."""
        product = self.p * w
        return product.addcmul_(self.p, product.sum(-1, keepdim=True), value=-1).mul_(self.weights)

    def multiply(self, w: Tensor, out: Tensor) -> None:
        """Write the product with `w` into `out`, which may be `w` itself. Both have the shape of the logits."""
        for at, product in _results(out):
            p = self.p[at].to(product.dtype)
            torch.mul(p, w[at], out=product)
            inner = product.sum(-1, keepdim=True)
            product.addcmul_(p, inner, value=-1).mul_(self.weights[at])


def hard_residual(z: Tensor, index: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``s (p - e_y)``, the derivative of the cross-entropy if the targets are classes.

    The result can be differentiated any number of times with respect to `z`, unless `out` is given.

    Parameters
    ----------
    z : Tensor, shape (..., C)
        The logits.
    index : Tensor of int64, shape (..., 1)
        The classes `y`.
    weights : Tensor, shape (..., 1)
        The row weights `s`.
    out : Tensor, shape (..., C), optional
        Memory for the result.
    """
    if out is not None:
        _write_residual(z.detach(), index, weights, out)
        return out
    if z.numel() >= _FEW_ENTRIES and backward_only(z):
        return _Residual.apply(z, index, weights)  # type: ignore[no-any-return,no-untyped-call]
    weights = weights.to(z.dtype)
    residual = z.softmax(-1) * weights
    with torch.no_grad():  # the targets do not depend on the logits, so the graph needs no one-hot matrix
        return residual.scatter_add_(-1, index, -weights)


class _Residual(torch.autograd.Function):
    """The function `hard_residual`, which saves its result only.

    If the seed of a backward pass is the residual, the last layer of the model saves the residual, too. The derivative
    of the residual would also need the softmax. It is computed from the residual, and from the entries of the softmax
    at the targets. All other entries of the residual are equal to those of ``s p``.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        residual = torch.empty_like(z)
        targets = _write_residual(z, index, weights, residual)
        ctx.save_for_backward(residual, index, weights, targets)
        return residual

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        residual, index, weights, targets = ctx.saved_tensors
        inverse = torch.where(weights == 0, 0, 1 / weights)
        if torch.is_grad_enabled():  # the derivative is differentiated again
            scaled = residual.scatter_add(-1, index, weights.to(residual.dtype))
            return _general(scaled, inverse, grad), None, None
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            return _general(residual.scatter(-1, index, targets.to(residual.dtype)), inverse, grad), None, None
        out = torch.empty_like(grad)
        for at, product in _results(out):
            own, seed, place = residual[at].to(product.dtype), grad[at].to(product.dtype), index[at]
            torch.mul(own, seed, out=product)
            seed = seed.gather(-1, place)
            product.scatter_(-1, place, targets[at] * seed)
            inner = product.sum(-1, keepdim=True).mul_(inverse[at])
            product.addcmul_(own, inner, value=-1).scatter_(-1, place, targets[at] * (seed - inner))
        return out, None, None


def _write_residual(z: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """Write ``s (p - e_y)`` into `out`, and return the entries of ``s p`` at the targets `y`."""
    targets = torch.empty_like(weights)
    for at in chunks(z):
        p = z[at].softmax(-1, _wide(z.dtype)).mul_(weights[at])
        targets[at] = p.gather(-1, index[at])
        out[at] = p.scatter_add_(-1, index[at], -weights[at])
    return targets


def _general(scaled: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    """Return ``s (p * w - p (p . w))`` for the tensors ``s p``, ``1 / s`` and ``w``."""
    product = scaled * grad
    return product - scaled * (product.sum(-1, keepdim=True) * inverse.to(grad.dtype))


def draw_classes(z: Tensor, noise: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``s (p - e_c)`` with a class `c` drawn from `p` for each row.

    Parameters
    ----------
    z : Tensor, shape (..., C)
        The logits.
    noise : Tensor of float64, shape (..., 1)
        Random numbers between 0 and 1, which determine the classes.
    weights : Tensor, shape (..., 1)
        The row weights `s`.
    out : Tensor, shape (..., C), optional
        Memory for the result.
    """
    residual = torch.empty(z.shape, dtype=z.dtype, device=z.device) if out is None else out
    for at in chunks(z):
        # Use double precision. In a lower precision many classes would have the same cumulative probability as the
        # class before, and would never be drawn.
        cumulative = z[at].softmax(-1, torch.float64).cumsum(-1)
        drawn = (cumulative < noise[at]).sum(-1, keepdim=True).clamp(max=z.shape[-1] - 1)
        p = z[at].softmax(-1, _wide(z.dtype)).mul_(weights[at])
        residual[at] = p.scatter_add_(-1, drawn, -weights[at].to(p.dtype))
    return residual


def outer_product(factors: Sequence[Tensor], weight: Tensor | float, w: Tensor, out: Tensor) -> None:
    """Write the sum of ``weight * r (r . w)`` over several tensors `r` into `out`, which may be `w` itself.

    Parameters
    ----------
    factors : sequence of Tensor, shape (n, m)
        The tensors `r`. The inner products are computed for each of the n rows.
    weight : Tensor or float
        A number.
    w, out : Tensor, shape (n, m)
    """
    for at, product in _results(out):
        own = w[at].to(product.dtype)
        inner = [(factor[at] * own).sum(-1, keepdim=True) * weight for factor in factors]
        torch.mul(factors[0][at], inner[0], out=product)
        for factor, number in zip(factors[1:], inner[1:], strict=True):
            product.addcmul_(factor[at], number)
