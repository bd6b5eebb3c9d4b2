"""Exceptions for products that cannot be trusted, and helpers for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "NonDeterministicObjectiveError",
    "NonFiniteProductError",
    "NotFactorableError",
    "UnknownNameError",
    "explain_arrays",
    "first_line",
    "not_finite",
]


class NonFiniteProductError(ArithmeticError):
    """Raised if a product contains NaN or infinity.

    The message names the first batch and the first parameter at which NaN or infinity occurs. SciPy's Krylov solvers do
    not check products for NaN: ``cg`` continues until ``maxiter``, and PROPACK returns zeros.

    See Also
    --------
    curvop.check : Check a model, a loss and data before a long computation.
    NonDeterministicObjectiveError
    """


class NonDeterministicObjectiveError(RuntimeError):
    """Raised if the loss of the same data at the same parameters changes between two passes.

    The usual causes are dropout or batch normalization in training mode (call ``model.eval()``), random augmentation of
    the data, and shuffling with ``drop_last=True``.

    See Also
    --------
    curvop.check : Check a model, a loss and data before a long computation.
    NonFiniteProductError
    """


class NotFactorableError(ValueError):
    """Raised by ``A.gram()`` and by products with the factor S if A is not of the form ``S.T @ S``.

    Examples are Hessians, and Gauss-Newton matrices of losses that are not convex in the prediction.
    """


class UnknownNameError(KeyError, ValueError):
    """Raised if a name selects no parameter of an operator.

    It is a ``KeyError``, because parameters are selected by name, and a ``ValueError``, because earlier versions raised
    one.
    """

    def __str__(self) -> str:
        """Return the message without the quotes that ``KeyError`` adds."""
        return str(self.args[0])


def not_finite(what: str, index: int, loss: float, where: str) -> str:
    """Return the message of a `NonFiniteProductError` for a product, a gradient, a loss or a diagonal."""
    return (
        f"the {what} is not finite at batch {index} in {where} (the loss of that batch is {loss:.6g}): look there for "
        "NaN"
    )


def first_line(error: Exception) -> str:
    """Return the class name of an error, followed by at most 200 characters of the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def explain_arrays(error: Exception, batch: Any) -> None:
    """If `batch` contains a NumPy array that may have caused `error`, raise a TypeError that suggests a remedy.

    Call this function if the user's code has failed. Code that converts arrays to tensors does not fail.
    """
    array = isinstance(error, TypeError | AttributeError) or "numpy" in str(error)
    if array and (where := _first_array("the batch", batch)) is not None:
        raise TypeError(
            f"{where} is a NumPy array, and the model or the loss fails with it: make data yield tensors, such as "
            f"torch.from_numpy(array) (the error was {type(error).__name__}: {error})"
        ) from error


def _first_array(where: str, tree: Any) -> str | None:
    """Return the path to the first NumPy array in a tree (``the batch[0]``, for example), or None if there is none."""
    if any((kind.__module__, kind.__name__) == ("numpy", "ndarray") for kind in type(tree).__mro__):
        return where
    parts = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    paths = (_first_array(f"{where}[{key!r}]", part) for key, part in parts)
    return next((path for path in paths if path is not None), None)
