"""What the kernels raise when a product cannot be trusted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = [
    "NonDeterministicObjectiveError",
    "NonFiniteProductError",
    "arrays_explained",
    "first_line",
    "not_finite",
]


class NonFiniteProductError(ArithmeticError):
    """A product holds NaN or infinity; the message names the batch and the parameter where it arose.

    Krylov solvers do not look: ``cg`` runs to ``maxiter`` on NaN, PROPACK returns zeros. So the product itself refuses.
    """


class NonDeterministicObjectiveError(RuntimeError):
    """The loss of the same data at the same parameters changed between two passes.

    The usual causes are dropout or batch normalisation in training mode, and random augmentation in the data.
    """


def not_finite(what: str, index: int, loss: float, where: str) -> str:
    """Say in which batch a product, a gradient or a diagonal is not finite, and where in it."""
    return (
        f"the {what} is not finite at batch {index} in {where} (the loss of that batch is {loss:.6g}): look there for "
        "NaN"
    )


def first_line(error: Exception) -> str:
    """Return the kind of an error and the beginning of its message, for a report."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


@contextlib.contextmanager
def arrays_explained(batch: Any) -> Iterator[None]:
    """Raise a TypeError with the remedy if the user's code fails on a batch that holds NumPy arrays.

    Code that converts arrays itself may run. Other errors, such as a lack of memory, keep their type.
    """
    try:
        yield
    except Exception as error:
        array = isinstance(error, TypeError | AttributeError) or "numpy" in str(error)
        if array and (where := _first_array("the batch", batch)) is not None:
            raise TypeError(
                f"{where} is a NumPy array, and the model or the loss fails with it: let data yield tensors, such as "
                f"torch.from_numpy(array) (the error was {type(error).__name__}: {error})"
            ) from error
        raise


def _first_array(where: str, tree: Any) -> str | None:
    """Return where in a tree the first NumPy array is."""
    if any((kind.__module__, kind.__name__) == ("numpy", "ndarray") for kind in type(tree).__mro__):
        return where
    parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    found = (_first_array(f"{where}[{key!r}]", part) for key, part in parts)
    return next((one for one in found if one is not None), None)
