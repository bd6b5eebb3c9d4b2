"""Damped linear solves and their preconditioners."""

from curvop.solvers.linear_solve import SolveResult, solve
from curvop.solvers.preconditioners import NystromPreconditioner, jacobi, kfac, nystrom

__all__ = ["NystromPreconditioner", "SolveResult", "jacobi", "kfac", "nystrom", "solve"]


def __dir__() -> list[str]:
    """Return the list of public names for tab completion."""
    return __all__
