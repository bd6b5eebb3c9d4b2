"""Arguments that many functions have, checked alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator, aslinearoperator

__all__ = ["random_generator", "real_number", "real_operator", "whole_number"]


def whole_number(name: str, value: Any, least: int) -> int:
    """Return `value` where it is a whole number from `least` on; raise a ValueError where it is not."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {value!r}, but must be a whole number from {least} on")
    return int(value)


def real_number(name: str, value: Any) -> float:
    """Return `value` as a float where it is one real number, a tensor's too; raise a TypeError where it is not."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{name} is a {type(value).__name__}, but must be a real number")


def random_generator(rng: Any) -> np.random.Generator:
    """Return the source of random numbers that `rng` stands for, as ``numpy.random.default_rng`` does."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise TypeError(
            f"rng is {rng!r}, but must be a whole number from 0 on, a numpy.random.Generator, or None"
        ) from None


def real_operator(A: Any) -> LinearOperator:
    """Return `A`, an operator or a matrix, as a ``LinearOperator``; raise a TypeError where it is none, or complex."""
    try:
        A = aslinearoperator(A)
    except TypeError:
        raise TypeError(f"A is a {type(A).__name__}: pass a LinearOperator, or a matrix") from None
    if A.dtype is not None and not np.can_cast(A.dtype, np.float64, "same_kind"):
        raise TypeError(
            f"A has dtype {A.dtype}, but must be real: view a complex matrix as a real one of twice the size"
        )
    return A
