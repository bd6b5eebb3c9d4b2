"""Norms whose squares neither underflow nor overflow: a matrix may be of any scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["column_norms", "dots_of", "norm", "norm_of", "norms_of", "unit_of"]

Array = NDArray[Any]

# What can be squared, and so can sums of very many squares.
_SQUARABLE = {torch.float32: (1e-14, 1e14), torch.float64: (1e-140, 1e140)}
_SECTION = 4096


def unit_of(array: Array) -> int:
    """Return the exponent of the power of two just above the largest magnitude; 0 of zeros.

    ``numpy.ldexp(array, -unit)`` is the array in units of it, without any rounding.
    """
    return int(np.frexp(max(array.max(initial=0.0), -array.min(initial=0.0)))[1])


def column_norms(columns: Array) -> Array:
    """Return the norms ``(K,)`` of columns ``(N, K)``."""
    unit = unit_of(columns)
    scaled = np.ldexp(columns, -unit)
    norms: Array = np.ldexp(np.sqrt(np.einsum("ij,ij->j", scaled, scaled)), unit)
    return norms


def norm(array: Array) -> float:
    """Return the root of the sum of the squares of all entries."""
    return float(column_norms(array.reshape(-1, 1))[0])


def norm_of(vector: Tensor) -> float:
    """Return that of a tensor ``(N,)``; see `norms_of`."""
    return float(norms_of(vector[None])[0])


def norms_of(rows: Tensor) -> Array:
    """Return those ``(K,)`` of the rows of a tensor ``(K, N)``, summed as `dots_of` does."""
    found: Array = np.sqrt(dots_of(rows, rows).cpu().numpy())
    low, high = _SQUARABLE[rows.dtype]
    for row in np.flatnonzero(~((low < found) & (found < high))) if rows.shape[1] else ():
        largest = float(rows[row].abs().max())
        if largest == 0 or not np.isfinite(largest):
            found[row] = largest
        else:
            scaled = rows[row : row + 1] / largest
            found[row] = largest * float(dots_of(scaled, scaled)) ** 0.5
    return found


def dots_of(rows: Tensor, others: Tensor) -> Tensor:
    """Return the products ``(K,)`` of the rows of two tensors ``(K, N)``, in float64 and on their device.

    Sections are summed in double precision: of many numbers in single precision five digits would be right, and to
    make all of them double would take longer than to read them four times.
    """
    if rows.shape[1] <= _SECTION:
        return torch.bmm(rows[:, None], others[:, None].mT)[:, 0, 0].double()
    whole = rows.shape[1] // _SECTION * _SECTION
    sums = []
    for start, stop, length in ((0, whole, _SECTION), (whole, rows.shape[1], rows.shape[1] - whole)):
        if start < stop:
            one, two = (part[:, start:stop].reshape(-1, 1, length) for part in (rows, others))
            sums.append(torch.bmm(one, two.mT).reshape(len(rows), -1))  # strides that MKL takes ten times faster
    return torch.cat([*sums, rows.new_zeros(len(rows), 1)], 1).sum(1, dtype=torch.float64)
