"""Arguments that many functions have, checked alike."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvop.kernels.memory import free_bytes

__all__ = [
    "available_bytes",
    "check_fits",
    "named_keywords",
    "random_generator",
    "real_number",
    "real_operator",
    "whole_number",
]


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


# Keyword arguments that a constructor does not have, and what to write instead.

P = ParamSpec("P")
T = TypeVar("T")

#: Keywords of curvlinops' constructors, and those that replace them.
_RENAMED = {
    "model_func": "model",
    "loss_func": "loss_function",
    "progressbar": "progress",
    "batch_size_fn": "batch_weight",
    "seed": "rng",
}

_FISHER = "use FisherLinearOperator(..., mc_samples=, rng=) for a matrix of sampled targets"

#: What to do about keywords that nothing replaces.
_NOT_NEEDED = {
    "batch_size_fn": "leave it out: nothing is weighted here",
    "num_data": "leave it out: batches are weighted by the loss's own divisor",
    "num_per_example_loss_terms": "leave it out: batches are weighted by the loss's own divisor",
    "check_deterministic": "leave it out: products check it at no extra cost, and curvop.check(A) looks for more",
    "block_sizes": "take A.block(names) for one block, A.blocks() for that of each parameter",
    "fisher_type": "use GGNLinearOperator, EFLinearOperator or FisherLinearOperator",
    "mc_samples": _FISHER,
    "seed": _FISHER,
}


def named_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a constructor, so that a wrong argument raises a TypeError that names the class which the user wrote.

    Python names the class that defines ``__init__``, and neither the nearest keyword nor what replaces one of
    curvlinops. The signature stays.
    """
    signature = inspect.signature(function)
    known = [name for name in signature.parameters if name not in ("self", "cls")]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{_called(function, args[0])} got an unexpected keyword argument {name!r}: {_remedy(name, known)}"
                )
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_called(function, args[0])}: {error}; pass {', '.join(known)}") from None
        return function(*args, **kwargs)

    return checked


def _called(function: Callable[..., Any], owner: Any) -> str:
    """Return what the user called: a class, or its class method."""
    return f"{owner.__name__}.{function.__name__}" if isinstance(owner, type) else type(owner).__name__


def _remedy(name: str, known: list[str]) -> str:
    if _RENAMED.get(name) in known:
        whole = ", a function of the whole batch; the losses of torch.nn need none" if name == "batch_size_fn" else ""
        return f"pass {_RENAMED[name]}={whole}"
    if name in _NOT_NEEDED:
        return _NOT_NEEDED[name]
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}=?"
    return f"known are {', '.join(known)}"


# Memory that a study needs, counted before it runs.


def available_bytes(device: torch.device | None = None, memory: float | None = None) -> int:
    """Return `memory`, or half of what is free on `device`, the host by default: what a study may take unasked."""
    if memory is not None:
        return int(real_number("memory", memory))
    return free_bytes(device or torch.device("cpu")) // 2


def check_fits(needed: int, available: int, what: str, remedy: str, adjustable: bool = True) -> None:
    """Raise a `MemoryError` with both numbers where `what` does not fit; `adjustable`: by an argument ``memory=``."""
    if needed > available:
        more = ", or pass memory= in bytes if there is more" if adjustable else ""
        raise MemoryError(
            f"{what} takes {needed / 1e9:.3g} GB, but {available / 1e9:.3g} GB may be used: {remedy}{more}"
        )
