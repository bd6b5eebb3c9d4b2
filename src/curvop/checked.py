"""Arguments that many functions have, checked alike."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["generator", "real_number", "whole_number"]


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


def generator(rng: Any) -> np.random.Generator:
    """Return the source of random numbers that `rng` stands for, as ``numpy.random.default_rng`` does."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        raise TypeError(
            f"rng is {rng!r}, but must be a whole number from 0 on, a numpy.random.Generator, or None"
        ) from None
