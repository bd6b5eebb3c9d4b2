"""Validation of common arguments, and checks of the available memory."""

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
    "integer",
    "named_keywords",
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


# Unknown keyword arguments of the constructors.

P = ParamSpec("P")
T = TypeVar("T")

#: Maps keywords of curvlinops' constructors to the keywords of this package that have the same meaning.
_RENAMED = {
    "model_func": "model",
    "loss_func": "loss_function",
    "progressbar": "progress",
    "batch_size_fn": "batch_weight",
    "seed": "rng",
    "fisher_type": "fisher",
    "kfac_approx": "sharing",
    "separate_weight_and_bias": "joint_bias",
}

#: What to say in addition about a keyword in `_RENAMED`.
_HINTS = {
    "batch_size_fn": ", a function of the whole batch; the losses of torch.nn need none",
    "separate_weight_and_bias": ", which has the opposite meaning",
}

_FISHER = "use FisherLinearOperator(..., mc_samples=, rng=) for a matrix with sampled targets"

#: Advice for each keyword of curvlinops that has no equivalent in this package.
_NOT_NEEDED = {
    "batch_size_fn": "leave it out: nothing is weighted here",
    "num_data": "leave it out: batches are weighted by the loss's own divisor",
    "num_per_example_loss_terms": "leave it out: batches are weighted by the loss's own divisor",
    "check_deterministic": "leave it out: products check this at no extra cost, and curvop.check(A) checks more",
    "block_sizes": "use A.block(names) for one block, or A.blocks() for the blocks of all parameters",
    "fisher_type": "use GGNLinearOperator, EFLinearOperator or FisherLinearOperator",
    "mc_samples": _FISHER,
    "seed": _FISHER,
}


def named_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a constructor so that wrong arguments raise helpful errors. The signature is unchanged.

    If an argument is wrong, the error message names the class that the user called. Python's own message would name the
    class that defines ``__init__``, which may be a base class. For an unknown keyword, the message suggests the most
    similar keyword. For a keyword of curvlinops, the message explains what to use instead.
    """
    signature = inspect.signature(function)
    known = [name for name in signature.parameters if name not in ("self", "cls")]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                raise TypeError(
                    f"{_callee(function, args[0])} got an unexpected keyword argument {name!r}: {_remedy(name, known)}"
                )
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{_callee(function, args[0])}: {error}; pass {', '.join(known)}") from None
        return function(*args, **kwargs)

    return checked


def _callee(function: Callable[..., Any], owner: Any) -> str:
    """Return the name of the class or class method that the user called."""
    return f"{owner.__name__}.{function.__name__}" if isinstance(owner, type) else type(owner).__name__


def _remedy(name: str, known: list[str]) -> str:
    if _RENAMED.get(name) in known:
        return f"pass {_RENAMED[name]}={_HINTS.get(name, '')}"
    if name in _NOT_NEEDED:
        return _NOT_NEEDED[name]
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}=?"
    return f"known are {', '.join(known)}"


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
