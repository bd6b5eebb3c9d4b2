"""Norms whose squares neither underflow nor overflow: a matrix may be of any scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["column_norms", "norm", "norm_of", "norms_of", "unit_of"]

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
    """Return those ``(K,)`` of the rows of a tensor ``(K, N)``.

    Sections are summed in double precision: of many numbers in single precision five digits would be right, and to
    make all of them double would take longer than to read them four times.
    """
    found = _sectioned(rows)
    low, high = _SQUARABLE[rows.dtype]
    for row in np.flatnonzero(~((low < found) & (found < high))) if rows.shape[1] else ():
        largest = float(rows[row].abs().max())
        scaled = largest == 0 or not np.isfinite(largest)
        found[row] = largest if scaled else largest * _sectioned(rows[row : row + 1] / largest)[0]
    return found


def _sectioned(rows: Tensor) -> Array:
    whole = rows.shape[1] // _SECTION * _SECTION
    sections = torch.linalg.vector_norm(rows[:, :whole].reshape(len(rows), -1, _SECTION), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    norms = torch.linalg.vector_norm(torch.cat([sections, rest], 1), dim=1, dtype=torch.float64)
    return np.asarray(norms.cpu())
