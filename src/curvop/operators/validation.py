"""Validation of common arguments, and checks of the available memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvop.kernels.memory import free_bytes

__all__ = [
    "available_bytes",
    "check_fits",
    "integer",
    "random_generator",
    "real_operator",
    "real_scalar",
]


def integer(name: str, value: Any, least: int) -> int:
    """Convert ``value`` to an int. Raise a ``ValueError`` if it is not an integer >= ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be an integer >= {least}")
    return int(value)


def real_scalar(name: str, value: Any) -> float:
    """Convert a number or a tensor with one element to a float. Raise a ``TypeError`` for other values."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} is a {type(value).__name__}, but must be a real number")


def random_generator(rng: Any) -> np.random.Generator:
    """Return ``numpy.random.default_rng(rng)``. Raise a ``TypeError`` if ``rng`` is invalid."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise TypeError(f"rng is {rng!r}, but must be an integer >= 0, a numpy.random.Generator, or None") from None


def real_operator(A: Any) -> LinearOperator:
    """Convert a real operator or matrix to a ``LinearOperator``. Raise a ``TypeError`` for other values."""
    try:
        A = aslinearoperator(A)
    except TypeError:
        raise TypeError(f"A is a {type(A).__name__}: pass a LinearOperator, or a matrix") from None
    if A.dtype is not None and not np.can_cast(A.dtype, np.float64, "same_kind"):
        raise TypeError(
            f"A has dtype {A.dtype}, but must be real: view a complex matrix as a real one of twice the size"
        )
    return A


# Memory checks.


def available_bytes(device: torch.device | None = None, memory: float | None = None) -> int:
    """Convert ``memory``, a number of bytes, to an int. If it is None, return half of the free memory of ``device``.

    If ``device`` is None, the CPU is used.
    """
    if memory is not None:
        return int(real_scalar("memory", memory))
    return free_bytes(device or torch.device("cpu")) // 2


def check_fits(needed: int, available: int, what: str, remedy: str, adjustable: bool = True) -> None:
    """Raise a ``MemoryError`` if ``needed`` exceeds ``available`` bytes.

    If ``adjustable`` is True, the message advises the user to pass ``memory`` to the calling function.
    """
    if needed > available:
        more = ", or pass memory= (in bytes) if more memory is available" if adjustable else ""
        raise MemoryError(
            f"{what} takes {needed / 1e9:.3g} GB, but {available / 1e9:.3g} GB may be used: {remedy}{more}"
        )
