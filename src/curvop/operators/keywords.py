"""Keyword arguments that a constructor does not have, and what to write instead."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["named_keywords"]

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
