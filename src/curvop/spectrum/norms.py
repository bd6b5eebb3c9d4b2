"""Norms of arrays and tensors without underflow or overflow, and accurate inner products of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["binary_exponent", "column_norms", "inner_products", "norm", "row_dots", "row_norms", "tensor_norm"]

Array = NDArray[Any]

# Norms in this range are computed without scaling, because sums of squares neither underflow nor overflow.
_SAFE_NORMS = {torch.float32: (1e-14, 1e14), torch.float64: (1e-140, 1e140)}
# Number of products that are summed in the precision of the tensors: by `row_dots`, and by `inner_products` on the CPU.
_SECTION, _LONG_SECTION = 4096, 16384


def binary_exponent(array: Array) -> int:
    """Return the smallest integer e such that all entries are less than ``2**e`` in magnitude.

    The result is 0 if all entries are zero. ``numpy.ldexp(array, -e)`` scales the array without rounding errors.
    """
    return int(np.frexp(max(array.max(initial=0.0), -array.min(initial=0.0)))[1])


def column_norms(columns: Array) -> Array:
    """Return the Euclidean norms of the columns of an array ``(N, K)``, as an array ``(K,)``."""
    exponent = binary_exponent(columns)
    scaled = np.ldexp(columns, -exponent)
    norms: Array = np.ldexp(np.sqrt(np.einsum("ij,ij->j", scaled, scaled)), exponent)
    return norms


def norm(array: Array) -> float:
    """Return the Frobenius norm of an array."""
    return float(column_norms(array.reshape(-1, 1))[0])


def tensor_norm(vector: Tensor) -> float:
    """Return the Euclidean norm of a tensor ``(N,)``."""
    return float(row_norms(vector[None])[0])


def row_norms(rows: Tensor) -> Array:
    """Return the Euclidean norms of the rows of a tensor ``(K, N)``, as an array ``(K,)``.

    The squares are summed by `row_dots`. Rows with a very small or very large norm are scaled first.
    """
    norms: Array = np.sqrt(row_dots(rows, rows).cpu().numpy())
    low, high = _SAFE_NORMS[rows.dtype]
    for row in np.flatnonzero(~((low < norms) & (norms < high))) if rows.shape[1] else ():
        largest = float(rows[row].abs().max())
        if largest == 0 or not np.isfinite(largest):
            norms[row] = largest
        else:
            scaled = rows[row : row + 1] / largest
            norms[row] = largest * float(row_dots(scaled, scaled)) ** 0.5
    return norms


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products of corresponding rows of two tensors ``(K, N)``, as a float64 tensor ``(K,)``.

    Sections of 4,096 entries are summed in the precision of the tensors, and the sums of the sections are added in
    double precision. A single float32 sum over a long row would have only five correct digits. A conversion of all
    entries to float64 would take as long as reading the tensors four times.
    """
    size = left.shape[1]
    if size <= _SECTION:
        return torch.bmm(left[:, None], right[:, None].mT)[:, 0, 0].double()
    whole = size // _SECTION * _SECTION
    sums = []
    for start, stop, length in ((0, whole, _SECTION), (whole, size, size - whole)):
        if start < stop:
            left_part, right_part = (rows[:, start:stop].reshape(-1, 1, length) for rows in (left, right))
            product = torch.bmm(left_part, right_part.mT)  # with this memory layout, MKL is ten times faster
            sums.append(product.reshape(len(left), -1))
    return torch.cat([*sums, left.new_zeros(len(left), 1)], 1).sum(1, dtype=torch.float64)


def inner_products(bases: Tensor, vectors: Tensor) -> Tensor:
    """Return the inner products of each row of ``bases[i]`` with each column of ``vectors[i]``.

    The CPU sums sequentially. Therefore, long vectors are split into sections whose sums are added in float64.
    Otherwise, rounding errors would grow in every step of a Lanczos process if the matrix has large eigenvalues. A GPU
    sums in a tree and needs no sections.

    Parameters
    ----------
    bases : Tensor, shape (K, m, N)
    vectors : Tensor, shape (K, N, b)

    Returns
    -------
    Tensor, shape (K, m, b)
        The inner products, in the dtype of `vectors`.
    """
    size = bases.shape[2]
    section = _LONG_SECTION if bases.device.type == "cpu" else size
    total = torch.zeros(*bases.shape[:2], vectors.shape[2], dtype=torch.float64, device=bases.device)
    for start in range(0, size, section):
        entries = slice(start, start + section)
        total += torch.bmm(bases[:, :, entries], vectors[:, entries])
    return total.to(vectors.dtype)
