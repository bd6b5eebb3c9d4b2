"""What the kernels raise when a product cannot be trusted."""

from __future__ import annotations

__all__ = ["NonDeterministicObjectiveError", "NonFiniteProductError", "not_finite"]


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
