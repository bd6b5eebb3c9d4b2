"""Norms whose squares neither underflow nor overflow: a matrix may be of any scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["column_norms", "norm", "norm_of", "unit_of"]

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
    """Return that of a tensor ``(N,)``.

    Sections are summed in double precision: of many numbers in single precision five digits would be right, and to
    make all of them double would take longer than to read them four times.
    """
    found = _sectioned(vector)
    low, high = _SQUARABLE[vector.dtype]
    if low < found < high or not vector.numel():
        return found
    largest = float(vector.abs().max())
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * _sectioned(vector / largest)


def _sectioned(vector: Tensor) -> float:
    whole = vector.numel() // _SECTION * _SECTION
    sections = torch.linalg.vector_norm(vector[:whole].reshape(-1, _SECTION), dim=1)
    rest = torch.linalg.vector_norm(vector[whole:])
    return float(torch.linalg.vector_norm(torch.cat([sections, rest[None]]), dtype=torch.float64))
