"""Preconditioners for damped linear solves."""

from curvop.solvers.preconditioners import NystromPreconditioner, jacobi, nystrom

__all__ = ["NystromPreconditioner", "jacobi", "nystrom"]
